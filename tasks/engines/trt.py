"""TensorRT 8.6, 10 and 11: compile a typed graph for the GPU that is here.

The compiler times kernels on the device, so the device must be of the target's compute capability and should be idle. What
differs between versions is in `trt_adapter`; what a version cannot do is refused by name. Measured facts: docs/tensorrt.md.
"""

from __future__ import annotations

import hashlib
import json
import resource
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from artifacts.refs import BYTES, ENGINE_PLAN, JSON, SAFETENSORS
from tasks.engines.cuda import Cuda, driver_version, find_device
from tasks.engines.trt_adapter import device_memory, require
from tasks.engines.trt_calibrate import CACHE as CALIBRATION_CACHE
from tasks.engines.trt_calibrate import cache_reader
from tasks.engines.trt_layers import quantized_layers
from tasks.engines.trt_log import Log, progress_monitor
from tasks.engines.trt_network import add_profiles, parse, signature
from tasks.engines.trt_plugins import load_plugins, plugin_files
from tasks.engines.trt_replay import EXPECTED_LAYERS, replay_flags, require_same_layers
from tasks.engines.trt_settings import Settings
from tasks.engines.trt_timing import TIMING_CACHE, TimingCache
from tasks.engines.trt_weak import nodes_in_fp32
from tasks.engines.trt_weights import (
    REFIT,
    NotRefittableError,
    Slot,
    Source,
    finds_by_name,
    network_sources,
    refittable,
    require_one_profile,
    require_unfolded,
)
from tasks.errors import BackendError
from tasks.onnx_files import GRAPH, load_graph, opset_of
from tasks.stage import StageRequest, StageResult

PLAN: Final = "model.plan"
LAYERS: Final = "layers.json"
# A build that runs out of memory is tried again with half of the scratch memory, down to this.
LEAST_WORKSPACE: Final = 64 << 20
_MAX_WARNINGS: Final = 50
# Facts of a compilation that new weights do not change.
_LASTING: Final = ("settings", "inputs", "outputs", "network_layers", "layers", "kept", "plugins", "workspace")


def compile_plan(request: StageRequest) -> StageResult:
    """Compile "model.onnx" to "model.plan", for a device of params["gpu"].

    params: gpu, tf32, profiles, workspace (bytes or None), optimization_level, hardware_compatibility,
    version_compatible; and, where given, precision (to refuse what a version lacks), max_aux_streams, sparse_weights,
    refit ("weights" or "stripped"), weight_streaming, tactic_sources (names), dla {core, gpu_fallback}; typing ("weak":
    the graph is untyped, and lowered by flags), keep (globs of nodes that stay fp32 then) and calibrator (the method that
    the input "calibration.cache" was found by). Inputs "plugin-*" are libraries, loaded first. The optional input
    "timing.cache" speeds it up; with timing_cache ("pinned") it is used or the build fails, with reproducible its tactics are
    replayed, and with the input "expected-layers.json" the engine's layers are those (`trt_replay`). Outputs: the plan,
    "layers.json" (the inspector's listing), "timing.cache" (what was given and what this build measured) and, where new weights
    can be put into the plan, "refit.safetensors". Facts: refit {structure, weights, constants, fixed} or {refused},
    runtime_version, device,
    driver_cuda, settings, workspace {asked, limit, tried}, seconds, layers {count, digest; for int8 and fp8 quantized, by
    `trt_layers`}, timing_cache, phases
    (seconds of start, build and inspect, of which the rest is reading and checking), inputs, outputs,
    plugins, kept (with weak typing), warnings, log_lines, size, peak_memory_bytes. Raises BackendError with TensorRT's own words.
    """
    import tensorrt as trt

    device = find_device(request.params["gpu"])
    cuda = Cuda(device["index"])
    try:
        built = Build(trt, request).run(cuda.free_bytes)
    finally:
        cuda.close()
    return StageResult(built[0], {"device": device, "driver_cuda": driver_version(), **built[1]})


class Build:
    """One compilation with one TensorRT module, on the current CUDA device."""

    settings: type[Settings] = Settings

    def __init__(self, trt: Any, request: StageRequest) -> None:
        self._trt, self._request = trt, request
        self._log = Log(request.report, folder=str(request.inputs[GRAPH].parent))
        self._logger = self._log.for_runtime(trt)
        self._typing: str = request.params.get("typing", "strong")
        self._phases: dict[str, float] = {}
        self._refit = request.params.get("refit", "none")
        self._sources: dict[Slot, Source | None] | None = None
        self._timing = TimingCache(trt, self._log, request.inputs.get(TIMING_CACHE))

    def run(self, free_bytes: Callable[[], int]) -> tuple[dict[str, str], dict[str, Any]]:
        """Compile, load the plan once and list its layers; return outputs and facts.

        `free_bytes` says how much memory of the device is free.
        """
        plugins = load_plugins(self._trt, plugin_files(self._request.inputs))
        facts = {**self.compile(free_bytes), "plugins": plugins}
        with self._phase("inspect"):
            engine = self._load()
            facts["layers"] = self._inspect(engine)
        outputs = {PLAN: ENGINE_PLAN, LAYERS: JSON}
        if self._refit != "none":
            facts["refit"] = self._offer(engine, facts)
            outputs |= {REFIT: SAFETENSORS} if "structure" in facts["refit"] else {}
        if (self._request.output_dir / TIMING_CACHE).exists():
            outputs[TIMING_CACHE] = BYTES
        return outputs, {
            **facts,
            "timing_cache": self._timing.facts,
            "phases": {name: round(seconds, 3) for name, seconds in self._phases.items()},
            "warnings": self._log.warnings[:_MAX_WARNINGS],
            "log_lines": self._log.lines,
            "size": (self._request.output_dir / PLAN).stat().st_size,
            "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        }

    def compile(self, free_bytes: Callable[[], int]) -> dict[str, Any]:
        """Write the plan, trying again with less workspace where memory runs out; return facts."""
        trt, params = self._trt, self._request.params
        opset = opset_of(load_graph(self._request.inputs[GRAPH], weights=False))
        require(trt, params.get("precision", "fp32"), opset, self._typing)
        started = time.monotonic()
        limit, tried = params["workspace"], list[int]()
        while True:
            try:
                facts = self._attempt(limit, tried)
                break
            except BackendError as err:
                following = _smaller(tried, free_bytes) if err.kind == "out of memory" else None
                if following is None:
                    raise _with_attempts(err, tried) from err
                self._request.report(None, f"out of memory; trying again with {following >> 20} MiB of workspace")
                self._log.warnings.append(f"out of memory with {tried[-1] >> 20} MiB of workspace")
                self._log.take_errors(0)
                limit = following
        seconds = time.monotonic() - started
        return {
            "runtime_version": trt.__version__,
            **facts,
            "workspace": {"asked": params["workspace"], "limit": tried[-1], "tried": tried},
            "seconds": round(seconds, 3),
        }

    def _attempt(self, limit: int | None, tried: list[int]) -> dict[str, Any]:
        trt, log, params = self._trt, self._log, self._request.params
        begun = time.monotonic()
        try:
            builder = trt.Builder(self._logger)
        except TypeError as err:  # "pybind11::init(): factory function returned nullptr"
            raise log.failure(f"TensorRT {trt.__version__} does not start", otherwise="no device") from err
        self._phases["start"] = time.monotonic() - begun  # TensorRT loads its kernels
        network, parser = parse(trt, self._logger, log, builder, self._request.inputs[GRAPH], self._typing)
        config = builder.create_builder_config()
        settings = self.settings(trt, log, config)
        settings.apply(params, builder, network, self._request.inputs[GRAPH])
        tried.append(settings.workspace(limit))
        add_profiles(trt, log, builder, network, config, params["profiles"])
        if params.get("reproducible"):
            for name in replay_flags(trt, pinned=params.get("timing_cache") == "pinned"):
                settings.flag(name)
        cache, ranges = self._timing.attach(config, params), self._attach_calibration(config)
        monitor = progress_monitor(trt, log, self._request.report)
        if monitor is not None:
            config.progress_monitor = monitor
        self._request.report(0.0 if monitor is not None else None, "compiling")
        before = len(log.errors)
        with self._phase("build"):
            plan = builder.build_serialized_network(network, config)
        if ranges is not None and ranges.asked:
            raise log.failure("the calibration cache is not of this graph", kind="bad data", since=before)
        if plan is None:
            raise log.failure(f"TensorRT {trt.__version__} does not compile the graph", since=before)
        (self._request.output_dir / PLAN).write_bytes(memoryview(plan))
        self._timing.keep(config, self._request.output_dir)
        if self._refit != "none" and not finds_by_name(trt):
            self._sources = network_sources(trt, self._logger, log, builder, network, self._request.inputs[GRAPH])
        facts = {"settings": settings.applied, **signature(network), "network_layers": network.num_layers}
        if self._typing == "weak":
            keep, int8 = params.get("keep", ()), "calibrator" in params
            facts["kept"] = sorted(nodes_in_fp32(self._request.inputs[GRAPH], keep, int8=int8))
        # In this order: what is made from another must go first.
        del plan, monitor, cache, config, ranges, parser, network, builder
        self._log.warnings += [f"logged as an error, and built all the same: {words}" for words in log.take_errors(0)]
        return facts

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        """Time a part of the work; of a part that is tried again, the last time counts."""
        begun = time.monotonic()
        yield
        self._phases[name] = time.monotonic() - begun

    def _attach_calibration(self, config: Any) -> Any:
        """Give the builder the int8 ranges that were calibrated, where there are any."""
        path = self._request.inputs.get(CALIBRATION_CACHE)
        if path is None:
            return None
        reader = cache_reader(self._trt, self._request.params["calibrator"], path.read_bytes())
        config.int8_calibrator = reader
        return reader

    def _load(self) -> Any:
        """Load the plan once. Raises BackendError where TensorRT does not load its own plan."""
        self._request.report(None, "loading the plan")
        return load_plan(self._trt, self._logger, self._log, self._request.output_dir / PLAN, self._request.params)

    def _offer(self, engine: Any, facts: Mapping[str, Any]) -> dict[str, Any]:
        """Write down how the plan is refitted. Raises BackendError for a stripped one that cannot be: it is of no use."""
        from tasks.structure import structure_digest

        graph = self._request.inputs[GRAPH]
        try:
            if self._sources is not None:
                require_unfolded(self._log.warnings)
                require_one_profile(self._request.params["profiles"])
            found = refittable(self._trt, engine, self._logger, self._sources, graph)
        except NotRefittableError as err:
            if self._refit == "stripped":
                raise BackendError("rejected setting", f"refit: {err}", "set build.refit to none or weights") from err
            return {"refused": str(err)}
        found = replace(found, compiled={name: facts[name] for name in _LASTING if name in facts})
        found.write(self._request.output_dir)
        return {"structure": structure_digest(load_graph(graph)), **found.facts()}

    def _inspect(self, engine: Any) -> dict[str, Any]:
        """List the layers of the plan."""
        trt = self._trt
        text = engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON)
        listing = json.loads(text, strict=False)  # 8.6 separates names of fused ONNX nodes with a bare U+001E
        if EXPECTED_LAYERS in self._request.inputs:
            require_same_layers(self._request.inputs[EXPECTED_LAYERS], listing)
        canonical = json.dumps(listing, sort_keys=True, separators=(",", ":")) + "\n"
        (self._request.output_dir / LAYERS).write_text(canonical, "utf-8")
        asked = self._request.params.get("precision", "")
        return {
            **({"quantized": quantized_layers(listing)} if asked.startswith(("int8", "fp8")) else {}),
            "count": len(listing.get("Layers", ())),
            "digest": hashlib.sha256(canonical.encode()).hexdigest(),
            "device_memory_bytes": int(device_memory(engine)),
        }


def load_plan(trt: Any, logger: Any, log: Log, path: Path, params: Mapping[str, Any]) -> Any:
    """Deserialise a plan that this process has just written. Raises BackendError with TensorRT's words."""
    runtime = trt.Runtime(logger)
    if params.get("version_compatible"):
        runtime.engine_host_code_allowed = True  # the lean runtime inside of the plan; it was written by ourselves
    if params.get("dla") is not None:
        runtime.DLA_core = params["dla"]["core"]
    before = len(log.errors)
    engine = runtime.deserialize_cuda_engine(path.read_bytes())
    if engine is None:
        raise log.failure(f"TensorRT {trt.__version__} does not load the plan that it made", since=before)
    return engine


def _smaller(tried: list[int], free_bytes: Callable[[], int]) -> int | None:
    """Return the next workspace limit: half of the last, or of the memory that is free; None where there is no less."""
    if not tried or tried[-1] <= LEAST_WORKSPACE:
        return None
    return max(min(tried[-1], free_bytes()) // 2, LEAST_WORKSPACE)


def _with_attempts(err: BackendError, tried: list[int]) -> BackendError:
    if len(tried) < 2:
        return err
    limits = ", ".join(f"{limit >> 20} MiB" for limit in tried)
    return BackendError(err.kind, f"{err.message}\n    (tried workspaces: {limits})", err.advice)
