"""Plans as Markdown: a table of recipes for a pull request, with the stages of each below, folded."""

from __future__ import annotations

import html
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from enginery.since import Taken

# A comment on GitHub has at most 65536 characters; the table of recipes comes before what may be left out.
MAX_CHARACTERS: Final = 60_000


def plan_markdown(documents: list[dict[str, Any]], taken: Taken | None) -> str:
    """Return the reports of plans as GitHub's Markdown: what would run, for which engines, and why.

    What goes beyond MAX_CHARACTERS is left out from the end, and said.
    """
    lines = ["### Enginery: what a build would run", ""]
    if taken is not None:
        lines += [
            f"{len(documents)} of {taken.looked_at} recipes touched since `{taken.revision}` (`{taken.commit[:12]}`).",
            "",
        ]
    if documents:
        lines += markdown_rows(
            ("recipe", "to run", "after that", "cached", "engines", "touched by"), map(_row, documents)
        )
    text = "\n".join(lines)
    left_out = 0
    for document in documents:
        details = _details(document)
        if left_out or len(text) + len(details) > MAX_CHARACTERS:
            left_out += 1
        else:
            text += details
    if left_out:
        text += f"\n\nThe stages of {left_out} more recipes are left out here: `enginery plan --explain` prints them."
    return text[:MAX_CHARACTERS]


def markdown_rows(columns: tuple[str, ...], rows: Any) -> list[str]:
    """Return the lines of a Markdown table, each cell's text as it is: no markup, no line ends."""
    head = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    return [*head, *(f"| {' | '.join(map(_cell, row))} |" for row in rows), ""]


def _row(document: dict[str, Any]) -> tuple[str, ...]:
    states = [step["state"] for step in document["steps"]]
    engines = [engine["state"] for engine in document["engines"]]
    told = ", ".join(f"{engines.count(state)} {state}" for state in dict.fromkeys(engines))
    files = document.get("since", {}).get("files", {})
    why = ", ".join(f"{name} ({kind})" for name, kind in files.items())
    counts = (str(states.count(state)) for state in ("run", "follows", "cached"))
    return (document["recipe"], *counts, told, why)


def _details(document: dict[str, Any]) -> str:
    steps = [step for step in document["steps"] if step["state"] != "cached"]
    engines = [engine for engine in document["engines"] if engine["state"] in ("waiting", "failed")]
    if not steps and not engines:
        return ""
    lines = ["", f"<details><summary>{html.escape(document['recipe'])}</summary>", ""]
    if steps:
        rows = ((step["stage"], step["subject"], step["state"], "; ".join(step["why"])) for step in steps)
        lines += markdown_rows(("stage", "subject", "state", "why"), rows)
    if engines:
        told = ((one["target"], one["precision"]["asked"], one["state"], one["why"]) for one in engines)
        lines += markdown_rows(("engine", "precision", "state", "why"), told)
    return "\n".join([*lines, "</details>", ""])


def _cell(text: str) -> str:
    kept = html.escape(" ".join(text.split()), quote=False)
    for mark in "\\|`*_[]~":
        kept = kept.replace(mark, f"\\{mark}")
    return kept.replace("@", "&#64;")  # mentions nobody
