"""The `refit` stage: new weights for a plan that was compiled for a graph of the same structure.

Retraining a model is the commonest reason to rebuild an engine, and a refit does without the compiler: the plan is loaded,
every weight that it takes is set from the new graph, and the plan is written again. It fails where a weight that the plan
does not take has changed, and the engine is compiled instead.
"""

from __future__ import annotations

import os
import resource
import shutil
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import numpy as np

from artifacts.refs import ENGINE_PLAN, JSON
from tasks.engines.cuda import Cuda, driver_version, find_device
from tasks.engines.trt import LAYERS, PLAN, load_plan
from tasks.engines.trt_log import Log
from tasks.engines.trt_plugins import load_plugins, plugin_files
from tasks.engines.trt_weights import REFIT, Array, Refittable, digest_of, transposed
from tasks.errors import BackendError
from tasks.onnx_files import GRAPH
from tasks.stage import StageRequest, StageResult

Weights = Mapping[tuple[str, bool], Array]  # by the weight's name, and whether its two axes are swapped

_MAX_WARNINGS: Final = 50
_NAMED: Final = 5
_COMPILE: Final = "the engine is compiled instead"


def run(request: StageRequest) -> StageResult:
    """Put the weights of "model.onnx" into "model.plan", as "refit.safetensors" says, and write the plan anew.

    The optional input "layers.json", the plan's listing, holds for what is made, too; inputs "plugin-*" are libraries, loaded
    first. params: those of the compilation (gpu, version_compatible). Facts: those of the compilation that new weights do not
    change; runtime_version, device, driver_cuda, weights and constants (how many were set; None where the version sets them
    from the file), bytes (of the weights), phases (seconds by name), size, warnings, log_lines, peak_memory_bytes. Raises
    BackendError: "wrong result" where a weight that the plan does not take has changed or one is missing, else with TensorRT's
    own words.
    """
    # Otherwise the CUDA of TensorRT 8.6 (12.0) loads every kernel of its libraries before the first call. CUDA reads it once.
    os.environ.setdefault("CUDA_MODULE_LOADING", "LAZY")
    clock = _Clock()
    with ThreadPoolExecutor(1) as pool:  # the graph is read while TensorRT starts and loads the plan
        reading = pool.submit(_read, request.inputs[GRAPH], request.inputs[REFIT])
        import tensorrt as trt

        log = Log(request.report, folder=str(request.inputs[GRAPH].parent))
        logger = log.for_runtime(trt)
        device = find_device(request.params["gpu"])
        cuda = Cuda(device["index"])
        clock.lap("start")
        try:
            request.report(None, "loading the plan")
            load_plugins(trt, plugin_files(request.inputs))
            engine = load_plan(trt, logger, log, request.inputs[PLAN], request.params)
            clock.lap("load")
            how, weights = reading.result()
            clock.lap("read")
            refitter = trt.Refitter(engine, logger)
            refitter.max_threads = len(os.sched_getaffinity(0))
            set_weights(trt, refitter, logger, log, how, weights, request.inputs[GRAPH])
            clock.lap("set")
            request.report(None, "refitting")
            before = len(log.errors)
            if not refitter.refit_cuda_engine():
                raise log.failure(f"TensorRT {trt.__version__} does not refit the plan", since=before)
            clock.lap("refit")
            size = (request.output_dir / PLAN).write_bytes(serialized(trt, engine))
            clock.lap("save")
            del refitter, engine
        finally:
            cuda.close()
    outputs = {PLAN: ENGINE_PLAN}
    if LAYERS in request.inputs:
        shutil.copyfile(request.inputs[LAYERS], request.output_dir / LAYERS)
        outputs[LAYERS] = JSON
    facts = {key: value for key, value in how.facts().items() if key != "fixed"}
    return StageResult(
        outputs,
        {
            **how.compiled,
            "runtime_version": trt.__version__,
            "device": device,
            "driver_cuda": driver_version(),
            **facts,
            "bytes": sum(values.nbytes for values in weights.values()),
            "phases": clock.laps,
            "size": size,
            "warnings": [*log.warnings, *log.errors][:_MAX_WARNINGS],
            "log_lines": log.lines,
            "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        },
    )


def set_weights(trt: Any, refitter: Any, logger: Any, log: Log, how: Refittable, weights: Weights, graph: Path) -> None:
    """Give a refitter every weight that its plan takes: of `weights`, or where `how` says so of the file `graph` itself.

    The arrays of `weights` must live until the refit is done. Raises BackendError where one is missing or not taken.
    """
    before = len(log.errors)
    if how.slots is None:
        parser = trt.OnnxParserRefitter(refitter, logger)
        if not parser.refit_from_file(str(graph)):
            said = "\n    ".join(parser.get_error(index).desc() for index in range(parser.num_errors))
            raise log.failure("the graph does not refit the plan", otherwise="wrong result", extra=said, since=before)
    for (layer, role), source in (how.slots or {}).items():
        values = source.constant if source.weight is None else weights[source.weight, source.transposed]
        since = len(log.errors)
        if not refitter.set_weights(layer, trt.WeightsRole.__members__[role], trt.Weights(values)):
            if source.weight is not None:
                raise log.failure(f"{layer} does not take its {role}", otherwise="wrong result", since=since)
            # 8.6 lists integers and booleans that it does not let anyone set; it keeps what they are.
            log.warnings += log.take_errors(since)
    missing, roles = refitter.get_missing()
    if missing:
        names = ", ".join(f"{layer} ({role.name})" for layer, role in zip(missing, roles, strict=True))
        raise BackendError("wrong result", f"the plan needs more than the graph's weights: {names}", _COMPILE)


def read_weights(graph: Path, how: Refittable) -> Weights:
    """Return the weights that a plan takes from a graph, flat, by name and whether the axes are swapped.

    Raises BackendError where a weight that the plan does not take is another than in the graph it was compiled for.
    """
    from tasks.onnx_files import load_graph
    from tasks.structure import raw_values, weights_of

    found = weights_of(load_graph(graph))
    changed = [
        name for name, digest in how.fixed.items() if name not in found or digest_of(raw_values(found[name])) != digest
    ]
    if changed:
        names = ", ".join(changed[:_NAMED]) + (f" and {len(changed) - _NAMED} more" if len(changed) > _NAMED else "")
        raise BackendError("wrong result", f"weights changed that the plan does not take back: {names}", _COMPILE)
    wanted = {(one.weight, one.transposed) for one in (how.slots or {}).values() if one.weight is not None}
    lost = sorted(name for name, _swap in wanted if name not in found)
    if lost:
        raise BackendError("wrong result", f"the graph has no weights {', '.join(lost)}", _COMPILE)
    return {(name, swap): _flat(found[name], swap=swap) for name, swap in sorted(wanted)}


def _flat(tensor: Any, *, swap: bool) -> Array:
    from onnx import helper

    from tasks.structure import raw_values

    values = raw_values(tensor)
    values = transposed(values, tensor.dims) if swap else values
    return np.frombuffer(values, helper.tensor_dtype_to_np_dtype(tensor.data_type))


def serialized(trt: Any, engine: Any) -> memoryview:
    """Return a refitted engine as a plan with all of its weights. Raises BackendError."""
    if hasattr(engine, "create_serialization_config"):  # 10.0 and later, where stripped engines leave their weights out
        config = engine.create_serialization_config()
        config.clear_flag(trt.SerializationFlag.EXCLUDE_WEIGHTS)
        plan = engine.serialize_with_config(config)
    else:
        plan = engine.serialize()
    if plan is None:
        raise BackendError("crash", f"TensorRT {trt.__version__} does not write the plan that it refitted", _COMPILE)
    return memoryview(plan)


def _read(graph: Path, refit: Path) -> tuple[Refittable, Weights]:
    how = Refittable.read(refit)
    return how, read_weights(graph, how)


class _Clock:
    """Seconds of each phase, by name."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name] = round(now - self._last, 4)
        self._last = now
