"""The `check` stage: one target's answer about the simplified graph, with the place of every node that it refuses."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

from tasks.onnx_files import GRAPH, load_graph
from tasks.stage import StageRequest, StageResult
from tasks.support import contents, parser_query, session_query
from tasks.support.nodes import PLACES

_MOST_NODES: Final = 200


def run(request: StageRequest) -> StageResult:
    """Ask as params["by"] says: the runtime's parser, a session, or the newest opset that params["version"] reads.

    Facts: an entry of a support table (`enginery inspect`). Where "places.json" is among the inputs, nodes are told with the
    module that they came from. A parser that refuses a graph without naming a node is not believed: the compiler decides.
    Raises as the query does.
    """
    params = request.params
    if params["by"] == "opset":
        model = load_graph(request.inputs[GRAPH], weights=False)
        facts = contents.above_ceiling(model, f"tensorrt {params['version']}", params["ceiling"])
    elif params["by"] == "session":
        facts = dict(session_query.run(request).facts)
    else:
        module = {"tensorrt-rtx": "tensorrt_rtx", "tensorrt": "tensorrt"}[params["runtime"]]
        facts = dict(parser_query.asked(request, module))
        if facts["state"] == "no" and not facts["nodes"]:
            facts["state"] = "not known"
    nodes = _placed(request, facts["nodes"])
    return StageResult({}, {**facts, "nodes": nodes[:_MOST_NODES], "refused": len(nodes)})


def _placed(request: StageRequest, nodes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    if PLACES not in request.inputs or not nodes:
        return nodes
    places: Mapping[str, str] = json.loads(request.inputs[PLACES].read_text("utf-8"))
    outputs = [list(node.output) for node in load_graph(request.inputs[GRAPH], weights=False).graph.node]
    told = []
    for node in nodes:
        module = next((places[name] for name in outputs[node["index"]] if name in places), "")
        known = not module or module in node["location"]
        told.append(node if known else {**node, "location": f"{node['location']}, in {module}"})
    return told
