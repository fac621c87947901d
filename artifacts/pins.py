"""Pins: engines that stay in a store whatever names them, until somebody takes the pin out.

pins/<recipe>/<target>/<build>.json     {"schema": 1, "reason": ..., "by": ..., "time": ...}: its path alone counts
"""

from __future__ import annotations

import datetime as dt
import json
from typing import Any, Final

from artifacts.catalog import EngineCatalog, EngineId
from artifacts.errors import NotFoundError
from artifacts.garbage import PINS, pin_path
from artifacts.leases import leased
from artifacts.store import Store

_SCHEMA: Final = 1


def pin(catalog: EngineCatalog, engine: EngineId, by: str, reason: str | None) -> None:
    """Pin a published engine, over an earlier pin. Raises NotFoundError where the engine is gone, StoreError."""
    now = dt.datetime.now(dt.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
    document = {"schema": _SCHEMA, "reason": reason, "by": by, "time": now}
    # From here on no garbage collector removes it: what is looked for is what will be pinned.
    with leased(catalog.store, f"pin {engine}", [str(engine)]):
        catalog.manifest_bytes(engine)
        catalog.store.write(pin_path(engine), json.dumps(document, indent=1, ensure_ascii=False).encode() + b"\n")


def unpin(store: Store, engine: EngineId) -> bool:
    """Take a pin out; return False where there is none. Raises StoreError."""
    there = store.info(pin_path(engine)) is not None
    store.delete(pin_path(engine))
    return there


def pins(store: Store) -> dict[EngineId, dict[str, Any]]:
    """Return what is pinned, with what the pins say, as far as that can be read. Raises StoreError."""
    found: dict[EngineId, dict[str, Any]] = {}
    for info in store.list(PINS):
        parts = info.path.removesuffix(".json").split("/")
        if len(parts) == 4:
            try:
                document = json.loads(store.read(info.path))
            except NotFoundError:
                continue
            except (ValueError, RecursionError):
                document = None
            found[EngineId(*parts[1:])] = document if isinstance(document, dict) else {}
    return found
