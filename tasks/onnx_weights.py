"""Weights that stay on disk: graphs with external data are read, changed and written without holding their large tensors.

A graph read by `load_streamed` names its external data by absolute paths, so that any tensor can be read alone (`read_external`),
and `save_streamed` copies each from where it lies, in the half type where `as_half` asked for that. A graph that is saved names one
file beside it again.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np

from tasks.onnx_files import DATA, EXTERNAL_THRESHOLD, GRAPH, load_graph, tensors_of

Array = np.ndarray[Any, np.dtype[Any]]

_CHUNK: Final = 8 << 20
_HALF: Final = (
    "enginery_half"  # a type that the tensor's values, float32 where they lie, are rounded to when they are copied
)
# Tensors of this size (bytes) are kept out of a graph while it is simplified, where all of them together are this large.
LARGE: Final = 1 << 20
APART: Final = 256 << 20


def load_streamed(path: Path) -> Any:
    """Read a graph as `load_graph` does, without its external data, whose places become absolute. Raises as that does."""
    model = load_graph(path, weights=False)
    for tensor in tensors_of(model):
        if is_external(tensor):
            for entry in tensor.external_data:
                if entry.key == "location":
                    entry.value = str(path.parent / entry.value)
    return model


def is_external(tensor: Any) -> bool:
    """Tell whether a tensor's values lie in another file."""
    return int(tensor.data_location) == 1  # TensorProto.EXTERNAL


def external_bytes(model: Any) -> int:
    """Return how many bytes of a model's tensors lie in other files."""
    return sum(_span(tensor)[2] for tensor in tensors_of(model) if is_external(tensor))


def read_external(tensor: Any) -> bytes:
    """Return a tensor's bytes, read from its absolute place: as they lie there, without a rounding that is still to come."""
    path, offset, length = _span(tensor)
    with path.open("rb") as stream:
        stream.seek(offset)
        return stream.read(length)


def as_half(tensor: Any, name: str, elem: int, half: str) -> Any:
    """Return an external float32 tensor under another name and in a half type; it is rounded when it is saved."""
    made = type(tensor)()
    made.CopyFrom(tensor)
    made.name, made.data_type = name, elem
    made.external_data.add(key=_HALF, value=half)
    return made


def inline(tensor: Any) -> None:
    """Bring an external tensor's values into the graph."""
    tensor.raw_data = read_external(tensor)
    tensor.ClearField("external_data")
    tensor.ClearField("data_location")


def save_streamed(model: Any, folder: Path) -> None:
    """Write `model.onnx` with all but its small tensors in `model.onnx.data`, a piece at a time; the model given is changed."""
    with (folder / DATA).open("wb") as data:
        for tensor in tensors_of(model):
            if is_external(tensor):
                offset = data.tell()
                for piece in _pieces(tensor):
                    data.write(piece)
                _place(tensor, offset, data.tell() - offset)
            elif tensor.HasField("raw_data") and len(tensor.raw_data) >= EXTERNAL_THRESHOLD:
                offset, length = data.tell(), len(tensor.raw_data)
                data.write(tensor.raw_data)
                tensor.ClearField("raw_data")
                _place(tensor, offset, length)
        empty = data.tell() == 0
    if empty:
        (folder / DATA).unlink()
    (folder / GRAPH).write_bytes(model.SerializeToString(deterministic=True))


def set_apart(model: Any) -> dict[str, Any]:
    """Make the large external initialisers of a streamed model inputs, and return them by name; small ones come into it."""
    apart: dict[str, Any] = {}
    kept = []
    for tensor in model.graph.initializer:
        copied = type(tensor)()
        copied.CopyFrom(tensor)
        if is_external(tensor) and _span(tensor)[2] >= LARGE:
            apart[tensor.name] = copied
        else:
            kept.append(copied)
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    listed = {value.name for value in model.graph.input}
    for name, tensor in apart.items():
        if name not in listed:
            value = model.graph.input.add(name=name)
            value.type.tensor_type.elem_type = tensor.data_type
            for extent in tensor.dims:
                value.type.tensor_type.shape.dim.add(dim_value=extent)
    for tensor in tensors_of(model):
        if is_external(tensor):
            inline(tensor)
    return apart


def put_back(model: Any, apart: dict[str, Any]) -> None:
    """Make the inputs that `set_apart` made initialisers again, as far as anything reads them."""
    kept = [value for value in model.graph.input if value.name not in apart]
    inputs = [type(value).FromString(value.SerializeToString()) for value in kept]
    del model.graph.input[:]
    model.graph.input.extend(inputs)
    read = _names_read(model)
    model.graph.initializer.extend(tensor for name, tensor in apart.items() if name in read)


def _names_read(model: Any) -> set[str]:
    from tasks.onnx_files import graphs_of

    read = {value.name for value in model.graph.output}
    for graph in graphs_of(model):
        read.update(name for node in graph.node for name in node.input)
        read.update(value.name for value in graph.output)
    return read


def _span(tensor: Any) -> tuple[Path, int, int]:
    entries = {entry.key: entry.value for entry in tensor.external_data}
    path, offset = Path(entries["location"]), int(entries.get("offset", "0"))
    length = int(entries["length"]) if "length" in entries else path.stat().st_size - offset
    return path, offset, length


def _pieces(tensor: Any) -> Iterator[bytes]:
    half = next((entry.value for entry in tensor.external_data if entry.key == _HALF), None)
    path, offset, left = _span(tensor)
    with path.open("rb") as stream:
        stream.seek(offset)
        while left:
            piece = stream.read(min(_CHUNK, left))
            if not piece:
                raise OSError(f"{path.name} ended before tensor {tensor.name!r} did")
            left -= len(piece)
            yield piece if half is None else _rounded(piece, half)


def _rounded(piece: bytes, half: str) -> bytes:
    from tasks.halves import round_to_half

    values = np.frombuffer(piece, np.float32)
    return round_to_half(values, "bf16" if half == "bf16" else "fp16").tobytes()


def _place(tensor: Any, offset: int, length: int) -> None:
    tensor.data_location = 1
    del tensor.external_data[:]
    for key, value in (("location", DATA), ("offset", offset), ("length", length)):
        tensor.external_data.add(key=key, value=str(value))
