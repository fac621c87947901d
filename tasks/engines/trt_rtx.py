"""TensorRT-RTX: compiled ahead of time, without a GPU, for one compute capability.

The compiler's Python setters do not raise where a setting is refused, so every one is read back and the log is
watched. TensorRT-RTX knows strongly typed networks only: the precision is in the graph, TF32 is the one flag. The facts
about its plans (a header of 64 bytes) were read from plans of 1.7.1 and are not documented by NVIDIA.
"""

from __future__ import annotations

import contextlib
import resource
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from artifacts.refs import ENGINE_PLAN
from tasks.errors import BackendError
from tasks.onnx_files import GRAPH, custom_domains, load_graph
from tasks.stage import StageRequest, StageResult
from tasks.trt_words import NodeFault, build_failure, parse_failure, real_errors

_PLAN: Final = "model.plan"
_MAX_WARNINGS: Final = 50
_LEAST_STEP: Final = 0.01
_HEADER_BYTES: Final = 64
# Plans of these versions have the header that is checked; of others it is only recorded.
_KNOWN_HEADERS: Final = ("1.7.",)
# What the compiler of the runtime tensorrt takes, and this one does not.
_FOREIGN: Final = frozenset(
    ("calibrator", "dla", "max_aux_streams", "refit", "sparse_weights", "tactic_sources", "typing", "weight_streaming")
)
_CAPABILITY_BITS: Final = ("sm75", "sm80", "sm86", "sm89", "sm120", "sm121")


def compile_plan(request: StageRequest) -> StageResult:
    """Compile `model.onnx` into `model.plan` for `params["gpu"]`, with all profiles.

    Raises BackendError by what the compiler says; "rejected setting" names the recipe's field, "bad profile" is raised
    where TensorRT-RTX itself only warns.
    """
    _refuse_foreign_settings(request.params)
    import tensorrt_rtx as trt

    compiler = f"TensorRT-RTX {trt.__version__}"
    log, progress = _Log(), _Progress(request.report)
    logger = _logger(trt, log)
    try:
        builder = trt.Builder(logger)
    except TypeError as err:  # "factory function returned nullptr": how its Python API says that it cannot start
        raise BackendError("no device", f"{compiler} does not start: {err}", "look at the log of the stage") from err
    network = builder.create_network(0)
    _parse(trt, network, logger, log, request.inputs[GRAPH], compiler)
    config = builder.create_builder_config()
    settings = _Settings(log, compiler)
    _configure(trt, config, request.params, settings)
    _add_profiles(builder, network, config, request.params["profiles"], settings)
    config.progress_monitor = _monitor(trt, progress)
    plan = builder.build_serialized_network(network, config)
    inconsistent = [line for line in log.warnings if "not self-consistent" in line]
    if plan is None or real_errors(log.errors) or inconsistent:
        raise build_failure(compiler, log.errors + inconsistent)
    path = request.output_dir / _PLAN
    path.write_bytes(memoryview(plan))
    facts = {
        "runtime_version": trt.__version__,
        "header": _checked_header(path, trt.__version__, str(request.params["gpu"])),
        "settings": settings.given,
        "layers": network.num_layers,
        "inputs": {name: _tensor(tensor) for name, tensor in _inputs(network).items()},
        "outputs": {
            tensor.name: _tensor(tensor) for tensor in (network.get_output(i) for i in range(network.num_outputs))
        },
        "warnings": log.warnings[:_MAX_WARNINGS],
        "log_lines": log.counts.total(),
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    return StageResult({_PLAN: ENGINE_PLAN}, facts)


@dataclass
class _Log:
    """What the compiler logs; its process has one logger, and ignores every later one."""

    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)

    def add(self, severity: str, text: str) -> None:
        """Keep a line, and show it unless it is verbose."""
        self.counts[severity] += 1
        if severity == "VERBOSE":
            return
        sys.stderr.write(f"[{severity.lower()}] {text}\n")
        if severity in ("ERROR", "INTERNAL_ERROR"):
            self.errors.append(text)
        elif severity == "WARNING" and text not in self.warnings:
            self.warnings.append(text)


@dataclass
class _Settings:
    """Settings that were made and read back, by the recipe's field."""

    log: _Log
    compiler: str
    given: dict[str, Any] = field(default_factory=dict)

    def make(self, name: str, wanted: Any, assign: Callable[[], object], read: Callable[[], Any]) -> None:
        """Make a setting; raise BackendError("rejected setting") where it does not stick or an error is logged."""
        before = len(self.log.errors)
        try:
            assign()
        except (TypeError, ValueError, OverflowError, RuntimeError) as err:
            self.log.errors.append(str(err))
        found, said = read(), real_errors(self.log.errors[before:])
        if found != wanted or said:
            words = f"{name}: asked for {wanted}, {self.compiler} has {found}" + "".join(f"; {line}" for line in said)
            raise BackendError("rejected setting", words, f"change {name} in the recipe, or leave it out")
        self.given[name] = wanted


class _Progress:
    """Nested phases as one fraction that never falls; phases of equal rank count alike, however long they take."""

    def __init__(self, report: Callable[[float | None, str], None]) -> None:
        self._report = report
        self._phases: dict[str, tuple[str | None, int]] = {}
        self._done: dict[str, int] = {}
        self._reported = -_LEAST_STEP

    def start(self, name: str, parent: str | None, steps: int) -> None:
        """Note that a phase of `steps` steps has begun within another."""
        self._phases[name], self._done[name] = (parent, max(steps, 1)), 0
        self._tell(name)

    def step(self, name: str, index: int) -> None:
        """Note that a step (from 0) is done."""
        self._done[name] = index + 1
        self._tell(name)

    def finish(self, name: str) -> None:
        """Note that a phase is over; its parent's step says so too."""
        parent, steps = self._phases[name]
        self._done[name] = steps
        self._tell(name)
        if parent is not None:
            del self._phases[name], self._done[name]

    def _tell(self, text: str) -> None:
        fraction = max(
            (self._fraction(name) for name, (parent, _) in self._phases.items() if parent is None), default=0
        )
        if fraction >= self._reported + _LEAST_STEP:
            self._reported = fraction
            self._report(fraction, text)

    def _fraction(self, name: str) -> float:
        inside = max(
            (self._fraction(child) for child, (parent, _) in self._phases.items() if parent == name), default=0
        )
        return min(1.0, (self._done[name] + inside) / self._phases[name][1])


def _logger(trt: Any, log: _Log) -> Any:
    # Made by hand, since tensorrt_rtx is imported late and an untyped base class is no class to mypy.
    methods = {"log": lambda _self, severity, text: log.add(severity.name, text)}
    return type("Logger", (trt.ILogger,), methods)()


def _monitor(trt: Any, progress: _Progress) -> Any:
    def step_complete(_self: Any, name: str, index: int) -> bool:
        progress.step(name, index)
        return True  # False would cancel the build; a stage is cancelled by killing it

    methods = {
        "phase_start": lambda _self, name, parent, steps: progress.start(name, parent, steps),
        "phase_finish": lambda _self, name: progress.finish(name),
        "step_complete": step_complete,
    }
    return type("Monitor", (trt.IProgressMonitor,), methods)()


def _refuse_foreign_settings(params: Mapping[str, Any]) -> None:
    level = params["hardware_compatibility"]
    if level != "none":
        raise BackendError(
            "rejected setting",
            f"build.hardware_compatibility: {level} is not supported by TensorRT-RTX, which would only warn and ignore it",
            "leave it out for tensorrt-rtx; name each GPU in targets[].gpus",
        )
    if params["version_compatible"]:
        raise BackendError(
            "rejected setting",
            "build.version_compatible: TensorRT-RTX has no lean runtime to put into a plan, so its plans are tied to the "
            "exact release",
            "leave it out for tensorrt-rtx, and build again for each release",
        )
    foreign = sorted(_FOREIGN.intersection(params))
    if foreign:
        raise BackendError(
            "rejected setting",
            f"TensorRT-RTX takes no {', '.join(foreign)}",
            "state this option for the targets of the runtime tensorrt, under targets[].build",
        )


def _parse(trt: Any, network: Any, logger: Any, log: _Log, graph: Path, compiler: str) -> None:
    parser = trt.OnnxParser(network, logger)
    parsed = parser.parse_from_file(str(graph))
    if parsed and network.num_outputs:  # bytes that are no ONNX at all may parse, as an empty graph
        return
    folder = f"{graph.parent}/"
    faults = [
        NodeFault(error.node_name(), error.node_operator(), error.desc().replace(folder, ""))
        for error in (parser.get_error(index) for index in range(parser.num_errors))
    ]
    if parsed:
        faults = [NodeFault("", "", "Failed to parse the ONNX model: it has no outputs")]
    raise parse_failure(compiler, faults, [line.replace(folder, "") for line in log.errors], _domains(graph))


def _domains(graph: Path) -> dict[str, str]:
    """Return the domain of every operator outside the ONNX standard, as far as the file can be read."""
    with contextlib.suppress(BackendError):
        found = custom_domains(load_graph(graph, weights=False))
        return {operator: domain for domain, operators in found.items() for operator in operators}
    return {}


def _configure(trt: Any, config: Any, params: Mapping[str, Any], settings: _Settings) -> None:
    gpu = str(params["gpu"])
    known = {name.lower(): value for name, value in trt.ComputeCapability.__members__.items() if name.startswith("SM")}
    if gpu not in known:
        allowed = ", ".join(known)
        raise BackendError(
            "rejected setting",
            f"targets[].gpus: {settings.compiler} does not compile for {gpu} (allowed: {allowed})",
            "drop this GPU from the target, or use the runtime tensorrt for it",
        )

    def set_capability() -> None:
        config.num_compute_capabilities = 1
        config.set_compute_capability(known[gpu], 0)

    settings.make(
        "targets[].gpus",
        [gpu],
        set_capability,
        lambda: [config.get_compute_capability(index).name.lower() for index in range(config.num_compute_capabilities)],
    )
    tf32, flag = bool(params["tf32"]), trt.BuilderFlag.TF32
    settings.make(
        "tf32",
        tf32,
        lambda: config.set_flag(flag) if tf32 else config.clear_flag(flag),
        lambda: config.get_flag(flag),
    )
    if params["workspace"] is not None:
        pool = trt.MemoryPoolType.WORKSPACE
        settings.make(
            "build.workspace",
            params["workspace"],
            lambda: config.set_memory_pool_limit(pool, params["workspace"]),
            lambda: config.get_memory_pool_limit(pool),
        )
    if params["optimization_level"] is not None:
        settings.make(
            "build.optimization_level",
            params["optimization_level"],
            lambda: setattr(config, "builder_optimization_level", params["optimization_level"]),
            lambda: config.builder_optimization_level,
        )


def _add_profiles(
    builder: Any, network: Any, config: Any, profiles: Sequence[Mapping[str, Any]], settings: _Settings
) -> None:
    inputs = _inputs(network)
    for tensor in inputs.values():
        if tensor.is_shape_tensor:
            raise BackendError(
                "bad profile",
                f"the values of the input {tensor.name!r} decide shapes; profiles give shapes only",
                "make these values constants of the model, or derive them from the shape of another input",
            )
    for profile in profiles:
        shapes = profile["inputs"]
        dynamic = {name for name, tensor in inputs.items() if -1 in tuple(tensor.shape)}
        for what, names in (("lacks", dynamic - set(shapes)), ("names unknown", set(shapes) - set(inputs))):
            if names:
                raise BackendError(
                    "bad profile",
                    f"profile {profile['name']} {what} input(s) {', '.join(sorted(names))} "
                    f"(the graph's inputs: {', '.join(inputs)})",
                    "make inputs in the recipe name the graph's inputs",
                )
        optimisation, before = builder.create_optimization_profile(), len(settings.log.errors)
        for name, corners in shapes.items():
            optimisation.set_shape(name, corners["min"], corners["opt"], corners["max"])
        if config.add_optimization_profile(optimisation) < 0:
            said = real_errors(settings.log.errors[before:])
            raise BackendError(
                "bad profile",
                f"profile {profile['name']}: " + ("; ".join(said) or f"{settings.compiler} refused it"),
                "every axis needs min <= opt <= max",
            )
    settings.given["profiles"] = len(profiles)


def _inputs(network: Any) -> dict[str, Any]:
    return {tensor.name: tensor for tensor in (network.get_input(index) for index in range(network.num_inputs))}


def _tensor(tensor: Any) -> dict[str, Any]:
    """Return a tensor's type and shape; dynamic extents are None."""
    return {"dtype": tensor.dtype.name.lower(), "shape": [None if extent < 0 else extent for extent in tensor.shape]}


def _checked_header(path: Path, version: str, gpu: str) -> dict[str, Any]:
    """Read a plan's header back: magic at 0, size at 16 (u64), version at 24 (4 bytes), capability mask at 32 (u32)."""
    with path.open("rb") as stream:
        head = stream.read(_HEADER_BYTES)
    mask = int.from_bytes(head[32:36], "little")
    header = {
        "magic": head[:4].decode("latin-1"),
        "size": int.from_bytes(head[16:24], "little"),
        "version": ".".join(str(byte) for byte in head[24:28]),
        "compute_capabilities": [name for bit, name in enumerate(_CAPABILITY_BITS) if mask >> bit & 1],
    }
    wanted = {"magic": "vtrt", "size": path.stat().st_size, "version": version, "compute_capabilities": [gpu]}
    if version.startswith(_KNOWN_HEADERS) and header != wanted:
        raise BackendError("wrong result", f"the plan's header says {header}, expected {wanted}", "please report it")
    return header
