"""The `type` stage: a precision written into the graph, so that no compiler has to be told.

fp32 and tf32 leave the graph as it is; fp16 and bf16 are `halves`, int8 is `quantize`, fp8 is `fp8` on top of it, and int8-fp16
and fp8-fp16 are both: pairs, and halves everywhere else. int8-dynamic is `dynamic`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any, Final

import onnx

from artifacts.refs import ONNX, ONNX_DATA
from recipes.targets import TYPED_OPSETS
from tasks import halves, quantize
from tasks.dynamic import quantize_dynamic
from tasks.errors import BackendError
from tasks.fp8 import as_fp8
from tasks.graphs import (
    hoist_constants,
    matching_nodes,
    name_nodes,
)
from tasks.onnx_files import DATA, GRAPH, check_graph, dtype_name, load_graph, opset_of, save_graph
from tasks.onnx_weights import APART, external_bytes, load_streamed, put_back, set_apart
from tasks.outliers import nodes_of
from tasks.stage import StageRequest, StageResult
from tasks.structure import structure_digest

KEEP: Final = "keep.json"
# What came with bfloat16 in Conv, pooling and GridSample (opset 22); TensorRT-RTX parses it.
_BF16_IR: Final = 10


def run(request: StageRequest) -> StageResult:
    """Type "model.onnx" (and int8's "ranges.json") as `params` say: precision, keep, io; and structure, where given.

    Facts: structure (the digest of the typed graph without the values of its weights, where it was asked for), nodes, casts, quantized, kept, and inputs and outputs as {name: dtype}; with "outliers.json" `outliers` (tensors that float16 cannot hold: the nodes that give or take them are kept in fp32); for half precisions `clamped` (constants
    that stood for infinity), `overflowing` (weights whose nodes stay fp32) and `counted` (nodes kept fp32 because they
    compute on counted values); for int8 `quantizable` (how many nodes could be, kept ones too) and `constant` (nodes kept fp32 because an input was zero on all calibration data).
    With "keep.json" ({node: why}) its nodes stay too, and facts say `why_kept` of all nodes that do; so they do where there is control flow,
    of which nothing is typed that is inside.
    Raises BackendError("bad data") for a glob of `keep` that matches no node.
    """
    params, inputs = request.params, request.inputs
    precision = params["precision"]
    full = precision in ("fp32", "tf32")
    model = _loaded(request)
    external = DATA in inputs
    facts: dict[str, Any] = {"casts": 0, "quantized": 0, "kept": []}
    if full:
        media_types = {name: kind for name, kind in ((GRAPH, ONNX), (DATA, ONNX_DATA)) if name in inputs}
        for name in media_types:
            shutil.copyfile(inputs[name], request.output_dir / name)
        return StageResult(media_types, facts | _described(model) | _structure(model, params))
    hoist_constants(model)
    name_nodes(model)
    keep = matching_nodes(model, params["keep"])
    if "outliers.json" in inputs:
        outliers = json.loads(inputs["outliers.json"].read_text("utf-8"))
        keep |= nodes_of(model, outliers)
        facts["outliers"] = sorted(outliers)
    if KEEP in inputs:
        facts["why_kept"] = _reasons(model, params["keep"], facts.get("outliers", ()), _found(inputs))
        keep |= facts["why_kept"].keys()
    facts |= _with_control_flow(model, keep, facts, params["keep"])
    request.report(None, f"typing {len(model.graph.node)} nodes as {precision}")
    pairs = precision in ("int8", "int8-fp16", "fp8", "fp8-fp16")
    if pairs:
        fp8 = precision.startswith("fp8")
        if precision in TYPED_OPSETS:
            model = _raised(model, TYPED_OPSETS[precision], precision)
        ranges = quantize.read_ranges(inputs["ranges.json"])
        known = {name for node in model.graph.node for name in node.output}
        quantizable = sum(node.op_type in quantize.OPERATORS for node in model.graph.node)
        result = quantize.quantize(model, ranges, keep, residual_pairs=not fp8)
        model = as_fp8(result.model, ranges, known) if fp8 else result.model
        facts |= {"quantized": len(result.nodes), "quantizable": quantizable, "constant": list(result.constant)}
    if precision == "int8-dynamic":
        model, nodes = quantize_dynamic(model, keep)
        facts |= {"quantized": len(nodes)}
    if precision not in ("int8", "fp8", "int8-dynamic"):
        half: halves.Half = "bf16" if precision == "bf16" else "fp16"
        if half == "bf16":
            model = _raised(model, TYPED_OPSETS[precision], precision)
            model.ir_version = max(model.ir_version, _BF16_IR)
        name_nodes(model)
        typed = halves.to_half(model, half, keep, native=params["io"] == "native", quantized=pairs)
        model = typed.model
        facts |= {
            "casts": typed.casts,
            "clamped": typed.clamped,
            "overflowing": sorted(typed.overflowing),
            "counted": typed.counted,
        }
    facts |= _described(model) | _structure(model, params)
    outputs = save_graph(model, request.output_dir, external=external)
    check_graph(request.output_dir / GRAPH)
    return StageResult(outputs, facts)


def _with_control_flow(
    model: onnx.ModelProto, keep: AbstractSet[str], facts: Mapping[str, Any], globs: Sequence[str]
) -> dict[str, Any]:
    """Return what is kept, with the nodes that have graphs inside (If, Loop, Scan), since these stay as they are."""
    bodies = (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS)
    control = {
        node.name: f"{node.op_type}: what is inside of control flow stays fp32"
        for node in model.graph.node
        if any(attribute.type in bodies for attribute in node.attribute)
    }
    if not control:
        return {"kept": sorted(keep)}
    why = facts.get("why_kept") or _reasons(model, globs, facts.get("outliers", ()), {})
    return {"kept": sorted(keep | control.keys()), "why_kept": {**control, **why}}


def _found(inputs: Mapping[str, Path]) -> dict[str, str]:
    """Read "keep.json": {node: why it is kept}."""
    return {str(node): str(why) for node, why in json.loads(inputs[KEEP].read_text("utf-8")).items()}


def _reasons(
    model: onnx.ModelProto, globs: Sequence[str], outliers: Sequence[str], found: Mapping[str, str]
) -> dict[str, str]:
    """Say of each node that is kept why: the recipe's globs before tensors that overflow, before what was found."""
    overflows = dict.fromkeys(
        nodes_of(model, dict.fromkeys(outliers)), "gives or takes a tensor that overflows float16"
    )
    return dict(sorted({**found, **overflows, **dict.fromkeys(matching_nodes(model, globs), "precision.keep")}.items()))


def _loaded(request: StageRequest) -> onnx.ModelProto:
    """Read the graph, with its weights only where they are changed here: large ones are copied (rounded) as it is saved."""
    precision, structure = request.params["precision"], "structure" in request.params
    if precision in ("fp32", "tf32") or structure or DATA not in request.inputs or precision == "int8-dynamic":
        whole: onnx.ModelProto = load_graph(
            request.inputs[GRAPH], weights=precision not in ("fp32", "tf32") or structure
        )
        return whole
    streamed: onnx.ModelProto = load_streamed(request.inputs[GRAPH])
    if precision != "fp16" and external_bytes(streamed) <= APART:
        return load_graph(request.inputs[GRAPH])
    return streamed


def _described(model: onnx.ModelProto) -> dict[str, Any]:
    constants = {tensor.name for tensor in model.graph.initializer}
    return {
        "nodes": len(model.graph.node),
        "inputs": {
            value.name: dtype_name(value.type.tensor_type.elem_type)
            for value in model.graph.input
            if value.name not in constants
        },
        "outputs": {value.name: dtype_name(value.type.tensor_type.elem_type) for value in model.graph.output},
    }


def _structure(model: onnx.ModelProto, params: Mapping[str, Any]) -> dict[str, Any]:
    return {"structure": structure_digest(model)} if params.get("structure") else {}


def _raised(model: onnx.ModelProto, opset: int, precision: str) -> onnx.ModelProto:
    """Return the graph at `opset`, or as it is where it is there already."""
    if opset_of(model) >= opset:
        return model
    apart = (
        set_apart(model) if external_bytes(model) else {}
    )  # the converter takes 2 GB at most, and drops what lies elsewhere
    try:
        raised = onnx.version_converter.convert_version(model, opset)
    except Exception as err:  # the C++ converter raises bare RuntimeErrors, and asserts
        raise BackendError(
            "unsupported operator",
            f"{precision} needs ONNX opset {opset}, and the graph (opset {opset_of(model)}) cannot be raised to it: {err}",
            "set export.opset to 18 or more, or build fp16",
        ) from err
    put_back(raised, apart)
    name_nodes(raised)  # the converter may add nodes without names
    return raised
