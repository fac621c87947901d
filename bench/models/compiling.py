"""A compilation with options that recipes do not have (yet): what the product's own stage does, and these on top."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tasks.engines.cuda import Cuda, driver_version, find_device
from tasks.engines.trt import Build
from tasks.engines.trt_adapter import named
from tasks.engines.trt_log import Log
from tasks.engines.trt_settings import Settings
from tasks.engines.trt_timing import TIMING_CACHE, TimingCache
from tasks.stage import StageRequest, StageResult


class Extended(Settings):
    """Also takes `flags` (BuilderFlag names), `previews` ({PreviewFeature: bool}), `formats` ({tensor: [TensorFormat]}),
    `half_io` (inputs and outputs whose type becomes HALF), `average` (avg_timing_iterations) and `half_layers` (every layer
    with a float result is held to HALF)."""

    def apply(self, params: Any, builder: Any, network: Any, graph: Path) -> None:
        trt, config = self._trt, self._config
        super().apply(params, builder, network, graph)
        for flag in params.get("flags", ()):
            self.flag(flag)
        for name, on in params.get("previews", {}).items():
            config.set_preview_feature(named(trt, "PreviewFeature", name), on)
            self.applied[name] = bool(config.get_preview_feature(named(trt, "PreviewFeature", name)))
        if params.get("average"):
            self.attribute("avg_timing_iterations", params["average"])
        if params.get("half_layers"):
            self.flag("OBEY_PRECISION_CONSTRAINTS")
            self.applied["held"] = hold_half(trt, network)
        tensors = [network.get_input(i) for i in range(network.num_inputs)]
        tensors += [network.get_output(i) for i in range(network.num_outputs)]
        for tensor in tensors:
            if tensor.name in params.get("half_io", ()):
                tensor.dtype = trt.DataType.HALF
            for formats in (params.get("formats", {}).get(tensor.name),):
                if formats:
                    tensor.allowed_formats = sum(1 << int(named(trt, "TensorFormat", name)) for name in formats)
                    self.applied[f"formats of {tensor.name}"] = ",".join(formats)


def hold_half(trt: Any, network: Any) -> int:
    """Hold every layer whose results are floats, constants and casts excepted, to HALF; return how many were."""
    count = 0
    for layer in (network.get_layer(index) for index in range(network.num_layers)):
        kinds = {layer.get_output(index).dtype for index in range(layer.num_outputs)}
        if kinds == {trt.DataType.HALF} and layer.type not in (trt.LayerType.CONSTANT, trt.LayerType.CAST):
            layer.precision = trt.DataType.HALF
            count += 1
    return count


class Told(Log):
    """Also writes everything that is said, VERBOSE lines too, into a file."""

    def __init__(self, report: Any, path: Path, *, folder: str) -> None:
        super().__init__(report, folder=folder)
        self._everything = path.open("w", buffering=1 << 20)

    def write(self, severity: str, message: str) -> None:
        super().write(severity, message)
        with self._lock:
            self._everything.write(f"[{severity}] {message}\n")
            if severity != "VERBOSE":
                self._everything.flush()


class Compilation(Build):
    """The product's compilation with the settings above; with the parameter `verbose_log`, a log of all that is said."""

    settings = Extended

    def __init__(self, trt: Any, request: StageRequest) -> None:
        super().__init__(trt, request)
        if request.params.get("verbose_log"):
            folder = str(request.inputs["model.onnx"].parent)
            self._log = Told(request.report, Path(request.params["verbose_log"]), folder=folder)
            self._logger = self._log.for_runtime(trt)
            self._timing = TimingCache(trt, self._log, request.inputs.get(TIMING_CACHE))


def compile_variant(request: StageRequest) -> StageResult:
    """Do what `tasks.engines.trt.compile_plan` does, with the settings above."""
    import tensorrt as trt

    device = find_device(request.params["gpu"])
    cuda = Cuda(device["index"])
    try:
        outputs, facts = Compilation(trt, request).run(cuda.free_bytes)
    finally:
        cuda.close()
    return StageResult(outputs, {"device": device, "driver_cuda": driver_version(), **facts})
