"""One candidate in a process of its own: it is loaded, timed at every case, and its process ends with its memory."""

from __future__ import annotations

import json
import resource
from collections.abc import Mapping
from typing import Any, Final

from artifacts.refs import JSON
from tasks.benchmark.clocks import Gauge
from tasks.benchmark.measure import Array, Candidate, Rule, measure
from tasks.errors import BackendError
from tasks.seeded import seeded_inputs
from tasks.stage import StageRequest, StageResult
from tasks.toolchain import cpu_name

PROFILE: Final = "profile.json"
_PROFILE_RUNS: Final = 20


def engine(request: StageRequest) -> StageResult:
    """Time the engine: "model.plan" in TensorRT, with and without a CUDA graph, or "model.onnx" in ONNX Runtime.

    params: executor, gpu, version_compatible, cases, tensors, input_seed, seconds. Facts: as `_Report.facts`. For TensorRT
    "profile.json" has the mean time of each layer at every case: {"cases": [{"name", "runs", "layers": [...]}]}.
    """
    if request.params["executor"] == "onnxruntime":
        return onnxruntime(request)
    from tasks.engines.cuda import find_device

    device = find_device(request.params["gpu"])
    gauge = Gauge(device["uuid"])
    report = _Report(request, gauge, device["name"], device["uuid"])
    from tasks.benchmark.plan_candidate import PlanCandidate, layer_profile
    from tasks.engines.trt_run import runner_for

    for graph in (False, True):
        runner = runner_for(request, graphs=graph)
        candidate = PlanCandidate(runner, graph=graph)
        for case in request.params["cases"]:
            report.time(candidate, case, graph=graph)
        runner.close()
    layers = []
    for index, case in enumerate(request.params["cases"]):
        profiled = runner_for(request)  # a profiler slows what it is attached to
        found = layer_profile(profiled, report.arrays(index), _PROFILE_RUNS)
        layers.append({"name": case["name"], "runs": _PROFILE_RUNS, "layers": found})
        profiled.close()
    (request.output_dir / PROFILE).write_text(json.dumps({"cases": layers}, indent=1) + "\n", "utf-8")
    return StageResult({PROFILE: JSON}, report.facts(_version("tensorrt")))


def onnxruntime(request: StageRequest) -> StageResult:
    """Time "model.onnx" in ONNX Runtime: on the GPU where params["gpu"] names one and its CUDA provider is there."""
    from tasks.benchmark.onnx_candidate import OnnxCandidate

    gpu = request.params["gpu"] != "cpu"
    gauge, name = _gauge(request.params)
    candidate = OnnxCandidate(request.inputs["model.onnx"], gpu=gpu)
    on_gpu = candidate.provider == "CUDAExecutionProvider"
    report = _Report(request, gauge, name if on_gpu else cpu_name())
    for case in request.params["cases"]:
        report.time(candidate, case)
    return StageResult({}, report.facts(candidate.version) | {"provider": candidate.provider})


def torch(request: StageRequest) -> StageResult:
    """Time the source module as params["candidate"] says: torch (fp32), torch-fp16, torch-compile (fp16 on a GPU)."""
    import torch as framework

    from tasks.benchmark.torch_candidate import TorchCandidate
    from tasks.torch_module import load_module

    gpu, name = request.params["gpu"] != "cpu", request.params["candidate"]
    if gpu and not framework.cuda.is_available():
        raise BackendError("no device", f"PyTorch {framework.__version__} sees no GPU here", "install its CUDA build")
    if name == "torch-fp16" and not gpu:
        raise BackendError("rejected setting", "torch-fp16 is for GPUs: halves are slow on a CPU", "compare with torch")
    gauge, device = _gauge(request.params)
    request_of_source = StageRequest("reference", request.params["source"], request.inputs, request.output_dir)
    module = load_module(request_of_source)
    half = gpu and name != "torch"
    candidate = TorchCandidate(module, gpu=gpu, half=half, compiled=name == "torch-compile")
    report = _Report(request, gauge, device)
    for case in request.params["cases"]:
        report.time(candidate, case)
    more = {"dtype": "float16" if half else "float32", "compile_seconds": candidate.compile_seconds}
    return StageResult({}, report.facts(framework.__version__) | more)


class _Report:
    """Times candidates case by case, and keeps what was found with the state of the device before and after."""

    def __init__(self, request: StageRequest, gauge: Gauge, device: str, uuid: str | None = None) -> None:
        self._request, self._gauge, self._device, self._uuid = request, gauge, device, uuid
        self._rule = Rule(seconds=request.params["seconds"])
        self._before, self._used = gauge.read(), gauge.used_bytes()
        self._rows: list[dict[str, Any]] = []

    def arrays(self, index: int) -> Mapping[str, Array]:
        """Return the seeded inputs of a case: the same for every candidate."""
        params = self._request.params
        return seeded_inputs(params["tensors"], params["cases"][index]["shapes"], params["input_seed"], index)

    def time(self, candidate: Candidate, case: Mapping[str, Any], *, graph: bool = False) -> None:
        """Time one case."""
        cases = self._request.params["cases"]
        words = f"timing {case['name']}{' as a CUDA graph' if graph else ''}"
        self._request.report(cases.index(case) / len(cases), words)
        found = measure(candidate, self.arrays(cases.index(case)), case["batch"], self._rule)
        if graph and not getattr(candidate, "graphed", False):
            return  # it ran without one: a shape or a host tensor forbids it
        used = self._gauge.used_bytes()
        memory = used - self._used if used is not None and self._used is not None else None
        row = {key: case[key] for key in ("name", "profile", "batch")}
        self._rows.append({**row, "graph": graph, **found, "gpu_memory_bytes": memory})

    def _position(self, row: Mapping[str, Any]) -> tuple[int, bool]:
        names = [case["name"] for case in self._request.params["cases"]]
        return names.index(row["name"]), row["graph"]

    def facts(self, version: str) -> dict[str, Any]:
        """Return version, device, uuid, cases, clocks {before, after}, host_memory_bytes (the process's peak) and rule.

        gpu_memory_bytes of a case is how much more of the device's memory is in use than before this process used it.
        """
        return {
            "version": version,
            "device": self._device,
            "uuid": self._uuid,
            "cases": sorted(self._rows, key=self._position),
            "clocks": {"before": self._before, "after": self._gauge.read()},
            "host_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            "rule": self._rule.to_json(),
        }


def _gauge(params: Mapping[str, Any]) -> tuple[Gauge, str]:
    """Return what reads the device's state, and the device's name, as the engine's own run found them: params["device"].

    Another interpreter than ours may not have what asks CUDA.
    """
    if params["gpu"] == "cpu":
        return Gauge(), cpu_name()
    return Gauge(params["device"]["uuid"]), params["device"]["name"]


def _version(package: str) -> str:
    import importlib

    return str(importlib.import_module(package).__version__)
