"""The store's edge: named objects with atomic writes, in a folder or in S3.

Everything above this Protocol (blobs, records, engines) is the same for every store. Paths are
relative, use `/`, and never contain `..`, an empty part or a backslash.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from artifacts.errors import StoreError
from artifacts.refs import ArtifactRef


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """One stored object: its path, its size in bytes, and when it was last written (seconds, UTC)."""

    path: str
    size: int
    modified: float


class Store(Protocol):
    """Named objects; a write is visible whole or not at all."""

    @property
    def uri(self) -> str:
        """Where it is: `file:///...` or `s3://bucket/prefix`."""

    def read(self, path: str) -> bytes:
        """Return a small object. Raises NotFoundError, StoreError."""

    def write(self, path: str, data: bytes, *, if_absent: bool = False) -> bool:
        """Write a small object atomically.

        With `if_absent`, return False (and write nothing) where one exists: of many such writers one
        gets True. Raises StoreError.
        """

    def put_file(self, path: str, source: Path, ref: ArtifactRef) -> None:
        """Store a file of any size at `path`, atomically, with flat memory; its bytes are checked against `ref`.

        Writing over an existing object of the same size is a no-op, since such paths name content.
        Raises IntegrityError where the file's bytes are not `ref`, StoreError.
        """

    def get_file(self, path: str, ref: ArtifactRef, target: Path) -> None:
        """Bring an object to the local path `target` (which must not exist), checking its digest on the way.

        A folder store may hard-link: `target` must not be written to. Raises NotFoundError, StoreError, and
        IntegrityError (leaving no `target`) where bytes or size do not match.
        """

    def copy(self, source: str, target: str) -> None:
        """Copy an object inside the store (a hard link, or a server-side copy), atomically."""

    def info(self, path: str) -> ObjectInfo | None:
        """Return size and time of an object, or None where there is none."""

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """Yield every object whose path starts with `prefix` (a folder prefix ends with `/`), sorted by path."""

    def delete(self, path: str) -> None:
        """Remove an object; no error where there is none."""

    def lock(self, name: str) -> AbstractContextManager[None]:
        """Hold an exclusive lock that dies with its holder, where the store has one (a folder); else no lock."""


def check_path(path: str) -> str:
    """Return `path` if it is a valid object path, else raise StoreError."""
    parts = path.split("/")
    if "\\" in path or "\0" in path or any(part in ("", ".", "..") for part in parts) or len(path) > 900:
        raise StoreError(f"not an object path: {path!r}")
    return path


def open_store(uri: str) -> Store:
    """Open `file:///path`, a plain path, or `s3://bucket/prefix`; raise StoreError for anything else."""
    scheme, separator, rest = uri.partition("://")
    if not separator:
        from artifacts.folder import FolderStore

        return FolderStore(Path(uri))
    if scheme == "file":
        from artifacts.folder import FolderStore

        return FolderStore(Path(rest))
    if scheme == "s3":
        try:
            from artifacts.s3 import S3Store
        except ImportError as err:
            raise StoreError(f"{uri}: S3 needs boto3; install it with: pip install 'enginery[s3]'") from err
        return S3Store.from_uri(uri)
    raise StoreError(f"{uri}: unknown kind of store {scheme!r} (allowed: a folder, file://, s3://)")
