"""ONNX: a file of the author's, checked, brought to the recipe's opset and axis names, and kept as its own reference."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from typing import Any

from artifacts.refs import ONNX
from tasks.errors import BackendError
from tasks.graphs import half_nodes
from tasks.onnx_axes import compare_inputs, rename_axes
from tasks.onnx_files import (
    GRAPH,
    INLINE_LIMIT,
    brief,
    check_graph,
    graph_facts,
    graph_inputs,
    has_external_data,
    infer_shapes,
    load_graph,
    opset_of,
    save_graph,
    strip_notes,
    tensors_of,
)
from tasks.onnx_sessions import GraphRunner
from tasks.onnx_weights import external_bytes, load_streamed, put_back, set_apart
from tasks.references import Run, write_reference
from tasks.seeded import Array
from tasks.stage import StageRequest, StageResult


def reference(request: StageRequest) -> StageResult:
    """Run the author's own file in ONNX Runtime without optimisations (see `tasks.references`).

    Raises BackendError("bad profile"), naming the case, where the file does not run at a shape of the profiles.
    """
    return write_reference(request, runner(request))


def runner(request: StageRequest) -> Run:
    """Load the author's own file, to be run on arrays."""
    path = request.inputs[GRAPH]
    load_graph(path, weights=False)  # what is damaged or reaches outside its folder is refused before it is run
    session = GraphRunner(path)
    wanted = request.params["outputs"]

    def run(arrays: Mapping[str, Array], what: str) -> dict[str, Array]:
        found = session.run(arrays, what)
        return found if wanted is None else {name: found[name] for name in wanted}

    if wanted is not None:
        _require_outputs(session.outputs, wanted)
    return run


def save(request: StageRequest) -> StageResult:
    """Write the author's own file: byte for byte, or with its external data in one file beside it.

    Raises BackendError("bad data") as `export` does for a file that is damaged, or whose outputs the recipe does not name.
    """
    path, wanted = request.inputs[GRAPH], request.params["outputs"]
    model = load_graph(path, weights=False)
    check_graph(path)
    given = [value.name for value in model.graph.output]
    _require_single(given)
    outputs = given if wanted is None else list(wanted)
    _require_outputs(given, outputs)
    if has_external_data(model):
        files = save_graph(load_streamed(path), request.output_dir, external=True)
    else:
        shutil.copyfile(path, request.output_dir / GRAPH)
        files = {GRAPH: ONNX}
    facts = {"plan": GRAPH, "form": "ONNX", "inputs": list(request.params["tensors"]), "outputs": outputs}
    return StageResult(files, facts)


def export(request: StageRequest) -> StageResult:
    """Write the file with the recipe's opset, shapes and axis names; weights go to one data file or into the graph.

    Raises BackendError("bad data") where the file is damaged, invalid, computes in half precision, or disagrees with the
    recipe's inputs or outputs; "rejected setting" where onnx cannot convert it to the opset asked for.
    """
    params = request.params
    path = request.inputs[GRAPH]
    given = load_graph(path, weights=False)
    external = has_external_data(given)
    check_graph(path)
    _require_single([value.name for value in given.graph.output])
    model = load_streamed(path) if external else load_graph(path)
    _lift_initialisers(model)
    _require_full(model)
    if params["opset"] is not None and opset_of(model) != params["opset"]:
        request.report(0.3, f"converting opset {opset_of(model)} to {params['opset']}")
        model = _converted(model, params["opset"])
    _agree(model, params)
    strip_notes(model, keep_model_metadata=True)
    outputs = save_graph(model, request.output_dir, external=external)
    graph = infer_shapes(request.output_dir)
    check_graph(request.output_dir / GRAPH)
    return StageResult(outputs, graph_facts(graph))


def _require_full(model: Any) -> None:
    """Refuse halves: an engine of any precision would hold them, and be called by the precision that was asked."""
    halves = half_nodes(model)
    if halves:
        raise BackendError(
            "bad data",
            f"the file computes in half precision ({', '.join(halves)}); a recipe begins with a float32 graph, and "
            "precision.build says what it becomes",
            "export the file in float32",
        )


def _lift_initialisers(model: Any) -> None:
    """Drop initialisers from the inputs, where IR 3 and some exporters list them: as inputs, callers may replace them."""
    fed = graph_inputs(model)
    if len(fed) != len(model.graph.input):
        kept = [type(value).FromString(value.SerializeToString()) for value in fed]
        del model.graph.input[:]
        model.graph.input.extend(kept)
        model.ir_version = max(model.ir_version, 4)


def _converted(model: Any, opset: int) -> Any:
    import onnx
    import onnx.inliner  # which `import onnx` leaves out

    asked = f"opset {opset_of(model)} to {opset}"
    # onnx's converter takes what is in the graph, 2 GB at most, and drops what lies elsewhere: large weights are inputs meanwhile.
    metadata = [(entry.key, entry.value) for entry in model.metadata_props]
    apart = set_apart(model) if external_bytes(model) else {}
    if sum(len(tensor.raw_data) for tensor in tensors_of(model)) > INLINE_LIMIT:
        raise BackendError(
            "rejected setting",
            f"{asked}: onnx converts no graph above 2 GB",
            "keep its weights in external data, export the model at that opset, or remove export.opset from the recipe",
        )
    if model.functions:
        model = onnx.inliner.inline_local_functions(model, convert_version=True)  # the converter drops functions
    try:
        converted = onnx.version_converter.convert_version(model, opset)
    except Exception as err:  # RuntimeError, ConvertError, ValidationError, and what C++ raises
        raise BackendError(
            "rejected setting",
            f"{asked}: onnx {onnx.__version__} cannot convert this graph: {brief(err)}",
            "export the model at that opset, or remove export.opset from the recipe",
        ) from err
    if opset_of(converted) != opset:
        raise BackendError(
            "rejected setting",
            f"{asked}: the converter left opset {opset_of(converted)}",
            "export the model at that opset, or remove export.opset from the recipe",
        )
    put_back(converted, apart)
    del converted.metadata_props[:]
    for key, value in metadata:
        converted.metadata_props.add(key=key, value=value)
    return converted


def _agree(model: Any, params: Mapping[str, Any]) -> None:
    agreement = compare_inputs(model, params["tensors"])
    faults = agreement.faults + [
        f"input {at.input!r} axis {at.position} is fixed at {at.extent} in the file, the recipe calls it {at.axis!r}"
        for at in agreement.fixed
    ]
    if faults:
        advice = "write the file's shapes, types and names in the recipe's inputs"
        if agreement.fixed:
            at = agreement.fixed[0]
            advice = f"write {at.extent} instead of {at.axis} in inputs.{at.input}.shape, or export the file with a dynamic axis"
        raise BackendError("bad data", "; ".join(faults), advice)
    rename_axes(model, params["tensors"], agreement.names)
    if params["outputs"] is not None:
        values = {value.name: value for value in model.graph.output}
        _require_outputs(list(values), params["outputs"])
        ordered = [type(values[name]).FromString(values[name].SerializeToString()) for name in params["outputs"]]
        del model.graph.output[:]
        model.graph.output.extend(ordered)


def _require_single(outputs: list[str]) -> None:
    """Refuse outputs of one name, which onnx's checker admits."""
    twice = sorted({name for name in outputs if outputs.count(name) > 1})
    if twice:
        raise BackendError(
            "bad data",
            f"the file has several outputs of one name: {', '.join(map(repr, twice))}",
            "give each output a name of its own, with an Identity node where they are one value",
        )


def _require_outputs(found: list[str], wanted: list[str]) -> None:
    if sorted(found) != sorted(wanted):
        raise BackendError(
            "bad data",
            f"the file's outputs are {', '.join(found)}; the recipe names {', '.join(wanted)}",
            "name all outputs of the file in the recipe, or leave `outputs` away",
        )
