"""Reads everything that a store holds, moves aside what is damaged, and repairs it from another store.

Checked: blobs by their names, records by their keys, engines' manifests, their files, signatures and attestations, what
was published together, channels by their chains. What is damaged goes to `quarantine/<time>/<its path>` and is never deleted here (`gc` removes it when
it has lain there for long). What was published together is told by its name and its engines' marks. Right bytes are those of the digest that a name or a manifest states, found in this store or
in the other; a document is taken from the other store where it can be read there and is of this place. An engine that
cannot be repaired goes with its manifest first, so that nobody finds an engine that is not whole.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Final, Literal

from artifacts.attestation import FOLDER, Attestation
from artifacts.cache import blob_path, record_path
from artifacts.catalog import SIGNATURES, EngineCatalog, EngineId
from artifacts.channels import channel_path, read_channel
from artifacts.errors import ArtifactError, IntegrityError, NotFoundError, StoreError
from artifacts.leases import leased
from artifacts.manifest import MANIFEST_NAME, Manifest
from artifacts.publications import (
    PUBLICATIONS,
    mark_document,
    mark_of,
    publication_document,
    publication_path,
    read_publication,
)
from artifacts.records import ActionRecord
from artifacts.refs import BYTES, ArtifactRef, digest_bytes, is_digest
from artifacts.signing import hint_of
from artifacts.store import Store

_BLOBS: Final = "cache/blobs/sha256/"
_RECORDS: Final = "cache/actions/"
State = Literal["repaired", "quarantined"]


@dataclass(frozen=True)
class Damage:
    """One damaged object: what is wrong, what became of it, where its bytes lie now (None: they were gone)."""

    path: str
    why: str
    state: State
    moved: str | None


@dataclass
class DeepCheck:
    """Checks one store, with another (`spare`) to repair from. `checked` counts objects that were read."""

    store: Store
    spare: Store | None = None
    stamp: str = field(default_factory=lambda: dt.datetime.now(dt.timezone.utc).strftime("%Y%m%dT%H%M%S.%fZ"))
    checked: int = 0
    damages: list[Damage] = field(default_factory=list)

    def run(self) -> list[Damage]:
        """Check everything, and return what was damaged. Raises StoreError; what was done until then stays done."""
        with leased(self.store, "verify --deep"):
            self._blobs()
            for path in self._paths("engines/", 5, MANIFEST_NAME):
                self._engine(EngineId(*path.split("/")[1:4]))
            for path in self._paths(_RECORDS, 4):
                self._document(path, _check_record)
            for path in self._paths("engines/", 6):
                if path.split("/")[4] == FOLDER:
                    self._document(path, lambda _path, data: Attestation.from_bytes(data))
                elif path.split("/")[4] == SIGNATURES:
                    self._document(path, _check_signature)
            self._publications()
            for path in self._paths("channels/", 4):
                self._channel(path)
        return self.damages

    def _paths(self, prefix: str, parts: int, last: str | None = None) -> Iterator[str]:
        for info in list(self.store.list(prefix)):
            names = info.path.split("/")
            if len(names) == parts and last in (None, names[-1]):
                yield info.path

    def _blobs(self) -> None:
        for info in list(self.store.list(_BLOBS)):
            digest = info.path.rpartition("/")[2]
            if not is_digest(digest) or info.path != blob_path(digest):
                continue
            why = self._wrong(info.path, ArtifactRef(digest, info.size, BYTES))
            if why is not None:
                moved = self._set_aside(info.path)
                repaired = self._bring_blob(digest)
                self.damages.append(Damage(info.path, why, "repaired" if repaired else "quarantined", moved))

    def _engine(self, engine: EngineId) -> None:
        path = f"{engine.path}/{MANIFEST_NAME}"

        def check(_path: str, data: bytes) -> object:
            return EngineCatalog(self.store).read_manifest(engine, data)

        data = self._document(path, check, hide=lambda: EngineCatalog(self.store).unmark(engine))
        if data is None:
            return
        manifest = Manifest.from_bytes(data)
        found = [
            (name, entry.ref, why)
            for name, entry in manifest.files.items()
            if (why := self._wrong(f"{engine.path}/{name}", entry.ref))
        ]
        lost = [name for name, ref, _why in found if not self._has_right_blob(ref)]
        if lost:
            # First, so that nobody finds an engine that is not whole.
            EngineCatalog(self.store).unmark(engine)
            moved = self._set_aside(path)
            self.damages.append(Damage(path, f"its files {', '.join(lost)} are damaged or gone", "quarantined", moved))
        for name, ref, why in found:
            file = f"{engine.path}/{name}"
            moved = self._copy_aside(file)
            if name in lost:
                self.store.delete(file)
            else:
                self.store.copy(blob_path(ref.digest), file)
            self.damages.append(Damage(file, why, "quarantined" if name in lost else "repaired", moved))

    def _publications(self) -> None:
        """Mend what says that engines were published together: that it is there counts, so that it is never only removed."""
        marked: dict[str, dict[str, str]] = {}
        for path in self._paths("engines/", 6):
            name, engine = mark_of(path), EngineId(*path.split("/")[1:4])
            if name is not None:
                self._mend(path, mark_document(engine.recipe, name), _check_mark)
                with suppress(NotFoundError):
                    digest = digest_bytes(EngineCatalog(self.store).manifest_bytes(engine))
                    marked.setdefault(publication_path(engine.recipe, name), {})[str(engine)] = digest
        for path in self._paths(f"{PUBLICATIONS}/", 3):
            self._mend(path, publication_document(marked.get(path, {}), {}), lambda _path, data: read_publication(data))

    def _mend(self, path: str, right: bytes, check: Callable[[str, bytes], object]) -> None:
        try:
            data = self.store.read(path)
        except NotFoundError:
            return  # removed since it was listed
        self.checked += 1
        why = _why_not(path, data, check)
        if why is not None:
            moved = self._copy_aside(path)
            self.store.write(path, right)
            self.damages.append(Damage(path, why, "repaired", moved))

    def _channel(self, path: str) -> None:
        place = path.removesuffix(".json").split("/")[1:]
        if not path.endswith(".json"):
            return

        def check(_path: str, _data: bytes) -> None:
            read_channel(self.store, *place)

        def spare_is_right(store: Store) -> bool:
            channel = read_channel(store, *place)
            head = channel.head.move if channel is not None else None
            return (
                head is not None
                and path == channel_path(*head.at)
                and (
                    self.store.info(f"{EngineId(head.recipe, head.target, head.build).path}/{MANIFEST_NAME}")
                    is not None
                )
            )

        self._document(path, check, spare_is_right)

    def _document(
        self,
        path: str,
        check: Callable[[str, bytes], object],
        spare_is_right: Callable[[Store], bool] | None = None,
        hide: Callable[[], None] = lambda: None,
    ) -> bytes | None:
        """Check a small object; return its bytes, or the right ones where it was repaired; None where it is not there now.

        `hide` is called before it is removed.
        """
        try:
            data, version = self.store.read_versioned(path)
        except NotFoundError:
            return None  # removed since it was listed
        self.checked += 1
        why = _why_not(path, data, check)
        if why is None:
            return data
        moved = self._copy_aside(path)
        right = self._spare_document(path, check, spare_is_right)
        if right is not None:
            # Only over what was found damaged: a mover or builder may have been faster.
            self.store.write(path, right, if_version=version)
        elif self._has_version(path, version):
            hide()
            self.store.delete(path)
        self.damages.append(Damage(path, why, "repaired" if right is not None else "quarantined", moved))
        return right

    def _has_version(self, path: str, version: str) -> bool:
        try:
            return self.store.read_versioned(path)[1] == version
        except NotFoundError:
            return False

    def _spare_document(
        self, path: str, check: Callable[[str, bytes], object], spare_is_right: Callable[[Store], bool] | None
    ) -> bytes | None:
        if self.spare is None:
            return None
        try:
            data = self.spare.read(path)
            if spare_is_right is not None:
                return data if spare_is_right(self.spare) else None
        except (NotFoundError, IntegrityError):
            return None
        return data if _why_not(path, data, check) is None else None

    def _wrong(self, path: str, ref: ArtifactRef) -> str | None:
        """Say what is wrong with a file; None where its bytes are those of the reference."""
        self.checked += 1
        try:
            with self.store.scratch() as folder:
                self.store.get_file(path, ref, folder / "file")
        except NotFoundError:
            return "is gone"
        except IntegrityError as err:
            return str(err)
        return None

    def _has_right_blob(self, ref: ArtifactRef) -> bool:
        return self._wrong(blob_path(ref.digest), ref) is None or self._bring_blob(ref.digest, ref)

    def _bring_blob(self, digest: str, ref: ArtifactRef | None = None) -> bool:
        """Bring a blob from the other store, where it is a blob or, by its manifest, a file of an engine."""
        if self.spare is None:
            return False
        path = blob_path(digest)
        info = self.spare.info(path)
        places: Sequence[str] = [path] if info is not None else []
        size = ref.size if ref is not None else info.size if info is not None else None
        if size is None:
            return False
        if ref is not None:
            places = [*places, *self._spare_files(digest)]
        for place in places:
            try:
                with self.store.scratch() as folder:
                    right = ArtifactRef(digest, size, ref.media_type if ref is not None else BYTES)
                    self.spare.get_file(place, right, folder / "file")
                    self.store.put_file(path, folder / "file", right)
            except (NotFoundError, IntegrityError):
                continue
            return True
        return False

    def _spare_files(self, digest: str) -> list[str]:
        if self.spare is None:
            return []
        return [
            f"{EngineId.of(manifest.identity).path}/{name}"
            for manifest in EngineCatalog(self.spare).manifests()
            for name, entry in manifest.files.items()
            if entry.digest == digest
        ]

    def _set_aside(self, path: str) -> str | None:
        moved = self._copy_aside(path)
        self.store.delete(path)
        return moved

    def _copy_aside(self, path: str) -> str | None:
        moved = f"quarantine/{self.stamp}/{path}"
        try:
            self.store.copy(path, moved)
        except NotFoundError:
            return None
        return moved


def _why_not(path: str, data: bytes, check: Callable[[str, bytes], object]) -> str | None:
    try:
        check(path, data)
    except StoreError:
        raise
    except ArtifactError as err:
        return str(err)
    return None


def _check_record(path: str, data: bytes) -> None:
    record = ActionRecord.from_bytes(data)
    if record_path(record.stage, record.key) != path:
        raise IntegrityError(f"{path}: holds the record of {record.stage} {record.key[:12]}")


def _check_mark(path: str, data: bytes) -> None:
    if data != mark_document(path.split("/")[1], mark_of(path) or ""):
        raise IntegrityError(f"{path}: is no mark of this publication")


def _check_signature(path: str, data: bytes) -> None:
    if hint_of(data) is None:
        raise IntegrityError(f"{path}: is no signature")
