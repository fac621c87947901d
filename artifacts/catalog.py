"""The engines, channels and hosts that a store holds.

engines/<recipe>/<target>/<build>/     the engine's files, and manifest.json, which makes them an engine
    signatures/<digest>-<key>.sig      signatures, each named by 16 digits of what it signs and of its key
    publications/<name>                marks of what it is published together with (artifacts.publications)
    verification/                      what was found when it was executed later (artifacts.attestation)
channels/<recipe>/<target>/<name>.json what a channel names, with its history (artifacts.channels)
hosts/<host>.json                      a host's fingerprint, with its history (artifacts.hosts)

A folder without a manifest is not an engine, nor is one that is marked for publications none of which is complete: it
is what a publication that died has left, or one that is under way. A signature's name says which manifest it is of, so that of two who publish one
build neither's signature meets the other's manifest, and several keys may sign one.
"""

from __future__ import annotations

import datetime as dt
import difflib
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Final

from artifacts.attestation import FOLDER, Attestation, effective
from artifacts.cache import blob_path
from artifacts.errors import IntegrityError, NotFoundError, SigningError
from artifacts.host import Host
from artifacts.leases import leased
from artifacts.manifest import MANIFEST_NAME, FileEntry, Identity, Manifest
from artifacts.provenance import PROVENANCE_TYPE
from artifacts.publications import (
    PUBLICATIONS,
    completed,
    mark_document,
    mark_of,
    mark_path,
    marks_of,
    next_name,
    publication_document,
    publication_name,
    publication_path,
)
from artifacts.refs import digest_bytes
from artifacts.signing import ATTESTATION_NAME, SIGNATURE_BYTES, Signer, hint_of, signed_contents
from artifacts.store import Store

SIGNATURES: Final = "signatures"
SIGNATURE_DIGITS: Final = 16
_MOST_SIGNATURES: Final = 32
_UNSAFE: Final = re.compile(r"[^A-Za-z0-9._-]")


@dataclass(frozen=True, order=True, slots=True)
class EngineId:
    """An engine's three names, which are its path in a store."""

    recipe: str
    target: str
    build: str

    def __str__(self) -> str:
        return f"{self.recipe}/{self.target}/{self.build}"

    @property
    def path(self) -> str:
        """The engine's folder in a store."""
        return f"engines/{self}"

    @classmethod
    def of(cls, identity: Identity) -> EngineId:
        """Return the name of the engine that a manifest describes."""
        return cls(identity.recipe, identity.target, identity.build)


@dataclass(frozen=True)
class Published:
    """What became visible together: the manifests that count, in the order that was asked for, and the publication's name."""

    manifests: list[bytes]
    name: str


@dataclass(frozen=True)
class EngineCatalog:
    """The published engines of a store. `warn` is told, in one sentence, of what had to be passed over.

    `believes` is asked about an attestation that an engine passed, with its signatures; by default each one counts.
    """

    store: Store
    warn: Callable[[str], None] = lambda _message: None
    believes: Callable[[Attestation, Mapping[str, bytes]], bool] | None = None

    def publish(self, manifest: Manifest, signer: Signer | None = None) -> bytes:
        """Make stored blobs an engine, as `publish_together` does; return the manifest that counts."""
        return self.publish_together([manifest], signer).manifests[0]

    def publish_together(
        self, manifests: Sequence[Manifest], signer: Signer | None = None, without: Mapping[str, str] | None = None
    ) -> Published:
        """Make stored blobs engines of one recipe that are visible all at once; return what counts.

        Of each the files first, its signature, its mark, its manifest; then, in one write, the publication. Of two that
        publish the same build the first wins; a damaged manifest is replaced. `without` says for people which targets were
        not built, and why. Raises NotFoundError where a blob is gone, StoreError, SigningError, and IntegrityError where
        another action's engine has this name; nothing is visible then that was not before.
        """
        engines = [EngineId.of(manifest.identity) for manifest in manifests]
        names = [str(engine) for engine in engines]
        with leased(self.store, f"publish {', '.join(names)}", names):
            for engine, manifest in zip(engines, manifests, strict=True):
                for name, entry in manifest.files.items():
                    self.store.copy(blob_path(entry.digest), f"{engine.path}/{name}")
            made = [
                (engine, manifest, manifest.to_bytes()) for engine, manifest in zip(engines, manifests, strict=True)
            ]
            signatures: dict[EngineId, str] = {}

            def sign(engine: EngineId, manifest: Manifest, data: bytes) -> None:
                if signer is not None:
                    signatures[engine] = self.sign(manifest, data, signer)

            published = self._make_visible(made, without or {}, sign)
            for (engine, manifest, data), winner in zip(made, published.manifests, strict=True):
                if winner != data:
                    # What only this manifest names, which will never be there.
                    own = manifest.files.keys() - self.read_manifest(engine, winner).files.keys()
                    for path in (*(f"{engine.path}/{name}" for name in own), *filter(None, [signatures.get(engine)])):
                        self.store.delete(path)
        return published

    def _make_visible(
        self,
        made: Sequence[tuple[EngineId, Manifest, bytes]],
        without: Mapping[str, str],
        sign: Callable[[EngineId, Manifest, bytes], None],
    ) -> Published:
        """Do all that is left when the files of engines are there; return what counts."""
        publication = publication_name(manifest.provenance.key for _engine, manifest, _data in made)
        while self._is_of_others(publication, [engine for engine, _manifest, _data in made]):
            publication = next_name(publication)
        winners: dict[str, bytes] = {}
        for engine, manifest, data in made:
            sign(engine, manifest, data)
            # One that is visible without marks, from an older release, must not disappear.
            if not self.is_visible(engine):
                self.store.write(mark_path(str(engine), publication), mark_document(engine.recipe, publication))
            winners[str(engine)] = self._complete(engine, manifest, data)
        digests = {name: digest_bytes(data) for name, data in winners.items()}
        path = publication_path(made[0][0].recipe, publication)
        self.store.write(path, publication_document(digests, without))
        return Published(list(winners.values()), publication)

    def _is_of_others(self, publication: str, engines: Sequence[EngineId]) -> bool:
        """Tell whether a publication is complete though engines that are to be part of it are not visible."""
        there = self.store.info(publication_path(engines[0].recipe, publication)) is not None
        return there and not all(self.is_visible(engine) for engine in engines)

    def is_visible(self, engine: EngineId) -> bool:
        """Tell whether an engine has a manifest, and a publication that is complete where it is marked. Raises StoreError."""
        if self.store.info(f"{engine.path}/{MANIFEST_NAME}") is None:
            return False
        paths = [publication_path(engine.recipe, mark) for mark in marks_of(self.store, engine.path)]
        return not paths or any(self.store.info(path) is not None for path in paths)

    def unmark(self, engine: EngineId) -> None:
        """Make a visible engine one by its manifest alone, which whoever is about to remove that does first.

        Else what is published anew in its place would be visible by an old mark before its own publication is complete.
        Raises StoreError.
        """
        if self.is_visible(engine):
            for info in list(self.store.list(f"{engine.path}/{PUBLICATIONS}/")):
                self.store.delete(info.path)

    def sign(self, manifest: Manifest, data: bytes, signer: Signer) -> str:
        """Store a signature over an engine's manifest, whose bytes are `data`, and its files; return its path.

        Raises StoreError, SigningError.
        """
        engine = EngineId.of(manifest.identity)
        return self._put_signature(engine, data, signer.sign(str(engine), signed_contents(manifest, data)))

    def signatures(self, engine: EngineId, data: bytes) -> dict[str, bytes]:
        """Return the signatures of an engine's manifest, whose bytes are `data`, by the key that each claims to be by.

        Keys are fingerprints; what is no signature is passed over. Nothing is checked here. Raises StoreError.
        """
        found = {}
        prefix = f"{engine.path}/{SIGNATURES}/{digest_bytes(data)[:SIGNATURE_DIGITS]}-"
        for info in islice(self.store.list(prefix), _MOST_SIGNATURES):
            if info.size <= SIGNATURE_BYTES:
                signature = self.store.read(info.path)
                fingerprint = hint_of(signature)
                if fingerprint is not None:
                    found[fingerprint] = signature
        return found

    def send(
        self,
        engines: Sequence[EngineId],
        other: EngineCatalog,
        without: Mapping[str, str] | None = None,
        put: Collection[str] = (),
    ) -> list[bytes]:
        """Publish engines of one recipe in another store too, all at once and as they are; return the manifests that count there.

        Their bytes are checked on the way; files that are there in their size are not sent again, and those whose blobs
        the caller has `put` there himself, by their paths, are copied there: another's may be damaged. Raises NotFoundError, StoreError and IntegrityError; nothing is visible there then that was not
        before.
        """
        names = [str(engine) for engine in engines]
        stored = [(engine, self.manifest_bytes(engine)) for engine in engines]
        sent = [(engine, self.read_manifest(engine, data), data) for engine, data in stored]
        with leased(other.store, f"publish {', '.join(names)}", names):
            for engine, manifest, _data in sent:
                paths = {f"{engine.path}/{name}": (name, entry) for name, entry in manifest.files.items()}
                there = {path: info.size for path, info in other.store.infos(paths).items()}
                # The receiver's scratch, so that a folder links the files instead of copying them once more.
                with other.store.scratch() as folder:
                    for path, (name, entry) in paths.items():
                        if there.get(path) == entry.size:
                            continue
                        (folder / name).parent.mkdir(exist_ok=True)  # a part's own
                        self.fetch(engine, name, entry, folder / name)
                        blob = blob_path(entry.digest)
                        if blob not in put or not _copied(other.store, blob, path):
                            other.store.put_file(path, folder / name, entry.ref)
            return other._make_visible(
                sent, without or {}, lambda engine, _manifest, data: self._send_signatures(engine, data, other)
            ).manifests

    def _send_signatures(self, engine: EngineId, data: bytes, other: EngineCatalog) -> None:
        for signature in self.signatures(engine, data).values():
            other._put_signature(engine, data, signature)

    def fetch(self, engine: EngineId, name: str, entry: FileEntry, target: Path) -> None:
        """Bring one file of an engine to the new path `target`, checked. Raises NotFoundError, StoreError, IntegrityError."""
        self.store.get_file(f"{engine.path}/{name}", entry.ref, target)

    def engines(self, recipe: str | None = None) -> list[EngineId]:
        """Return the names of all published engines (of one recipe), sorted; nothing is opened."""
        return sorted(self._listed(recipe))

    def manifests(self, recipe: str | None = None) -> list[Manifest]:
        """Return the manifests of all published engines (of one recipe), by name, with what was executed later.

        Damaged ones are passed over, aloud.
        """
        return [manifest for manifest, _data in self.stored_manifests(recipe)]

    def stored_manifests(self, recipe: str | None = None) -> list[tuple[Manifest, bytes]]:
        """Return what `manifests` does, each with its bytes, over which signatures are."""
        found = []
        for engine, attested in sorted(self._listed(recipe).items()):
            try:
                data = self.manifest_bytes(engine)
                manifest = self.read_manifest(engine, data)
            except (IntegrityError, NotFoundError) as err:
                self.warn(f"{err}; passed over")
                continue
            found.append((effective(manifest, self._attestations(attested, digest_bytes(data))), data))
        return found

    def effective(self, engine: EngineId) -> Manifest:
        """Return one engine's manifest with what was executed later in its `verification`: what to judge it by.

        Raises as `manifest` does.
        """
        data = self.manifest_bytes(engine)
        return effective(self.read_manifest(engine, data), self.attestations(engine, digest_bytes(data)))

    def attest(self, engine: EngineId, attestation: Attestation, signer: Signer | None = None) -> Attestation:
        """Keep what was found when an engine was executed; of two about one action the first counts, and is returned.

        One that is damaged is replaced. Raises StoreError, SigningError.
        """
        if signer is not None:
            data = attestation.to_bytes()
            signature = signer.sign(f"{engine}/{attestation.name}", {ATTESTATION_NAME: digest_bytes(data)})
            self._put_signature(engine, data, signature)
        path = f"{engine.path}/{FOLDER}/{attestation.name}"
        if not self.store.write(path, attestation.to_bytes(), if_absent=True):
            there = self._attestations([path], attestation.manifest)
            if there:
                return there[0]
            self.store.write(path, attestation.to_bytes())
        return attestation

    def attestations(self, engine: EngineId, manifest: str) -> list[Attestation]:
        """Return what was executed later of the engine whose manifest has this digest. Raises StoreError."""
        return self._attestations([info.path for info in self.store.list(f"{engine.path}/{FOLDER}/")], manifest)

    def manifest(self, engine: EngineId) -> Manifest:
        """Return one engine's manifest as it was published.

        Raises NotFoundError, StoreError, and IntegrityError, naming the path, where it cannot be read or is another's.
        """
        return self.read_manifest(engine, self.manifest_bytes(engine))

    def manifest_bytes(self, engine: EngineId) -> bytes:
        """Return one engine's manifest as it is stored. Raises NotFoundError, StoreError."""
        return self.store.read(f"{engine.path}/{MANIFEST_NAME}")

    def read_manifest(self, engine: EngineId, data: bytes) -> Manifest:
        """Read an engine's manifest from its bytes. Raises IntegrityError, naming the path, as `manifest` does."""
        path = f"{self.store.uri}: {engine.path}/{MANIFEST_NAME}"
        try:
            manifest = Manifest.from_bytes(data)
        except IntegrityError as err:
            raise IntegrityError(f"{path}: {err}") from err
        if EngineId.of(manifest.identity) != engine:
            raise IntegrityError(f"{path}: is the manifest of {manifest.identity}")
        return manifest

    def find(self, text: str) -> list[EngineId]:
        """Return the engines that a text can mean: the one of this name, else all that have it as a part of theirs."""
        engines = self.engines()
        text = text.strip().removeprefix("engines/").removesuffix(f"/{MANIFEST_NAME}").strip("/")
        exact = [engine for engine in engines if text in (str(engine), engine.build)]
        return exact if len(exact) == 1 else [engine for engine in engines if text in str(engine)]

    def near(self, text: str) -> list[str]:
        """Return up to three names, of recipes or engines, that look like a text."""
        engines = self.engines()
        recipes = dict.fromkeys(engine.recipe for engine in engines)
        targets = dict.fromkeys(f"{engine.recipe}/{engine.target}" for engine in engines)
        return difflib.get_close_matches(text, [*recipes, *targets, *map(str, engines)], n=3, cutoff=0.6)

    def channels(self, recipe: str, name: str) -> dict[str, str]:
        """Return the build that a channel names, by target. Raises StoreError, and IntegrityError for damaged ones."""
        from artifacts.channels import channels_of

        return {found.head.move.target: found.head.move.build for found in channels_of(self.store, recipe, name)}

    def record_host(self, host: Host) -> str:
        """Keep a host's fingerprint, and what changed since an earlier one; return its path. Raises StoreError, IntegrityError."""
        from artifacts.hosts import see_host

        path = host_path(host.name)
        see_host(self.store, path, host, dt.datetime.now(dt.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"))
        return path

    def host(self, name: str) -> Host:
        """Return a recorded fingerprint. Raises NotFoundError, StoreError, and IntegrityError for a damaged one."""
        from artifacts.hosts import read_host

        return read_host(self.store, host_path(name))[0].host

    def _listed(self, recipe: str | None) -> dict[EngineId, list[str]]:
        """Return every engine that has a manifest, with the paths of what was executed later; two listings, unsorted."""
        engines, attested = set[EngineId](), dict[EngineId, list[str]]()
        marks = dict[EngineId, list[str]]()
        # Before the engines: of one that is complete by now, all are there when these are listed, which takes its time.
        done = completed(self.store, recipe)
        for info in self.store.list("engines/" if recipe is None else f"engines/{recipe}/"):
            parts = info.path.split("/")
            if len(parts) == 5 and parts[4] == MANIFEST_NAME:
                engines.add(EngineId(*parts[1:4]))
            elif len(parts) == 6 and parts[4] == FOLDER:
                attested.setdefault(EngineId(*parts[1:4]), []).append(info.path)
            elif (mark := mark_of(info.path)) is not None:
                marks.setdefault(EngineId(*parts[1:4]), []).append(publication_path(parts[1], mark))
        visible = (engine for engine in engines if engine not in marks or not done.isdisjoint(marks[engine]))
        return {engine: attested.get(engine, []) for engine in visible}

    def _attestations(self, paths: Sequence[str], manifest: str) -> list[Attestation]:
        found = []
        for path in paths:
            try:
                attestation = Attestation.from_bytes(self.store.read(path))
            except (IntegrityError, NotFoundError) as err:
                self.warn(f"{self.store.uri}: {path}: {err}; passed over")
                continue
            if attestation.manifest == manifest:
                if self._believed(EngineId(*path.split("/")[1:4]), attestation):
                    found.append(attestation)
            else:
                self.warn(
                    f"{self.store.uri}: {path}: is about another manifest, {attestation.manifest[:12]}; passed over"
                )
        return found

    def _believed(self, engine: EngineId, attestation: Attestation) -> bool:
        # That an engine failed is believed of everybody: who may write to the store can take it away as well.
        if self.believes is None or not attestation.passed:
            return True
        believed = self.believes(attestation, self.signatures(engine, attestation.to_bytes()))
        if not believed:
            self.warn(f"{engine}: {attestation.name} is not signed by a key that is trusted; passed over")
        return believed

    def _put_signature(self, engine: EngineId, data: bytes, signature: bytes) -> str:
        key = hint_of(signature)
        if key is None:
            raise SigningError(f"{engine}: the signature names no key, so that nobody could check it")
        path = f"{engine.path}/{SIGNATURES}/{digest_bytes(data)[:SIGNATURE_DIGITS]}-{key[:SIGNATURE_DIGITS]}.sig"
        self.store.write(path, signature)
        return path

    def _complete(self, engine: EngineId, manifest: Manifest, data: bytes) -> bytes:
        path = f"{engine.path}/{MANIFEST_NAME}"
        if self.store.write(path, data, if_absent=True):
            return data
        try:
            winner = self.manifest_bytes(engine)
            there = self.read_manifest(engine, winner)
        except (IntegrityError, NotFoundError) as err:
            self.warn(f"{err}; replaced")
        else:
            if there.provenance.key != manifest.provenance.key:
                raise IntegrityError(
                    f"{self.store.uri}: {path} is the engine of action {there.provenance.key[:24]}, not of "
                    f"{manifest.provenance.key[:24]}; two keys share their first digits: remove one of the engines"
                )
            if _made(there) == _made(manifest):
                return winner
            self.warn(f"{self.store.uri}: {path} names other files than its action made; replaced")
        self.store.write(path, data)
        return data


def _made(manifest: Manifest) -> dict[str, FileEntry]:
    """Return the files that an action made: all but the provenance, which says who ran it and when."""
    return {name: entry for name, entry in manifest.files.items() if entry.media_type != PROVENANCE_TYPE}


def host_path(name: str) -> str:
    """Return where a store keeps the fingerprint of the host of this name."""
    return f"hosts/{_UNSAFE.sub('_', name).lstrip('.') or 'unnamed'}.json"


def _copied(store: Store, source: str, target: str) -> bool:
    """Copy an object inside a store; False where it was removed meanwhile."""
    try:
        store.copy(source, target)
    except NotFoundError:
        return False
    return True
