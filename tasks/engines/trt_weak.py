"""Weak typing, of 8.6 and (deprecated) 10: the builder gets the fp32 graph and flags that say what it may lower.

Every layer may then run in any precision that is allowed, whichever is fastest; constraints hold those in fp32 that the
recipe keeps, and those that int8 cannot express.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np

from tasks.graphs import matching_nodes
from tasks.onnx_files import load_graph

_FLAGS: Final = {
    "fp32": (),
    "tf32": (),
    "fp16": ("FP16",),
    "bf16": ("BF16",),
    "int8": ("INT8",),
    "int8-fp16": ("FP16", "INT8"),
}
_FROM_NODE: Final = re.compile(r"\[ONNX Layer: (.*?)\]")
# Which axis of a constant second input counts the channels that each have a scale, by operator.
_CHANNEL_AXES: Final = {"Conv": 0, "ConvTranspose": 1, "MatMul": -1, "Gemm": -1}


class Untyped:
    """8.6 and 10: networks that are not strongly typed."""

    def __init__(self, trt: Any) -> None:
        newer = hasattr(trt.BuilderFlag, "BF16")
        self.opset: int | None = None if newer else 17
        self.precisions: tuple[str, ...] = ("fp32", "tf32", "fp16", *(("bf16",) if newer else ()), "int8", "int8-fp16")

    def network_flags(self, trt: Any) -> int:
        """Return EXPLICIT_BATCH, which 8.6 needs and 10 ignores."""
        return 1 << int(trt.NetworkDefinitionCreationFlag.EXPLICIT_BATCH)

    def prepare_parser(self, trt: Any, parser: Any) -> None:
        """Ask for native InstanceNorm where the parser can be asked: it is the default of 10."""
        if hasattr(parser, "set_flag"):
            parser.set_flag(trt.OnnxParserFlag.NATIVE_INSTANCENORM)

    def type_flags(self, trt: Any, network: Any, graph: Path, params: Mapping[str, Any]) -> tuple[str, ...]:
        """Return the flag of params["precision"]; hold the nodes of params["keep"] in fp32.

        With params["calibrator"], also nodes with a channel of zeros: its scale would be zero, and quantising a bias by it
        ends 8.6 with `quantizeBiasCommon: Assertion getter(i) != 0`.
        """
        kept = nodes_in_fp32(graph, params.get("keep", ()), int8="calibrator" in params)
        return (*_FLAGS[params.get("precision", "fp32")], *hold_fp32(trt, network, kept))


def nodes_in_fp32(graph: Path, keep: Collection[str], *, int8: bool) -> frozenset[str]:
    """Return the names of the nodes that match the globs of `keep`; with `int8` also those with a channel of zeros."""
    if not keep and not int8:
        return frozenset()
    model = load_graph(graph, weights=int8)
    kept = matching_nodes(model, list(keep))
    return frozenset(kept | set(zero_channels(model))) if int8 else frozenset(kept)


def zero_channels(model: Any) -> list[str]:
    """Return the names of the nodes whose constant weights are zero for a whole output channel."""
    from onnx import numpy_helper

    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    found = []
    for node in model.graph.node:
        axis = _CHANNEL_AXES.get(node.op_type)
        if axis is None or len(node.input) < 2 or node.input[1] not in weights:
            continue
        values = numpy_helper.to_array(weights[node.input[1]])
        transposed = node.op_type == "Gemm" and any(each.name == "transB" and each.i for each in node.attribute)
        channels = np.moveaxis(values, 0 if transposed else axis, 0)
        if not np.abs(channels.reshape(len(channels), -1)).max(axis=1, initial=0).all():
            found.append(node.name)
    return found


def hold_fp32(trt: Any, network: Any, nodes: Collection[str]) -> tuple[str, ...]:
    """Constrain the layers that came from ONNX nodes to fp32; return the flag that makes the builder obey, if any."""
    layers = [network.get_layer(index) for index in range(network.num_layers)] if nodes else []
    constrained = False
    for layer in layers:
        floats = [i for i in range(layer.num_outputs) if layer.get_output(i).dtype == trt.DataType.FLOAT]
        if floats and not _nodes_of(layer).isdisjoint(nodes):
            layer.precision = trt.DataType.FLOAT
            constrained = True
            for index in floats:  # what is computed in fp32 must not be stored in half either
                layer.set_output_type(index, trt.DataType.FLOAT)
    return ("OBEY_PRECISION_CONSTRAINTS",) if constrained else ()


def _nodes_of(layer: Any) -> set[str]:
    """Return the ONNX nodes that a layer came from: 8.6 notes them as metadata, and names most layers after them."""
    return {layer.name, *_FROM_NODE.findall(getattr(layer, "metadata", "") or "")}
