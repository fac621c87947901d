"""A compilation with options that recipes do not have (yet): what the product's own stage does, and these on top."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tasks.engines.cuda import Cuda, driver_version, find_device
from tasks.engines.trt import Build
from tasks.engines.trt_adapter import named
from tasks.engines.trt_settings import Settings
from tasks.stage import StageRequest, StageResult


class Extended(Settings):
    """Also takes `flags` (BuilderFlag names), `previews` ({PreviewFeature: bool}), `formats` ({tensor: [TensorFormat]}),
    `half_io` (inputs and outputs whose type becomes HALF) and `average` (avg_timing_iterations)."""

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
        tensors = [network.get_input(i) for i in range(network.num_inputs)]
        tensors += [network.get_output(i) for i in range(network.num_outputs)]
        for tensor in tensors:
            if tensor.name in params.get("half_io", ()):
                tensor.dtype = trt.DataType.HALF
            for formats in (params.get("formats", {}).get(tensor.name),):
                if formats:
                    tensor.allowed_formats = sum(1 << int(named(trt, "TensorFormat", name)) for name in formats)
                    self.applied[f"formats of {tensor.name}"] = ",".join(formats)


class Compilation(Build):
    settings = Extended


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
