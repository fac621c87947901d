"""What of a store nothing needs any more: pure rules over what a survey found.

An engine stays while a channel names it (now, among its last moves, or until the grace period ago), a pin or a lease names
it, its recipe's last build made it, it is young, or it is the newest of its recipe, target and precision. A record stays
while an engine that stays, a recipe's last build or a list of refittable plans names it, or while it is young; a blob
while such an engine or record has it, or while it is young. Young is what was written or used within the grace period, or
since the oldest build that is under way began.

An engine goes in two steps, so that whoever is reading it can finish: its manifest first, with a note in `removed/`; its
files when the grace period has passed since. See docs/adr/0006-garbage.md.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Final

from artifacts.attestation import FOLDER
from artifacts.cache import blob_path, record_path
from artifacts.catalog import SIGNATURE_DIGITS, SIGNATURES, EngineId
from artifacts.claims import CLAIMS
from artifacts.fresh_plans import PLANS
from artifacts.leases import FRESH_SECONDS, LEASES, SWEEPS, LeaseFacts, is_dead
from artifacts.manifest import MANIFEST_NAME
from artifacts.publications import PUBLICATIONS, mark_of, publication_path
from artifacts.store import ObjectInfo

BLOBS: Final = "cache/blobs/sha256/"
RECORDS: Final = "cache/actions/"
LATEST: Final = "cache/latest/"
REFITS: Final = "cache/refit/"
REMOVED: Final = "removed/"
QUARANTINE: Final = "quarantine/"
PINS: Final = "pins/"
_DAY: Final = 86400.0


@dataclass(frozen=True)
class Policy:
    """What stays although nothing names it. `recipe` limits what goes to engines of one recipe and what only they had."""

    keep_days: float = 30.0
    keep_newest: int = 1
    keep_moves: int = 10
    grace: float = _DAY
    recipe: str | None = None


@dataclass(frozen=True)
class EngineFacts:
    """What a manifest says that matters here. `keys` are those of the actions that the engine came through."""

    precision: str
    created: str
    manifest: str
    key: str
    keys: frozenset[str]
    files: Mapping[str, str]


@dataclass(frozen=True)
class Named:
    """A build that a channel named, until when (seconds, UTC; None: it does now)."""

    build: str
    until: float | None


@dataclass(frozen=True)
class RecordFacts:
    """The blobs of a record, by digest, and the engine's folder where it is one of a publication."""

    outputs: frozenset[str]
    engine: str | None = None


@dataclass(frozen=True)
class Survey:
    """A store at one instant, whose clock says `now`. None stands for what is there and cannot be read.

    `gone` are engines whose manifests this collection has removed: what only they had was their recipe's.
    """

    now: float
    objects: Mapping[str, ObjectInfo]
    engines: Mapping[EngineId, EngineFacts | None] = field(default_factory=dict)
    channels: Mapping[tuple[str, str, str], tuple[Named, ...] | None] = field(default_factory=dict)
    latest: Mapping[str, frozenset[str]] = field(default_factory=dict)
    refits: Mapping[str, tuple[tuple[str, str | None], ...]] = field(default_factory=dict)
    leases: tuple[LeaseFacts, ...] = ()
    gone: Mapping[EngineId, EngineFacts] = field(default_factory=dict)
    record: Callable[[str], RecordFacts | None] = lambda _path: None


@dataclass(frozen=True, order=True)
class Removal:
    """One object that may go, whose it was (a recipe, or nobody's in particular), and why."""

    path: str
    size: int
    recipe: str
    why: str


@dataclass(frozen=True)
class Garbage:
    """What may go, in the order in which it has to, and what stays and why.

    `manifests` make engines invisible; `files` are those of engines that went earlier, and what was left beside engines;
    `waiting` are files that go with a later collection; `shared` are blobs that in a folder are the same bytes as those.
    """

    manifests: tuple[Removal, ...]
    files: tuple[Removal, ...]
    records: tuple[Removal, ...]
    blobs: tuple[Removal, ...]
    rest: tuple[Removal, ...]
    waiting: tuple[Removal, ...]
    shared: frozenset[str]
    kept: Mapping[EngineId, str]


def find_garbage(survey: Survey, policy: Policy) -> Garbage:
    """Return what of a store may go. Pure: nothing is read but what the survey holds."""
    return _Rules(survey, policy).garbage()


def pin_path(engine: EngineId) -> str:
    """Return where a store keeps the pin of an engine."""
    return f"{PINS}{engine}.json"


def note_path(engine: EngineId) -> str:
    """Return where a store notes that an engine's manifest was removed, and by its time when."""
    return f"{REMOVED}{engine}.json"


@dataclass(frozen=True)
class _Rules:
    survey: Survey
    policy: Policy

    @cached_property
    def leases(self) -> tuple[LeaseFacts, ...]:
        return tuple(lease for lease in self.survey.leases if not is_dead(lease.renewed, self.survey.now))

    @cached_property
    def cutoff(self) -> float:
        """What was written or used after this instant is young."""
        began = (lease.began - FRESH_SECONDS for lease in self.leases)
        return min(self.survey.now - self.policy.grace, *began, self.survey.now)

    def young(self, path: str, *, days: float = 0.0) -> bool:
        info = self.survey.objects.get(path)
        return info is not None and info.modified > min(self.cutoff, self.survey.now - days * _DAY)

    def garbage(self) -> Garbage:
        doomed = {
            engine: facts
            for engine, facts in self.survey.engines.items()
            if facts is not None and engine not in self.kept
        }
        manifests = [
            self._removal(
                f"{engine.path}/{MANIFEST_NAME}",
                engine.recipe,
                "its publication ended early" if engine in self.held else "nothing names it",
            )
            for engine in doomed
        ] + [
            self._removal(path, engine.recipe, "its engine goes")
            for engine in doomed
            if engine not in self.held
            for path in self._marks.get(engine, ())
        ]
        files, waiting = self._files(doomed)
        gone = {**self.survey.gone, **doomed}
        owners = {key: engine.recipe for engine, facts in sorted(gone.items()) for key in facts.keys}
        records = [
            self._removal(path, owners.get(_key(path), ""), "no engine that stays came through it")
            for path in self._under(RECORDS)
            if path not in self.kept_records and self._in_scope(owners.get(_key(path), ""))
        ]
        return Garbage(
            manifests=tuple(sorted(manifests)),
            files=tuple(sorted(files)),
            records=tuple(sorted(records)),
            blobs=tuple(sorted(self._blobs(gone, owners, records))),
            rest=tuple(sorted(self._rest())),
            waiting=tuple(sorted(waiting)),
            shared=frozenset(blob_path(digest) for facts in gone.values() for digest in facts.files.values()),
            kept=self.kept,
        )

    @cached_property
    def kept(self) -> dict[EngineId, str]:
        """Every engine that stays, with the first reason for it."""
        kept: dict[EngineId, str] = {}
        for engine, why in self._reasons():
            if engine in self.survey.engines:
                kept.setdefault(engine, why)
        return kept

    def _reasons(self) -> Iterator[tuple[EngineId, str]]:
        yield from self._named()
        for engine, facts in self.survey.engines.items():
            manifest = f"{engine.path}/{MANIFEST_NAME}"
            if facts is None:
                yield engine, "its manifest cannot be read"
            elif not self._in_scope(engine.recipe):
                yield engine, "of another recipe"
            elif any(lease.names(str(engine)) for lease in self.leases):
                yield engine, "somebody is using it"
            elif engine not in self.held and facts.key in self.survey.latest.get(f"{LATEST}{engine.recipe}.json", ()):
                yield engine, "its recipe's last build made it"
            elif self.young(manifest):
                yield engine, "written within the grace period"
            elif engine in self.held:
                continue
            elif self.young(manifest, days=self.policy.keep_days):
                yield engine, f"younger than {self.policy.keep_days:g} days"
        for path in self._under(f"{RECORDS}publish/"):
            facts_of = self.survey.record(path) if self.young(path) else None
            if facts_of is not None and facts_of.engine is not None:
                parts = facts_of.engine.split("/")
                if len(parts) == 4:
                    yield EngineId(*parts[1:]), "used within the grace period"
        yield from self._newest()

    def _named(self) -> Iterator[tuple[EngineId, str]]:
        for (recipe, target, channel), moves in self.survey.channels.items():
            if moves is None:
                for engine in self.survey.engines:
                    if (engine.recipe, engine.target) == (recipe, target):
                        yield engine, f"channel {channel} cannot be read"
                continue
            for age, named in enumerate(reversed(moves)):
                engine = EngineId(recipe, target, named.build)
                if named.until is None:
                    yield engine, f"channel {channel} names it"
                elif age < self.policy.keep_moves:
                    yield engine, f"among the last {self.policy.keep_moves} moves of channel {channel}"
                elif named.until > self.survey.now - self.policy.grace:
                    yield engine, f"channel {channel} named it within the grace period"
        for path in self._under(PINS):
            parts = path.removesuffix(".json").split("/")
            if len(parts) == 4:
                yield EngineId(*parts[1:]), "pinned"

    def _newest(self) -> Iterator[tuple[EngineId, str]]:
        kinds: dict[tuple[str, str, str], list[tuple[str, EngineId]]] = defaultdict(list)
        for engine, facts in self.survey.engines.items():
            if facts is not None and engine not in self.held:
                kinds[engine.recipe, engine.target, facts.precision].append((facts.created, engine))
        for (_recipe, _target, precision), found in kinds.items():
            for _created, engine in sorted(found, reverse=True)[: self.policy.keep_newest]:
                yield engine, f"the newest {precision} of its target"

    def _files(self, doomed: Mapping[EngineId, EngineFacts]) -> tuple[list[Removal], list[Removal]]:
        """Return what may go of engines' folders now, and what later."""
        now: list[Removal] = []
        later: list[Removal] = []
        for engine, paths in self._folders.items():
            if not self._in_scope(engine.recipe) or any(lease.names(str(engine)) for lease in self.leases):
                continue
            if engine in doomed:
                with_manifest = self._marks.get(engine, []) if engine not in self.held else []
                later += [
                    self._removal(path, engine.recipe, "its engine goes") for path in paths if path not in with_manifest
                ]
            elif engine in self.survey.engines:
                facts = self.survey.engines[engine]
                strays = [path for path in paths if facts is not None and self._is_stray(engine, facts, path)]
                now += [
                    self._removal(path, engine.recipe, "no part of its engine")
                    for path in strays
                    if not self.young(path)
                ]
            elif note_path(engine) in self.survey.objects:
                settled = not self.young(note_path(engine))
                chosen = now if settled else later
                chosen += [self._removal(path, engine.recipe, "its engine was removed") for path in paths]
            elif not any(self.young(path) for path in paths):
                now += [self._removal(path, engine.recipe, "left by a publication that ended early") for path in paths]
        return now, later

    def _is_stray(self, engine: EngineId, facts: EngineFacts, path: str) -> bool:
        name = path.removeprefix(f"{engine.path}/")
        folder, _slash, signature = name.rpartition("/")
        if folder == SIGNATURES:
            # Of the manifest, or of what was executed later, whose digests are not known here.
            attested = any(other.startswith(f"{engine.path}/{FOLDER}/") for other in self._folders[engine])
            return not attested and not signature.startswith(f"{facts.manifest[:SIGNATURE_DIGITS]}-")
        return not folder and name not in facts.files

    @cached_property
    def held(self) -> frozenset[EngineId]:
        """Every engine that nobody can see, since it waits for a publication that is not complete."""
        return frozenset(
            engine
            for engine, paths in self._marks.items()
            if not any(self._publication(path) in self.survey.objects for path in paths)
        )

    @cached_property
    def _marks(self) -> dict[EngineId, list[str]]:
        """The marks of engines that have some."""
        found = {engine: [path for path in paths if mark_of(path)] for engine, paths in self._folders.items()}
        return {engine: paths for engine, paths in found.items() if paths}

    def _publication(self, mark: str) -> str:
        return publication_path(mark.split("/")[1], mark_of(mark) or "")

    @cached_property
    def _folders(self) -> dict[EngineId, list[str]]:
        """All that lies in engines' folders, but manifests."""
        found: dict[EngineId, list[str]] = defaultdict(list)
        for path in self._under("engines/"):
            parts = path.split("/")
            if len(parts) >= 5 and parts[4:] != [MANIFEST_NAME]:
                found[EngineId(*parts[1:4])].append(path)
        return found

    @cached_property
    def kept_keys(self) -> frozenset[str]:
        kept: set[str] = set()
        for engine in self.kept:
            facts = self.survey.engines[engine]
            kept |= facts.keys if facts is not None else set()
        for path, keys in self.survey.latest.items():
            if self._latest_counts(path):
                kept |= keys
        for path, bases in self.survey.refits.items():
            counts = self.young(path, days=self.policy.keep_days)
            kept |= {key for key, engine in bases if counts or engine in self._kept_names}
        return frozenset(kept)

    @cached_property
    def _kept_names(self) -> frozenset[str]:
        return frozenset(map(str, self.kept))

    @cached_property
    def _attested(self) -> frozenset[str]:
        """What of keys the names of later executions of engines that stay tell."""
        return frozenset(
            path.removesuffix(".json").rpartition("-")[2]
            for engine in self.kept
            for path in self._folders.get(engine, ())
            if path.startswith(f"{engine.path}/{FOLDER}/")
        )

    @cached_property
    def _kept_recipes(self) -> frozenset[str]:
        return frozenset(engine.recipe for engine in self.kept)

    def _latest_counts(self, path: str) -> bool:
        recipe = path.removeprefix(LATEST).removesuffix(".json")
        return recipe in self._kept_recipes or self.young(path, days=self.policy.keep_days)

    @cached_property
    def kept_records(self) -> frozenset[str]:
        return frozenset(
            path
            for path in self._under(RECORDS)
            if (key := _key(path)) in self.kept_keys or key[:16] in self._attested or self.young(path)
        )

    @cached_property
    def kept_blobs(self) -> frozenset[str]:
        digests: set[str] = set()
        for path in self.kept_records:
            facts = self.survey.record(path)
            digests |= facts.outputs if facts is not None else set()
        for engine in self.kept:
            found = self.survey.engines[engine]
            digests |= set(found.files.values()) if found is not None else set()
        return frozenset(map(blob_path, digests))

    def _blobs(
        self, gone: Mapping[EngineId, EngineFacts], owners: Mapping[str, str], records: Iterable[Removal]
    ) -> list[Removal]:
        whose: dict[str, str] = {}
        for engine, facts in sorted(gone.items()):
            whose |= {blob_path(digest): engine.recipe for digest in facts.files.values()}
        for record in records:
            if _key(record.path) in owners:
                found = self.survey.record(record.path)
                whose |= {blob_path(digest): record.recipe for digest in (found.outputs if found is not None else ())}
        return [
            self._removal(path, whose.get(path, ""), "no engine and no record that stays has it")
            for path in self._under(BLOBS)
            if path not in self.kept_blobs and not self.young(path) and self._in_scope(whose.get(path, ""))
        ]

    def _rest(self) -> Iterator[Removal]:
        now, objects = self.survey.now, self.survey.objects
        for path in (*self._under(LEASES), *self._under(SWEEPS)):
            if is_dead(objects[path].modified, now):
                yield self._removal(path, "", "left by a process that died")
        for path in self._under(REMOVED):
            parts = path.removesuffix(".json").split("/")
            if len(parts) == 4 and self._in_scope(parts[1]) and not self.young(path):
                engine = EngineId(*parts[1:])
                if engine in self.kept or (engine not in self.survey.engines and engine not in self._folders):
                    yield self._removal(path, engine.recipe, "what it is about is done")
        marked = {
            self._publication(path)
            for engine, paths in self._marks.items()
            for path in paths
            if engine in self.kept or engine in self.held or engine not in self.survey.engines
        }
        for path in self._under(f"{PUBLICATIONS}/"):
            recipe = path.split("/")[1]
            if path not in marked and self._in_scope(recipe) and not self.young(path):
                yield self._removal(path, recipe, "its engines are gone")
        if self.policy.recipe is not None:
            return
        for path in self._under(CLAIMS):
            # A holder writes its claim again all the time. Should one be taken just now, its holder puts it back.
            if is_dead(objects[path].modified, now) and not self.young(path):
                yield self._removal(path, "", "nobody has claimed it since")
        for path in self._under(QUARANTINE):
            if not self.young(path, days=self.policy.keep_days):
                yield self._removal(path, "", f"in quarantine for {self.policy.keep_days:g} days")
        for path in self._under(PLANS):
            if not self.young(path, days=self.policy.keep_days):
                yield self._removal(path, "", f"plans that no build has changed for {self.policy.keep_days:g} days")
        for path in self._under(LATEST):
            if not self._latest_counts(path):
                yield self._removal(path, path.removeprefix(LATEST).removesuffix(".json"), "its recipe has no engine")
        for path, bases in self.survey.refits.items():
            if not self.young(path, days=self.policy.keep_days) and not any(
                record_path("compile", key) in self.kept_records for key, _engine in bases
            ):
                yield self._removal(path, "", "no plan that it lists stays")

    def _in_scope(self, recipe: str) -> bool:
        return self.policy.recipe in (None, recipe)

    @cached_property
    def _paths(self) -> tuple[str, ...]:
        return tuple(sorted(self.survey.objects))

    def _under(self, prefix: str) -> list[str]:
        start = bisect_left(self._paths, prefix)
        end = bisect_left(self._paths, f"{prefix}\U0010ffff")
        return list(self._paths[start:end])

    def _removal(self, path: str, recipe: str, why: str) -> Removal:
        return Removal(path, self.survey.objects[path].size, recipe, why)


def _key(record: str) -> str:
    """Return the key of the record at a path."""
    return record.rpartition("/")[2].removesuffix(".json")
