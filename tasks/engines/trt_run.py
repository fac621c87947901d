"""Run a TensorRT plan: arrays in, arrays out; buffers are kept, and the profile is chosen for the shapes that come.

A plan is executable code: it is handed to the runtime only after its digest was checked.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from artifacts.refs import digest_bytes
from tasks.engines.cuda import Cuda, find_device
from tasks.engines.device_arrays import on_device
from tasks.engines.profiles import Profile, choose_profile
from tasks.engines.trt_bound import Bound
from tasks.engines.trt_log import Log
from tasks.engines.trt_plugins import load_plugins, plugin_files
from tasks.engines.trt_pool import SlotPool
from tasks.engines.trt_slots import Feed, Loaded
from tasks.engines.trt_types import Array, as_type, type_name, widened
from tasks.errors import BackendError
from tasks.stage import StageRequest


class PlanRunner:
    """A plan that was loaded and checked. Not safe to share between threads.

    `inputs` is {name: TensorRT's name of the type}, `outputs` the names in order, `types` the usual name of each tensor's
    element type, `profiles` what shapes it takes.
    """

    emulated: str | None = None  # as `tasks.verify` asks of what it runs: the device computes as the plan says

    def __init__(
        self,
        plan: Path | bytes,
        digest: str | None,
        *,
        device: int = 0,
        host_code: bool = False,
        graphs: bool = False,
        plugins: Sequence[Path] = (),
        dla_core: int | None = None,
        names: Sequence[str] = (),
        trt: Any = None,
    ) -> None:
        """Load `plan` on a device.

        `digest` is the SHA-256 that its manifest names; None only for what the caller has checked (the inputs of a stage
        are). `host_code` must be true for version-compatible plans, which bring code for the host. With `graphs`, a shape
        that comes back is replayed as a CUDA graph. `plugins` are libraries to load first, which the caller has checked;
        `dla_core` is the accelerator's core for a plan that was made for one; `names` are the profiles', in order. Raises
        BackendError: "bad data" for another digest, "version mismatch" where this TensorRT or GPU does not take the plan, "no device".
        """
        data = plan if isinstance(plan, bytes) else plan.read_bytes()
        what = "the plan" if isinstance(plan, bytes) else plan.name
        if digest is not None and (found := digest_bytes(data)) != digest:
            raise BackendError(
                "bad data",
                f"{what} has digest {found[:12]}, expected {digest[:12]}: it is not loaded",
                "fetch it again",
            )
        trt = trt or importlib.import_module("tensorrt")
        log = Log(lambda _fraction, _text: None)
        load_plugins(trt, plugins)
        self._cuda = Cuda(device)
        logger = log.for_runtime(trt)
        try:
            self._runtime = trt.Runtime(logger)
        except TypeError as err:  # "pybind11::init(): factory function returned nullptr"
            raise log.failure(f"TensorRT {trt.__version__} does not start", otherwise="no device") from err
        if host_code:
            self._runtime.engine_host_code_allowed = True
        if dla_core is not None:
            self._runtime.DLA_core = dla_core
        engine = self._runtime.deserialize_cuda_engine(data)
        if engine is None:
            raise log.failure(f"TensorRT {trt.__version__} does not load {what}", otherwise="version mismatch")
        if getattr(engine, "streamable_weights_size", 0):  # built with weight streaming: as much as there is room for
            engine.weight_streaming_budget_v2 = engine.get_weight_streaming_automatic_budget()
        tensors = [str(engine.get_tensor_name(index)) for index in range(engine.num_io_tensors)]
        is_input = {name: engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT for name in tensors}
        kinds = {name: engine.get_tensor_dtype(name).name for name in tensors}
        self.inputs = {name: kinds[name] for name in tensors if is_input[name]}
        self.outputs = [name for name in tensors if not is_input[name]]
        self.types = {name: type_name(kind) for name, kind in kinds.items()}
        count = engine.num_optimization_profiles
        self.profiles = [
            Profile(
                index,
                {name: [list(shape) for shape in engine.get_tensor_profile_shape(name, index)] for name in self.inputs},
                names[index] if len(names) == count else "",
            )
            for index in range(count)
        ]
        on_host = {name for name in self.inputs if engine.get_tensor_location(name) == trt.TensorLocation.HOST}
        # 8.6 lets two contexts be on one profile only where the builder's preview feature PROFILE_SHARING_0806 was on; 10, which
        # has allocation strategies, always. What brings code for the host may bring that of an earlier version.
        shares = hasattr(trt, "ExecutionContextAllocationStrategy") and not host_code
        loaded = Loaded(trt, log, self._cuda, engine, kinds, tuple(self.outputs), frozenset(on_host), shares)
        one_shape = all(
            list(least) == list(most) for profile in self.profiles for least, _opt, most in profile.ranges.values()
        )
        self._pool: SlotPool | None = SlotPool(loaded, graphs=graphs, one_shape=one_shape)

    @property
    def warnings(self) -> list[str]:
        """What TensorRT warned of so far."""
        return self._open.loaded.log.warnings

    @property
    def device(self) -> str:
        """Where it runs, as PyTorch names it."""
        return f"cuda:{self._cuda.index}"

    @property
    def _open(self) -> SlotPool:
        if self._pool is None:
            raise ValueError("the plan is closed")
        return self._pool

    def __call__(self, arrays: Mapping[str, Array], where: str = "this call") -> dict[str, Array]:
        """Run once and return every output by name; `where` names the run in errors.

        Inputs are cast between float widths, and from int64 to int32 where the values fit (8.6 has no int64). bfloat16
        outputs come back as float32. Raises BackendError: "bad data" for missing inputs or types that do not fit,
        "bad profile" for shapes, "out of memory", "crash".
        """
        feeds = self.typed(arrays, where)
        shapes = {name: feed.shape for name, feed in feeds.items()}
        return self.run(feeds, choose_profile(self.profiles, shapes, where).index, {}, where)

    def typed(self, arrays: Mapping[str, Array], where: str) -> dict[str, Array]:
        """Return every input in the plan's own type and order, as a call casts them; errors as of a call."""
        missing = sorted(set(self.inputs) - set(arrays))
        if missing:
            raise BackendError("bad data", f"{where}: no input {', '.join(missing)}", "give every input of the plan")
        return {name: as_type(arrays[name], kind, f"{where}, input {name}") for name, kind in self.inputs.items()}

    def bind(self, arrays: Mapping[str, Array], where: str = "this call", *, graph: bool = False) -> Bound:
        """Copy inputs to the device and bind them to the plan, to be run there again and again; errors as of a call.

        It holds until the plan is called or bound again on the same profile.
        """
        feeds = self.typed(arrays, where)
        profile = choose_profile(self.profiles, {name: feed.shape for name, feed in feeds.items()}, where).index
        return Bound(self._cuda, self._open.base(profile), feeds, self._open.loaded.on_host, where, graph=graph)

    def adopt(self, value: object, where: str) -> Feed | None:
        """Return a view of an array that lies on a GPU, usable in this plan's stream; None for any other value."""
        return on_device(value, self._cuda.stream, where, self._cuda.wait_for)

    def run(
        self, feeds: Mapping[str, Feed], profile: int, out: Mapping[str, Feed], where: str = "this call"
    ) -> dict[str, Any]:
        """Run once on a profile that admits the feeds, which are of the plan's own types and contiguous, in its order.

        Outputs land in the arrays that `out` has for them, else in new ones on the host; all is done on return.
        """
        slot, graph = self._open.slot(profile, tuple(feed.shape for feed in feeds.values()))
        found = slot.run(feeds, out, where, graph=graph)
        kinds = self._open.loaded.kinds
        return {name: values if name in out else widened(values, kinds[name]) for name, values in found.items()}

    def make_current(self) -> None:
        """Let the calling thread use this plan, which another thread has loaded or used before."""
        self._cuda.make_current()

    def close(self) -> None:
        """Free contexts, engine and memory."""
        if self._pool is None:
            return
        self._cuda.make_current()
        with contextlib.suppress(BackendError):  # after a kernel's fault there is nothing to wait for
            self._cuda.synchronize()
        self._pool.close()
        self._pool = None
        del self._runtime
        self._cuda.close()


def runner_for(request: StageRequest, *, graphs: bool = False) -> PlanRunner:
    """Return the runner of a stage's input "model.plan", which the stage's parent has checked.

    `graphs` as of PlanRunner. params: `gpu` (where given, the device must be of it), `version_compatible`, `dla_core`, and
    `executor`, which says whose plan it is; inputs "plugin-*" are libraries.
    """
    gpu = request.params.get("gpu")
    device = find_device(gpu)["index"] if gpu is not None else 0
    host_code = bool(request.params.get("version_compatible"))
    trt = load_runtime(request.params.get("executor", "tensorrt"))
    return PlanRunner(
        request.inputs["model.plan"],
        None,
        device=device,
        host_code=host_code,
        graphs=graphs,
        plugins=plugin_files(request.inputs),
        dla_core=request.params.get("dla_core"),
        trt=trt,
    )


def load_runtime(runtime: str) -> Any:
    """Import the module that runs plans of `tensorrt` or `tensorrt-rtx`. Raises BackendError("missing package")."""
    package = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}[runtime]
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as err:
        if err.name != package:
            raise
        raise BackendError(
            "missing package", f"{package} is not installed here", f"pip install 'enginery[{runtime}]'"
        ) from err
