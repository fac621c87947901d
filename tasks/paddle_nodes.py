"""Which operators of a Paddle graph its converter may not know: said before it is called, since it ends the process over them.

paddle2onnx 2.1 aborts without naming one. What it lists as supported are names of the older graphs (`elementwise_add`), which
it gives some of the newer ones itself (`add`): those that it was seen to convert are in `_RENAMED`.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

_RENAMED: Final = frozenset(
    (
        *(
            "add",
            "arange",
            "argmax",
            "batch_norm_",
            "divide",
            "expand",
            "flatten",
            "hardsigmoid",
            "hardswish",
            "matmul",
        ),
        *("max", "maximum", "mean", "min", "minimum", "multiply", "subtract", "topk", "unsqueeze"),
    )
)
# Of the graph itself, and not of what it computes.
_STRUCTURE: Final = frozenset(("p", "data", "feed", "fetch", "combine", "split", "slice", "yield", "if", "while"))
_OPERATORS: Final = "1."  # the dialect pd_op; others are Paddle's own bookkeeping


def unknown_operators(graph: Path, supported: Collection[str]) -> list[str]:
    """Return the operators of a saved graph (.json) that are not among `supported`: each with its place and what it makes."""
    if graph.suffix != ".json":
        return []
    program = json.loads(graph.read_bytes())["program"]
    found = list(_operators(program["regions"]))
    return [
        f"{name} (operator {index + 1} of {len(found)}, makes {', '.join(map(_shape, operator.get('O', ()))) or 'nothing'})"
        for index, (name, operator) in enumerate(found)
        if operator["#"].startswith(_OPERATORS) and name not in supported and name not in _RENAMED | _STRUCTURE
    ]


def _operators(regions: list[Mapping[str, Any]]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield every operator with its plain name; those of its branches come after the one that holds them."""
    for region in regions:
        for block in region["blocks"]:
            for operator in block["ops"]:
                yield operator["#"].partition(".")[2] or operator["#"], operator
                yield from _operators(operator.get("regions", []))


def _shape(output: Mapping[str, Any]) -> str:
    described = output.get("TT", {}).get("D", [])
    extents = described[1] if len(described) > 1 and isinstance(described[1], list) else []
    return f"[{', '.join('?' if extent == -1 else str(extent) for extent in extents)}]"
