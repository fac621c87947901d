"""Temporary names that die with their process.

A name is guarded by a lock file beside it, whose `flock` the kernel drops when the process ends,
however it ends. So a free lock means that its owner is dead, and what it left may be removed.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import stat
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Final

from artifacts.errors import StoreError
from artifacts.files import make_folders, os_faults, store_error

_LOCK: Final = ".lock"
_FRESH: Final = ".fresh"
# A fresh file lives for microseconds, between its creation and its lock; one this old was left by a killed process.
_FRESH_SECONDS: Final = 3600.0


@contextmanager
def held_name(folder: Path) -> Iterator[Path]:
    """Yield an unused path in `folder`; whatever is there at the end of the block is removed. Raises OSError."""
    name = uuid.uuid4().hex
    fresh, lock, path = folder / f"{name}{_FRESH}", folder / f"{name}{_LOCK}", folder / name
    descriptor = os.open(fresh, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        # Locked before it gets the name that `sweep` looks for, so that no living process's name is ever taken.
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        fresh.rename(lock)
        yield path
    finally:
        with suppress(OSError):
            _remove(path)
        # The guard outlives what could not be removed (a network's disk may be away), so that a later sweep tries again.
        with suppress(OSError):
            if not os.path.lexists(path):
                lock.unlink(missing_ok=True)
            fresh.unlink(missing_ok=True)
        with suppress(OSError):
            os.close(descriptor)


@contextmanager
def held_folder(folder: Path) -> Iterator[Path]:
    """Yield a new, empty folder (mode 0700) in `folder`, removed afterwards. Raises OSError."""
    with held_name(folder) as path:
        path.mkdir(mode=0o700)
        yield path


@contextmanager
def locked_folder(folder: Path, lock: str) -> Iterator[Path]:
    """Yield a folder, made where it is not, under the lock of this name in it, which the kernel drops with its holder. Raises OSError."""
    make_folders(folder)
    with (folder / lock).open("wb") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield folder


def sweep(folder: Path) -> None:
    """Remove what dead processes left in `folder`; what is another user's, or held, stays."""
    with suppress(OSError):
        for entry in list(folder.iterdir()):
            if entry.suffix == _LOCK:
                with suppress(OSError):
                    _sweep_dead(entry)
            elif entry.suffix == _FRESH:
                with suppress(OSError):
                    if time.time() - entry.stat().st_mtime > _FRESH_SECONDS:
                        entry.unlink()


def system_scratch() -> Path:
    """Return this user's folder for temporary names in the system's temporary folder, making it where it is not.

    Raises StoreError where the name is taken by someone else (in a folder that all may write to, anybody can make it), and,
    with the reason, where no folder for temporary files can be written to.
    """
    base = _base()
    folder = base / f"enginery-{os.getuid()}"
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise StoreError(f"{folder} is not a private folder of this user; remove it, or set TMPDIR to another place")
    return folder


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """Yield a new, empty folder in the system's temporary folder (`TMPDIR`), having removed what dead processes left. Raises StoreError."""
    with ExitStack() as stack:
        with os_faults("the system's temporary folder"):
            base = system_scratch()
            sweep(base)
            folder = stack.enter_context(held_folder(base))
        yield folder


@contextmanager
def private_folder() -> Iterator[Path]:
    """Yield a new, empty folder of a name that nobody can guess, so that no other user can be in the way. Raises StoreError.

    A process that is killed leaves it: for a few small files.
    """
    base = _base()
    with ExitStack() as stack:
        with os_faults(f"{base}, for temporary files (TMPDIR)"):
            folder = stack.enter_context(
                tempfile.TemporaryDirectory(prefix="enginery-", dir=base, ignore_cleanup_errors=True)
            )
        yield Path(folder)


def _base() -> Path:
    """Return the system's temporary folder. Raises StoreError, with the reason, where none can be written to."""
    try:
        return Path(tempfile.gettempdir())
    except FileNotFoundError as err:
        base = Path(os.environ.get("TMPDIR") or "/tmp")  # noqa: S108 - what is tried first (tempfile.gettempdir)
        why = _why_not(base) or err
        said = store_error(f"{base}, for temporary files", why)
        raise StoreError(f"{said} (or set TMPDIR to a folder that can be written)") from err


def _why_not(folder: Path) -> OSError | None:
    """Return what is in the way of a file in a folder; None where nothing is, now."""
    path = folder / f"enginery-{uuid.uuid4().hex}"
    try:
        path.write_bytes(b"written?")
    except OSError as err:
        return err
    finally:
        with suppress(OSError):
            path.unlink()
    return None


def _sweep_dead(lock: Path) -> None:
    descriptor = os.open(lock, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _remove(lock.with_suffix(""))
        lock.unlink()
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
