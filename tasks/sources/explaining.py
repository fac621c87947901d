"""The `explain` stage: why an exported graph gives other outputs than its source: what the exporter took from its sample.

Exporters see one sample input. The model is exported again with another size of each dynamic axis in turn, and with other
values; where two graphs differ, what they differ in was taken from the sample: a constant, an extent, the way that a decision
went. It runs only where the exported graph failed, and its own failures explain too.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np

from tasks.errors import BackendError, ModelCodeError
from tasks.onnx_files import GRAPH, brief, load_graph
from tasks.sources import run_export
from tasks.stage import StageRequest, StageResult
from tasks.support.nodes import operator_name

_MOST: Final = 5  # differences told of one export
_SMALL: Final = 64  # elements of a constant that is compared: weights are not taken from a sample
_SHOWN: Final = 4


def run(request: StageRequest) -> StageResult:
    """Export again, and compare with "graph/model.onnx"; params are the export's, and `cases` as parity is measured at.

    Facts: `found`, a list of {"axis" (None: values), "at", "node", "operator", "words"}, and `exports`, how many were made.
    """
    params: Mapping[str, Any] = request.params
    graph = load_graph(request.inputs[f"graph/{GRAPH}"], weights=False)
    inputs = {name: path for name, path in request.inputs.items() if not name.startswith("graph/")}
    found: list[dict[str, Any]] = []
    variants = list(_variants(params))
    for index, (axis, at, changes) in enumerate(variants):
        request.report(index / len(variants), f"exporting at {at}")
        own = {name: value for name, value in params.items() if name != "cases"} | changes
        with tempfile.TemporaryDirectory(dir=request.output_dir) as folder:
            again = replace(request, stage="export", params=own, inputs=inputs, output_dir=Path(folder))
            try:
                run_export(again)
                differences = _differences(graph, load_graph(Path(folder) / GRAPH, weights=False))
            except (BackendError, ModelCodeError) as err:
                differences = [("", "", f"the exporter refuses it there: {brief(err, 300)}")]
        by_values = {one["node"] for one in found if one["axis"] is None}  # another size has other values too
        found += [
            {"axis": axis, "at": at, "node": node, "operator": operator, "words": words}
            for node, operator, words in differences[:_MOST]
            if not (node and node in by_values)
        ]
    return StageResult({}, {"found": found, "exports": len(variants)})


def _variants(params: Mapping[str, Any]) -> Iterator[tuple[str | None, str, dict[str, Any]]]:
    """Yield what to export with: other values, then each dynamic axis at another size that the recipe admits."""
    tensors, trace = params["tensors"], params["trace"]

    def extent(shapes: Mapping[str, Sequence[int]], axis: str) -> int:
        return next(
            shapes[name][position]
            for name, tensor in tensors.items()
            for position, wanted in enumerate(tensor["shape"])
            if wanted == axis
        )

    yield None, "other values", {"sample": 1}
    for axis in sorted({one for tensor in tensors.values() for one in tensor["shape"] if isinstance(one, str)}):
        now = extent(trace, axis)
        sizes = {extent(case["shapes"], axis) for case in params["cases"]} - {now}
        if not sizes:
            continue
        used = max(sizes)  # exporters take an extent of 1 for one that is always 1
        shapes = {
            name: [used if wanted == axis else size for size, wanted in zip(trace[name], tensor["shape"], strict=True)]
            for name, tensor in tensors.items()
        }
        yield axis, f"{axis} {used} instead of {now}", {"trace": shapes}


def _differences(before: Any, after: Any) -> list[tuple[str, str, str]]:
    """Return in what two graphs differ: (node, operator, words)."""
    found: list[tuple[str, str, str]] = []
    constants, others = _constants(before), _constants(after)
    nodes, there = _computing(before), _computing(after)
    for left, right in zip(nodes, there, strict=False):
        if operator_name(left) != operator_name(right):
            words = f"from here on the graphs differ ({operator_name(left)}, there {operator_name(right)}): a decision was frozen"
            return [*found, (left.name, operator_name(left), words)]
        for what, one, other in _pairs(left, right, constants, others):
            if one != other:
                found.append((left.name, operator_name(left), f"{what} is {_text(one)}, there {_text(other)}"))
    if len(nodes) != len(there):
        shared = min(len(nodes), len(there))
        last = nodes[shared - 1]
        words = f"after this come {len(nodes) - shared} more nodes, there {len(there) - shared}: a loop or a decision was frozen"
        found.append((last.name, operator_name(last), words))
    return found


def _computing(model: Any) -> list[Any]:
    """Return the nodes but for constants, which are compared where they are read."""
    return [node for node in model.graph.node if node.op_type != "Constant"]


def _pairs(
    left: Any, right: Any, constants: Mapping[str, list[Any]], others: Mapping[str, list[Any]]
) -> Iterator[tuple[str, Any, Any]]:
    """Yield what two nodes of one operator hold that may come from a sample: small constants, and attributes."""
    for position, (one, other) in enumerate(zip(left.input, right.input, strict=False)):
        if one in constants and other in others:
            yield f"the constant at input {position}", constants[one], others[other]
        elif (one in constants) != (other in others):
            yield (
                f"input {position}",
                "a constant" if one in constants else "computed",
                ("a constant" if other in others else "computed"),
            )
    stated = {attribute.name: _attribute(attribute) for attribute in right.attribute}
    for attribute in left.attribute:
        yield f"the attribute {attribute.name}", _attribute(attribute), stated.get(attribute.name)


def _attribute(attribute: Any) -> Any:
    import onnx

    value = onnx.helper.get_attribute_value(attribute)
    if isinstance(value, onnx.TensorProto):
        return _values(value)
    if isinstance(value, (onnx.GraphProto, bytes)):
        return None if isinstance(value, onnx.GraphProto) else value.decode("utf-8", "replace")
    return list(value) if hasattr(value, "__iter__") and not isinstance(value, str) else value


def _constants(model: Any) -> dict[str, list[Any]]:
    """Return the small constants of a graph by the value that holds them; large ones are empty, and so all equal."""
    found = {tensor.name: _values(tensor) for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Constant" and node.attribute and node.attribute[0].HasField("t"):
            found[node.output[0]] = _values(node.attribute[0].t)
    return found


def _values(tensor: Any) -> list[Any]:
    import onnx

    if int(np.prod(tensor.dims)) > _SMALL or tensor.data_location == onnx.TensorProto.EXTERNAL:
        return [f"{'x'.join(map(str, tensor.dims))} values"]
    array = onnx.numpy_helper.to_array(tensor)
    return list(array.reshape(-1).tolist())


def _text(value: Any) -> str:
    if isinstance(value, list):
        shown = ", ".join(f"{one:.4g}" if isinstance(one, float) else str(one) for one in value[:_SHOWN])
        return f"[{shown}{', ...' if len(value) > _SHOWN else ''}]"
    return "none" if value is None else str(value)
