"""A graph that passes of `tasks.rewrite` read and change: who makes and who reads each tensor, and its linear layers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import onnx
from onnx import helper, numpy_helper

from tasks.graphs import FreshNames, array_of, fresh_names

Array = np.ndarray[Any, np.dtype[Any]]
_MOVES: Final = ("Reshape", "Transpose", "Identity", "Squeeze", "Unsqueeze", "Flatten")


class Graph:
    """The top-level graph with who makes and who reads each tensor."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = model
        self.fresh: FreshNames = fresh_names(model)
        self.constants = {tensor.name: tensor for tensor in model.graph.initializer}
        self.outputs = {value.name for value in model.graph.output}
        self.index()

    def index(self) -> None:
        """Find makers and readers anew."""
        self.maker: dict[str, onnx.NodeProto] = {}
        self.readers: dict[str, list[onnx.NodeProto]] = defaultdict(list)
        for node in self.model.graph.node:
            for name in node.output:
                self.maker[name] = node
            for name in node.input:
                self.readers[name].append(node)

    def nodes(self) -> Iterator[onnx.NodeProto]:
        """Yield the nodes that are there now and still there when their turn comes; passes may replace any meanwhile."""
        for name in [node.output[0] for node in self.model.graph.node]:
            node = self.maker.get(name)
            if node is not None and node.output[0] == name:
                yield node

    def only_reader(self, name: str) -> onnx.NodeProto | None:
        """Return the node that alone reads a tensor which is no output of the graph."""
        readers = self.readers.get(name, [])
        return readers[0] if len(readers) == 1 and name not in self.outputs else None

    def value(self, name: str) -> Array | None:
        """Return a constant's values."""
        tensor = self.constants.get(name)
        return None if tensor is None else array_of(tensor)

    def add_constant(self, wanted: str, values: Array) -> str:
        """Add a constant and return its name."""
        name = self.fresh(wanted)
        tensor = numpy_helper.from_array(np.ascontiguousarray(values), name)
        self.model.graph.initializer.append(tensor)
        self.constants[name] = tensor
        return name

    def replace(self, old: list[onnx.NodeProto], new: list[onnx.NodeProto]) -> None:
        """Put nodes where the first of the old ones was: they may read only what is known there."""
        gone = {id(node) for node in old}
        nodes: list[onnx.NodeProto] = []
        placed = False
        for node in self.model.graph.node:
            if id(node) not in gone:
                nodes.append(node)
            elif not placed:
                nodes.extend(new)
                placed = True
        copied = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
        del self.model.graph.node[:]
        self.model.graph.node.extend(copied)
        self.index()


@dataclass
class Linear:
    """A MatMul with a constant matrix, and the Add of a constant vector that alone reads it, if there is one."""

    product: onnx.NodeProto
    matrix: Array
    output: str
    bias: onnx.NodeProto | None = None
    vector: Array | None = None
    vector_name: str = ""


def linear_of(graph: Graph, node: onnx.NodeProto | None) -> Linear | None:
    """Return the linear layer that a node belongs to: its MatMul, or its Add."""
    if node is None:
        return None
    if node.op_type == "Add":
        products = [graph.maker[name] for name in node.input if name in graph.maker]
        found = [linear for linear in (linear_of(graph, p) for p in products if p.op_type == "MatMul") if linear]
        return next((linear for linear in found if linear.bias is node), None)
    matrix = graph.value(node.input[1]) if node.op_type == "MatMul" else None
    if matrix is None or matrix.ndim != 2:
        return None
    output = node.output[0]
    linear = Linear(node, matrix, output)
    added = graph.only_reader(output)
    if added is not None and added.op_type == "Add":
        other = added.input[1] if added.input[0] == output else added.input[0]
        vector = graph.value(other)
        if vector is not None and vector.shape == matrix.shape[1:]:
            linear.bias, linear.vector, linear.vector_name = added, vector, other
            linear.output = added.output[0]
    return linear


def projection_of(graph: Graph, name: str) -> Linear | None:
    """Walk up through moves that nothing else reads; return the linear layer where they start."""
    while graph.only_reader(name) is not None:
        node = graph.maker.get(name)
        if node is None:
            return None
        if node.op_type not in _MOVES:
            return linear_of(graph, node)
        name = node.input[0]
    return None


def bypass(graph: Graph, node: onnx.NodeProto, source: str) -> None:
    """Let the readers of a node read its input instead; the node goes."""
    target = node.output[0]
    if target in graph.outputs:
        identity = helper.make_node("Identity", [source], [target], name=graph.fresh(f"{node.name}_kept"))
        graph.replace([node], [identity])
        return
    for reader in graph.readers[target]:
        for index, name in enumerate(reader.input):
            if name == target:
                reader.input[index] = source
    graph.replace([node], [])
