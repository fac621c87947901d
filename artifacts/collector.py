"""Collects garbage: looks at a store, applies the rules of `garbage`, and removes what may go, so that it can die at any instant.

Manifests go first, then files, records, blobs: what is visible is whole at every instant, and what a killed collector leaves
is what the next one finds. Each batch is decided on inside of a sweep (`leases`), by what the store says then.
"""

from __future__ import annotations

import datetime as dt
import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal, TypeVar

from artifacts.catalog import EngineCatalog, EngineId
from artifacts.channels import channel_path, read_channel
from artifacts.claims import CLAIMS
from artifacts.errors import IntegrityError, NotFoundError
from artifacts.fresh_plans import PLANS
from artifacts.garbage import (
    BLOBS,
    LATEST,
    PINS,
    QUARANTINE,
    RECORDS,
    REFITS,
    REMOVED,
    EngineFacts,
    Garbage,
    Named,
    Policy,
    RecordFacts,
    Removal,
    Survey,
    find_garbage,
    note_path,
)
from artifacts.keys import canonical_json
from artifacts.leases import LEASES, SWEEPS, Notice, read_leases, sweeping
from artifacts.manifest import MANIFEST_NAME, Manifest
from artifacts.publications import PUBLICATIONS
from artifacts.records import ActionRecord
from artifacts.refits import parse_bases
from artifacts.refs import digest_bytes
from artifacts.store import ObjectInfo, Store

Phase = Literal["manifests", "files", "records", "blobs", "rest"]
PHASES: Final[tuple[Phase, ...]] = ("manifests", "files", "records", "blobs", "rest")
# Builders may wait for a sweep, so that a long one is made of short ones.
_SWEEP_SECONDS: Final = 20.0
_THREADS: Final = 16
_SMALL: Final = (
    CLAIMS,
    LEASES,
    SWEEPS,
    PINS,
    "channels/",
    "engines/",
    f"{PUBLICATIONS}/",
    RECORDS,
    LATEST,
    REFITS,
    PLANS,
    REMOVED,
    QUARANTINE,
)
T = TypeVar("T")


@dataclass(frozen=True)
class Collected:
    """What a collection removed, or would: every object; what it found to remove at first; and what stays, and why."""

    removed: tuple[Removal, ...]
    found: Garbage
    waiting: tuple[Removal, ...]


@dataclass
class Collector:
    """Collects the garbage of one store. `warn` is told, in one sentence, of what cannot be read and so stays."""

    store: Store
    policy: Policy = field(default_factory=Policy)
    warn: Callable[[str], None] = lambda _message: None
    _read: dict[ObjectInfo, Any] = field(default_factory=dict)
    _blobs: dict[str, ObjectInfo] = field(default_factory=dict)
    _facts: dict[EngineId, EngineFacts | None] = field(default_factory=dict)
    _gone: dict[EngineId, EngineFacts] = field(default_factory=dict)

    def preview(self) -> Collected:
        """Return what a collection would remove; nothing is written, so that this host's clock tells ages. Raises StoreError."""
        found = self._found(time.time(), blobs=True)
        return Collected(tuple(removal for phase in PHASES for removal in getattr(found, phase)), found, found.waiting)

    def collect(self, removed: Callable[[Removal], None] = lambda _removal: None) -> Collected:
        """Remove what may go, and tell `removed` of each object. Raises StoreError; what was removed until then is."""
        first: Garbage | None = None
        gone: list[Removal] = []
        waiting: tuple[Removal, ...] = ()
        for phase in PHASES:
            done = False
            while not done:
                with sweeping(self.store) as sweep:
                    found = self._found(sweep.now(), blobs=first is None or phase == "blobs")
                    first, waiting = first or found, found.waiting
                    removals = self._still_old(found.blobs) if phase == "blobs" else getattr(found, phase)
                    until = sweep.elapsed() + _SWEEP_SECONDS
                    for removal in self._each(self._removing(phase, sweep, until), removals):
                        if removal is not None:
                            gone.append(removal)
                            removed(removal)
                    done = sweep.elapsed() < until
        return Collected(tuple(gone), first or self._found(time.time(), blobs=False), waiting)

    def _removing(self, phase: Phase, sweep: Notice, until: float) -> Callable[[Removal], Removal | None]:
        def remove(removal: Removal) -> Removal | None:
            if sweep.elapsed() >= until or removal.path == sweep.path:
                return None
            if phase == "manifests":
                # By its time, files wait until whoever is reading them can have finished.
                engine = EngineId(*removal.path.split("/")[1:4])
                note = {"schema": 1, "engine": str(engine), "why": removal.why}
                self.store.write(note_path(engine), json.dumps(note, indent=1).encode() + b"\n")
                self._gone[engine] = self._facts[engine]  # type: ignore[assignment]  # what cannot be read stays
                EngineCatalog(self.store).unmark(engine)
            self.store.delete(removal.path)
            self._blobs.pop(removal.path, None)
            return removal

        return remove

    def _still_old(self, blobs: Sequence[Removal]) -> list[Removal]:
        """Leave out what was written or used since it was listed."""
        infos = self.store.infos([blob.path for blob in blobs])
        # In whole seconds: some of S3's answers tell no more.
        same = {path for path, info in infos.items() if int(info.modified) == int(self._blobs[path].modified)}
        return [blob for blob in blobs if blob.path in same]

    def _found(self, now: float, *, blobs: bool) -> Garbage:
        return find_garbage(self.survey(now, blobs=blobs), self.policy)

    def survey(self, now: float, *, blobs: bool = True) -> Survey:
        """Return what is there, at this time of the store's clock; blobs are listed once. Raises StoreError."""
        if blobs and not self._blobs:
            self._blobs = {info.path: info for info in self.store.list(BLOBS)}
        # Leases before anything that they could protect: one that comes later has waited for this sweep.
        leases = read_leases(self.store)
        objects = {info.path: info for prefix in _SMALL for info in self.store.list(prefix)}
        self._facts = self._engines(objects)
        self._each(self._record, [info for path, info in objects.items() if path.startswith(RECORDS)])
        return Survey(
            now=now,
            objects={**objects, **self._blobs} if blobs else objects,
            engines=self._facts,
            channels=self._channels(objects),
            latest=self._documents(objects, LATEST, _keys_of_latest, frozenset()),
            refits=self._documents(objects, REFITS, _bases, ()),
            leases=leases,
            gone=dict(self._gone),
            record=lambda path: self._record(objects[path]),
        )

    def _engines(self, objects: dict[str, ObjectInfo]) -> dict[EngineId, EngineFacts | None]:
        manifests = [
            info
            for path, info in objects.items()
            if path.startswith("engines/") and path.count("/") == 4 and path.endswith(f"/{MANIFEST_NAME}")
        ]
        found = self._each(lambda info: self._once(info, self._manifest), manifests)
        return {
            EngineId(*info.path.split("/")[1:4]): facts
            for info, facts in zip(manifests, found, strict=True)
            if facts is not _GONE
        }

    def _manifest(self, info: ObjectInfo) -> EngineFacts | None:
        catalog = EngineCatalog(self.store)
        engine = EngineId(*info.path.split("/")[1:4])
        data = self.store.read(info.path)
        try:
            return _facts(catalog.read_manifest(engine, data), data)
        except IntegrityError as err:
            self.warn(f"{err}; the engine stays")
            return None

    def _channels(self, objects: dict[str, ObjectInfo]) -> dict[tuple[str, str, str], tuple[Named, ...] | None]:
        places = [
            (parts[1], parts[2], parts[3].removesuffix(".json"))
            for path in objects
            if path.startswith("channels/") and len(parts := path.split("/")) == 4 and path.endswith(".json")
        ]
        return dict(zip(places, self._each(lambda place: self._channel(place, objects), places), strict=True))

    def _channel(self, place: tuple[str, str, str], objects: dict[str, ObjectInfo]) -> tuple[Named, ...] | None:
        try:
            channel = read_channel(self.store, *place)
        except IntegrityError as err:
            self.warn(f"{err}; all engines of {place[0]}/{place[1]} stay")
            return None
        moves = [signed.move for signed in channel.moves] if channel is not None else []
        # The last of them was written when the store says so, whatever the clock of whoever wrote it.
        until = [_seconds(move.time) for move in moves[1:]]
        until[-1:] = [max(end, objects[channel_path(*place)].modified) for end in until[-1:]]
        return tuple(Named(move.build, end) for move, end in zip(moves, [*until, None], strict=False))

    def _documents(
        self, objects: dict[str, ObjectInfo], prefix: str, parse: Callable[[bytes], T], damaged: T
    ) -> dict[str, T]:
        """Read hints, of which one that cannot be read says nothing."""

        def read(info: ObjectInfo) -> T:
            try:
                return parse(self.store.read(info.path))
            except (ValueError, TypeError, KeyError, RecursionError):
                return damaged

        infos = [info for path, info in objects.items() if path.startswith(prefix)]
        found = self._each(lambda info: self._once(info, read), infos)
        return {info.path: facts for info, facts in zip(infos, found, strict=True) if facts is not _GONE}

    def _record(self, info: ObjectInfo) -> RecordFacts | None:
        def read(info: ObjectInfo) -> RecordFacts | None:
            try:
                record = ActionRecord.from_bytes(self.store.read(info.path))
            except IntegrityError:
                return None  # which is a miss: nothing can be found by it
            engine = record.facts.get("path") if record.stage == "publish" else None
            outputs = frozenset(ref.digest for ref in record.outputs.values())
            return RecordFacts(outputs, engine if isinstance(engine, str) else None)

        found = self._once(info, read)
        return None if found is _GONE else found

    def _once(self, info: ObjectInfo, read: Callable[[ObjectInfo], Any]) -> Any:
        """Read an object unless it was read as it is; `_GONE` where somebody else removed it meanwhile."""
        if info not in self._read:
            try:
                self._read[info] = read(info)
            except NotFoundError:
                return _GONE
        return self._read[info]

    def _each(self, call: Callable[[Any], T], items: Iterable[Any]) -> list[T]:
        """Call for each item; many at once where each waits for a store across the network."""
        found = list(items)
        if self.store.uri.startswith("file:") or len(found) < 2:
            return [call(item) for item in found]
        from concurrent.futures import ThreadPoolExecutor

        with ThreadPoolExecutor(_THREADS) as pool:
            return list(pool.map(call, found))


_GONE: Final[Any] = object()


def _facts(manifest: Manifest, data: bytes) -> EngineFacts:
    made = manifest.provenance
    keys = {made.key, *(step.key for step in made.steps)}
    keys |= {manifest.benchmark.key} if manifest.benchmark is not None else set()
    keys |= {made.refitted_from.compilation} if made.refitted_from is not None else set()
    return EngineFacts(
        precision=manifest.precision.given,
        created=manifest.identity.created,
        manifest=digest_bytes(data),
        key=made.key,
        keys=frozenset(keys),
        files={name: entry.digest for name, entry in manifest.files.items()},
    )


def _keys_of_latest(data: bytes) -> frozenset[str]:
    return frozenset(digest_bytes(canonical_json(preimage)) for preimage in json.loads(data).values())


def _bases(data: bytes) -> tuple[tuple[str, str | None], ...]:
    return tuple((base.key, base.engine) for base in parse_bases(data))


def _seconds(instant: str | None) -> float:
    """Return an RFC 3339 instant as seconds (UTC); none was long ago."""
    if instant is None:
        return 0.0
    whole = instant.removesuffix("Z").partition(".")[0]  # Python 3.10 reads fractions of three and six digits alone
    return dt.datetime.fromisoformat(f"{whole}+00:00").timestamp()
