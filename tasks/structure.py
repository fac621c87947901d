"""The structure of an ONNX graph: all of it but the values of its weights.

Two typed graphs of one structure differ in weights alone, so that an engine of the one can be refitted to the other.
A tensor counts as a weight where only operators read it that take it as data; what an operator may be specialised by
(a clip's bounds, the scales of Q/DQ pairs, shapes) is part of the structure, value and all.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any, Final

from onnx import NodeProto, TensorProto, ValueInfoProto

from tasks.graphs import array_of
from tasks.onnx_files import graphs_of

_FLOATS: Final = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE)
# Which inputs of an operator are data to it; None: every one.
_DATA_INPUTS: Final[dict[str, tuple[int, ...] | None]] = {
    "Add": None, "BatchNormalization": (1, 2, 3, 4), "Concat": None, "Conv": (1, 2), "ConvTranspose": (1, 2), "Div": None,
    "Einsum": None, "Expand": (0,), "Gather": (0,), "Gemm": None, "Identity": None, "LayerNormalization": (1, 2),
    "MatMul": None, "Mul": None, "PRelu": (1,), "QuantizeLinear": (0,), "Reshape": (0,), "Slice": (0,), "Squeeze": (0,),
    "Sub": None, "Transpose": None, "Unsqueeze": (0,),
}  # fmt: skip


def weights_of(model: Any) -> dict[str, Any]:
    """Return the weights of a model by name: TensorProtos of floats, initialisers and Constants of the top-level graph.

    They are the model's own: changing one changes the model.
    """
    found = {tensor.name: tensor for tensor in model.graph.initializer}
    found |= {node.output[0]: value for node in model.graph.node if (value := _constant(node)) is not None}
    weights = {name: tensor for name, tensor in found.items() if name and tensor.data_type in _FLOATS}
    for value in (*model.graph.input, *model.graph.output):
        weights.pop(value.name, None)
    top = model.graph
    for graph in graphs_of(model):
        for node in graph.node:
            standard = node.domain in ("", "ai.onnx") and graph is top
            taken = _DATA_INPUTS.get(node.op_type, ()) if standard else ()
            for index, name in enumerate(node.input):
                if taken is not None and index not in taken:
                    weights.pop(name, None)
        for value in graph.output:
            weights.pop(value.name, None)
    return weights


def structure_digest(model: Any) -> str:
    """Return the SHA-256 of a model's structure: operators, attributes, names, types, shapes, and all values but weights'.

    The model must have been read with its external data. Documentation, metadata and inferred shapes do not enter, nor
    does the order in which initialisers are stored.
    """
    weights = weights_of(model)
    digest = hashlib.sha256()
    for part in _parts(model, weights):
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()


def raw_values(tensor: Any) -> bytes:
    """Return the values of a TensorProto as they lie in memory."""
    return tensor.raw_data or array_of(tensor).tobytes()


def _parts(model: Any, weights: dict[str, Any]) -> Iterator[bytes]:
    for domain, version in sorted((entry.domain or "ai.onnx", entry.version) for entry in model.opset_import):
        yield f"opset {domain} {version}".encode()
    for function in model.functions:
        yield function.SerializeToString(deterministic=True)
    graph = model.graph
    initializers = {tensor.name: tensor for tensor in graph.initializer}
    for value in graph.input:
        if value.name not in initializers:
            yield b"input"
            yield _plain(value)
    for value in graph.output:  # whose shape follows
        yield f"output {value.name} {value.type.tensor_type.elem_type}".encode()
    for node in graph.node:
        if _constant(node) is not None and node.output[0] in weights:
            yield f"constant {node.name}".encode()
            yield from _declared(weights[node.output[0]], node.output[0])
        else:
            yield _plain(node)
    for name in sorted(initializers):
        yield b"initializer"
        yield from _declared(initializers[name], name)
        if name not in weights:
            yield _values(initializers[name])
    for sparse in graph.sparse_initializer:
        yield sparse.SerializeToString(deterministic=True)


def _plain(part: NodeProto | ValueInfoProto) -> bytes:
    copy = type(part)()
    copy.CopyFrom(part)
    for name in ("doc_string", "metadata_props"):
        if name in copy.DESCRIPTOR.fields_by_name:
            copy.ClearField(name)
    return bytes(copy.SerializeToString(deterministic=True))


def _declared(tensor: Any, name: str) -> Iterator[bytes]:
    yield f"{name} {TensorProto.DataType.Name(tensor.data_type)} {list(tensor.dims)}".encode()


def _values(tensor: Any) -> bytes:
    if tensor.data_type == TensorProto.STRING:
        return b"\0".join(tensor.string_data)
    return raw_values(tensor)


def _constant(node: Any) -> Any | None:
    """Return the tensor that a Constant node holds, if it is one."""
    if node.op_type != "Constant" or node.domain not in ("", "ai.onnx"):
        return None
    return next((attribute.t for attribute in node.attribute if attribute.name == "value"), None)
