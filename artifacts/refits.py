"""Which compiled plans new weights may be put into: a hint in the store, by all that such plans have in common.

`cache/refit/<digest>.json` lists the keys of compilations that differ in weights alone, the newest first. Whoever
uses one looks its record up, so that a list that is wrong or lost costs a compilation and never an engine.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from artifacts.errors import NotFoundError
from artifacts.keys import canonical_json
from artifacts.refs import digest_bytes, is_digest
from artifacts.store import Store

# What may differ between a plan and the one that it is refitted from: the graph, whose structure is compared instead, and
# what only makes compiling faster.
_NOT_COMPARED: Final = ("model.onnx", "model.onnx.data", "timing.cache")
_KEPT: Final = 8
_SCHEMA: Final = 1


@dataclass(frozen=True)
class Base:
    """A compilation whose plan may be refitted: its key, and the engine that it was first published as."""

    key: str
    engine: str | None = None


def refit_identity(compilation: Mapping[str, Any], structure: str) -> str:
    """Return what a compilation has in common with all that it can be refitted from and to, as one digest.

    `compilation` is its preimage; `structure` the digest of its graph without the values of weights.
    """
    common = {
        **compilation,
        "structure": structure,
        "inputs": {name: ref for name, ref in compilation["inputs"].items() if name not in _NOT_COMPARED},
    }
    return digest_bytes(canonical_json(common))


@dataclass(frozen=True)
class RefitIndex:
    """The lists of one store; safe to change from many processes."""

    store: Store

    def bases(self, identity: str) -> tuple[Base, ...]:
        """Return what may be refitted, the newest first; nothing where the list is lost or damaged."""
        try:
            return parse_bases(self.store.read(_path(identity)))
        except NotFoundError:
            return ()

    def add(self, identity: str, base: Base) -> None:
        """Put a compilation first; of one that is listed already, only the engine's name is noted. Raises StoreError."""
        while not self._add(identity, base):
            pass

    def _add(self, identity: str, base: Base) -> bool:
        path = _path(identity)
        try:
            data, version = self.store.read_versioned(path)
        except NotFoundError:
            return self.store.write(path, _dump((base,)), if_absent=True)
        found = parse_bases(data)
        if any(one.key == base.key for one in found):
            listed = tuple(
                replace(one, engine=one.engine or base.engine) if one.key == base.key else one for one in found
            )
        else:
            listed = (base, *found)[:_KEPT]
        return listed == found or self.store.write(path, _dump(listed), if_version=version)


def _path(identity: str) -> str:
    return f"cache/refit/{identity}.json"


def _dump(bases: tuple[Base, ...]) -> bytes:
    return canonical_json({"schema": _SCHEMA, "bases": [{"key": base.key, "engine": base.engine} for base in bases]})


def parse_bases(data: bytes) -> tuple[Base, ...]:
    """Return what a list names; nothing where it is damaged."""
    try:
        document = json.loads(data)
        if document["schema"] != _SCHEMA:
            return ()
        found = [Base(entry["key"], entry["engine"]) for entry in document["bases"]]
    except (ValueError, TypeError, KeyError, RecursionError):
        return ()
    return tuple(base for base in found if is_digest(base.key) and isinstance(base.engine, (str, type(None))))
