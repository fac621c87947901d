"""A lock among hosts that share a store and nothing else, by compare and swap: so that one action is done once.

claims/<sha256 of the name>.json    who has it now, and how often they said so; `holder` is null once it is free

A holder writes its claim again every few seconds. Who waits takes over a claim that is free, or whose version has not changed
for `ENGINERY_CLAIM_SECONDS` (60) of its own clock: no clocks are compared, and a killed holder delays the others by that
time at most. A holder that was only slow finds its claim lost and goes on: then two do one thing, and the first record counts.
A claim stays when it is free, since a removal cannot be made conditional everywhere; `gc` removes what nobody claimed for long,
and whose claim it removed in the instant in which they took it puts it back.
"""

from __future__ import annotations

import json
import os
import platform
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Final

from artifacts.errors import ArtifactError, NotFoundError, StoreError
from artifacts.refs import digest_bytes
from artifacts.store import Store

CLAIMS: Final = "claims/"
SECONDS: Final = "ENGINERY_CLAIM_SECONDS"
_DEFAULT_SECONDS: Final = 60.0
_FIRST_WAIT: Final = 0.05
_LONGEST_WAIT: Final = 2.0


@contextmanager
def claimed(store: Store, name: str, give_up: Callable[[], bool] | None = None) -> Iterator[None]:
    """Hold a claim for a block, waiting for a live holder until `give_up` says True. Raises StoreError, also then."""
    path = f"{CLAIMS}{digest_bytes(name.encode())}.json"
    claim = _Claim(store, path, name)
    claim.take(give_up)
    done = threading.Event()
    beating = threading.Thread(target=claim.beat, args=(done,), name=path, daemon=True)
    beating.start()
    try:
        yield
    finally:
        done.set()
        beating.join()
        with suppress(ArtifactError):  # then others wait until it is old
            claim.free()


class _Claim:
    def __init__(self, store: Store, path: str, name: str) -> None:
        self._store = store
        self._path = path
        self._name = name
        self._holder = uuid.uuid4().hex
        self._beats = 0
        self._lost = False
        self._life = float(os.environ.get(SECONDS) or _DEFAULT_SECONDS)

    def take(self, give_up: Callable[[], bool] | None) -> None:
        """Wait for the claim and take it."""
        seen, since, wait = "", time.monotonic(), _FIRST_WAIT
        while True:
            try:
                data, version = self._store.read_versioned(self._path)
            except NotFoundError:
                if self._store.write(self._path, self._dump(self._holder), if_absent=True) or self._is_mine():
                    return
                continue
            if version != seen:
                seen, since = version, time.monotonic()
            stale = time.monotonic() - since > self._life
            if (stale or _holder(data) is None) and (
                self._store.write(self._path, self._dump(self._holder), if_version=version) or self._is_mine()
            ):
                return
            if give_up is not None and give_up():
                raise StoreError(f"{self._store.uri}: gave up waiting for {self._name}, which another builder makes")
            time.sleep(min(wait, self._life / 4))
            wait = min(1.5 * wait, _LONGEST_WAIT)

    def beat(self, done: threading.Event) -> None:
        """Say that the holder lives, until done; stop where another has taken over."""
        while not done.wait(self._life / 6) and not self._lost:
            with suppress(ArtifactError):  # said again soon
                self._write(self._holder)

    def free(self) -> None:
        """Let the next one have it."""
        if not self._lost:
            self._write(None)

    def _write(self, holder: str | None) -> None:
        self._beats += 1
        try:
            data, version = self._store.read_versioned(self._path)
        except NotFoundError:
            if holder is not None:
                self._store.write(self._path, self._dump(holder), if_absent=True)
            return
        if _holder(data) != self._holder:
            self._lost = True
        else:
            self._store.write(self._path, self._dump(holder), if_version=version)

    def _is_mine(self) -> bool:
        """Tell whether a write succeeded whose answer was lost."""
        try:
            return _holder(self._store.read(self._path)) == self._holder
        except NotFoundError:
            return False

    def _dump(self, holder: str | None) -> bytes:
        document = {"schema": 1, "name": self._name, "holder": holder, "beats": self._beats, "from": self._holder}
        return json.dumps({**document, "host": platform.node(), "pid": os.getpid()}, sort_keys=True).encode()


def _holder(data: bytes) -> str | None:
    """Return who holds a claim; None where nobody does, or it cannot be read."""
    try:
        holder = json.loads(data)["holder"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return holder if isinstance(holder, str) else None
