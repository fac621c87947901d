"""ONNX graphs on disk: `model.onnx`, with `model.onnx.data` beside it where weights are external.

Reading refuses what is damaged or reaches outside its folder; writing is deterministic; facts are small JSON.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, Final

from artifacts.refs import ONNX, ONNX_DATA
from recipes.onnx_data import leads_out
from tasks.errors import BackendError

GRAPH: Final = "model.onnx"
DATA: Final = "model.onnx.data"
# Protobuf cannot serialise 2 GiB or more; weights leave the graph well before that.
INLINE_LIMIT: Final = 1_800_000_000
# Tensors below this size (bytes) stay in the graph: shape inference needs the small constants.
EXTERNAL_THRESHOLD: Final = 1024


def load_graph(path: Path, *, weights: bool = True) -> Any:
    """Read an ONNX file as a ModelProto, with its external data unless `weights` is false.

    Raises BackendError("bad data") where the file is not ONNX or is cut short, and where external data is missing,
    too short, or outside the file's folder.
    """
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]  # no stubs installed

    try:
        model = onnx.load_model(str(path), load_external_data=False)
    except DecodeError as err:
        raise _damaged(path, str(err)) from err
    if model.ir_version == 0 or not model.opset_import or not model.graph.output:
        raise _damaged(path, "it has no IR version, opset or outputs")
    has_external = False
    for tensor in tensors_of(model):
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            has_external = True
            _check_external(tensor, path)
        _check_extents(tensor, path)
    if has_external and weights:
        onnx.load_external_data_for_model(model, str(path.parent))
    return model


def has_external_data(model: Any) -> bool:
    """Tell whether any tensor of a model read with `weights=False` lies outside the graph file."""
    import onnx

    return any(tensor.data_location == onnx.TensorProto.EXTERNAL for tensor in tensors_of(model))


def save_graph(model: Any, folder: Path, *, external: bool = False) -> dict[str, str]:
    """Write a model as `model.onnx` (+ `model.onnx.data`) and return the files' media types.

    Weights go to the data file where `external` asks for it, the graph would exceed INLINE_LIMIT bytes, or some of them lie in
    another file (`tasks.onnx_weights`), from which they are copied.
    """
    from tasks.onnx_weights import is_external, save_streamed

    size = sum(len(tensor.raw_data) for tensor in tensors_of(model))
    if not external and size < INLINE_LIMIT and not any(map(is_external, tensors_of(model))):
        (folder / GRAPH).write_bytes(model.SerializeToString(deterministic=True))
        return {GRAPH: ONNX}
    save_streamed(model, folder)
    return {GRAPH: ONNX, DATA: ONNX_DATA} if (folder / DATA).exists() else {GRAPH: ONNX}


def infer_shapes(folder: Path) -> Any:
    """Infer the shapes of `model.onnx` in place and return it without its external data.

    Where notes of shapes inside of the graph (value_info), which bind no runtime, contradict, all of them are dropped and
    inferred anew: onnxsim 0.7.3 leaves wrong ones of a Swin-Tiny that PyTorch 2.11 exported. Raises BackendError("bad data") where anything else contradicts.
    """
    import onnx

    path = folder / GRAPH

    def infer() -> None:
        onnx.shape_inference.infer_shapes_path(str(path), str(path), check_type=True, strict_mode=True, data_prop=True)

    try:
        try:
            infer()
        except onnx.shape_inference.InferenceError:
            model = onnx.load_model(str(path), load_external_data=False)
            if not model.graph.value_info:
                raise
            del model.graph.value_info[:]
            path.write_bytes(model.SerializeToString(deterministic=True))
            infer()
    except (onnx.shape_inference.InferenceError, RuntimeError) as err:
        raise BackendError(
            "bad data", f"ONNX shape inference failed: {brief(err)}", "correct the model, or export it anew"
        ) from err
    return onnx.load_model(str(path), load_external_data=False)


def check_graph(path: Path) -> None:
    """Run onnx.checker with shape inference on a file. Raises BackendError with the checker's words."""
    import onnx

    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError, RuntimeError) as err:
        words = brief(err)
        if "ir_version" in words or "opset" in words.lower():
            raise BackendError(
                "version mismatch",
                f"onnx.checker {onnx.__version__}: {words}",
                "export the model at an earlier opset (export.opset, where an exporter writes it), or install a newer onnx",
            ) from err
        raise BackendError("bad data", f"onnx.checker: {words}", "the graph is not valid ONNX; export it anew") from err


def strip_notes(model: Any, *, keep_model_metadata: bool = False) -> None:
    """Remove doc strings and metadata (stack traces with paths, notes of exporters) from a model, in place."""
    model.ClearField("doc_string")
    if not keep_model_metadata:
        model.ClearField("metadata_props")
    for graph in graphs_of(model):
        parts = [graph, *graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer]
        parts += [attribute for node in graph.node for attribute in node.attribute]
        for part in parts:
            part.ClearField("doc_string")
            if "metadata_props" in part.DESCRIPTOR.fields_by_name:
                part.ClearField("metadata_props")
    for function in model.functions:
        function.ClearField("doc_string")
        function.ClearField("metadata_props")
        for node in function.node:
            node.ClearField("doc_string")
            node.ClearField("metadata_props")


def graphs_of(model: Any) -> Iterator[Any]:
    """Yield the graph and every subgraph of its nodes' attributes."""
    waiting = [model.graph]
    while waiting:
        graph = waiting.pop()
        yield graph
        for node in graph.node:
            for attribute in node.attribute:
                if attribute.HasField("g"):
                    waiting.append(attribute.g)
                waiting.extend(attribute.graphs)


def tensors_of(model: Any) -> Iterator[Any]:
    """Yield every tensor that a model holds: initialisers and tensor attributes, in subgraphs and functions too."""
    for graph in graphs_of(model):
        yield from graph.initializer
        for node in graph.node:
            yield from _attribute_tensors(node)
    for function in model.functions:
        for node in function.node:
            yield from _attribute_tensors(node)


def opset_of(model: Any) -> int:
    """Return the version of the default operator set (0 where the model imports none)."""
    return max((int(entry.version) for entry in model.opset_import if entry.domain in ("", "ai.onnx")), default=0)


def graph_inputs(model: Any) -> list[Any]:
    """Return the inputs that a caller feeds (before IR 4, initialisers are listed among the inputs too)."""
    constants = {tensor.name for tensor in model.graph.initializer}
    return [value for value in model.graph.input if value.name not in constants]


def value_facts(value: Any) -> dict[str, Any]:
    """Return `{"dtype", "shape"}` of a graph input or output; an unknown extent is "?"."""
    return {"dtype": dtype_name(value.type.tensor_type.elem_type), "shape": dims_of(value)}


def dims_of(value: Any) -> list[int | str]:
    """Return the extents of a value: numbers, names of dynamic axes, or "?" where nothing is known."""
    return [
        int(dim.dim_value) if dim.HasField("dim_value") else dim.dim_param or "?"
        for dim in value.type.tensor_type.shape.dim
    ]


def dtype_name(elem_type: int) -> str:
    """Return numpy's spelling of an ONNX element type: float32, int64, bool, bfloat16."""
    import onnx

    name = str(onnx.TensorProto.DataType.Name(elem_type)).lower()
    return {"float": "float32", "double": "float64"}.get(name, name)


def graph_facts(model: Any) -> dict[str, Any]:
    """Return the facts of a graph: opset, IR version, node count, inputs, outputs, number of float parameters."""
    import onnx

    floats = {onnx.TensorProto.FLOAT, onnx.TensorProto.DOUBLE, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16}
    facts: dict[str, Any] = {
        "opset": opset_of(model),
        "ir_version": int(model.ir_version),
        "nodes": len(model.graph.node),
        "inputs": {value.name: value_facts(value) for value in graph_inputs(model)},
        "outputs": {value.name: value_facts(value) for value in model.graph.output},
        "parameters": sum(math.prod(tensor.dims) for tensor in model.graph.initializer if tensor.data_type in floats),
    }
    domains = custom_domains(model)
    return {**facts, "domains": domains} if domains else facts


def custom_domains(model: Any) -> dict[str, list[str]]:
    """Return the operators outside the ONNX standard: `{domain: [op types]}`, sorted."""
    found: dict[str, set[str]] = {}
    for graph in graphs_of(model):
        for node in graph.node:
            if node.domain not in ("", "ai.onnx"):
                found.setdefault(node.domain, set()).add(node.op_type)
    return {domain: sorted(found[domain]) for domain in sorted(found)}


def brief(error: BaseException, limit: int = 600) -> str:
    """Return an error's words on one line, cut at `limit` characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else f"{text[:limit]}..."


def _attribute_tensors(node: Any) -> Iterator[Any]:
    for attribute in node.attribute:
        if attribute.HasField("t"):
            yield attribute.t
        yield from attribute.tensors


def _check_external(tensor: Any, path: Path) -> None:
    entries: Mapping[str, str] = {entry.key: entry.value for entry in tensor.external_data}
    location = entries.get("location", "")
    name = PurePosixPath(location)
    strange = not location or name.is_absolute() or ".." in name.parts or "\\" in location or ":" in location
    if strange or leads_out(path, location):
        raise BackendError(
            "bad data",
            f"{path.name}: tensor {tensor.name!r} reads its data from {location!r}, outside the model's folder",
            "save the model again with its data beside it",
        )
    file = path.parent.joinpath(*name.parts)
    if not file.is_file():
        raise BackendError(
            "bad data",
            f"{path.name}: external data {location!r} of tensor {tensor.name!r} is not beside it",
            "put the file beside the model under that name",
        )
    try:
        offset, length = int(entries.get("offset", "0")), int(entries.get("length", "0"))
    except ValueError as err:
        raise _damaged(path, f"tensor {tensor.name!r} has an offset or length that is no number") from err
    size = file.stat().st_size
    if offset < 0 or length < 0 or offset + length > size:
        raise _damaged(path, f"{location} has {size} bytes, tensor {tensor.name!r} needs {offset + length}")


def _check_extents(tensor: Any, path: Path) -> None:
    """Refuse extents that claim more than the tensor's data holds, before anything makes an array of them."""
    import onnx

    elements = math.prod(tensor.dims)
    if any(extent < 0 for extent in tensor.dims):
        raise _damaged(path, f"tensor {tensor.name!r} has a negative extent: {list(tensor.dims)}")
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        entries = {entry.key: entry.value for entry in tensor.external_data}
        size = path.parent.joinpath(entries["location"]).stat().st_size
        held = int(entries.get("length", size - int(entries.get("offset", "0"))))
    elif tensor.HasField("raw_data"):
        held = len(tensor.raw_data)
    else:
        fields = ("float", "int32", "string", "int64", "double", "uint64")
        held = 8 * sum(len(getattr(tensor, f"{field}_data")) for field in fields)
    # The smallest elements take two bits.
    if elements > 4 * held:
        raise _damaged(path, f"tensor {tensor.name!r} has extents {list(tensor.dims)}, and {held} bytes of data")


def _damaged(path: Path, what: str) -> BackendError:
    return BackendError("bad data", f"{path.name} is not a whole ONNX file: {what}", "fetch or export it again")
