"""What ONNX Runtime says of a graph, on CPU: whether a session of it can be made, and which nodes it does not know."""

from __future__ import annotations

import re
from typing import Any, Final

from tasks.onnx_files import GRAPH, brief, load_graph
from tasks.stage import StageRequest, StageResult
from tasks.support.nodes import located, refusal

# How it names the node that it stops at: no kernel for these types; a type that the operator does not take; wrong inputs.
_NAMING: Final = (r"node with name '([^']+)'", r"in node \(([^)]+)\)", r"Error Node ?\(([^)]+)\)")


def run(request: StageRequest) -> StageResult:
    """Make a session of `model.onnx`; facts: one entry of a support table.

    ONNX Runtime stops at the first node that it refuses; the others are found by its list of operators. Raises
    ModuleNotFoundError without the package.
    """
    import onnxruntime

    path = request.inputs[GRAPH]
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    words = ""
    try:
        onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as err:  # noqa: BLE001  # its exceptions share no base of their own
        words = brief(err).replace(f"{path.parent}/", "")
    nodes = refused(load_graph(path, weights=False), words) if words else []
    newer = "opset" in words.lower() or "ir version" in words.lower()
    advice = "export with a lower opset (export.opset)" if newer else "see the nodes, or export the model anew"
    facts = {
        "target": f"onnxruntime {onnxruntime.__version__} cpu",
        "by": "a session",
        "state": "no" if words else "yes",
        "words": words,
        "advice": advice if words else "",
        "nodes": nodes,
    }
    return StageResult({}, facts)


def refused(model: Any, words: str) -> list[dict[str, Any]]:
    """Return every node whose operator ONNX Runtime lacks, and the one that its words name, as `nodes.refusal` does."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    known = {(schema.domain, schema.name) for schema in state.get_all_operator_schema()}
    known |= {(function.domain, function.name) for function in model.functions}
    said = next(filter(None, (re.search(pattern, words) for pattern in _NAMING)), None)
    nodes = []
    for index, node, place in located(model):
        domain = "" if node.domain == "ai.onnx" else node.domain
        if (domain, node.op_type) not in known:
            nodes.append(refusal(index, node, place, "ONNX Runtime has no such operator", runtime="onnxruntime"))
        elif said is not None and said[1] == node.name:
            nodes.append(refusal(index, node, place, words, runtime="onnxruntime"))
    return nodes
