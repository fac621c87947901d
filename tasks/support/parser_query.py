"""What TensorRT's (or TensorRT-RTX's) own parser says of a graph, node by node; `supports_operator` is not asked, since it says yes to NonZero."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from tasks.onnx_files import GRAPH, load_graph
from tasks.stage import StageRequest, StageResult
from tasks.support.nodes import located, refusal


def run(request: StageRequest) -> StageResult:
    """Ask `OnnxParser.supports_model_v2` about `model.onnx`; facts: one entry of a support table.

    A node is refused where an error of the parser names it, or where it is in none of the parser's subgraphs. Raises
    ModuleNotFoundError without the package, BackendError("bad data") for what is no ONNX.
    """
    return StageResult({}, asked(request, "tensorrt_rtx"))


def asked(request: StageRequest, module: str) -> dict[str, Any]:
    """Ask the parser of the package `module` as `run` does; plugins among the inputs are loaded first.

    Raises ModuleNotFoundError, BackendError.
    """
    trt: Any = importlib.import_module(module)
    runtime = module.replace("_", "-")
    path = request.inputs[GRAPH]
    model = load_graph(path, weights=False)
    logger = type("Logger", (trt.ILogger,), {"log": lambda _self, _severity, _text: None})()
    builder, flags = trt.Builder(logger), 0
    if module == "tensorrt":
        from tasks.engines.trt_adapter import adapter
        from tasks.engines.trt_plugins import load_plugins, plugin_files

        load_plugins(trt, plugin_files(request.inputs))
        flags = adapter(trt).network_flags(trt)
    network = builder.create_network(flags)  # the parser does not hold it
    parser = trt.OnnxParser(network, logger)
    supported, read = _supports(parser, path)
    errors = [parser.get_error(index) for index in range(parser.num_errors)]
    nodes = _refused(model, errors, read, path, runtime) if not supported else []
    rest = "; ".join(
        error.desc() for error in errors if not (hasattr(error, "node_operator") and error.node_operator())
    )
    words = "" if supported else f"the parser refuses {len(nodes)} node(s)" + (f"; {rest}" if rest else "")
    return {
        "target": f"{runtime} {trt.__version__}",
        "by": "its parser",
        "state": "yes" if supported else "no",
        "words": words,
        "advice": "" if supported else "see the nodes",
        "nodes": nodes,
    }


def _supports(parser: Any, path: Path) -> tuple[bool, set[int]]:
    """Return whether the whole graph is read, and the indices of the nodes that are."""
    if hasattr(parser, "supports_model_v2"):
        supported = bool(parser.supports_model_v2(path.read_bytes(), str(path)))
        count = range(parser.num_subgraphs)
        return supported, {index for subgraph in count for index in parser.get_subgraph_nodes(subgraph)}
    supported, subgraphs = parser.supports_model(path.read_bytes(), str(path))  # 8.6
    return bool(supported), {index for nodes, reads in subgraphs if reads for index in nodes}


def _refused(model: Any, errors: list[Any], read: set[int], path: Path, runtime: str) -> list[dict[str, Any]]:
    places, folder = list(located(model)), f"{path.parent}/"
    found: dict[str, dict[str, Any]] = {}
    named: set[int] = set()
    for error in errors:
        # 8.6 names a node by its index alone; its subgraphs say which are refused.
        if not hasattr(error, "node_operator") or not error.node_operator():
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
        found.setdefault(f"{place} {node.name} {node.output}", refusal(index, node, place, words, runtime=runtime))
    for index, node in enumerate(model.graph.node):
        if index not in read and index not in named:
            place = f"node {index} of {len(model.graph.node)}"
            words = "in none of the subgraphs that the parser takes"
            found[f"{place} {node.name} {node.output}"] = refusal(index, node, place, words, runtime=runtime)
    return sorted(found.values(), key=lambda entry: int(entry["index"]))
