"""Blobs and action records in a store: content addressed, shared by everyone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from artifacts.errors import IntegrityError, NotFoundError, StoreError
from artifacts.leases import Lease
from artifacts.records import ActionRecord
from artifacts.refs import ArtifactRef
from artifacts.store import Store


def blob_path(digest: str) -> str:
    """Return where the blob of this SHA-256 lies in a store."""
    return f"cache/blobs/sha256/{digest[:2]}/{digest}"


def record_path(stage: str, key: str) -> str:
    """Return where the record of this action lies in a store."""
    return f"cache/actions/{stage}/{key}.json"


def no_lease() -> Lease | None:
    """Return no lease: of who only looks."""
    return None


@dataclass(frozen=True)
class ActionCache:
    """Action records and their blobs. `warn` is told, in one sentence, of every hit that had to become a miss.

    Who builds on what is found, while others may collect garbage, has a `lease` (`artifacts.leases`): then a record that is
    found, and a blob that is there already, count as used now.
    """

    store: Store
    warn: Callable[[str], None] = lambda _message: None
    lease: Callable[[], Lease | None] = no_lease

    def lookup(self, stage: str, key: str) -> ActionRecord | None:
        """Return the record of an action if it and every blob it names are there, else None.

        Blobs are checked for presence and size here; their bytes are checked whenever they are read.
        """
        path = record_path(stage, key)
        try:
            record = ActionRecord.from_bytes(self.store.read(path))
        except NotFoundError:
            return None
        except IntegrityError as err:
            self.warn(f"{path}: {err}; treated as a miss")
            return None
        if record.key != key or record.stage != stage:
            self.warn(f"{path}: holds the record of {record.stage} {record.key[:12]}; treated as a miss")
            return None
        lease = self.lease()
        # Before its blobs are looked for: those of a record that counts as used now are not removed any more.
        if lease is not None and lease.use([path]):
            return None
        for name, ref in record.outputs.items():
            info = self.store.info(blob_path(ref.digest))
            if info is None or info.size != ref.size:
                found = "is gone" if info is None else f"has {info.size} bytes instead of {ref.size}"
                self.warn(f"{stage} {key[:12]}: its output {name} ({ref.digest[:12]}) {found}; treated as a miss")
                return None
        return record

    def put_record(self, record: ActionRecord) -> ActionRecord:
        """Store a record whose blobs are stored already, and return the one that counts.

        Of two builders of one key the first wins and the second gets the first's record. A record
        that no longer holds (damaged, or its blobs are gone) is replaced. With a lease, raises NotFoundError where
        one of its blobs was removed while it was made, so that it is made again.
        """
        path = record_path(record.stage, record.key)
        lease = self.lease()
        if lease is not None:
            lease.settle()
            blobs = [blob_path(ref.digest) for ref in record.outputs.values()]
            there = self.store.infos(blobs)
            for blob in blobs:
                if blob not in there:
                    raise NotFoundError(self.store.uri, blob)
        if self.store.write(path, record.to_bytes(), if_absent=True):
            return record
        # Of two builders that find the same damaged record, too, one replaces it and the other sees that.
        with self.store.lock(path):
            winner = ActionCache(self.store).lookup(record.stage, record.key)
            if winner is not None:
                return winner
            self.store.write(path, record.to_bytes())
        return record

    def put_blob(self, source: Path, ref: ArtifactRef) -> None:
        """Store a file as a blob, checking that its bytes are `ref`; a blob that is there is not sent again."""
        path, lease = blob_path(ref.digest), self.lease()
        if lease is not None:
            lease.use([path])
        self.store.put_file(path, source, ref)

    def get_blob(self, ref: ArtifactRef, target: Path) -> None:
        """Bring a blob to `target`, checked; a damaged blob is removed from the store before IntegrityError is raised.

        Raises NotFoundError and StoreError as the store does.
        """
        path = blob_path(ref.digest)
        try:
            self.store.get_file(path, ref, target)
        except IntegrityError as damage:
            try:
                self.store.delete(path)
            except StoreError as err:
                raise IntegrityError(f"{damage}; it could not be removed ({err}): remove it by hand") from err
            raise IntegrityError(f"{damage}; removed it, so that the stage that made it runs again") from damage
