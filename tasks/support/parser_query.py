"""What TensorRT-RTX's own parser says of a graph, node by node; `supports_operator` is not asked, since it says yes to NonZero."""

from __future__ import annotations

from typing import Any

from tasks.onnx_files import GRAPH, load_graph
from tasks.stage import StageRequest, StageResult
from tasks.support.nodes import located, refusal


def run(request: StageRequest) -> StageResult:
    """Ask `OnnxParser.supports_model_v2` about `model.onnx`; facts: one entry of a support table.

    A node is refused where an error of the parser names it, or where it is in none of the parser's subgraphs. Raises
    ModuleNotFoundError without the package, BackendError("bad data") for what is no ONNX.
    """
    import tensorrt_rtx as trt

    path = request.inputs[GRAPH]
    model = load_graph(path, weights=False)
    logger = type("Logger", (trt.ILogger,), {"log": lambda _self, _severity, _text: None})()
    network = trt.Builder(logger).create_network(0)
    parser = trt.OnnxParser(network, logger)
    supported = bool(parser.supports_model_v2(path.read_bytes(), str(path)))
    errors = [parser.get_error(index) for index in range(parser.num_errors)]
    read = {index for subgraph in range(parser.num_subgraphs) for index in parser.get_subgraph_nodes(subgraph)}
    nodes = _refused(model, errors, read, f"{path.parent}/") if not supported else []
    rest = "; ".join(error.desc() for error in errors if not error.node_operator())
    words = "" if supported else f"the parser refuses {len(nodes)} node(s)" + (f"; {rest}" if rest else "")
    facts = {
        "target": f"tensorrt-rtx {trt.__version__}",
        "by": "its parser",
        "state": "yes" if supported else "no",
        "words": words,
        "advice": "" if supported else "see the nodes",
        "nodes": nodes,
    }
    return StageResult({}, facts)


def _refused(model: Any, errors: list[Any], read: set[int], folder: str) -> list[dict[str, Any]]:
    places = list(located(model))
    found: dict[str, dict[str, Any]] = {}
    named: set[int] = set()
    for error in errors:
        if not error.node_operator():
            continue
        named.add(error.node())
        index, node, place = next(
            (
                entry
                for entry in places
                if entry[0] == error.node()
                and (entry[1].op_type, entry[1].name) == (error.node_operator(), error.node_name())
            ),
            next(entry for entry in places if entry[0] == error.node()),
        )
        said = " ".join(error.desc().replace(folder, "").split())
        # Some refusals say nothing but the assertion that failed.
        words = "not supported" if said in ("", "false") else said
        found.setdefault(
            f"{place} {node.name} {node.output}", refusal(index, node, place, words, runtime="tensorrt-rtx")
        )
    for index, node in enumerate(model.graph.node):
        if index not in read and index not in named:
            place = f"node {index} of {len(model.graph.node)}"
            words = "in none of the subgraphs that the parser takes"
            found[f"{place} {node.name} {node.output}"] = refusal(index, node, place, words, runtime="tensorrt-rtx")
    return sorted(found.values(), key=lambda entry: int(entry["index"]))
