"""The one key function: sha256 over canonical JSON, and the difference between two preimages.

An action is a stage applied to given inputs, parameters and toolchain. Its key is the SHA-256 of
all of these; the record keeps the preimage, so that every miss can say which value changed. Paths,
times and host names never enter an action.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Final

from artifacts.refs import digest_bytes

Json = None | bool | int | float | str | list["Json"] | dict[str, "Json"]


@dataclass(frozen=True)
class Action:
    """A stage applied to inputs (file name -> SHA-256), parameters and toolchain (name -> version)."""

    stage: str
    stage_version: int
    params: Mapping[str, Any] = field(default_factory=dict)
    inputs: Mapping[str, str] = field(default_factory=dict)
    toolchain: Mapping[str, Any] = field(default_factory=dict)

    def preimage(self) -> dict[str, Any]:
        """Return the JSON document whose digest is the key."""
        return {
            "stage": self.stage,
            "stage_version": self.stage_version,
            "params": dict(self.params),
            "inputs": dict(self.inputs),
            "toolchain": dict(self.toolchain),
        }

    @cached_property
    def key(self) -> str:
        """The action's key: 64 lower-case hex digits."""
        return digest_bytes(canonical_json(self.preimage()))


# One encoder for all: json.dumps makes a new one for every call.
_encode: Final = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode
_ATOMS: Final = frozenset((type(None), bool, int, float, str))
_NAMES: Final = frozenset((str,))


def canonical_json(value: object) -> bytes:
    """Serialise JSON values to their one canonical spelling: sorted keys, no spaces, UTF-8.

    Raises TypeError for anything that is not JSON (a path, a tuple, an enum, a key that is not a
    string) and ValueError for NaN or infinity, so that nothing enters a key by way of its repr.
    """
    text = canonical_parsed(value)
    if not _is_json(value):
        _require_json(value, "$")
    return text


def canonical_parsed(value: object) -> bytes:
    """Do the same for what a JSON parser returned, whose types need no look: only its numbers may be no JSON.

    Raises ValueError for NaN, infinity and half a surrogate pair.
    """
    try:
        return _encode(value).encode()
    except (TypeError, ValueError):
        _require_json(value, "$")  # which says where it is
        raise


def _is_json(value: object) -> bool:
    """Tell whether a value that can be encoded has JSON types only; where it has not, `_require_json` says where.

    The encoder takes more (tuples, enums, keys that are numbers). This look is most of what a key costs.
    """
    left: list[Any] = [value]
    while left:
        item = left.pop()
        kind = type(item)
        if kind is dict:
            if set(map(type, item)) - _NAMES:
                return False
            item = item.values()
        elif kind is not list:
            if kind not in _ATOMS:
                return False
            continue
        if set(map(type, item)) - _ATOMS:  # most hold numbers and texts alone
            left.extend(item)
    return True


def _require_json(value: object, path: str) -> None:
    if value is None or type(value) in (bool, int, str):
        return
    if type(value) is float:
        if not math.isfinite(value):
            raise ValueError(f"{path}: {value} cannot enter a key")
        return
    if type(value) is list:
        for index, item in enumerate(value):
            _require_json(item, f"{path}[{index}]")
        return
    if type(value) is dict:
        for name, item in value.items():
            if type(name) is not str:
                raise TypeError(f"{path}: key {name!r} is not a string")
            _require_json(item, f"{path}.{name}")
        return
    raise TypeError(f"{path}: {type(value).__name__} cannot enter a key (JSON values only)")


@dataclass(frozen=True, slots=True)
class Difference:
    """One value that differs between two preimages.

    Where a side lacks it, that side is None here, and `added` or `removed` tells it from a JSON null.
    """

    path: str
    old: Any
    new: Any
    added: bool = False
    removed: bool = False

    def __str__(self) -> str:
        old = "(none)" if self.added else _brief(self.old)
        new = "(none)" if self.removed else _brief(self.new)
        if old == new:  # 18 and "18", or long values that differ at their ends
            old, new = (json.dumps(value, sort_keys=True, ensure_ascii=False) for value in (self.old, self.new))
        return f"{self.path} {old} -> {new}"


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Difference]:
    """Return every leaf that differs between two JSON objects, in path order.

    The list is empty exactly where both have the same canonical JSON. Raises TypeError and ValueError as
    `canonical_json` does.
    """
    return list(_differences(old, new, ""))


def _differences(old: object, new: object, path: str) -> Iterator[Difference]:
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for name in sorted({*old, *new}):
            inner = f"{path}.{name}" if path else name
            if name not in old:
                yield Difference(inner, None, new[name], added=True)
            elif name not in new:
                yield Difference(inner, old[name], None, removed=True)
            else:
                yield from _differences(old[name], new[name], inner)
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for index, (left, right) in enumerate(zip(old, new, strict=True)):
            yield from _differences(left, right, f"{path}[{index}]")
    # Not `old != new`: to Python 1, 1.0 and True are equal, and so are 0.0 and -0.0.
    elif canonical_json(old) != canonical_json(new):
        yield Difference(path, old, new)


def _brief(value: object) -> str:
    if isinstance(value, str):
        return f"{value[:12]}…" if len(value) == 64 and not value.strip("0123456789abcdef") else value
    text = json.dumps(value, sort_keys=True, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."
