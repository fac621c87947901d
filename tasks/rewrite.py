"""Rewrites of a graph before a compiler reads it: equal results, in forms that compilers fuse.

Each pass looks for one pattern, checks what makes it exact up to rounding, and counts what it changed; where anything does
not fit, the graph stays as it is. Who calls them compares the two graphs by running both (`tasks.simplify`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Final

import numpy as np
import onnx
from onnx import helper

from tasks.attention_rewrites import plain_softmax
from tasks.graph_index import Graph, Linear, bypass, linear_of, projection_of
from tasks.graphs import hoist_constants
from tasks.onnx_files import graphs_of


def rewrite(model: onnx.ModelProto, passes: tuple[str, ...]) -> dict[str, int]:
    """Apply the named passes in order, in place, and return how often each changed something.

    Raises KeyError for a name that is none of PASSES. Constants that nothing reads any more are dropped. A graph with control
    flow stays as it is: the bodies of its branches and loops may read any tensor.
    """
    if len(list(graphs_of(model))) > 1:
        return dict.fromkeys(passes, 0)
    hoist_constants(model)
    counts = {}
    for name in passes:
        counts[name] = PASSES[name](Graph(model))
        _drop_unused(model)
    return counts


def fold_scales(graph: Graph) -> int:
    """Multiply a scalar factor of queries, keys or attention scores into the projection that they come from.

    x W c = x (W c): what is scaled must reach the factor through moves alone, and nothing else may read it on the way. A
    factor of MatMul(q, k) goes into q's projection.
    """
    count = 0
    for node in graph.nodes():
        factor = _factor(graph, node)
        if factor is None:
            continue
        data, scale = factor
        linear = projection_of(graph, data)
        scores = graph.maker.get(data)
        if linear is None and scores is not None and scores.op_type == "MatMul" and graph.only_reader(data) is not None:
            linear = projection_of(graph, scores.input[0])
        if linear is None or _shared(graph, linear):
            continue
        name = f"{linear.product.input[1]}_scaled"
        linear.product.input[1] = graph.add_constant(name, (linear.matrix * scale).astype(linear.matrix.dtype))
        if linear.bias is not None and linear.vector is not None:
            index = list(linear.bias.input).index(linear.vector_name)
            scaled = (linear.vector * scale).astype(linear.vector.dtype)
            linear.bias.input[index] = graph.add_constant(f"{linear.vector_name}_scaled", scaled)
        bypass(graph, node, data)
        count += 1
    return count


def _factor(graph: Graph, node: onnx.NodeProto) -> tuple[str, float] | None:
    """Return what a node multiplies by a scalar constant, and the scalar."""
    if node.op_type not in ("Mul", "Div"):
        return None
    for data, other in ((node.input[0], node.input[1]), (node.input[1], node.input[0])):
        values = graph.value(other)
        if values is not None and values.size == 1 and data not in graph.constants:
            if node.op_type == "Div" and other == node.input[0]:
                return None
            number = float(values.reshape(()))
            return data, (number if node.op_type == "Mul" else 1 / number)
    return None


def _shared(graph: Graph, linear: Linear) -> bool:
    """Say whether another node reads the product before its bias was added."""
    return linear.bias is None and graph.only_reader(linear.product.output[0]) is None


def merge_projections(graph: Graph) -> int:
    """Turn linear layers that read one tensor (queries, keys, values) into one, whose result is split.

    Their matrices must have one height and one type; a bias that one of them lacks is zero.
    """
    count = 0
    groups: dict[str, list[str]] = defaultdict(list)
    for node in graph.model.graph.node:
        if node.op_type == "MatMul" and linear_of(graph, node) is not None:
            groups[node.input[0]].append(node.output[0])
    for source, products in groups.items():
        found = [linear_of(graph, graph.maker[name]) for name in products]
        linears = [linear for linear in found if linear is not None]
        if len(linears) < 2 or len({(linear.matrix.shape[0], linear.matrix.dtype) for linear in linears}) > 1:
            continue
        _merge(graph, source, linears)
        count += 1
    return count


def _merge(graph: Graph, source: str, linears: list[Linear]) -> None:
    stem = graph.fresh(f"{linears[0].product.name}_merged")
    matrix = np.concatenate([linear.matrix for linear in linears], axis=1)
    made = f"{stem}_product"
    nodes = [helper.make_node("MatMul", [source, graph.add_constant(f"{stem}_weight", matrix)], [made], name=stem)]
    if any(linear.vector is not None for linear in linears):
        parts = [
            np.zeros(linear.matrix.shape[1], matrix.dtype) if linear.vector is None else linear.vector
            for linear in linears
        ]
        bias = graph.add_constant(f"{stem}_bias", np.concatenate(parts))
        nodes.append(helper.make_node("Add", [made, bias], [f"{stem}_shifted"], name=f"{stem}_add"))
        made = f"{stem}_shifted"
    sizes = graph.add_constant(f"{stem}_sizes", np.array([linear.matrix.shape[1] for linear in linears], np.int64))
    outputs = [linear.output for linear in linears]
    nodes.append(helper.make_node("Split", [made, sizes], outputs, name=f"{stem}_split", axis=-1))
    old = [linear.product for linear in linears] + [linear.bias for linear in linears if linear.bias is not None]
    graph.replace(old, nodes)


def drop_moves(graph: Graph) -> int:
    """Drop what moves nothing: Identity, and Pad by zeros; join two Reshapes in a row into the last one."""
    count = 0
    for node in graph.nodes():
        if node.op_type == "Pad":
            pads = graph.value(node.input[1]) if len(node.input) > 1 else None  # an attribute before opset 11
            idle = pads is not None and not pads.any()
        else:
            idle = node.op_type == "Identity" and node.input[0] not in graph.constants
        if idle and node.output[0] not in graph.outputs:
            bypass(graph, node, node.input[0])
            count += 1
    for node in graph.nodes():
        if node.op_type != "Reshape":
            continue
        first = graph.maker.get(node.input[0])
        shape = graph.value(node.input[1])
        if first is None or first.op_type != "Reshape" or graph.only_reader(first.output[0]) is None:
            continue
        if shape is None or (shape == 0).any():  # 0 copies an extent of the tensor in between
            continue
        reader = graph.readers[first.output[0]][0]
        reader.input[0] = first.input[0]
        graph.replace([first], [])
        count += 1
    return count


def decompose_layernorm(graph: Graph) -> int:
    """Write LayerNormalization over the last axis as the arithmetic that it stands for."""
    count = 0
    for node in graph.nodes():
        attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
        if node.op_type != "LayerNormalization" or attributes.get("axis", -1) != -1 or len(node.output) > 1:
            continue
        scale = graph.value(node.input[1])
        if scale is None:
            continue
        kind, stem = scale.dtype, graph.fresh(f"{node.name or node.output[0]}_parts")
        eps = graph.add_constant(f"{stem}_eps", np.array(attributes.get("epsilon", 1e-5), kind))
        two = graph.add_constant(f"{stem}_two", np.array(2, kind))
        names = {
            part: f"{stem}_{part}" for part in ("mean", "gap", "square", "variance", "sum", "root", "unit", "wide")
        }
        last = node.output[0]
        has_bias = len(node.input) > 2 and bool(node.input[2])
        steps = [
            ("ReduceMean", [node.input[0]], names["mean"]),
            ("Sub", [node.input[0], names["mean"]], names["gap"]),
            ("Pow", [names["gap"], two], names["square"]),
            ("ReduceMean", [names["square"]], names["variance"]),
            ("Add", [names["variance"], eps], names["sum"]),
            ("Sqrt", [names["sum"]], names["root"]),
            ("Div", [names["gap"], names["root"]], names["unit"]),
            ("Mul", [names["unit"], node.input[1]], names["wide"] if has_bias else last),
            *([("Add", [names["wide"], node.input[2]], last)] if has_bias else []),
        ]
        nodes = [
            helper.make_node(
                op, inputs, [output], name=f"{output}_node", **({"axes": [-1]} if op == "ReduceMean" else {})
            )
            for op, inputs, output in steps
        ]
        graph.replace([node], nodes)
        count += 1
    return count


def _drop_unused(model: onnx.ModelProto) -> None:
    read = {name for node in model.graph.node for name in node.input} | {value.name for value in model.graph.output}
    for index in reversed(range(len(model.graph.initializer))):
        if model.graph.initializer[index].name not in read:
            del model.graph.initializer[index]


PASSES: Final[Mapping[str, Callable[[Graph], int]]] = {
    "drop-moves": drop_moves,
    "plain-softmax": plain_softmax,
    "fold-scales": fold_scales,
    "merge-projections": merge_projections,
    "decompose-layernorm": decompose_layernorm,
}
