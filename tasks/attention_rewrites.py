"""Attention as compilers look for it: MatMul, an Add of a mask where there is one, Softmax, MatMul, and nothing in between.

TensorRT 8.6 runs that as one kernel ("mha"); a mask of zeros or a guard against NaN makes it five, with the scores in memory.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import helper

from tasks.graph_index import Array, Graph, bypass


def plain_softmax(graph: Graph) -> int:
    """Drop masks of zeros before a Softmax, and guards that turn its NaN into a number where a row cannot be all -inf.

    PyTorch writes both where attention got a mask: scores plus 0 where every position may be seen, and
    Where(IsNaN(p), 0, p), since a row that may see nothing has no softmax. On finite scores the results are equal; scores
    that overflowed give NaN in place of 0.
    """
    shapes = _shapes(graph.model)
    count = 0
    for node in graph.nodes():
        if node.op_type == "Softmax" and _drop_zeros(graph, node, shapes):
            count += 1
    for node in graph.nodes():
        if node.op_type == "Where" and _drop_guard(graph, node):
            count += 1
    return count


def _drop_zeros(graph: Graph, softmax: onnx.NodeProto, shapes: dict[str, tuple[Any, ...]]) -> bool:
    added = graph.maker.get(softmax.input[0])
    mask = None if added is None else _mask_of(graph, added)
    if added is None or mask is None or graph.only_reader(added.output[0]) is None:
        return False
    name, values = mask
    data = added.input[1] if added.input[0] == name else added.input[0]
    shape = shapes.get(data, ())
    if values.any() or not _fits(values.shape, shape):
        return False
    bypass(graph, added, data)
    return True


def _fits(small: tuple[int, ...], shape: tuple[Any, ...]) -> bool:
    """Tell whether adding an array of the first shape to a tensor of the second leaves that shape as it is."""
    if len(small) > len(shape):
        return False
    return all(extent in (1, other) for extent, other in zip(reversed(small), reversed(shape), strict=False))


def _drop_guard(graph: Graph, where: onnx.NodeProto) -> bool:
    test, guarded = graph.maker.get(where.input[0]), where.input[2]
    softmax = graph.maker.get(guarded)
    if test is None or test.op_type != "IsNaN" or test.input[0] != guarded or graph.value(where.input[1]) is None:
        return False
    if softmax is None or softmax.op_type != "Softmax" or not _sees_something(graph, softmax):
        return False
    substitute = graph.value(where.input[1])
    if substitute is None or substitute.size != 1:  # a larger one would give the result its shape
        return False
    bypass(graph, where, guarded)
    if graph.readers.get(test.output[0]) or test.output[0] in graph.outputs:
        return True
    graph.replace([graph.maker[test.output[0]]], [])
    return True


def _sees_something(graph: Graph, softmax: onnx.NodeProto) -> bool:
    """Tell whether each row that a Softmax over the last axis gets has a position that no mask took away."""
    axis = next(
        (helper.get_attribute_value(attribute) for attribute in softmax.attribute if attribute.name == "axis"), -1
    )
    scores = graph.maker.get(softmax.input[0])
    mask = None if scores is None else _mask_of(graph, scores)
    if mask is not None and scores is not None:
        name, values = mask
        if axis != -1 and axis != values.ndim - 1:
            return False
        if not np.isfinite(np.max(values, axis=-1, initial=-np.inf)).all():
            return False
        scores = graph.maker.get(scores.input[1] if scores.input[0] == name else scores.input[0])
    while scores is not None and scores.op_type in ("Mul", "Div"):
        other = next((name for name in scores.input if graph.value(name) is not None), None)
        factor = None if other is None else graph.value(other)
        if factor is None or not np.isfinite(factor).all():
            return False
        data = scores.input[1] if scores.input[0] == other else scores.input[0]
        scores = graph.maker.get(data)
    return scores is not None and scores.op_type == "MatMul"


def _mask_of(graph: Graph, node: onnx.NodeProto) -> tuple[str, Array] | None:
    """Return the constant that an Add adds, and its name."""
    if node.op_type != "Add":
        return None
    for name in node.input:
        values = graph.value(name)
        if values is not None:
            return name, values
    return None


def _shapes(model: onnx.ModelProto) -> dict[str, tuple[Any, ...]]:
    """Return the shapes that are known; an axis without a known extent is its name or None."""
    try:
        known = onnx.shape_inference.infer_shapes(model)
    except (ValueError, RuntimeError):  # larger than protobuf takes, or inconsistent: what is written must do
        known = model
    values = [*known.graph.value_info, *known.graph.input, *known.graph.output]
    return {
        value.name: tuple(
            dim.dim_value if dim.HasField("dim_value") else dim.dim_param or None
            for dim in value.type.tensor_type.shape.dim
        )
        for value in values
        if value.type.tensor_type.HasField("shape")
    }
