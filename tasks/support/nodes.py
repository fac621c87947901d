"""Where a node is in a model, and what to do about one that a target refuses."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

# What an export keeps of the modules that nodes came from, since their notes are stripped from the graph.
PLACES: Final = "places.json"

_VALUES: Final = (
    "the size of its output depends on values: use a mask (Where, Mul) or TopK, or move it out of the model"
)
_RANDOM: Final = "it draws random numbers: export the model after eval(), without dropout or sampling"
# Operators that draw numbers: no two runs agree.
DRAWING: Final = frozenset(
    ["Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike"]
)
_ADVICE: Final = {
    **dict.fromkeys(sorted(DRAWING), _RANDOM),
    "Compress": _VALUES,
    "NonMaxSuppression": _VALUES,
    "NonZero": _VALUES,
    "Unique": _VALUES,
}
_STANDARD: Final = ("", "ai.onnx")


def operator_name(node: Any) -> str:
    """Return a node's operator, with its domain where that is no ONNX standard: "Conv", "my::Mystery"."""
    return node.op_type if node.domain in _STANDARD else f"{node.domain}::{node.op_type}"


def located(model: Any) -> Iterator[tuple[int, Any, str]]:
    """Yield (index of the top-level node, node, location) of every node, those in subgraphs after the node that holds them."""
    for index, node in enumerate(model.graph.node):
        place = f"node {index} of {len(model.graph.node)}"
        yield from _within(index, node, place)


def refusal(index: int, node: Any, place: str, words: str, *, runtime: str) -> dict[str, Any]:
    """Return what is told of a node that `runtime` refuses, as JSON values; `words` are the target's own."""
    outputs = ", ".join(filter(None, node.output))
    inside = _module_of(node)
    return {
        "index": index,
        "name": node.name,
        "operator": operator_name(node),
        "location": f"{place}, makes {outputs or 'nothing'}" + (f", in {inside}" if inside else ""),
        "words": words,
        "advice": advice_for(node, runtime),
    }


def modules_of(model: Any) -> dict[str, str]:
    """Return the module that each value was exported from, as far as the exporter noted it: {value: "Model/layer1: Block"}."""
    return {
        name: module
        for _index, node, _place in located(model)
        if (module := _module_of(node))
        for name in node.output
        if name
    }


def _module_of(node: Any) -> str:
    scopes: dict[str, str] = {entry.key: entry.value for entry in getattr(node, "metadata_props", ())}
    return scopes.get("namespace", "").lstrip(": ")


def advice_for(node: Any, runtime: str) -> str:
    """Return what to do about a node that a runtime does not read."""
    if node.domain not in _STANDARD:
        advice = "rewrite it with operators of the ONNX standard"
        plugin = " or give it a plugin (build.plugins)" if runtime == "tensorrt" else ""
        return f"{advice}{plugin}" if runtime == "onnxruntime" else f"{advice}{plugin}{_fallback(node)}"
    advice = _ADVICE.get(
        node.op_type, f"export with another opset or exporter, or rewrite the model without {node.op_type}"
    )
    return advice if runtime == "onnxruntime" else f"{advice}{_fallback(node)}"


def _fallback(node: Any) -> str:
    known = "" if node.domain in _STANDARD else ", if that knows it"
    return f"; or serve this model by a target of runtime onnxruntime{known}"


def _within(index: int, node: Any, place: str) -> Iterator[tuple[int, Any, str]]:
    yield index, node, place
    for attribute in node.attribute:
        for graph in (*((attribute.g,) if attribute.HasField("g") else ()), *attribute.graphs):
            for inner in graph.node:
                yield from _within(index, inner, f"{place} > {node.op_type} {node.name!r} {attribute.name}")
