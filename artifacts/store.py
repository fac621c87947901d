"""The store's edge: named objects with atomic writes, in a folder or in S3.

Everything above this Protocol (blobs, records, engines) is the same for every store. Paths are
relative, use `/`, and never contain `..`, an empty part or a backslash. The first parts `tmp`,
`locks` and `store.json` (`artifacts.layout`) belong to the store itself. Reading creates nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Protocol

from artifacts.errors import AddressError, StoreError
from artifacts.layout import LAYOUT_NAME
from artifacts.refs import ArtifactRef

PATH_BYTES: Final = 900
PART_BYTES: Final = 255
RESERVED: Final = ("tmp", "locks", LAYOUT_NAME)


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """One stored object: its path, its size in bytes, and when it was last written (seconds, UTC).

    `version` is the name of its version as `read_versioned` tells it, where looking tells it too (S3), else empty.
    """

    path: str
    size: int
    modified: float
    version: str = field(default="", compare=False)


class Store(Protocol):
    """Named objects; a write is visible whole or not at all."""

    @property
    def uri(self) -> str:
        """Where it is: `file:///...` or `s3://bucket/prefix`."""

    def read(self, path: str) -> bytes:
        """Return a small object. Raises NotFoundError, StoreError."""

    def read_versioned(self, path: str) -> tuple[bytes, str]:
        """Return a small object and the name of its version, for `write`. Raises NotFoundError, StoreError.

        A version is opaque text that other bytes do not have; the same bytes may have it again.
        """

    def write(self, path: str, data: bytes, *, if_absent: bool = False, if_version: str | None = None) -> bool:
        """Write a small object atomically.

        With `if_absent`, return False (and write nothing) where one exists: of many such writers one
        gets True. With `if_version`, return False where the object is not of that version any more, or
        is gone: of many writers that read one version, one gets True. What is written so must be written
        in no other way, except `if_absent`. False may be told of a write to S3 whose answer was lost and
        that another has written over since, so that who tries again looks for their change first.
        Raises StoreError.
        """

    def put_file(self, path: str, source: Path, ref: ArtifactRef) -> None:
        """Store a file of any size at `path`, atomically, with flat memory; its bytes are checked against `ref`.

        Writing over an existing object of the same size is a no-op, since such paths name content.
        Raises IntegrityError where the file's bytes are not `ref`, StoreError.
        """

    def get_file(self, path: str, ref: ArtifactRef, target: Path) -> None:
        """Bring an object to the local path `target` (a new name in a folder that exists), checking its digest.

        A folder store may hard-link: `target` must not be written to. Raises NotFoundError, StoreError, and
        IntegrityError (leaving no `target`) where bytes or size do not match.
        """

    def copy(self, source: str, target: str) -> None:
        """Copy an object inside the store (a hard link, or a server-side copy), atomically, over what is there.

        Raises NotFoundError, StoreError.
        """

    def info(self, path: str) -> ObjectInfo | None:
        """Return size and time of an object, or None where there is none."""

    def infos(self, paths: Collection[str]) -> dict[str, ObjectInfo]:
        """Return what `info` does of many objects, by path, leaving out those that are not there; of thousands, by listing.

        Raises StoreError.
        """

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """Yield every object whose path starts with `prefix` (a folder prefix ends with `/`), sorted by path."""

    def touch(self, path: str) -> bool:
        """Make an object count as written now, its bytes unchanged; return False where there is none. Raises StoreError.

        Its version may change, so that what is written by version is not to be touched.
        """

    def delete(self, path: str) -> None:
        """Remove an object; no error where there is none."""

    def lock(self, name: str, *, give_up: Callable[[], bool] | None = None) -> AbstractContextManager[None]:
        """Hold an exclusive lock that dies with its holder, where the store has one (a folder); else no lock.

        Waits for another holder until `give_up` says True. Raises StoreError, also then.
        """

    def scratch(self) -> AbstractContextManager[Path]:
        """Yield a new, empty local folder, removed afterwards; what a killed process leaves is removed later.

        Files made in it reach the store cheapest: a folder store links them instead of copying.
        """


def is_relative_path(path: str) -> bool:
    """Tell whether `path` is a plain relative path: parts joined by `/`, none of which leads elsewhere.

    Parts are printable, of at most 255 bytes in UTF-8 (file systems), 900 in all (S3 keys end at 1024).
    """
    if not path.isprintable() or "\\" in path or len(path.encode()) > PATH_BYTES:
        return False
    return all(part not in ("", ".", "..") and len(part.encode()) <= PART_BYTES for part in path.split("/"))


def check_path(path: str) -> str:
    """Return `path` if it is a valid object path, else raise StoreError."""
    if not is_relative_path(path):
        raise StoreError(
            f"not an object path: {path!r} (expected printable parts joined by '/', no '..', no '\\', <= {PATH_BYTES} bytes)"
        )
    if path.split("/", 1)[0] in RESERVED:
        raise StoreError(f"not an object path: {path!r} ({', '.join(RESERVED)} belong to the store itself)")
    return path


def require_one_condition(if_absent: bool, if_version: str | None) -> None:
    """Raise ValueError where a write has both conditions, of which one never holds."""
    if if_absent and if_version is not None:
        raise ValueError("a write is conditional on an object's absence or on its version, not on both")


def check_prefix(prefix: str) -> str:
    """Return `prefix` if objects may start with it (an object path, with or without a last `/`, or empty)."""
    if prefix:
        check_path(prefix.removesuffix("/"))
    return prefix


def without_secret(address: str) -> str:
    """Return an address that is refused less what stands before its last `@`, a password mostly, which nobody should read."""
    scheme, separator, rest = address.partition("://")
    return f"{scheme}{separator}{rest.rpartition('@')[2]}" if separator else address


def open_store(uri: str) -> Store:
    """Open `file:///path`, a plain path (`~` is the home folder), or `s3://bucket/prefix`; nothing is touched yet.

    Raises AddressError for anything else, and StoreError where S3 is asked for without boto3.
    """
    scheme, separator, rest = uri.partition("://")
    if scheme == "s3" and separator:
        from artifacts.s3 import S3Store

        return S3Store.from_uri(uri)
    if separator and scheme != "file":
        raise AddressError(
            f"{without_secret(uri)}: unknown kind of store {scheme!r} (allowed: a folder, file:///folder, s3://bucket)"
        )
    if separator and not rest.startswith("/"):
        raise AddressError(
            f"{without_secret(uri)}: a file:// address needs an absolute path (write file:///folder, or a plain path)"
        )
    if not uri:
        raise AddressError("the store's address is empty (expected a folder, file:///folder or s3://bucket/prefix)")
    from artifacts.folder import FolderStore

    return FolderStore(Path(rest) if separator else _home(Path(uri)))


def _home(path: Path) -> Path:
    try:
        return path.expanduser()
    except RuntimeError as err:
        raise AddressError(f"{path}: {err} (write the whole path)") from err
