"""Values of a YAML file with the places that state them, and the words that messages use for both."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

Key = tuple[str | int, ...]


@dataclass(frozen=True, slots=True)
class Node:
    """A value and where it is stated.

    `value` is a dict of nodes, a list of nodes, or a scalar; `line` counts from 1 and is that of the key, or of the
    list item, that the value belongs to; `text` is an unquoted scalar as written; `size` counts the nodes inside.
    """

    value: Any
    file: str
    line: int
    text: str | None = None
    size: int = 1

    def plain(self) -> Any:
        """Return the value as JSON."""
        if isinstance(self.value, dict):
            return {key: node.plain() for key, node in self.value.items()}
        if isinstance(self.value, list):
            return [node.plain() for node in self.value]
        return self.value

    def at(self, path: Key) -> Node:
        """Return the node at a path, or the last one on the way to it that exists."""
        node = self
        for part in path:
            inside = isinstance(node.value, dict) and part in node.value
            if not inside and not (isinstance(node.value, list) and type(part) is int and part < len(node.value)):
                break
            node = node.value[part]
        return node

    def walk(self, path: Key = ()) -> Iterator[tuple[Key, Node]]:
        """Yield every node below this one, and this one, with its path."""
        yield path, self
        if isinstance(self.value, dict):
            for key, node in self.value.items():
                yield from node.walk((*path, key))
        elif isinstance(self.value, list):
            for index, node in enumerate(self.value):
                yield from node.walk((*path, index))


def dotted(path: Sequence[str | int]) -> str:
    """Return a path as messages write it: `targets[0].gpus[1]`."""
    parts = (f"[{part}]" if isinstance(part, int) else f".{brief(part, 60)}" for part in path)
    return "".join(parts).removeprefix(".")


def described(node: Node) -> str:
    """Say what a value is, in YAML's words: `a list`, `the string "on"`, `the number 10.10`."""
    value = node.value
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list):
        return "a list"
    if value is None:
        return "nothing"
    if isinstance(value, str):
        return f'the string "{brief(value, 40)}"'
    text = node.text if node.text is not None else str(value)
    return text if isinstance(value, bool) else f"the number {brief(text, 40)}"


def near(word: str, known: Sequence[str]) -> str:
    """Return `did you mean 'x'? ` where one of the known words is near, else nothing."""
    from difflib import get_close_matches

    by_fold = {name.lower(): name for name in known}
    found = get_close_matches(word.lower()[:100], list(by_fold), n=1, cutoff=0.6)
    return f"did you mean {by_fold[found[0]]!r}? " if found else ""


def beside(path: Path) -> str:
    """Return ` (did you mean 'x'?)` for a missing file that has a near namesake in its folder, or name the folder."""
    try:
        names = [entry.name for entry in islice(path.parent.iterdir(), 2000)]
    except (OSError, ValueError):
        return f" (there is no folder {path.parent})"
    hint = near(path.name, sorted(names))
    return f" ({hint.strip()})" if hint else ""


def brief(text: str, limit: int) -> str:
    """Return a text, cut where it is longer than `limit` characters."""
    return text if len(text) <= limit else f"{text[:limit]}..."
