"""A loaded engine that is called like a function, whatever its runtime: checks what it is given, then runs it.

    runner = open_runner(folder, manifest)
    logits = runner(image=batch)["logits"]

`enginery.load` opens one after it has checked digests, trust and host; nothing here checks those. See docs/serving.md.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Protocol

import numpy as np

from tasks.engines.device_arrays import DeviceArray
from tasks.engines.profiles import Profile, nearest, not_admitted
from tasks.errors import BackendError, CallError

if TYPE_CHECKING:
    from typing_extensions import Self

    from artifacts.manifest import Compatibility, FallbackFacts, Manifest

Array = np.ndarray[Any, np.dtype[Any]]

_CHOICES: Final = 4096
_WHERE: Final = "this call"
# What an input may be given as, besides its own type, without a change of any value that fits: TensorRT 8.6 has no int64,
# and numpy no bfloat16.
_ALSO: Final = {"int32": ("int64",), "int64": ("int32",), "bfloat16": ("float32",)}
_TENSORRT_KINDS: Final = {"int32": "INT32", "int64": "INT64", "bfloat16": "BF16"}


@dataclass(frozen=True)
class TensorSpec:
    """One input or output: element type by name, and sizes or names of dynamic axes (None: not known)."""

    dtype: str
    shape: tuple[int | str | None, ...] | None


class Execution(Protocol):
    """What runs a plan on feeds that were checked: `tasks.engines.trt_run`, `.ort_run`, `.torch_run`, `.paddle_run`."""

    inputs: dict[str, str]
    outputs: list[str]
    types: dict[str, str]
    profiles: list[Profile]

    @property
    def device(self) -> str:
        """Where it runs: "cpu", "cuda:0"."""

    @property
    def warnings(self) -> list[str]:
        """What the runtime warned of so far."""

    def adopt(self, value: object, where: str) -> Any:
        """Return a view of what lies on this engine's device, None for what numpy reads. Raises CallError."""

    def run(
        self, feeds: Mapping[str, Any], profile: int, out: Mapping[str, Any], where: str = _WHERE
    ) -> dict[str, Any]:
        """Run once; done when it returns. Raises BackendError, CallError."""

    def make_current(self) -> None:
        """Let the calling thread use it, whatever device that thread used last."""

    def close(self) -> None:
        """Free everything."""


class Runner:
    """A loaded engine: `engine(image=array)` gives `{"logits": array}`.

    `inputs` and `outputs` say what it takes and gives, `profiles` which shapes, `device` where it runs, `manifest` all that
    is known of it. May be called from any thread; calls of one engine run one after another. A context manager closes it.
    """

    def __init__(self, execution: Execution, manifest: Manifest) -> None:
        self.manifest: Final = manifest
        self.device: Final = execution.device
        self.inputs: Final[Mapping[str, TensorSpec]] = _specs(execution.inputs, execution, manifest)
        self.outputs: Final[Mapping[str, TensorSpec]] = _specs(execution.outputs, execution, manifest)
        self.profiles: Final[Sequence[Profile]] = tuple(execution.profiles)
        self._execution: Execution | None = execution
        self._dtypes = {
            name: np.dtype(spec.dtype)
            for name, spec in (*self.inputs.items(), *self.outputs.items())
            if spec.dtype != "bfloat16"
        }
        self._chosen: dict[tuple[Any, ...], int] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __getitem__(self, part: str) -> Runner:
        """Return one part of an engine that has several. Raises CallError for what it has not."""
        raise CallError(f"the engine {self.manifest.identity} has no parts, so no {part!r}: call it itself")

    def __repr__(self) -> str:
        return f"<engine {self.manifest.identity} on {self.device}{' (closed)' if self.closed else ''}>"

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._execution is None

    @property
    def warnings(self) -> tuple[str, ...]:
        """What the runtime warned of so far."""
        return tuple(self._use().warnings)

    def __call__(
        self,
        inputs: Mapping[str, Any] | None = None,
        /,
        *,
        profile: str | None = None,
        out: Mapping[str, Any] | None = None,
        **named: Any,
    ) -> dict[str, Any]:
        """Run once and return every output by name, in the engine's order; everything is done on return.

        Inputs are C-contiguous (others are copied) numpy arrays, or arrays on the engine's GPU that speak DLPack or
        `__cuda_array_interface__` and are not copied to the host; they have the engine's element type, or one whose values
        are converted exactly (int64 for int32 where they fit) or as the plan would (float32 for bfloat16). `out` has arrays
        that outputs are written to, on the host or on the GPU; other outputs are new numpy arrays, bfloat16 as float32.
        `profile` names the one to use, else the nearest that admits the shapes is. Inputs whose names are no Python names,
        or are `profile` or `out`, go into `inputs`.

        Raises CallError, naming what is expected, for names, types, shapes and a closed engine; BackendError by its kind
        ("out of memory", "crash", ...) for what happens on the device.
        """
        given = named if inputs is None else {**inputs, **named}
        with self._lock:
            execution = self._use()
            feeds = self._feeds(given, execution)
            shapes = tuple(feed.shape for feed in feeds.values())
            index = self._chosen.get((profile, shapes))
            if index is None:
                index = self._choose(profile, {name: feed.shape for name, feed in feeds.items()}, shapes)
            if not out:
                return execution.run(feeds, index, {})
            found = execution.run(feeds, index, self._targets(out, execution))
            return {name: out.get(name, values) for name, values in found.items()}

    def prepare(self, shapes: Mapping[str, Sequence[int]], *, profile: str | None = None, calls: int = 6) -> None:
        """Run zeros of these shapes, `calls` times: by then buffers are there and, on a GPU, the CUDA graph is captured."""
        unknown = sorted(set(shapes) ^ set(self.inputs))
        if unknown:
            raise CallError(
                f"shapes are needed for {', '.join(self.inputs)}, and for nothing else (wrong: {', '.join(unknown)})"
            )
        zeros = {
            name: np.zeros(tuple(shapes[name]), self._dtypes.get(name, np.dtype(np.float32))) for name in self.inputs
        }
        for _ in range(calls):
            self(zeros, profile=profile)

    def profile_for(self, shapes: Mapping[str, Sequence[int]], profile: str | None = None) -> Profile:
        """Return the profile that a call at these shapes uses. Raises CallError where none admits them."""
        sizes = {name: tuple(shape) for name, shape in shapes.items()}
        return self.profiles[self._choose(profile, sizes, tuple(sizes[name] for name in self.inputs))]

    def close(self) -> None:
        """Free the engine and its memory; to call it afterwards is a CallError. Closing twice does nothing."""
        with self._lock:
            if self._execution is not None:
                self._execution.close()
                self._execution = None

    def _use(self) -> Execution:
        if self._execution is None:
            raise CallError(f"the engine {self.manifest.identity} is closed; load it again")
        self._execution.make_current()  # another thread, another engine or another library may have used the device since
        return self._execution

    def _feeds(self, given: Mapping[str, Any], execution: Execution) -> dict[str, Any]:
        if given.keys() != self.inputs.keys():
            raise self._wrong_names(given)
        return {name: self._feed(name, given[name], execution) for name in self.inputs}

    def _feed(self, name: str, value: Any, execution: Execution) -> Any:
        dtype = self._dtypes.get(name)
        if not isinstance(value, np.ndarray):
            adopted = execution.adopt(value, f"{_WHERE}: input {name}")
            if adopted is not None:
                return self._on_device(name, adopted)
            value = np.asarray(value)
        if value.dtype == dtype:
            return value if value.flags.c_contiguous else np.ascontiguousarray(value)
        return self._converted(name, value)

    def _converted(self, name: str, value: Array) -> Array:
        spec = self.inputs[name].dtype
        if value.dtype.name not in _ALSO.get(spec, ()):
            also = "".join(f", or {other}" for other in _ALSO.get(spec, ()))
            raise CallError(f"{_WHERE}: input {name} is {value.dtype.name}, the engine takes {spec}{also}")
        from tasks.engines.trt_types import as_type

        try:
            return as_type(value, _TENSORRT_KINDS[spec], f"{_WHERE}: input {name}")
        except BackendError as err:
            raise CallError(err.message) from err

    def _on_device(self, name: str, adopted: DeviceArray) -> DeviceArray:
        spec = (self.inputs.get(name) or self.outputs[name]).dtype
        if adopted.dtype != spec:
            raise CallError(
                f"{_WHERE}: {name} is {adopted.dtype} on the device, the engine has {spec}; convert it there"
            )
        if adopted.device is not None and f"cuda:{adopted.device}" != self.device:
            raise CallError(f"{_WHERE}: {name} lies on cuda:{adopted.device}, the engine runs on {self.device}")
        return adopted

    def _targets(self, out: Mapping[str, Any], execution: Execution) -> dict[str, Any]:
        unknown = sorted(set(out) - set(self.outputs))
        if unknown:
            raise CallError(f"{_WHERE}: no output {', '.join(unknown)} (the engine gives: {', '.join(self.outputs)})")
        return {name: self._target(name, value, execution) for name, value in out.items()}

    def _target(self, name: str, value: Any, execution: Execution) -> Any:
        if not isinstance(value, np.ndarray):
            adopted = execution.adopt(value, f"{_WHERE}: out {name}")
            if adopted is None:
                raise CallError(
                    f"{_WHERE}: out {name} is a {type(value).__name__}; give a numpy array, or one on the device"
                )
            return self._on_device(name, adopted)
        if value.dtype != self._dtypes.get(name) or not (value.flags.c_contiguous and value.flags.writeable):
            raise CallError(
                f"{_WHERE}: out {name} is {value.dtype.name}; a writable C-contiguous array of {self.outputs[name].dtype} is "
                "needed"
            )
        return value

    def _choose(self, profile: str | None, shapes: Mapping[str, tuple[int, ...]], key: tuple[Any, ...]) -> int:
        among = [one for one in self.profiles if profile is None or one.name == profile]
        if not among:
            names = ", ".join(one.name for one in self.profiles)
            raise CallError(f"{_WHERE}: no profile {profile!r} (the engine has: {names})")
        found = nearest(among, shapes)
        if found is None:
            raise CallError(not_admitted(among, shapes, _WHERE))
        if len(self._chosen) >= _CHOICES:
            self._chosen.clear()
        self._chosen[profile, key] = found.index
        return found.index

    def _wrong_names(self, given: Mapping[str, Any]) -> CallError:
        missing = [name for name in self.inputs if name not in given]
        unknown = [str(name) for name in given if name not in self.inputs]
        parts = [
            f"no input {', '.join(missing)}" if missing else "",
            f"unknown {', '.join(unknown)}" if unknown else "",
        ]
        return CallError(f"{_WHERE}: {'; '.join(filter(None, parts))} (the engine takes: {', '.join(self.inputs)})")


class PartedRunner(Runner):
    """A loaded engine of several parts, each of them a runner of its own: `engine["encoder"](image=array)`."""

    def __init__(self, parts: Mapping[str, Runner], manifest: Manifest) -> None:
        # Not the base's: there is no single execution, and so neither inputs nor outputs of the whole.
        self.parts: Final = dict(parts)
        self.manifest = manifest  # type: ignore[misc]
        self.device = next(iter(parts.values())).device  # type: ignore[misc]
        self.inputs, self.outputs, self.profiles = {}, {}, ()  # type: ignore[misc]
        self._lock = threading.Lock()

    def __getitem__(self, part: str) -> Runner:
        """Return the part of this name. Raises CallError where there is none."""
        if part not in self.parts:
            raise CallError(
                f"the engine {self.manifest.identity} has no part {part!r} (it has: {', '.join(self.parts)})"
            )
        return self.parts[part]

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return all(part.closed for part in self.parts.values())

    @property
    def warnings(self) -> tuple[str, ...]:
        """What the runtime warned of so far, of every part."""
        return tuple(dict.fromkeys(text for part in self.parts.values() for text in part.warnings))

    def _use(self) -> Execution:
        first = next(iter(self.parts))
        raise CallError(
            f"the engine {self.manifest.identity} has the parts {', '.join(self.parts)}: call one of them, such as "
            f"engine[{first!r}](...)"
        )

    def _choose(self, profile: str | None, shapes: Mapping[str, tuple[int, ...]], key: tuple[Any, ...]) -> int:
        del profile, shapes, key
        self._use()
        return 0

    def close(self) -> None:
        """Free every part."""
        for part in self.parts.values():
            part.close()


def open_runner(
    plan: Path | bytes,
    manifest: Manifest,
    *,
    device: int | None = None,
    graphs: bool = True,
    threads: int | None = None,
    host_code: bool = False,
    plugins: Sequence[Path] = (),
    cache: Path | None = None,
) -> Runner:
    """Load a plan whose bytes were checked against its manifest, in this process.

    `plan` is a file where it has external data beside it. `device` is the index of a CUDA device (None: the first of the
    manifest's compute capability), `graphs` replays shapes that come back as CUDA graphs, `threads` bounds the threads of
    ONNX Runtime, PyTorch or Paddle, `host_code` lets a version-compatible plan bring code for the host, `plugins` are libraries of the engine
    that were checked too, `cache` is a folder that a fallback's providers may write to. Raises BackendError: "no device", "version mismatch", "missing package", "missing plugin",
    "out of memory", "bad data".
    """
    runtime = manifest.compatibility.runtime
    if runtime == "onnxruntime":
        from tasks.engines.ort_run import OrtRunner

        if manifest.fallback is None:
            return Runner(OrtRunner(plan, _profiles(manifest), threads=threads), manifest)
        providers = _providers(manifest.fallback, cache, device)
        return Runner(OrtRunner(plan, _profiles(manifest), threads=threads, providers=providers), manifest)
    if manifest.fallback is not None:
        from tasks.engines.saved_run import Saved, open_saved

        facts = manifest.fallback.saved[""]
        inputs = {name: manifest.inputs[name].dtype for name in facts.inputs}
        outputs = {name: manifest.outputs[name].dtype for name in facts.outputs}
        saved = Saved(plan, facts.form, inputs, outputs, _profiles(manifest), threads=threads, device=device)
        execution: Execution = open_saved(runtime, saved)
        return Runner(execution, manifest)
    from tasks.engines.trt_run import PlanRunner, load_runtime

    trt = load_runtime(runtime)
    execution = PlanRunner(
        plan,
        None,
        device=_device(manifest.compatibility, device),
        host_code=host_code,
        graphs=graphs,
        plugins=plugins,
        dla_core=manifest.compatibility.dla_core,
        names=[profile.name for profile in manifest.profiles],
        trt=trt,
    )
    return Runner(execution, manifest)


def _providers(fallback: FallbackFacts, cache: Path | None, device: int | None) -> list[tuple[str, dict[str, str]]]:
    """Return a fallback's providers with their options; without a folder to write to, nothing is kept."""
    found = []
    for provider in fallback.providers.get("", ()):
        options = {
            name: value.replace("{cache}", str(cache))
            for name, value in provider.options.items()
            if cache is not None or "cache" not in name
        }
        chosen = {"device_id": str(device)} if device is not None and provider.name != "CPUExecutionProvider" else {}
        found.append((provider.name, {**options, **chosen}))
    return found


def merged_recipe(manifest: Manifest) -> dict[str, Any]:
    """Return the recipe that an engine was built from, as plain values; includes are merged, defaults are not filled in."""
    import yaml

    document: dict[str, Any] = yaml.safe_load(manifest.provenance.recipe_text) or {}
    return document


def brings_host_code(manifest: Manifest) -> bool:
    """Tell whether the recipe asked for a version-compatible plan, which holds code for the host: a runtime of its own."""
    needs, recipe = manifest.compatibility, merged_recipe(manifest)
    own = [
        target.get("build") or {}
        for target in recipe.get("targets", ())
        if target.get("runtime") == needs.runtime == "tensorrt" and set(target.get("gpus", ())) & set(needs.gpus)
    ]
    return any({**(recipe.get("build") or {}), **build}.get("version_compatible") for build in own)


def _device(needs: Compatibility, asked: int | None) -> int:
    """Return the index of the device to use: one as the engine was built on before any other of the compute capability.

    Raises BackendError("no device") where there is none.
    """
    from tasks.engines.cuda import device_count, device_properties

    found = {index: device_properties(index) for index in range(device_count())}
    fitting = [
        index for index, one in found.items() if one["compute_capability"] in needs.gpus and asked in (None, index)
    ]
    if fitting:
        built_on = needs.device.model_dump(exclude_none=True) if needs.device is not None else {}
        return max(fitting, key=lambda index: sum(found[index].get(name) == value for name, value in built_on.items()))
    here = ", ".join(f"cuda:{index} {one['name']} ({one['compute_capability']})" for index, one in found.items())
    gpus = " or ".join(needs.gpus)
    wanted = f"cuda:{asked}, which would have to be {gpus}" if asked is not None else gpus
    raise BackendError("no device", f"no {wanted} is here (found: {here or 'none'})", "choose another device or engine")


def _profiles(manifest: Manifest) -> list[Profile]:
    return [
        Profile(
            index,
            {name: [list(span.min), list(span.opt), list(span.max)] for name, span in profile.inputs.items()},
            profile.name,
        )
        for index, profile in enumerate(manifest.profiles)
    ]


def _specs(names: Sequence[str] | Mapping[str, str], execution: Execution, manifest: Manifest) -> dict[str, TensorSpec]:
    stated = {**manifest.inputs, **manifest.outputs}
    return {name: TensorSpec(execution.types[name], stated[name].shape if name in stated else None) for name in names}
