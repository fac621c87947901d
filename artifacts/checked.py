"""Documents that say a digest of themselves, so that one flipped bit in them is damage and not another document."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

from artifacts.keys import canonical_parsed
from artifacts.refs import digest_bytes

_CHECK: Final = "check"


def dump_checked(document: Mapping[str, Any]) -> bytes:
    """Serialise a document for people who read the store, with `check`: the SHA-256 of the rest as canonical JSON."""
    seen = json.loads(json.dumps(document, allow_nan=False))  # what a reader will see: JSON has no tuples
    return json.dumps({**seen, _CHECK: _digest(seen)}, indent=1, sort_keys=True, ensure_ascii=False).encode() + b"\n"


def parse_checked(data: bytes) -> dict[str, Any]:
    """Read such a document back; those of earlier releases have no check.

    Raises ValueError, TypeError or RecursionError where it is no JSON object, or not what was written.
    """
    document = json.loads(data)
    if not isinstance(document, dict):
        raise TypeError(f"expected an object, got {type(document).__name__}")
    check = document.pop(_CHECK, None)
    if check is not None and check != _digest(document):
        raise ValueError("it is not what was written: a part of it was changed")
    return document


def _digest(document: object) -> str:
    return digest_bytes(canonical_parsed(document))
