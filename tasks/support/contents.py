"""What an ONNX file holds: inputs and outputs, dynamic axes, opset, operators, sizes; and the opset ceilings it meets.

Ceilings are those of onnx-tensorrt's docs/operators.md for the releases named; of later releases none is known.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from tasks.onnx_files import GRAPH, graph_inputs, graphs_of, opset_of, tensors_of, value_facts
from tasks.onnx_weights import load_streamed
from tasks.stage import StageRequest, StageResult
from tasks.support.nodes import located, operator_name, refusal
from tasks.weight_report import stated_ranges, stated_weights

_CEILINGS: Final[Mapping[str, int | None]] = {"8.6": 17, "10.0, 10.1": 20, "10.2 and later": None}


def run(request: StageRequest) -> StageResult:
    """Describe `model.onnx`; facts only: of a graph with Q/DQ pairs also what each costs ("quantized"). Raises BackendError("bad data") where it is no whole ONNX file."""
    import onnx

    path = request.inputs[GRAPH]
    model = load_streamed(path)
    inputs = {value.name: _facts(value) for value in graph_inputs(model)}
    outputs = {value.name: _facts(value) for value in model.graph.output}
    functions = [node for function in model.functions for node in function.node]
    counts = Counter(operator_name(node) for graph in graphs_of(model) for node in graph.node)
    counts.update(operator_name(node) for node in functions)
    files = {
        entry.value
        for tensor in tensors_of(model)
        if tensor.data_location == onnx.TensorProto.EXTERNAL
        for entry in tensor.external_data
        if entry.key == "location"
    }
    pairs = {"activations": stated_ranges(model), "weights": stated_weights(model)}
    facts = {
        "opset": opset_of(model),
        "opsets": {entry.domain or "ai.onnx": entry.version for entry in model.opset_import},
        "ir_version": model.ir_version,
        "producer": f"{model.producer_name} {model.producer_version}".strip(),
        "inputs": inputs,
        "outputs": outputs,
        "dynamic_axes": _dynamic_axes({**inputs, **outputs}),
        "operators": dict(sorted(counts.items(), key=lambda item: (-item[1], item[0]))),
        "parameters": sum(math.prod(tensor.dims) for graph in graphs_of(model) for tensor in graph.initializer),
        "size": {
            "graph_bytes": path.stat().st_size,
            "external_bytes": sum(Path(name).stat().st_size for name in files),
            "external_files": sorted(str(Path(name).relative_to(path.parent)) for name in files),
        },
        "support": _by_ceiling(model),
        **({"quantized": pairs} if any(pairs.values()) else {}),
    }
    return StageResult({}, facts)


def above_ceiling(model: Any, target: str, ceiling: int, custom: Sequence[dict[str, Any]] = ()) -> dict[str, Any]:
    """Judge a graph whose opset is above what a target reads: which nodes have a form that came later, and what to do."""
    import onnx

    opset, newer = opset_of(model), []
    for index, node, place in located(model):
        if node.domain not in ("", "ai.onnx") or not onnx.defs.has(node.op_type):
            continue
        since = onnx.defs.get_schema(node.op_type, opset).since_version
        if since > ceiling:
            words = f"has the form of opset {since}, and {target} reads {ceiling} at most"
            newer.append(refusal(index, node, place, words, runtime="tensorrt"))
    advice = f"export with opset {ceiling} or lower (export.opset; exporter: torchscript for opsets below 18)"
    if not newer:
        advice += ": no operator of the graph changed since"
    return {
        "target": target,
        "by": "opset ceiling",
        "state": "no",
        "words": f"reads opset {ceiling} at most, this is {opset}",
        "advice": advice,
        "nodes": [*custom, *newer],
    }


def _facts(value: Any) -> dict[str, Any]:
    """Return a tensor's dtype and shape; the shape is None where the file states none."""
    facts = value_facts(value)
    return facts if value.type.tensor_type.HasField("shape") else facts | {"shape": None}


def _dynamic_axes(values: Mapping[str, Mapping[str, Any]]) -> dict[str, list[str]]:
    """Return by name of a dynamic axis ("?" where it has none) where it is: `input[0]`."""
    axes: dict[str, list[str]] = {}
    for name, facts in values.items():
        for index, extent in enumerate(facts["shape"] or ()):
            if isinstance(extent, str):
                axes.setdefault(extent, []).append(f"{name}[{index}]")
    return axes


def _by_ceiling(model: Any) -> list[dict[str, Any]]:
    """Judge by the opset alone what TensorRT releases read; operators outside the standard need a plugin there."""
    opset = opset_of(model)
    local = {(function.domain, function.name) for function in model.functions}
    custom = [
        refusal(index, node, place, "no ONNX standard: TensorRT needs a plugin of this name", runtime="tensorrt")
        for index, node, place in located(model)
        if node.domain not in ("", "ai.onnx") and (node.domain, node.op_type) not in local
    ]
    found = []
    for release, ceiling in _CEILINGS.items():
        state, words, advice = "not known", "its opset ceiling is not known here", "build for it on a host that has it"
        if ceiling is not None and opset > ceiling:
            found.append(above_ceiling(model, f"tensorrt {release}", ceiling, custom))
            continue
        if custom:
            state, words, advice = "needs plugins", "operators outside the ONNX standard", "see the nodes"
        elif ceiling is not None:
            state, words, advice = "opset ok", f"opset {opset} of {ceiling} at most; operators were not asked", ""
        found.append(
            {
                "target": f"tensorrt {release}",
                "by": "opset ceiling",
                "state": state,
                "words": words,
                "advice": advice,
                "nodes": custom,
            }
        )
    return found
