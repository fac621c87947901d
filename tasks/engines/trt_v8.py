"""TensorRT 8.6: weakly typed. Flags allow what the typed graph uses, and constraints keep its fp32 parts as they are.

Types are read from the ONNX file: before a build, 8.6 says FLOAT of every tensor but the inputs and outputs (seen on an
H200: a network full of half tensors had none). There is no bf16 and no int64; Q/DQ pairs make int8 explicit, so no
calibrator is asked.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Final

from tasks.engines.trt_weak import hold_fp32
from tasks.graphs import matching_nodes, tensor_types
from tasks.onnx_files import load_graph

# Operators that move, describe or retype data: they have no arithmetic to constrain.
_NO_ARITHMETIC: Final = frozenset(
    (
        "Cast", "Concat", "Constant", "ConstantOfShape", "DequantizeLinear", "Expand", "Flatten", "Gather", "Identity", "If",
        "Loop", "Pad", "QuantizeLinear", "Reshape", "Scan", "Shape", "Size", "Slice", "Split", "Squeeze", "Tile", "Transpose",
        "Unsqueeze",
    )
)  # fmt: skip


class Weak:
    """8.6: EXPLICIT_BATCH networks, FP16 and INT8 flags."""

    opset: int | None = 17
    precisions: tuple[str, ...] = ("fp32", "tf32", "fp16", "int8", "int8-fp16")

    def network_flags(self, trt: Any) -> int:
        """Return EXPLICIT_BATCH, which parsed ONNX needs."""
        return 1 << int(trt.NetworkDefinitionCreationFlag.EXPLICIT_BATCH)

    def prepare_parser(self, trt: Any, parser: Any) -> None:
        """Ask for native InstanceNorm where the parser can be asked (8.6.1): version-compatible plans need it."""
        if hasattr(parser, "set_flag"):
            parser.set_flag(trt.OnnxParserFlag.NATIVE_INSTANCENORM)

    def type_flags(self, trt: Any, network: Any, graph: Path, params: Mapping[str, Any]) -> tuple[str, ...]:
        """Return FP16 where the graph has half tensors, INT8 where it has Q/DQ pairs; constrain fp32 beside half.

        With the FP16 flag alone, the builder would also run in half what the graph keeps in fp32. Of int8-fp16 that is what
        is wanted, but for the nodes of params["keep"]: halves beside the pairs of its fp32 graph.
        """
        flags, kept = typing_of(graph)
        if params.get("precision") == "int8-fp16":
            flags, kept = ("FP16", "INT8"), kept_beside_pairs(graph, params.get("keep", ()))
        return (*flags, *hold_fp32(trt, network, kept))


def kept_beside_pairs(graph: Path, keep: Collection[str]) -> frozenset[str]:
    """Return the names of the nodes with arithmetic that match the globs of `keep`; pairs, whose names may too, are none."""
    if not keep:
        return frozenset()
    model = load_graph(graph, weights=False)
    matched = matching_nodes(model, list(keep))
    return frozenset(
        node.name for node in model.graph.node if node.name in matched and node.op_type not in _NO_ARITHMETIC
    )


def typing_of(graph: Path) -> tuple[tuple[str, ...], frozenset[str]]:
    """Return the flags that a typed ONNX file needs, and the names of the nodes that compute in fp32 beside half ones."""
    import onnx

    model = load_graph(graph, weights=False)
    types = tensor_types(model)
    half = onnx.TensorProto.FLOAT16 in types.values()
    quantized = any(node.op_type in ("QuantizeLinear", "DequantizeLinear") for node in model.graph.node)
    flags = (*(("FP16",) if half else ()), *(("INT8",) if quantized else ()))
    kept = (
        node.name
        for node in model.graph.node
        if half
        and node.op_type not in _NO_ARITHMETIC
        and any(types.get(name) == onnx.TensorProto.FLOAT for name in node.output)
    )
    return flags, frozenset(kept)
