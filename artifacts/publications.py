"""Engines that become visible together: all that one build publishes, by one write.

publications/<recipe>/<name>.json                     written last: what bears its mark is published
engines/<recipe>/<target>/<build>/publications/<name> the mark, written before the engine's manifest

An engine with marks is one only where the publication of one of them is there; without any (older stores) its manifest alone
makes it one. A name follows from the actions that are published together, so that two builders of the same make one
publication, and one that was killed is completed under its name. Where a publication of that name is there already, of
engines that were removed since, the next name is taken: by the old one the first engine would be visible before the last.
Only that the document is there counts, and
it needs no condition: who writes over it writes the same. See docs/adr/0009-publications.md.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from artifacts.errors import IntegrityError
from artifacts.keys import canonical_json
from artifacts.refs import digest_bytes
from artifacts.store import Store

PUBLICATIONS: Final = "publications"
PUBLICATION_SCHEMA: Final = 1
_DIGITS: Final = 16


@dataclass(frozen=True)
class Publication:
    """What was published together: engines with the digests of their manifests, and what was not built, and why."""

    engines: Mapping[str, str]
    without: Mapping[str, str] = field(default_factory=dict)


def publication_name(keys: Iterable[str]) -> str:
    """Return the name of what the publish actions of these keys make together."""
    return digest_bytes(canonical_json(sorted(keys)))[:_DIGITS]


def next_name(name: str) -> str:
    """Return the name that is taken where another publication has this one."""
    return publication_name([name])


def publication_path(recipe: str, name: str) -> str:
    """Return where a store says that a publication is complete."""
    return f"{PUBLICATIONS}/{recipe}/{name}.json"


def mark_path(engine: str, name: str) -> str:
    """Return where an engine, `recipe/target/build`, says that it is part of a publication."""
    return f"engines/{engine}/{PUBLICATIONS}/{name}"


def mark_of(path: str) -> str | None:
    """Return the name in the path of a mark; None for the path of anything else."""
    parts = path.split("/")
    return parts[5] if len(parts) == 6 and parts[0] == "engines" and parts[4] == PUBLICATIONS else None


def marks_of(store: Store, folder: str) -> list[str]:
    """Return the names of the publications that the engine in a folder is marked for. Raises StoreError."""
    return [info.path.rpartition("/")[2] for info in store.list(f"{folder}/{PUBLICATIONS}/")]


def mark_document(recipe: str, name: str) -> bytes:
    """Return what a mark says: where its publication is."""
    return f"{publication_path(recipe, name)}\n".encode()


def completed(store: Store, recipe: str | None = None) -> frozenset[str]:
    """Return the paths of all publications (of one recipe) that are complete; nothing is opened. Raises StoreError."""
    prefix = f"{PUBLICATIONS}/" if recipe is None else f"{PUBLICATIONS}/{recipe}/"
    return frozenset(info.path for info in store.list(prefix))


def publication_document(engines: Mapping[str, str], without: Mapping[str, str]) -> bytes:
    """Return what a publication says: its engines with their manifests' digests; targets that it is without, and why."""
    document: dict[str, Any] = {"schema": PUBLICATION_SCHEMA, "engines": dict(sorted(engines.items()))}
    document |= {"without": dict(sorted(without.items()))} if without else {}
    return json.dumps(document, indent=1, ensure_ascii=False).encode() + b"\n"


def read_publication(data: bytes) -> Publication:
    """Return what a publication says. Raises IntegrityError."""
    try:
        document = json.loads(data)
        engines, without, schema = document["engines"], document.get("without", {}), document["schema"]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as err:
        raise IntegrityError(f"not a publication: {err}") from err
    if schema != PUBLICATION_SCHEMA or not isinstance(engines, dict) or not isinstance(without, dict):
        raise IntegrityError(f"not a publication of schema {PUBLICATION_SCHEMA}: schema {schema!r}")
    if not all(isinstance(digest, str) for digest in engines.values()):
        raise IntegrityError("not a publication: an engine without the digest of its manifest")
    if not all(isinstance(why, str) for why in without.values()):
        raise IntegrityError("not a publication: a target that it is without, and no reason")
    return Publication(engines, without)
