"""Local files, written whole or not at all: exclusive creation, hashing on the way, links, and what went wrong."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, Final

from artifacts.errors import StoreError, UnavailableError
from artifacts.refs import CHUNK_BYTES, ArtifactRef, require_match

NO_LINKS: Final = (errno.EPERM, errno.EXDEV, errno.EMLINK, errno.EOPNOTSUPP, errno.EACCES)
_ADVICE: Final = {
    errno.ENOSPC: "the disk is full; free some space (enginery gc, which needs some KiB itself), or use another folder or --store",
    errno.EDQUOT: "the disk quota is used up; free some space (enginery gc) or use another --store",
    errno.EFBIG: "the file is larger than this file system, or this process's limit (ulimit -f), allows",
    errno.EACCES: "no permission; check who owns the folder, or use another --store",
    errno.EPERM: "not permitted here; check who owns the folder, or use a --store on another file system",
    errno.EROFS: "the file system is read-only; use another --store",
    errno.EXDEV: "the folders of a store must lie on one file system",
    errno.EOPNOTSUPP: "this file system has no hard links; use a --store on another one",
    errno.ENOTDIR: "a file lies where a folder is expected; move it away",
    errno.EISDIR: "a folder lies where a file is expected; move it away",
    errno.ESHUTDOWN: "the file system has shut this host out, which was silent for too long (CephFS: evicted); mount it anew",
    errno.ENOTEMPTY: "a folder lies where a file is expected; move it away",
}
# What a file system on a network says while its server is away (NFS: nfs(5), soft mounts).
_AWAY: Final = (
    errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETDOWN,
    errno.ENETUNREACH, errno.ECONNRESET, errno.EAGAIN, errno.ESHUTDOWN,
)  # fmt: skip


@contextmanager
def os_faults(what: str) -> Iterator[None]:
    """Turn every OSError of the block into a StoreError about `what`."""
    try:
        yield
    except OSError as err:
        raise store_error(what, err) from err


def store_error(what: str, err: OSError) -> StoreError:
    """Return the StoreError that says what happened to `what`, and what to do next."""
    advice = _ADVICE.get(err.errno or 0, "check the folder and its disk, or use another --store")
    kind = UnavailableError if err.errno in _AWAY else StoreError
    return kind(f"{what}: {err.strerror or err}: {advice}")


def open_regular(source: Path) -> BinaryIO:
    """Open a regular file for reading. Raises StoreError, also for folders, pipes and devices."""
    with os_faults(str(source)):
        stream = source.open("rb")
    if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
        stream.close()
        raise StoreError(f"{source} is not a regular file")
    return stream


def create_file(path: Path, mode: int) -> BinaryIO:
    """Create a file that does not exist, with `mode` less the umask, for writing. Raises OSError."""
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode), "wb")


def link_file(source: Path, target: Path, stream: BinaryIO) -> bool:
    """Link `source` to `target` if the file system can, and if `source` still is the file that `stream` reads."""
    try:
        os.link(source.resolve(), target)
    except FileNotFoundError:
        return False
    except OSError as err:
        if err.errno in NO_LINKS:
            return False
        raise
    if os.path.samestat(target.lstat(), os.fstat(stream.fileno())):
        return True
    target.unlink()
    return False


@contextmanager
def arriving(target: Path) -> Iterator[Path]:
    """Yield an unused path beside `target` that becomes `target` when the block ends well, and is removed otherwise.

    Raises StoreError where `target` exists, or cannot be made.
    """
    if os.path.lexists(target):
        raise StoreError(f"{target} exists already, and is not written over")
    temporary = target.with_name(f".{uuid.uuid4().hex}.part")
    with os_faults(str(target)):
        try:
            yield temporary
            temporary.rename(target)
        finally:
            with suppress(FileNotFoundError, NotADirectoryError):
                temporary.unlink()


def file_chunks(stream: BinaryIO) -> Iterator[bytes]:
    """Yield what is left of a stream in chunks of 1 MiB. Raises OSError."""
    while chunk := stream.read(CHUNK_BYTES):
        yield chunk


def check_chunks(
    chunks: Iterable[bytes], ref: ArtifactRef, what: str, write: Callable[[bytes], object] | None = None
) -> None:
    """Hash chunks to their end, handing each on to `write`, and raise IntegrityError where they are not `ref`."""
    digest, size = hashlib.sha256(), 0
    for chunk in chunks:
        digest.update(chunk)
        size += len(chunk)
        if write is not None:
            write(chunk)
    require_match(what, ref, digest.hexdigest(), size)


def sync_file(stream: BinaryIO) -> None:
    """Wait until the bytes written so far are on disk. Raises OSError."""
    stream.flush()
    os.fsync(stream.fileno())


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on disk. Raises OSError."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folders(folder: Path) -> None:
    """Make a folder and its parents where they are not, and wait until their names are on disk. Raises OSError."""
    if folder.is_dir():
        return
    make_folders(folder.parent)
    # Another process may be as fast.
    with suppress(FileExistsError):
        folder.mkdir()
        sync_folder(folder.parent)
    if not folder.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))
