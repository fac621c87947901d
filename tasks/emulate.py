"""Half-precision graphs run honestly on a CPU: fp32 kernels, every result rounded to the half type.

ONNX Runtime's CPU provider has few half kernels. It computes float16 graphs in float32 and drops the casts between
nodes, so that 300 * 300 stays 90000 where a GPU finds infinity (measured on 1.31), and it has hardly any bfloat16
kernels at all. Explicit float32 -> half -> float32 casts it keeps. So each node here computes in float32 (as tensor
cores accumulate) and its result takes that round trip. What remains different from a GPU is the order of sums.

TF32 is no type of ONNX: what Conv, ConvTranspose, MatMul and Gemm multiply is rounded to its 10 bits by arithmetic.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import onnx
from onnx import TensorProto, helper

from tasks.graphs import array_of, fresh_names, graphs_in, tensor_types

HALVES: Final = (TensorProto.FLOAT16, TensorProto.BFLOAT16)
# What TensorRT computes in TF32 where it is allowed to.
_MULTIPLIES: Final = frozenset(["Conv", "ConvTranspose", "MatMul", "Gemm"])
# 2^13 + 1 cuts float32's 24 significant bits to 11, the leading one included.
_SPLITTER: Final = 8193.0
# These move values without changing them, so that what went in rounded comes out rounded.
_MOVES: Final = frozenset(
    [
        "Concat", "Expand", "Flatten", "Gather", "GatherElements", "GatherND", "Identity", "MaxPool", "Pad", "Relu",
        "Reshape", "Slice", "Split", "Squeeze", "Tile", "Transpose", "Unsqueeze", "Where",
    ]
)  # fmt: skip


def is_half(model: onnx.ModelProto) -> bool:
    """Say whether any node of the graph computes in float16 or bfloat16."""
    weights = any(tensor.data_type in HALVES for tensor in model.graph.initializer)
    casts = any(
        attribute.name == "to" and attribute.i in HALVES for node in model.graph.node for attribute in node.attribute
    )
    values = any(value.type.tensor_type.elem_type in HALVES for value in (*model.graph.input, *model.graph.output))
    return weights or casts or values


def emulated(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a float32 graph that gives what the half graph would: inputs and outputs float32, results rounded.

    The model given is changed. Bodies of control flow must not hold half tensors (the `type` stage writes none).
    """
    graph = model.graph
    halves = {name: elem for name, elem in tensor_types(model).items() if elem in HALVES}
    fresh = fresh_names(model)
    for index, tensor in enumerate(graph.initializer):
        if tensor.data_type in HALVES:
            graph.initializer[index].CopyFrom(_widened(tensor))
    nodes: list[onnx.NodeProto] = []

    def rounded(source: str, target: str, elem: int) -> None:
        middle = fresh(f"{target}_rounded")
        nodes.append(helper.make_node("Cast", [source], [middle], name=fresh(f"{target}_round"), to=elem))
        nodes.append(helper.make_node("Cast", [middle], [target], name=fresh(f"{target}_widen"), to=TensorProto.FLOAT))

    renamed: dict[str, str] = {}
    for value in graph.input:
        if value.name in halves and value.type.tensor_type.elem_type in HALVES:
            value.type.tensor_type.elem_type = TensorProto.FLOAT
            renamed[value.name] = fresh(f"{value.name}_half")
            rounded(value.name, renamed[value.name], halves[value.name])
    for node in graph.node:
        for index, name in enumerate(node.input):
            node.input[index] = renamed.get(name, name)
        _widen_attributes(node)
        pending = []
        for index, name in enumerate(node.output):
            if name in halves and node.op_type not in _MOVES:
                node.output[index] = fresh(f"{name}_exact")
                pending.append((node.output[index], name, halves[name]))
        nodes.append(node)
        for exact, name, elem in pending:
            rounded(exact, name, elem)
    for value in graph.output:
        if value.type.tensor_type.elem_type in HALVES:
            value.type.tensor_type.elem_type = TensorProto.FLOAT
    copied = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:], graph.value_info[:]
    graph.node.extend(copied)
    return model


def as_tf32(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a graph whose products have factors of TF32: 8 bits of exponent, 10 of mantissa, rounded to nearest.

    x is rounded as c - (c - x) with c = (2^13 + 1) x (Veltkamp 1968; exact in float32 for |x| below 4e34). Sums stay
    float32, as on tensor cores. Bodies of control flow stay as they are. The model given is changed.
    """
    graph, fresh = model.graph, fresh_names(model)
    floats = {name for name, elem in tensor_types(model).items() if elem == TensorProto.FLOAT}
    splitter = fresh("tf32_splitter")
    nodes: list[onnx.NodeProto] = []
    rounded: dict[str, str] = {}
    for node in graph.node:
        if node.op_type in _MULTIPLIES and node.domain in ("", "ai.onnx"):
            for index, name in enumerate(node.input[:2]):
                if name in floats and name not in rounded:
                    scaled, rest, rounded[name] = (fresh(f"{name}_{part}") for part in ("scaled", "rest", "tf32"))
                    for op, factors, result in (
                        ("Mul", (name, splitter), scaled),
                        ("Sub", (scaled, name), rest),
                        ("Sub", (scaled, rest), rounded[name]),
                    ):
                        nodes.append(helper.make_node(op, factors, [result], name=fresh(f"{result}_node")))
                node.input[index] = rounded.get(name, name)
        nodes.append(node)
    copied = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:], graph.value_info[:]
    graph.node.extend(copied)
    graph.initializer.append(helper.make_tensor(splitter, TensorProto.FLOAT, [], [_SPLITTER]))
    return model


def _widen_attributes(node: onnx.NodeProto) -> None:
    for attribute in node.attribute:
        if node.op_type == "Cast" and attribute.name == "to" and attribute.i in HALVES:
            attribute.i = TensorProto.FLOAT  # its result is rounded like any other
        elif attribute.HasField("t") and attribute.t.data_type in HALVES:
            attribute.t.CopyFrom(_widened(attribute.t))
    for graph in graphs_in(node):
        if any(tensor.data_type in HALVES for tensor in graph.initializer):
            raise ValueError(f"the body of {node.name!r} holds half tensors")


def _widened(tensor: onnx.TensorProto) -> onnx.TensorProto:
    values: np.ndarray[Any, np.dtype[Any]] = array_of(tensor).astype(np.float32)
    return TensorProto(name=tensor.name, data_type=TensorProto.FLOAT, dims=tensor.dims, raw_data=values.tobytes())
