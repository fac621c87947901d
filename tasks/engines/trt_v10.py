"""TensorRT 10: strongly typed, by a flag of the network. Precision flags are set only where `trt_weak` is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any


class StronglyTyped:
    """10.0 to 10.16: every type is the graph's own."""

    # 9 to 20 is what 10.0 documents; later ones read more, and their parser says what it cannot.
    opset: int | None = None
    precisions: tuple[str, ...] = ("fp32", "tf32", "fp16", "bf16", "fp8", "fp8-fp16", "int8", "int8-fp16")

    def network_flags(self, trt: Any) -> int:
        """Return STRONGLY_TYPED."""
        return 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)

    def prepare_parser(self, trt: Any, parser: Any) -> None:
        """Do nothing: native InstanceNorm is the default."""
        del trt, parser

    def type_flags(self, trt: Any, network: Any, graph: Path, params: Mapping[str, Any]) -> tuple[str, ...]:
        """Return nothing: `kFP16 is not compatible with a strongly typed network`."""
        del trt, network, graph, params
        return ()
