"""What must hold of a store at every instant, whatever was killed, lost or done at once: one list, one checker.

    python -m bench.faults.checker STORE            status 1 and a line for each violation

INVARIANTS is the list; each violation names the one that it breaks. A store is checked from the outside, by its objects
alone, with the readers that every client uses. It may be checked while others write to it: before what is missing counts,
what named it is read once more, since a collector removes the one that names before the one that is named.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from artifacts.attestation import Attestation
from artifacts.cache import blob_path
from artifacts.catalog import EngineCatalog, EngineId
from artifacts.channels import Channel, read_channel
from artifacts.errors import IntegrityError, NotFoundError, StoreError, TrustError
from artifacts.fresh_plans import unpack
from artifacts.manifest import MANIFEST_NAME, Manifest
from artifacts.publications import Publication, mark_path, publication_path, read_publication
from artifacts.records import ActionRecord
from artifacts.refs import digest_bytes, is_digest
from artifacts.signing import hint_of
from artifacts.store import Store, open_store

if TYPE_CHECKING:
    from artifacts.trust import Trust

INVARIANTS: Final[Mapping[str, str]] = {
    "names": "Every visible object has a place in the layout; no temporary name is visible.",
    "manifest": "Every visible manifest can be read, and names the folder in which it lies.",
    "files": "Every file that a visible manifest names is there, with the size and SHA-256 that it states.",
    "signature": "Every signature of a visible manifest holds, for the keys that are known here.",
    "together": "Of what was published together all is visible or nothing: what bears a publication's mark has its manifest.",
    "attestation": "Every attestation can be read, and is about the engine beside which it lies.",
    "channel": "Every channel can be read: its moves are its own, count up by one, each names the one before it.",
    "head": "Every channel names a published engine, and the very manifest that was promoted.",
    "blob": "Every blob has the SHA-256 that is its name.",
    "record": "Every record can be read, hashes to its key, and lies where its stage and key say.",
    "outputs": "Every blob that a record names is there (after blobs were removed: the record is a miss).",
    "hint": "Every hint (cache/latest, cache/refit), host, pin, lease, claim, rollout and timing fact is JSON.",
    "plans": "Every shard of fresh plans is whole.",
    "timing": "Every timing cache has the SHA-256 that its first line states.",
    "lost": "What was visible once stays: manifests byte for byte, moves of channels, records; but for what gc removed.",
    "told": "Who was told that a channel moved finds that move in its history once; who was refused, once at most.",
    "published": "A visible engine is one that a publisher was told of, byte for byte.",
    "pinned": "An engine that was pinned, or promoted last, is visible, whoever collected garbage meanwhile.",
    "used": "Who holds a lease is refused nothing: what they keep, publish and read stays while they do.",
}
# What is JSON and says nothing that anybody relies on unchecked.
_HINTS: Final = (
    "cache/latest/",
    "cache/refit/",
    "hosts/",
    "rollouts/",
    "leases/",
    "claims/",
    "sweeps/",
    "pins/",
    "removed/",
)
# Of no concern here: what was set aside as damaged. `store.json` says the layout's version.
_OTHER: Final = ("quarantine/",)
_TEMPORARY: Final = (".part", ".lock", ".fresh", ".new", ".tmp")


@dataclass(frozen=True)
class State:
    """What a store shows: SHA-256 of every manifest by path, digests of every channel's moves by path, records by path."""

    manifests: Mapping[str, str] = field(default_factory=dict)
    channels: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    records: frozenset[str] = frozenset()


@dataclass
class Report:
    """What was found: violations as (invariant, words), how many of each kind were looked at, and the state."""

    violations: list[tuple[str, str]] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    state: State = field(default_factory=State)

    def require_sound(self) -> None:
        """Raise AssertionError with every violation, if there is any."""
        if self.violations:
            raise AssertionError("\n".join(f"{name}: {words}" for name, words in self.violations))


def check(
    store: Store, judge: Trust | None = None, *, collected: bool = False, known: set[str] | None = None
) -> Report:
    """Check every invariant of a store but `lost`, reading every byte of it.

    `judge` checks signatures (whatever it does not know is passed over); `known` gathers those that held, which are not
    checked again by who gives it once more. With `collected`, blobs may have been removed, so that a record may be a
    miss. Raises StoreError where the store itself cannot be read.
    """
    return _Checker(store, judge, collected, known if known is not None else set()).check()


def lost(before: State, after: State, *, engines: bool = True, records: bool = True) -> list[tuple[str, str]]:
    """Return what `before` shows and `after` does not; `engines` and `records` say whether these had to stay."""
    found = [
        ("lost", f"{path}: {'changed' if path in after.manifests else 'gone'}")
        for path, digest in (before.manifests.items() if engines else ())
        if after.manifests.get(path) != digest
    ]
    found += [
        ("lost", f"{path}: {len(moves)} moves were there, now other ones or none")
        for path, moves in before.channels.items()
        if after.channels.get(path, ())[: len(moves)] != moves
    ]
    return found + [("lost", f"{path}: gone") for path in (sorted(before.records - after.records) if records else ())]


class _Checker:
    def __init__(self, store: Store, judge: Trust | None, collected: bool, known: set[str]) -> None:
        self.store, self.judge, self.collected, self.known = store, judge, collected, known
        self.catalog = EngineCatalog(store)
        self.report = Report()
        self.manifests: dict[str, str] = {}
        self.channels: dict[str, tuple[str, ...]] = {}
        self.records: set[str] = set()
        self.publications: dict[str, str] = {}
        self.together: dict[str, Publication] = {}
        self.marks: list[tuple[EngineId, str]] = []

    def check(self) -> Report:
        for info in list(self.store.list("")):
            kind, look = self._place(info.path)
            self.report.counts[kind] = self.report.counts.get(kind, 0) + 1
            if info.path.endswith(_TEMPORARY):
                self._violation("names", f"{info.path} is a temporary name")
            look(info.path)
        for path, publication in self.together.items():
            self._together(path, publication)
        # The record of a publication whose engine is gone is a miss, and is removed before the engine is published anew.
        self.records -= {path for path, engine in self.publications.items() if engine not in self.manifests}
        self.report.state = State(self.manifests, self.channels, frozenset(self.records))
        return self.report

    def _place(self, path: str) -> tuple[str, Callable[[str], None]]:
        match path.split("/"):
            case ["engines", _, _, _, name]:
                return ("manifest", self._engine) if name == MANIFEST_NAME else ("engine file", _nothing)
            case ["engines", _, _, _, "verification", _]:
                return "attestation", self._attestation
            case ["engines", _, _, _, "signatures", _]:
                return "signature", _nothing
            case ["engines", _, _, _, "publications", _]:
                return "mark", self._mark
            case ["engines", _, _, _, _, _]:  # of a part
                return "engine file", _nothing
            case ["publications", _, _]:
                return "publication", self._publication
            case ["channels", _, _, _]:
                return "channel", self._channel
            case ["cache", "blobs", "sha256", start, name] if is_digest(name) and name.startswith(start):
                return "blob", self._blob
            case ["cache", "actions", _, _]:
                return "record", self._record
            case ["cache", "plans", _, _]:
                return "plans", self._plans
            case ["timing", _, name]:
                return ("timing cache", self._timing) if name.endswith(".cache") else ("hint", self._hint)
            case ["store.json"]:
                return "hint", self._hint
        if path.startswith(_HINTS):
            return "hint", self._hint
        return ("other", _nothing) if path.startswith(_OTHER) else ("unknown", self._unknown)

    def _engine(self, path: str) -> None:
        engine = EngineId(*path.split("/")[1:4])
        with suppress(NotFoundError):  # removed since it was listed
            data = self.store.read(path)
            try:
                manifest = self.catalog.read_manifest(engine, data)
            except IntegrityError as err:
                return self._violation("manifest", str(err))
            self.manifests[path] = digest_bytes(data)
            for name, entry in manifest.files.items():
                file = f"{engine.path}/{name}"
                try:
                    found = self.store.read(file)
                except NotFoundError:
                    if self._still(path, data):
                        self._violation("files", f"{file} is missing, and the manifest is visible")
                    continue
                if (digest_bytes(found), len(found)) != (entry.digest, entry.size):
                    self._violation("files", f"{file} has {len(found)} bytes of {digest_bytes(found)[:12]}")
            self._signatures(engine, manifest, data)
        return None

    def _mark(self, path: str) -> None:
        parts = path.split("/")
        self.marks.append((EngineId(*parts[1:4]), publication_path(parts[1], parts[5])))

    def _publication(self, path: str) -> None:
        with suppress(NotFoundError):  # removed since it was listed
            try:
                self.together[path] = read_publication(self.store.read(path))
            except IntegrityError as err:
                self._violation("together", f"{path}: {err}")

    def _together(self, path: str, publication: Publication) -> None:
        name = path.rpartition("/")[2].removesuffix(".json")
        named = {EngineId(*engine.split("/")) for engine in publication.engines if engine.count("/") == 2}
        for engine in sorted(named | {engine for engine, of in self.marks if of == path}):
            manifest = f"{engine.path}/{MANIFEST_NAME}"
            if self.store.info(manifest) is not None:
                continue
            # A collector takes the mark first, and then the manifest; a publisher writes it last.
            mark = mark_path(str(engine), name)
            there = self.store.info(mark) is not None and self.store.info(path) is not None
            if (there and self.store.info(manifest) is None and self.store.info(mark) is not None) or (
                not self.collected and self._named_still(path, engine)
            ):
                self._violation("together", f"{path} is there, and the manifest of its {engine} is not")

    def _named_still(self, path: str, engine: EngineId) -> bool:
        with suppress(NotFoundError):
            return str(engine) in read_publication(self.store.read(path)).engines
        return False

    def _signatures(self, engine: EngineId, manifest: Manifest, data: bytes) -> None:
        for fingerprint, signature in self.catalog.signatures(engine, data).items():
            judge = self._judge_of(fingerprint, data, signature)
            if judge is not None:
                try:
                    judge.check_engine(manifest, data, {fingerprint: signature})
                except TrustError as err:
                    self._violation("signature", str(err))

    def _attestation(self, path: str) -> None:
        with suppress(NotFoundError):  # removed since it was listed
            try:
                attestation = Attestation.from_bytes(self.store.read(path))
            except IntegrityError as err:
                return self._violation("attestation", f"{path}: {err}")
            if (
                attestation.engine != "/".join(path.split("/")[1:4])
                or attestation.name != path.rsplit("/", maxsplit=1)[-1]
            ):
                self._violation("attestation", f"{path}: is {attestation.name} of {attestation.engine}")
        return None

    def _channel(self, path: str) -> None:
        recipe, target, name = path.removesuffix(".json").split("/")[1:]
        try:
            channel = read_channel(self.store, recipe, target, name)
        except IntegrityError as err:
            return self._violation("channel", str(err))
        if channel is not None:
            self.channels[path] = tuple(digest_bytes(signed.statement) for signed in channel.moves)
            self._head(path, channel)
            for signed in channel.moves:
                signature = signed.signature or b""
                judge = self._judge_of(hint_of(signature), signed.statement, signature)
                if judge is not None:
                    try:
                        judge.check_move(signed.statement, signature, recipe, name)
                    except TrustError as err:
                        self._violation("signature", f"{path}: {err}")
        return None

    def _head(self, path: str, channel: Channel) -> None:
        move = channel.head.move
        manifest = f"{EngineId(move.recipe, move.target, move.build).path}/{MANIFEST_NAME}"
        try:
            data = self.store.read(manifest)
        except NotFoundError:
            # Somebody may have moved it on since.
            now = read_channel(self.store, *move.at)
            if now is not None and now.head.statement == channel.head.statement:
                self._violation("head", f"{path} names {move.build}, which is not published")
            return
        if move.manifest not in (None, digest_bytes(data)):
            self._violation("head", f"{path} names a manifest {str(move.manifest)[:12]}, not the one of {move.build}")

    def _blob(self, path: str) -> None:
        with suppress(NotFoundError):  # removed since it was listed
            found = digest_bytes(self.store.read(path))
            if found != path.rsplit("/", maxsplit=1)[-1]:
                self._violation("blob", f"{path} has the bytes of {found[:12]}")

    def _record(self, path: str) -> None:
        with suppress(NotFoundError):  # removed since it was listed
            data = self.store.read(path)
            try:
                record = ActionRecord.from_bytes(data)
            except IntegrityError as err:
                return self._violation("record", f"{path}: {err}")
            if path != f"cache/actions/{record.stage}/{record.key}.json":
                self._violation("record", f"{path}: is the record of {record.stage} {record.key}")
            self.records.add(path)
            if record.stage == "publish":
                self.publications[path] = f"{record.facts.get('path')}/{MANIFEST_NAME}"
            blobs = {name: blob_path(ref.digest) for name, ref in record.outputs.items()}
            there = self.store.infos(blobs.values())
            for name, blob in blobs.items():
                if not self.collected and blob not in there and self._still(path, data):
                    self._violation("outputs", f"{path}: its output {name} is missing")
        return None

    def _hint(self, path: str) -> None:
        with suppress(NotFoundError):  # removed since it was listed
            try:
                json.loads(self.store.read(path))
            except ValueError as err:
                self._violation("hint", f"{path}: {err}")

    def _plans(self, path: str) -> None:
        with suppress(NotFoundError):  # removed since it was listed
            try:
                unpack(self.store.read(path))
            except IntegrityError as err:
                self._violation("plans", f"{path}: {err}")

    def _timing(self, path: str) -> None:
        with suppress(NotFoundError):  # removed since it was listed
            stated, _newline, cache = self.store.read(path).partition(b"\n")
            if stated != digest_bytes(cache).encode():
                self._violation("timing", f"{path}: its first line states {stated[:12]!r}")

    def _unknown(self, path: str) -> None:
        self._violation("names", f"{path} has no place in the layout")

    def _judge_of(self, fingerprint: str | None, signed: bytes, signature: bytes) -> Trust | None:
        """Return who can check a signature; None where nobody can, or it was checked before."""
        name = digest_bytes(digest_bytes(signed).encode() + signature)
        if self.judge is None or fingerprint not in self.judge.policy.keys or name in self.known:
            return None
        self.known.add(name)
        return self.judge

    def _still(self, path: str, data: bytes) -> bool:
        try:
            return self.store.read(path) == data
        except NotFoundError:
            return False

    def _violation(self, invariant: str, words: str) -> None:
        self.report.violations.append((invariant, words))


def _nothing(_path: str) -> None:
    """Nothing is to be seen at this object by itself; the manifest beside it is what names it."""


def _lines(report: Report) -> Iterator[str]:
    yield ", ".join(f"{count} {kind}" for kind, count in sorted(report.counts.items())) or "nothing"
    yield from (f"{name}: {words}  [{INVARIANTS[name]}]" for name, words in report.violations)


def main() -> int:
    """Check the store that the command line names."""
    try:
        report = check(open_store(sys.argv[1]), collected=True)
    except StoreError as err:
        print(f"error: {err}", file=sys.stderr)
        return 1
    print("\n".join(_lines(report)))
    return 1 if report.violations else 0


if __name__ == "__main__":
    sys.exit(main())
