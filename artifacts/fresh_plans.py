"""Fresh plans that builds leave in a store, so that a machine which has planned nothing yet need not read every record.

cache/plans/<profile>/<shard>    64 hex digits of SHA-256, a line break, and zlib of {"schema": 1, "plans": {name: plan}}

A profile is what all who read a shard have in common (`tasks.remembered`); a plan's name says in which of 64 shards it is. A
help and never needed: a shard that is lost, damaged or behind costs the time to plan again. See docs/adr/0008-fresh-plans.md.
"""

from __future__ import annotations

import json
import time
import zlib
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from random import uniform
from typing import Any, Final

from artifacts.errors import IntegrityError, NotFoundError, StoreError
from artifacts.refs import digest_bytes
from artifacts.store import Store

PLANS: Final = "cache/plans/"
SHARDS: Final = 64
MAX_PLANS: Final = 1024  # of one shard; beyond that the oldest go
_MAX_BYTES: Final = 256 << 20  # of one shard, unpacked, that is read
_ROOM: Final = _MAX_BYTES // 4  # for plans of one shard that is written
_SCHEMA: Final = 1
_TRIES: Final = 8
_LONGEST_WAIT: Final = 0.05  # seconds, times the tries before
_ASKERS: Final = 16


@dataclass(frozen=True)
class FreshPlans:
    """The plans of one profile in a store; safe to change from many processes. `warn` is told of a shard that is damaged."""

    store: Store
    profile: str
    warn: Callable[[str], None] = lambda _message: None

    def read(self, names: Collection[str]) -> dict[str, Any]:
        """Return those of these plans that are there: one request for each shard. Raises StoreError."""
        shards = sorted({_shard(name) for name in names})
        found = self._all(shards)
        return {name: found[name] for name in names if name in found}

    def add(self, plans: Mapping[str, Any], combine: Callable[[Any, Any], Any] = lambda _earlier, later: later) -> None:
        """Put plans in, over earlier ones of their names, or as `combine` has both (the earlier one may be anything).

        Of many writers at once one may lose its plans. Raises StoreError.
        """
        parts: dict[str, dict[str, Any]] = defaultdict(dict)
        for name, plan in plans.items():
            parts[_shard(name)][name] = plan
        for shard, part in parts.items():
            self._merge(shard, part, combine)

    def _all(self, shards: Iterable[str]) -> dict[str, Any]:
        shards = list(shards)
        if len(shards) < 2 or self.store.uri.startswith("file:"):
            loaded = [self._load(shard) for shard in shards]
        else:
            from concurrent.futures import ThreadPoolExecutor

            self.store.info(self._path(shards[0]))  # boto3 makes its client in one thread
            with ThreadPoolExecutor(_ASKERS) as pool:
                loaded = list(pool.map(self._load, shards))
        return {name: plan for plans, _version in loaded for name, plan in plans.items()}

    def _load(self, shard: str) -> tuple[dict[str, Any], str | None]:
        """Return a shard's plans and its version (None: there is no such object)."""
        path = self._path(shard)
        try:
            data, version = self.store.read_versioned(path)
        except NotFoundError:
            return {}, None
        try:
            return unpack(data), version
        except IntegrityError as err:
            self.warn(f"{path}: {err}; recipes are planned anew, and the next build replaces it")
            return {}, version

    def _merge(self, shard: str, plans: Mapping[str, Any], combine: Callable[[Any, Any], Any]) -> None:
        path = self._path(shard)
        for attempt in range(_TRIES):
            time.sleep(uniform(0, _LONGEST_WAIT * attempt))
            known, version = self._load(shard)
            merged = {name: plan for name, plan in known.items() if name not in plans}
            merged |= {name: combine(known[name], plan) if name in known else plan for name, plan in plans.items()}
            data = pack(dict(list(merged.items())[-MAX_PLANS:]))
            try:
                if self.store.write(path, data, if_absent=version is None, if_version=version):
                    return
            except StoreError:
                # A service without conditional writes: then of two writers at once the first has written in vain.
                self.store.write(path, data)
                return

    def _path(self, shard: str) -> str:
        return f"{PLANS}{self.profile}/{shard}"


def pack(plans: Mapping[str, Any]) -> bytes:
    """Return a shard's bytes; where there is no room for all plans, without the oldest."""
    texts: list[str] = []
    room = _ROOM
    for name, plan in reversed(list(plans.items())):
        text = f"{_json(name)}:{_json(plan)}"
        size = len(text.encode()) + 1
        if size <= room:
            texts.append(text)
            room -= size
    text = f'{{"schema":{_SCHEMA},"plans":{{{",".join(reversed(texts))}}}}}'
    data = zlib.compress(text.encode(), 6)
    return digest_bytes(data).encode() + b"\n" + data


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def unpack(data: bytes) -> dict[str, Any]:
    """Return the plans of a shard. Raises IntegrityError where its bytes are not those that were written."""
    check, _newline, packed = data.partition(b"\n")
    if check.decode("ascii", "replace") != digest_bytes(packed):
        raise IntegrityError("plans are not those that were written")
    try:
        unpacker = zlib.decompressobj()
        document = json.loads(unpacker.decompress(packed, _MAX_BYTES))
        plans = document["plans"] if document["schema"] == _SCHEMA else {}
    except (zlib.error, ValueError, KeyError, TypeError, RecursionError) as err:
        raise IntegrityError(f"plans cannot be read: {err!r}") from err
    if not isinstance(plans, dict):
        raise IntegrityError(f"plans cannot be read: a {type(plans).__name__}")
    return plans


def _shard(name: str) -> str:
    return f"{int(name[:8], 16) % SHARDS:02x}"
