"""TensorRT 11: every network is strongly typed; the flags of weak typing and the calibrators are gone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any


class Typed:
    """11.0 and later (TensorRT-RTX has the same interface)."""

    opset: int | None = None
    precisions: tuple[str, ...] = ("fp32", "tf32", "fp16", "bf16", "fp8", "fp8-fp16", "int8", "int8-fp16")

    def network_flags(self, trt: Any) -> int:
        """Return 0: there is nothing to choose."""
        del trt
        return 0

    def prepare_parser(self, trt: Any, parser: Any) -> None:
        """Do nothing: native InstanceNorm is the default."""
        del trt, parser

    def type_flags(self, trt: Any, network: Any, graph: Path, params: Mapping[str, Any]) -> tuple[str, ...]:
        """Return nothing: types are the graph's own."""
        del trt, network, graph, params
        return ()
