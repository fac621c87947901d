"""What typing asks of an ONNX graph: unique node names, globs on them, element types, weights as initialisers."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper, shape_inference

from tasks.errors import BackendError
from tasks.onnx_files import graphs_of
from tasks.onnx_weights import is_external, read_external


def tensor_types(model: onnx.ModelProto) -> dict[str, int]:
    """Return the element type (onnx.TensorProto.DataType) of every tensor of the top-level graph that can be inferred."""
    inferred = shape_inference.infer_shapes(_without_weights(model)).graph
    types = {tensor.name: tensor.data_type for tensor in inferred.initializer}
    for value in (*inferred.value_info, *inferred.input, *inferred.output):
        if value.type.HasField("tensor_type") and value.type.tensor_type.elem_type:
            types[value.name] = value.type.tensor_type.elem_type
    return types


def inferred_values(model: onnx.ModelProto) -> list[onnx.ValueInfoProto]:
    """Return type and shape of what nodes of the top-level graph give, as far as they follow; weights are not looked at."""
    return list(shape_inference.infer_shapes(_without_weights(model)).graph.value_info)


def half_nodes(model: onnx.ModelProto) -> list[str]:
    """Return the operators of the top-level graph that compute float16 or bfloat16, sorted; casts compute nothing."""
    halves = (onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)
    types = tensor_types(model)
    return sorted(
        {
            node.op_type
            for node in model.graph.node
            if node.op_type != "Cast" and any(types.get(name) in halves for name in node.output)
        }
    )


def name_nodes(model: onnx.ModelProto) -> None:
    """Give every node of the top-level graph a name that no other has; names that are unique already stay."""
    taken: set[str] = set()
    for node in model.graph.node:
        wanted = node.name or f"{node.op_type}_{next(iter(filter(None, node.output)), 'none')}"
        name, count = wanted, 0
        while name in taken:
            count += 1
            name = f"{wanted}_{count}"
        taken.add(name)
        node.name = name


def hoist_constants(model: onnx.ModelProto) -> None:
    """Turn Constant nodes of the top-level graph that hold floats into initialisers, under the same name."""
    kept = []
    for node in model.graph.node:
        tensor = _constant_value(node)
        if tensor is None:
            kept.append(node)
        else:
            tensor.name = node.output[0]
            model.graph.initializer.append(tensor)
    if len(kept) != len(model.graph.node):
        del model.graph.node[:]
        model.graph.node.extend(kept)


def matching_nodes(model: onnx.ModelProto, globs: Sequence[str]) -> set[str]:
    """Return the names of the nodes that any glob (fnmatch, case sensitive) matches.

    Raises BackendError("bad data") for globs that match no node, with the nearest names.
    """
    names = [node.name for node in model.graph.node if node.name]
    found: set[str] = set()
    misses = []
    for glob in globs:
        matched = {name for name in names if fnmatch.fnmatchcase(name, glob)}
        found |= matched
        if not matched:
            near = difflib.get_close_matches(glob.strip("*"), names, n=3, cutoff=0.3) or sorted(names)[:3]
            misses.append(f"precision.keep {glob!r} matches none of {len(names)} nodes (nearest: {', '.join(near)})")
    if misses:
        raise BackendError("bad data", "; ".join(misses), "use node names of the simplified graph, or remove the glob")
    return found


def graphs_in(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    """Yield the graphs that a node (If, Loop, Scan) holds, outer ones first."""
    for attribute in node.attribute:
        for graph in (*((attribute.g,) if attribute.HasField("g") else ()), *attribute.graphs):
            yield graph
            for inner in graph.node:
                yield from graphs_in(inner)


def fresh_names(model: onnx.ModelProto) -> FreshNames:
    """Return a source of tensor and node names that the model does not use yet."""
    taken: set[str] = set()
    for graph in graphs_of(model):
        taken.update(value.name for value in (*graph.input, *graph.output, *graph.value_info))
        taken.update(tensor.name for tensor in graph.initializer)
        for node in graph.node:
            taken.update((node.name, *node.input, *node.output))
    return FreshNames(taken)


class FreshNames:
    """Makes names that are not taken: the one wanted, else with the least number appended."""

    def __init__(self, taken: set[str]) -> None:
        """Take the names in use."""
        self._taken = taken

    def __call__(self, wanted: str) -> str:
        """Return a new name like `wanted`, and take it."""
        name, count = wanted, 0
        while name in self._taken:
            count += 1
            name = f"{wanted}_{count}"
        self._taken.add(name)
        return name


def array_of(tensor: onnx.TensorProto) -> np.ndarray[Any, np.dtype[Any]]:
    """Return a tensor's values; bfloat16 comes back widened to float32 (onnx gives bits, differently by version)."""
    if tensor.data_type == onnx.TensorProto.BFLOAT16:
        bits = np.frombuffer(tensor.raw_data, "<u2") if tensor.raw_data else np.array(tensor.int32_data)
        return (bits.astype(np.uint32) << 16).view(np.float32).reshape(tuple(tensor.dims))
    if is_external(tensor):
        kind = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
        return np.frombuffer(read_external(tensor), kind).reshape(tuple(tensor.dims))
    values: np.ndarray[Any, np.dtype[Any]] = numpy_helper.to_array(tensor)
    return values


def _constant_value(node: onnx.NodeProto) -> onnx.TensorProto | None:
    if node.op_type != "Constant" or node.domain not in ("", "ai.onnx"):
        return None
    for attribute in node.attribute:
        if attribute.name == "value" and attribute.t.data_type == onnx.TensorProto.FLOAT:
            tensor = onnx.TensorProto()
            tensor.CopyFrom(attribute.t)
            return tensor
        if attribute.name == "value_float":
            return helper.make_tensor(node.output[0], onnx.TensorProto.FLOAT, [], [attribute.f])
        if attribute.name == "value_floats":
            return helper.make_tensor(node.output[0], onnx.TensorProto.FLOAT, [len(attribute.floats)], attribute.floats)
    return None


def _without_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """Copy a model, weights declared as inputs instead: types follow all the same, below protobuf's limit of 2 GiB."""
    skeleton = onnx.ModelProto(ir_version=model.ir_version, opset_import=model.opset_import)
    skeleton.functions.extend(model.functions)
    graph, source = skeleton.graph, model.graph
    graph.name = source.name
    graph.node.extend(source.node)
    graph.input.extend(source.input)
    graph.output.extend(source.output)
    graph.value_info.extend(source.value_info)
    named = {value.name for value in source.input}
    for tensor in source.initializer:
        if tensor.ByteSize() <= 4096:
            graph.initializer.append(tensor)
        elif tensor.name not in named:
            graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    return skeleton
