"""Run a TensorRT plan: numpy in, numpy out; buffers are kept, and the profile is chosen for the shapes that come.

A plan is executable code: it is handed to the runtime only after its digest was checked.
"""

from __future__ import annotations

import contextlib
import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np

from artifacts.refs import digest_bytes
from tasks.engines.cuda import Cuda, find_device
from tasks.engines.trt_log import Log
from tasks.engines.trt_plugins import load_plugins, plugin_files
from tasks.errors import BackendError
from tasks.stage import StageRequest

Array = np.ndarray[Any, np.dtype[Any]]

# numpy's type for each of TensorRT's, by name. numpy has no bfloat16: its bits travel as uint16.
_DTYPES: Final = {
    "FLOAT": np.float32,
    "HALF": np.float16,
    "BF16": np.uint16,
    "INT8": np.int8,
    "UINT8": np.uint8,
    "INT32": np.int32,
    "INT64": np.int64,
    "BOOL": np.bool_,
}
_CORNERS: Final = ("min", "opt", "max")
_CAPTURE_AFTER: Final = 2


@dataclass(frozen=True)
class Profile:
    """One optimisation profile of a plan: {input: [min, opt, max]}."""

    index: int
    ranges: Mapping[str, Sequence[Sequence[int]]]

    def admits(self, shapes: Mapping[str, Sequence[int]]) -> bool:
        """Tell whether every extent lies between min and max."""
        return all(
            len(shape) == len(self.ranges[name][0])
            and all(low <= extent <= high for low, extent, high in zip(least, shape, most, strict=True))
            for name, shape in shapes.items()
            for least, _opt, most in [self.ranges[name]]
        )

    def distance(self, shapes: Mapping[str, Sequence[int]]) -> float:
        """Say how far shapes are from what the profile was tuned for: the sum of |log(extent / opt)|."""
        pairs = [
            (extent, best)
            for name, shape in shapes.items()
            for extent, best in zip(shape, self.ranges[name][1], strict=True)
        ]
        return sum(abs(math.log(max(extent, 1) / max(best, 1))) for extent, best in pairs)


def choose_profile(profiles: Sequence[Profile], shapes: Mapping[str, Sequence[int]], where: str) -> Profile:
    """Return the profile tuned nearest to the shapes. Raises BackendError("bad profile") listing what is admitted."""
    fitting = [profile for profile in profiles if profile.admits(shapes)]
    if fitting:
        return min(fitting, key=lambda profile: (profile.distance(shapes), profile.index))
    admitted = "; ".join(
        f"profile {profile.index}: "
        + ", ".join(f"{name} {list(ranges[0])} to {list(ranges[2])}" for name, ranges in profile.ranges.items())
        for profile in profiles
    )
    asked = ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
    raise BackendError("bad profile", f"{where}: no profile of the plan admits {asked} ({admitted})", "widen a profile")


class PlanRunner:
    """A plan that was loaded and checked. Not safe to share between threads.

    `inputs` is {name: TensorRT's name of the type}, `outputs` the names in order, `profiles` what shapes it takes.
    """

    emulated: str | None = None  # as `tasks.verify` asks of what it runs: the device computes as the plan says

    def __init__(
        self,
        plan: Path,
        digest: str | None,
        *,
        device: int = 0,
        host_code: bool = False,
        graphs: bool = False,
        plugins: Sequence[Path] = (),
        dla_core: int | None = None,
        trt: Any = None,
    ) -> None:
        """Load `plan` on a device.

        `digest` is the SHA-256 that its manifest names; None only for a file that the caller has checked (the inputs of
        a stage are). `host_code` must be true for version-compatible plans, which bring code for the host. With `graphs`,
        a shape that comes back is replayed as a CUDA graph. `plugins` are libraries to load first, which the caller has
        checked; `dla_core` is the accelerator's core for a plan that was made for one. Raises BackendError: "bad data" for another digest,
        "version mismatch" where this TensorRT or GPU does not take the plan, "no device".
        """
        data = plan.read_bytes()
        if digest is not None and (found := digest_bytes(data)) != digest:
            raise BackendError(
                "bad data",
                f"{plan.name} has digest {found[:12]}, expected {digest[:12]}: it is not loaded",
                "fetch it again",
            )
        trt = trt or importlib.import_module("tensorrt")
        self._trt, self._log = trt, Log(lambda _fraction, _text: None)
        load_plugins(trt, plugins)
        self._cuda = Cuda(device)
        logger = self._log.for_runtime(trt)
        try:
            self._runtime = trt.Runtime(logger)
        except TypeError as err:  # "pybind11::init(): factory function returned nullptr"
            raise self._log.failure(f"TensorRT {trt.__version__} does not start", otherwise="no device") from err
        if host_code:
            self._runtime.engine_host_code_allowed = True
        if dla_core is not None:
            self._runtime.DLA_core = dla_core
        self._engine = self._runtime.deserialize_cuda_engine(data)
        if self._engine is None:
            raise self._log.failure(
                f"TensorRT {trt.__version__} does not load {plan.name}", otherwise="version mismatch"
            )
        engine = self._engine
        if getattr(engine, "streamable_weights_size", 0):  # built with weight streaming: as much as there is room for
            engine.weight_streaming_budget_v2 = engine.get_weight_streaming_automatic_budget()
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        is_input = {name: engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT for name in names}
        self._types = {name: engine.get_tensor_dtype(name).name for name in names}
        self.inputs = {name: self._types[name] for name in names if is_input[name]}
        self.outputs = [name for name in names if not is_input[name]]
        self.profiles = [
            Profile(
                index,
                {name: [list(shape) for shape in engine.get_tensor_profile_shape(name, index)] for name in self.inputs},
            )
            for index in range(engine.num_optimization_profiles)
        ]
        self._contexts: dict[int, _Context] = {}
        self._graphs = graphs

    @property
    def warnings(self) -> list[str]:
        """What TensorRT warned of so far."""
        return self._log.warnings

    def __call__(self, arrays: Mapping[str, Array], where: str = "this call") -> dict[str, Array]:
        """Run once and return every output by name; `where` names the run in errors.

        Inputs are cast between float widths, and from int64 to int32 where the values fit (8.6 has no int64). bfloat16
        outputs come back as float32. Raises BackendError: "bad data" for missing inputs or types that do not fit,
        "bad profile" for shapes, "out of memory", "crash".
        """
        missing = sorted(set(self.inputs) - set(arrays))
        if missing:
            raise BackendError("bad data", f"{where}: no input {', '.join(missing)}", "give every input of the plan")
        feeds = {name: as_type(arrays[name], kind, f"{where}, input {name}") for name, kind in self.inputs.items()}
        shapes = {name: feed.shape for name, feed in feeds.items()}
        profile = choose_profile(self.profiles, shapes, where)
        context = self._contexts.get(profile.index)
        if context is None:
            context = self._contexts[profile.index] = self._context(profile.index)
        found = context.run(feeds, where, graphs=self._graphs)
        return {name: _widened(values, self._types[name]) for name, values in found.items()}

    def close(self) -> None:
        """Free contexts, engine and memory."""
        self._contexts.clear()
        del self._engine, self._runtime
        self._cuda.close()

    def _context(self, profile: int) -> _Context:
        made = self._engine.create_execution_context()
        if made is None:
            raise self._log.failure(f"no execution context for profile {profile}", otherwise="out of memory")
        if self._engine.num_optimization_profiles > 1:
            if not made.set_optimization_profile_async(profile, self._cuda.stream):
                raise self._log.failure(f"profile {profile} cannot be used", otherwise="bad profile")
            self._cuda.synchronize()
        dtypes = {name: np.dtype(_DTYPES[kind]) for name, kind in self._types.items()}
        return _Context(self._trt, self._log, self._cuda, made, dtypes, tuple(self.outputs))


def runner_for(request: StageRequest) -> PlanRunner:
    """Return the runner of a stage's input "model.plan", which the stage's parent has checked.

    params: `gpu` (where given, the device must be of it), `version_compatible` and `dla_core`; inputs "plugin-*" are
    libraries.
    """
    gpu = request.params.get("gpu")
    device = find_device(gpu)["index"] if gpu is not None else 0
    host_code = bool(request.params.get("version_compatible"))
    return PlanRunner(
        request.inputs["model.plan"],
        None,
        device=device,
        host_code=host_code,
        plugins=plugin_files(request.inputs),
        dla_core=request.params.get("dla_core"),
    )


@dataclass
class _Context:
    """An execution context on one profile, with its buffers: a tensor's buffer grows to the largest it has held."""

    trt: Any
    log: Log
    cuda: Cuda
    context: Any
    dtypes: Mapping[str, np.dtype[Any]]
    outputs: tuple[str, ...]
    buffers: dict[str, tuple[int, int]] = field(default_factory=dict)  # name -> address, size in bytes
    hosts: dict[str, Array] = field(default_factory=dict)  # inputs that TensorRT reads on the host, kept alive
    allocators: dict[str, Any] = field(default_factory=dict)
    graphs: dict[tuple[Any, ...], Any] = field(default_factory=dict)  # shapes -> graph, or how often they came

    def run(self, feeds: Mapping[str, Array], where: str, *, graphs: bool) -> dict[str, Array]:
        """Copy in, run, copy out."""
        for name, feed in feeds.items():
            self._set_shape(name, feed, where)
        unknown = [name for name in self.outputs if -1 in tuple(self.context.get_tensor_shape(name))]
        for name in self.outputs:
            if name not in unknown:
                self._reserve(name, self._bytes(name, self.context.get_tensor_shape(name)))
            elif name not in self.allocators:
                # With room for the most there can be, so that growing is the exception.
                self._reserve(name, self.context.get_max_output_size(name))
                self.allocators[name] = _allocator(self.trt, self.cuda, *self.buffers[name])
                if not self.context.set_output_allocator(name, self.allocators[name]):
                    raise self.log.failure(f"TensorRT does not take an allocator for {name}")
        for name, feed in feeds.items():
            if name not in self.hosts:
                self.cuda.upload(self.buffers[name][0], feed)
        for name in unknown:
            self.allocators[name].shape = None
        key = tuple((name, feed.shape) for name, feed in feeds.items())
        self._launch(key, where, graph=graphs and not unknown and not self.hosts)
        found = {}
        for name in self.outputs:
            if name in unknown:
                address, shape = self.allocators[name].address, self.allocators[name].shape
                if shape is None:
                    raise self.log.failure(f"{where}: TensorRT does not tell the shape of output {name}")
            else:
                address, shape = self.buffers[name][0], tuple(self.context.get_tensor_shape(name))
            found[name] = np.empty(shape, self.dtypes[name])
            self.cuda.download(found[name], address)
        self.cuda.synchronize()
        return found

    def _launch(self, key: tuple[Any, ...], where: str, *, graph: bool) -> None:
        known = self.graphs.get(key, 0)
        if graph and not isinstance(known, int):
            self.cuda.launch(known)
            return
        # The first runs of a shape must not be captured: TensorRT may still allocate and load in them.
        if graph and known >= _CAPTURE_AFTER:
            self.cuda.begin_capture()
            try:
                self._enqueue(where)
            except BackendError:
                with contextlib.suppress(BackendError):  # leave the stream usable; the first error is the one to tell
                    self.cuda.end_capture()
                raise
            self.graphs[key] = self.cuda.end_capture()
            self.cuda.launch(self.graphs[key])
            return
        self._enqueue(where)
        self.graphs[key] = known + 1 if isinstance(known, int) else known

    def _enqueue(self, where: str) -> None:
        before = len(self.log.errors)
        if not self.context.execute_async_v3(self.cuda.stream) or self.log.errors[before:]:
            raise self.log.failure(f"{where}: TensorRT does not run the plan", since=before)

    def _set_shape(self, name: str, feed: Array, where: str) -> None:
        before = len(self.log.errors)
        if not self.context.set_input_shape(name, tuple(feed.shape)):
            said = "; ".join(self.log.take_errors(before))
            raise BackendError("bad profile", f"{where}: input {name} {list(feed.shape)}: {said}", "widen a profile")
        if self.context.engine.get_tensor_location(name) == self.trt.TensorLocation.HOST:
            self.hosts[name] = feed
            self.context.set_tensor_address(name, feed.ctypes.data)
        else:
            self._reserve(name, feed.nbytes)

    def _bytes(self, name: str, shape: Sequence[int]) -> int:
        return math.prod(shape) * self.dtypes[name].itemsize

    def _reserve(self, name: str, size: int) -> None:
        address, had = self.buffers.get(name, (0, -1))
        if had >= size:
            return
        if had >= 0:
            self.cuda.free(address)
            self.graphs.clear()  # they hold the address that is gone
        address = self.cuda.allocate(size)
        self.buffers[name] = (address, size)
        if not self.context.set_tensor_address(name, address):
            raise self.log.failure(f"TensorRT does not take an address for {name}")


def _allocator(trt: Any, cuda: Cuda, address: int, size: int) -> Any:
    """Return an IOutputAllocator, with memory to start with, for an output whose shape depends on data."""

    class Allocator(trt.IOutputAllocator):  # type: ignore[misc]  # its type is known only at run time
        def __init__(self) -> None:
            trt.IOutputAllocator.__init__(self)
            self.address, self.size = address, size
            self.shape: tuple[int, ...] | None = None

        def reallocate_output(self, _name: str, _memory: int, size: int, _alignment: int) -> int:
            return self._grow(size)

        def reallocate_output_async(self, _name: str, _memory: int, size: int, _alignment: int, _stream: int) -> int:
            return self._grow(size)

        def notify_shape(self, _name: str, shape: Any) -> None:
            self.shape = tuple(shape)

        def _grow(self, size: int) -> int:
            if size > self.size:  # the old memory stays until `close`: the context still names it
                self.address, self.size = cuda.allocate(size), size
            return self.address

    return Allocator()


def as_type(values: Array, kind: str, where: str) -> Array:
    """Return a contiguous array of the type that the plan takes. Raises BackendError("bad data")."""
    wanted = np.dtype(_DTYPES[kind]) if kind in _DTYPES else None
    convert: Callable[[Array], Array] | None = None
    if wanted is None:
        raise BackendError("bad data", f"{where} has the type {kind}, which numpy cannot hold", "use io: float32")
    floating = np.issubdtype(values.dtype, np.floating)
    if kind == "BF16" and floating:
        convert = _bf16_bits
    elif values.dtype == wanted or (floating and kind in ("FLOAT", "HALF")):
        convert = None
    elif values.dtype == np.int64 and kind == "INT32":
        limits = np.iinfo(np.int32)
        if values.size and (values.min() < limits.min or values.max() > limits.max):
            raise BackendError(
                "bad data", f"{where}: values beyond int32, which is what the plan takes", "use smaller ones"
            )
    elif not (values.dtype == np.int32 and kind == "INT64"):
        raise BackendError("bad data", f"{where} is {values.dtype}, the plan takes {kind}", "give the recipe's dtype")
    # A copy in any case where the caller may write while the device still reads would cost more than it saves.
    return convert(values) if convert is not None else np.ascontiguousarray(values, dtype=wanted).reshape(values.shape)


def _bf16_bits(values: Array) -> Array:
    """Round to bfloat16, to nearest with ties to even, and return its bits."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    kept: Array = np.where(np.isnan(values), np.uint16(0x7FC0), rounded).reshape(values.shape)
    return kept


def _widened(values: Array, kind: str) -> Array:
    if kind != "BF16":
        return values
    bits: np.ndarray[Any, np.dtype[np.uint32]] = values.astype(np.uint32) << np.uint32(16)
    return bits.view(np.float32)
