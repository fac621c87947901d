"""What a store keeps of a recipe's last build: the preimage of every step, to explain misses with, and to keep from the garbage.

The targets of a recipe are built by several hosts at once, each of which knows its own steps alone: so that none of them
loses what another has just kept, it is changed by compare and swap.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from random import uniform
from typing import Any, Final

from artifacts.errors import NotFoundError
from artifacts.keys import canonical_json
from artifacts.store import Store

Preimages = Mapping[str, Mapping[str, Any]]
_MOST_TRIES: Final = 50
_LONGEST_WAIT: Final = 0.05


def latest_path(recipe: str) -> str:
    """Return where a store keeps the preimages of a recipe's last build, by step."""
    return f"cache/latest/{recipe}.json"


def read_latest(store: Store, recipe: str) -> Preimages:
    """Return the preimages of a recipe's last build; what is damaged explains nothing, and harms nothing. Raises StoreError."""
    try:
        return _preimages(store.read(latest_path(recipe)))
    except NotFoundError:
        return {}


def keep_latest(
    store: Store, recipe: str, steps: Preimages, known: tuple[bytes, str] | None = None
) -> tuple[bytes, str] | None:
    """Add the preimages of a build's steps to those that are kept, in place of those of the same names. Raises StoreError.

    `known` is what is kept, and its version, as it was just seen. Returns both, where nothing had to be added.
    """
    path = latest_path(recipe)
    for _try in range(_MOST_TRIES):
        found: Preimages
        data, version = b"", None
        try:
            data, version = known or store.read_versioned(path)
            found = _preimages(data)
        except NotFoundError:
            found = {}
        known = None
        wanted = canonical_json({**found, **steps})
        if version is not None and wanted == canonical_json(dict(found)):
            return data, version
        if (
            store.write(path, wanted, if_absent=True)
            if version is None
            else store.write(path, wanted, if_version=version)
        ):
            return None
        time.sleep(uniform(0, _LONGEST_WAIT))
    store.write(path, wanted)  # no build fails because of it
    return None


def _preimages(data: bytes) -> Preimages:
    try:
        document = json.loads(data)
        canonical_json(document)
    except (ValueError, RecursionError):
        return {}
    steps = document.items() if isinstance(document, dict) else ()
    return {
        step: preimage
        for step, preimage in steps
        if isinstance(preimage, dict) and isinstance(preimage.get("params"), dict)
    }
