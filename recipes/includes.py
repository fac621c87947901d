"""Shared bases: `include:` brings in other files, and the recipe wins over them.

Mappings merge key by key, everything else (lists, scalars, null) replaces; later bases win over earlier ones, and the
file that includes wins over its bases. A path is relative to the file that states it: on merging, the path fields of a
base (PATH_FIELDS) are rewritten to be relative to the recipe, so that the merged recipe means the same in its place.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Final

from recipes.errors import Fault
from recipes.nodes import Key, Node, described
from recipes.schema import SCHEMA_VERSION
from recipes.yaml_text import Document, read

MAX_INCLUDE_DEPTH: Final = 8
MAX_INCLUDES: Final = 64

# Every field of the schema that holds a path; "*" stands for each item of a list, or value of a mapping.
_SOURCE: Final[tuple[Key, ...]] = (
    ("model",),
    ("model", "file"),
    ("weights", "file"),
    ("graph", "file"),
    ("params", "file"),
    ("include", "*"),
)
_METRIC: Final[tuple[Key, ...]] = (("name",), ("data", "data"), ("data", "include", "*"))
_CALIBRATION: Final[tuple[Key, ...]] = (
    ("precision", "calibration", "data"),
    ("precision", "calibration", "include", "*"),
)
PATH_FIELDS: Final[tuple[Key, ...]] = (
    *(("source", *path) for path in _SOURCE),
    ("build", "plugins", "*", "file"),
    ("targets", "*", "build", "plugins", "*", "file"),
    ("build", "timing_cache", "file"),
    ("targets", "*", "build", "timing_cache", "file"),
    ("build", "layers", "file"),
    ("targets", "*", "build", "layers", "file"),
    *_CALIBRATION,
    *(("acceptance", "metric", *path) for path in _METRIC),
    *(("acceptance", "together", *path) for path in (*_METRIC, ("run",))),
    *(("parts", "*", "source", *path) for path in _SOURCE),
    *(("parts", "*", *path) for path in _CALIBRATION),
    *(("parts", "*", "acceptance", "metric", *path) for path in _METRIC),
    ("publish", "to"),
)
_CODE: Final = re.compile(r"[^:]+\.py:[A-Za-z_][A-Za-z0-9_]*")


@dataclass
class Merged:
    """A recipe with its bases: the merged mapping, every file that was read, and what is wrong with their text."""

    root: Node | None = None
    documents: list[Document] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    included: int = 0

    def base(self, folder: Path, prefix: str, entry: Node, chain: tuple[Path, ...]) -> Node | None:
        """Return the mapping that one `include` entry stands for, its own bases merged in, or None where it cannot be."""
        name = str(entry.value)
        path = folder / name
        why = _refusal(path, name, chain)
        self.included += 1
        if why is None and self.included > MAX_INCLUDES:
            why = f"more than {MAX_INCLUDES} includes"
        if why is not None:
            self.faults.append(Fault(entry.file, entry.line, "include", why))
            return None
        known = {document.path: document for document in self.documents}
        document = known.get(path)
        if document is None:
            document, faults = read(path)
            if document is None and faults and not faults[0].line:
                faults = [Fault(entry.file, entry.line, "include", f"{name}: {fault.what}") for fault in faults]
            self.faults.extend(faults)
            if document is None:
                return None
            self.documents.append(document)
            version = document.root.value.get("enginery")
            if version is not None and not states_version(version):
                self.faults.append(Fault(version.file, version.line, "enginery", _unread(version)))
                return None
        inner = _joined(prefix, str(PurePosixPath(name).parent))
        return self.with_bases(document, inner, (*chain, path))

    def with_bases(self, document: Document, prefix: str, chain: tuple[Path, ...]) -> Node:
        """Return a document's mapping over its bases; `prefix` leads from the recipe's folder to the document's."""
        own = dict(document.root.value)
        include = own.pop("include", None)
        root = _rebased(replace(document.root, value=own), prefix)
        entries = [] if include is None or include.value is None else [include]
        if include is not None and isinstance(include.value, list):
            entries = include.value
        below: Node | None = None
        for entry in entries:
            if not isinstance(entry.value, str) or not entry.value:
                what = f"expected the path of a base file, or a list of them, found {described(entry)}"
                self.faults.append(Fault(entry.file, entry.line, "include", what))
                continue
            base = self.base(document.path.parent, prefix, entry, chain)
            if base is not None:
                below = base if below is None else _merge(below, base)
        return root if below is None else _merge(below, root)


def read_merged(path: Path) -> Merged:
    """Read a recipe and everything that it includes, as far as that goes.

    The version is looked at first: where the recipe does not state one that this build reads, that is the only fault.
    """
    merged = Merged()
    document, faults = read(path)
    version = document.root.value.get("enginery") if document is not None else None
    if version is not None and not states_version(version):
        merged.faults = [Fault(version.file, version.line, "enginery", _unread(version))]
        return merged
    merged.faults = faults
    if document is None:
        return merged
    if version is None and not faults:
        what = f"no version stated; begin the recipe with 'enginery: {SCHEMA_VERSION}' (this build reads: {SCHEMA_VERSION})"
        merged.faults = [Fault(str(path), 1, "enginery", what)]
        return merged
    merged.documents.append(document)
    merged.root = merged.with_bases(document, "", (path,))
    return merged


def states_version(node: Node) -> bool:
    """Tell whether a node is the version of the schema that this build reads (a whole number, not a string)."""
    return type(node.value) is int and node.value == SCHEMA_VERSION


def _unread(version: Node) -> str:
    advice = f"; write enginery: {SCHEMA_VERSION}" if version.value == str(SCHEMA_VERSION) else ""
    return f"version {SCHEMA_VERSION} is what this build reads (allowed: {SCHEMA_VERSION}), found {described(version)}{advice}"


def _refusal(path: Path, name: str, chain: tuple[Path, ...]) -> str | None:
    if "\0" in name:
        return "a path cannot hold a NUL"
    if name.startswith(("/", "~")) or "://" in name:
        return f"{name}: bases are named relative to the file that includes them"
    if any(_same(path, outer) for outer in chain):
        loop = " -> ".join(str(outer) for outer in (*chain, path))
        return f"{name}: includes itself ({loop})"
    if len(chain) > MAX_INCLUDE_DEPTH:
        return f"{name}: includes go deeper than {MAX_INCLUDE_DEPTH} files"
    return None


def _same(one: Path, other: Path) -> bool:
    return os.path.realpath(one) == os.path.realpath(other)


def _merge(below: Node, above: Node) -> Node:
    if not (isinstance(below.value, dict) and isinstance(above.value, dict)):
        return above
    value = dict(below.value)
    for key, node in above.value.items():
        value[key] = _merge(value[key], node) if key in value else node
    return replace(above, value=value)


def _rebased(root: Node, prefix: str) -> Node:
    if not prefix:
        return root
    for path in PATH_FIELDS:
        root = _mapped(root, path, partial(_rebased_path, prefix=prefix, code_only=path[-1] == "name"))
    return root


def _mapped(node: Node, path: Key, change: Callable[[Node], Node]) -> Node:
    """Return the node with `change` applied to the strings at `path`, sharing all that does not change."""
    if not path:
        return change(node) if isinstance(node.value, str) else node
    part, rest = path[0], path[1:]
    if part == "*" and isinstance(node.value, list):
        return replace(node, value=[_mapped(item, rest, change) for item in node.value])
    if part == "*" and isinstance(node.value, dict):
        return replace(node, value={name: _mapped(item, rest, change) for name, item in node.value.items()})
    if isinstance(node.value, dict) and part in node.value:
        return replace(node, value={**node.value, part: _mapped(node.value[part], rest, change)})
    return node


def _rebased_path(node: Node, prefix: str, *, code_only: bool) -> Node:
    text: str = node.value
    if code_only and not is_code_reference(text):
        return node
    if text.startswith(("/", "~")) or "://" in text or not text:
        return node
    return replace(node, value=_joined(prefix, text))


def _joined(prefix: str, path: str) -> str:
    return path if prefix in ("", ".") else prefix if path == "." else f"{prefix}/{path}"


def is_code_reference(text: str) -> bool:
    """Tell whether a string names code: `file.py:callable`."""
    return _CODE.fullmatch(text) is not None
