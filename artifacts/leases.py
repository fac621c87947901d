"""Who uses a store, and who removes things from it: notices that both write, so that neither hurts the other.

leases/<id>.json    somebody builds, publishes or promotes here; renewed while they do, removed when they end
sweeps/<id>.json    somebody is removing garbage right now, for seconds

A lease protects what was written or used since it began (with `FRESH_SECONDS` before that), and the engines that it names. Who
holds one makes older objects that they rely on count as used (`Lease.use`). Both sides write first and look afterwards: a
holder writes (the lease, or the time of an object) and then waits for sweeps that are under way; a sweeper writes its
sweep and then reads leases and times. So of the two at least one sees the other. Ages are told by the store's
clock, never by this host's. A sweep whose process has ended on this machine is waited for no more; what is not renewed for `LIFE_SECONDS` is dead. See docs/adr/0006-garbage.md.
"""

from __future__ import annotations

import json
import os
import platform
import threading
import time
import uuid
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from artifacts.errors import ArtifactError, StoreError
from artifacts.store import ObjectInfo, Store

LEASES: Final = "leases/"
SWEEPS: Final = "sweeps/"
LIFE_SECONDS: Final = 600.0
FRESH_SECONDS: Final = 3600.0
_RENEW_SECONDS: Final = 60.0
_SCHEMA: Final = 1
_LONGEST_WAIT: Final = 0.5
# A request that a killed process had sent may be carried out after its end; none takes so long.
_UNDER_WAY_SECONDS: Final = 120.0


@dataclass
class Notice:
    """An object in the store that says what this process is doing there; `began` is the store's time."""

    store: Store
    path: str
    began: float
    since: float = field(default_factory=time.monotonic)

    def now(self) -> float:
        """Return the store's time, in seconds (UTC), as far as its clock and this host's run at one pace."""
        return self.began + self.elapsed()

    def elapsed(self) -> float:
        """Return how many seconds this has been there."""
        return time.monotonic() - self.since


@dataclass
class Lease(Notice):
    """A lease that this process holds."""

    def use(self, paths: Collection[str]) -> frozenset[str]:
        """Make objects that nobody used lately count as used now; return those that are gone. Raises StoreError."""
        infos = self.store.infos(paths)
        old = [path for path, info in infos.items() if info.modified < self.began - FRESH_SECONDS]
        if not old:
            return frozenset(path for path in paths if path not in infos)
        for path in old:
            self.store.touch(path)
        # A sweep that saw the old time may still remove it.
        self.settle()
        there = self.store.infos(paths)
        return frozenset(path for path in paths if path not in there)

    def settle(self) -> None:
        """Wait until every sweep that is under way has ended; later ones see what was written before this. Raises StoreError."""
        for sweep in list(self.store.list(SWEEPS)):
            found, wait = self.store.info(sweep.path), 0.01
            while found is not None and not is_dead(found.modified, self.now()) and not self._left(found):
                time.sleep(wait)
                wait = min(2 * wait, _LONGEST_WAIT)
                found = self.store.info(sweep.path)

    def _left(self, sweep: ObjectInfo) -> bool:
        """Tell whether a process of this machine left a sweep that has ended, and so has all that it had sent."""
        if not self.store.uri.startswith("file:") and self.now() - sweep.modified < _UNDER_WAY_SECONDS:
            return False
        try:
            return _has_ended(json.loads(self.store.read(sweep.path))["process"])
        except (ArtifactError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
            return False


@dataclass(frozen=True)
class LeaseFacts:
    """A lease as others see it: since when, last renewed when (both by the store's clock), and which engines it names.

    A name is `recipe/target/build`, or `recipe/target` for all builds there.
    """

    began: float
    renewed: float
    engines: tuple[str, ...] = ()

    def names(self, engine: str) -> bool:
        """Tell whether it names an engine, given as `recipe/target/build`."""
        return any(f"{engine}/".startswith(f"{name}/") for name in self.engines)


def is_dead(renewed: float, now: float) -> bool:
    """Tell whether a notice that was last written then is one that a dead process left."""
    return now - renewed > LIFE_SECONDS


@contextmanager
def leased(store: Store, what: str, engines: Collection[str] = ()) -> Iterator[Lease]:
    """Hold a lease for a block, whose words `what` are for people; `engines` (as in `LeaseFacts`) stay while it lasts.

    When the block begins, no sweep is under way that does not know of the lease. Raises StoreError.
    """
    with _noticed(store, LEASES, {"what": what, "engines": sorted(engines)}) as notice:
        lease = Lease(store, notice.path, notice.began, notice.since)
        lease.settle()
        yield lease


@contextmanager
def sweeping(store: Store) -> Iterator[Notice]:
    """Say for a block that garbage is removed; what is decided on has to be read inside of the block. Raises StoreError."""
    with _noticed(store, SWEEPS, {"what": "gc"}) as notice:
        yield notice


def read_leases(store: Store) -> tuple[LeaseFacts, ...]:
    """Return all leases, dead ones too; one that cannot be read protects as if it had begun when it was last written."""
    found = []
    for info in store.list(LEASES):
        began = info.modified
        engines: tuple[str, ...] = ()
        with suppress(ArtifactError, ValueError, KeyError, TypeError, RecursionError):
            document = json.loads(store.read(info.path))
            engines = tuple(str(name) for name in document["engines"])
            began = min(began, float(document.get("began", began)))
        found.append(LeaseFacts(began, info.modified, engines))
    return tuple(found)


@contextmanager
def _noticed(store: Store, folder: str, document: dict[str, Any]) -> Iterator[Notice]:
    path = f"{folder}{uuid.uuid4().hex}.json"
    document = {"schema": _SCHEMA, **document, "host": platform.node(), "pid": os.getpid(), "process": _this_process()}
    store.write(path, _dump(document))
    try:
        since = time.monotonic()
        info = store.info(path)
        if info is None:
            raise StoreError(f"{store.uri}: {path} was removed as soon as it was written; who else empties this store?")
        notice, done = Notice(store, path, info.modified, since), threading.Event()
        # Renewals hide when it began, so from the first of them on it says so itself.
        data = _dump({**document, "began": info.modified})
        renewing = threading.Thread(target=_renew, args=(store, path, data, done), name=path, daemon=True)
        renewing.start()
        try:
            yield notice
        finally:
            done.set()
            renewing.join()
    finally:
        # Left behind, it only makes others wait or keep more, until it is dead.
        with suppress(ArtifactError):
            store.delete(path)


def _renew(store: Store, path: str, data: bytes, done: threading.Event) -> None:
    while not done.wait(_RENEW_SECONDS):
        with suppress(ArtifactError):  # tried again in a minute
            store.write(path, data)


def _this_process() -> dict[str, Any] | None:
    """Return what tells this process from every other one; None where the system does not say (no /proc)."""
    machine = _machine()
    return None if machine is None else {"machine": machine, "pid": os.getpid(), "start": _start(os.getpid())}


def _has_ended(process: dict[str, Any]) -> bool:
    """Tell whether a process is known to have ended: only of this machine's, of this container's, can that be known."""
    if process["machine"] is None or process["machine"] != _machine() or type(process["pid"]) is not int:
        return False
    try:
        os.kill(process["pid"], 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    start = _start(process["pid"])
    return start is not None and process["start"] is not None and start != process["start"]


def _machine() -> str | None:
    """Return the boot, and the namespace that process numbers are of (proc(5), namespaces(7))."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return None


def _start(pid: int) -> str | None:
    """Return when a process was started, in ticks since the boot: field 22 of /proc/PID/stat (proc(5))."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None


def _dump(document: dict[str, Any]) -> bytes:
    return json.dumps(document, indent=1, sort_keys=True, ensure_ascii=False).encode() + b"\n"
