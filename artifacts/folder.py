"""A store in a local folder: atomic renames, hard links, and locks that the kernel drops with their holder."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, Final

from artifacts.errors import NotFoundError, StoreError
from artifacts.files import (
    NO_LINKS,
    arriving,
    check_chunks,
    create_file,
    file_chunks,
    link_file,
    make_folders,
    open_regular,
    os_faults,
    store_error,
    sync_file,
    sync_folder,
)
from artifacts.layout import LAYOUT_NAME, layout_document, require_layout
from artifacts.refs import CHUNK_BYTES, ArtifactRef, digest_bytes, require_size
from artifacts.scratch import held_folder, held_name, sweep
from artifacts.store import RESERVED, ObjectInfo, check_path, check_prefix, is_relative_path, require_one_condition

# Before the umask: nobody but the owner may write, and content-addressed bytes not even the owner.
_MODE: Final = 0o644
_MODE_BLOB: Final = 0o444
# How often a waiting process looks whether it is still wanted.
_LOCK_SECONDS: Final = 0.5


class FolderStore:
    """A folder; its objects are plain files, its own `tmp/` and `locks/` are no objects."""

    def __init__(self, root: Path) -> None:
        # Absolute at once: the working directory may change later.
        self.root = Path(os.path.abspath(root))  # noqa: PTH100 - Path.resolve() would follow links, and show another path
        self._tmp = self.root / "tmp"
        # None: not looked for yet.
        self._has_layout: bool | None = None

    def __repr__(self) -> str:
        return f"FolderStore({str(self.root)!r})"

    @property
    def uri(self) -> str:
        """Where it is: `file:///...`, not percent-encoded."""
        return f"file://{self.root}"

    def read(self, path: str) -> bytes:
        """Return a small object. Raises NotFoundError, StoreError."""
        with self._reading(path) as stream:
            return stream.read()

    def read_versioned(self, path: str) -> tuple[bytes, str]:
        """Return a small object and its version, which is its SHA-256. Raises NotFoundError, StoreError."""
        data = self.read(path)
        return data, digest_bytes(data)

    def write(self, path: str, data: bytes, *, if_absent: bool = False, if_version: str | None = None) -> bool:
        """Write a small object atomically; with a condition, return False where it does not hold. Raises StoreError."""
        require_one_condition(if_absent, if_version)
        target = self._locate(path)
        with self._faults(path), ExitStack() as stack:
            if if_absent and os.path.lexists(target):
                return False
            if if_version is not None:
                # Not `path` itself: who holds that name's lock may write conditionally too.
                stack.enter_context(self.lock(f"version of {path}"))
                if not self._has_version(path, if_version):
                    return False
            temporary = stack.enter_context(self._temporary())
            with create_file(temporary, _MODE) as stream:
                stream.write(data)
                sync_file(stream)
            return self._place(temporary, target, if_absent=if_absent)

    def put_file(self, path: str, source: Path, ref: ArtifactRef) -> None:
        """Store a file, checking its bytes on the way; linked, not copied, where it lies in a scratch folder.

        Raises IntegrityError where the file's bytes are not `ref`, StoreError.
        """
        target = self._locate(path)
        with self._faults(path), open_regular(source) as stream:
            size = os.fstat(stream.fileno()).st_size
            require_size(str(source), ref, size)
            there = self.info(path)
            if there is not None and there.size == size:
                return
            with self._temporary() as temporary:
                if self._may_link(source, stream) and link_file(source, temporary, stream):
                    # Read-only before it is hashed, so that what was hashed is what is kept.
                    temporary.chmod(stat.S_IMODE(os.fstat(stream.fileno()).st_mode) & _MODE_BLOB)
                    check_chunks(file_chunks(stream), ref, str(source))
                    sync_file(stream)
                else:
                    with create_file(temporary, _MODE_BLOB) as copy:
                        check_chunks(file_chunks(stream), ref, str(source), copy.write)
                        sync_file(copy)
                self._place(temporary, target)

    def get_file(self, path: str, ref: ArtifactRef, target: Path) -> None:
        """Bring an object to `target` by a hard link where that works, else by a copy; its bytes are hashed first.

        Raises NotFoundError, StoreError (also where `target` exists), and IntegrityError, leaving no `target`.
        """
        what = f"{self.uri}/{path}"
        with self._reading(path) as stream:
            require_size(what, ref, os.fstat(stream.fileno()).st_size)
            with arriving(target) as temporary:
                if link_file(self._locate(path), temporary, stream):
                    check_chunks(file_chunks(stream), ref, what)
                else:
                    with create_file(temporary, _MODE_BLOB) as copy:
                        check_chunks(file_chunks(stream), ref, what, copy.write)

    def copy(self, source: str, target: str) -> None:
        """Copy an object inside the store by a hard link, or by its bytes where links do not work.

        Raises NotFoundError, StoreError.
        """
        goal = self._locate(target)
        with self._reading(source) as stream, self._faults(target), self._temporary() as temporary:
            if not link_file(self._locate(source), temporary, stream):
                with create_file(temporary, stat.S_IMODE(os.fstat(stream.fileno()).st_mode) & _MODE) as copy:
                    shutil.copyfileobj(stream, copy, CHUNK_BYTES)
                    sync_file(copy)
            self._place(temporary, goal)

    def info(self, path: str) -> ObjectInfo | None:
        """Return size and time of an object, or None where there is none. Raises StoreError."""
        file = self._locate(path)
        with self._faults(path):
            try:
                status = file.lstat()
            except (FileNotFoundError, NotADirectoryError):
                return None
            return _info(path, status) if stat.S_ISREG(status.st_mode) else None

    def infos(self, paths: Collection[str]) -> dict[str, ObjectInfo]:
        """Return what `info` does of many objects; each takes one lstat, its folder is looked at once. Raises StoreError."""
        folders: dict[str, bool] = {}
        found: dict[str, ObjectInfo] = {}
        root = str(self._checked_root())
        for path in paths:
            folder, _slash, name = path.rpartition("/")
            if folder not in folders:
                if folder:
                    check_path(folder)
                folders[folder] = self._is_there(root, folder, folders)
            if not folder or name in ("", ".", "..") or not name.isprintable():
                check_path(path)
            if not folders[folder]:
                continue
            try:
                status = os.lstat(f"{root}/{path}")
            except (FileNotFoundError, NotADirectoryError):
                continue
            except OSError as err:
                raise store_error(f"{self.uri}: {path}", err) from err
            if stat.S_ISREG(status.st_mode):
                found[path] = _info(path, status)
        return found

    def _is_there(self, root: str, folder: str, known: dict[str, bool]) -> bool:
        """Tell whether a folder may hold objects, looking at each of its parts once. Raises StoreError."""
        if folder in known or not folder:
            return known.get(folder, True)
        above = folder.rpartition("/")[0]
        there = self._is_there(root, above, known)
        if there:
            try:
                mode = os.lstat(f"{root}/{folder}").st_mode
            except (FileNotFoundError, NotADirectoryError):
                there = False
            except OSError as err:
                raise store_error(f"{self.uri}: {folder}", err) from err
            else:
                self._refuse_link(folder, mode)
        known[folder] = there
        return there

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """Yield every object whose path starts with `prefix`, sorted by path. Raises StoreError."""
        folder, _slash, start = check_prefix(prefix).rpartition("/")
        base = self._locate(folder) if folder else self._checked_root()
        return self._walk(base, f"{folder}/" if folder else "", start)

    def touch(self, path: str) -> bool:
        """Make an object count as written now, all its names in this store too; False where there is none. Raises StoreError."""
        file = self._locate(path)
        with self._faults(path):
            try:
                os.utime(file)
            except (FileNotFoundError, NotADirectoryError):
                return False
            except PermissionError:
                return self._replace_by_copy(path, file)
        return True

    def delete(self, path: str) -> None:
        """Remove an object; no error where there is none. Raises StoreError."""
        file = self._locate(path)
        with self._faults(path), suppress(FileNotFoundError, NotADirectoryError):
            file.unlink()

    @contextmanager
    def lock(self, name: str, *, give_up: Callable[[], bool] | None = None) -> Iterator[None]:
        """Hold an exclusive lock; waits for its holder, until `give_up`, and never for a dead one.

        Raises StoreError, at the end too, where the lock's server is away: another host may have had the lock meanwhile.
        """
        from filelock import FileLock, Timeout

        with ExitStack() as stack:
            with self._faults(f"locks/{name}"):
                folder = self._checked_root() / "locks"
                make_folders(folder)
                # Hashed: names are paths and keys, and a file name has neither slashes nor more than 255 bytes.
                lock = FileLock(folder / f"{digest_bytes(name.encode())}.lock")
                while not lock.is_locked:
                    with suppress(Timeout):
                        stack.enter_context(lock.acquire(timeout=_LOCK_SECONDS))
                    if not lock.is_locked and give_up is not None and give_up():
                        raise StoreError(f"{self.uri}: gave up waiting for {name}, which another process holds")
            try:
                yield
            except BaseException:
                # Of a file system that went away, what was done under the lock tells more.
                with suppress(OSError):
                    stack.close()
                raise
            with self._faults(f"locks/{name}"):
                stack.close()

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        """Yield a new, empty folder on the store's file system; first removes what killed processes left there.

        Raises StoreError.
        """
        with ExitStack() as stack:
            with self._faults("tmp"):
                self._checked_root()
                make_folders(self._tmp)
                sweep(self._tmp)
                folder = stack.enter_context(held_folder(self._tmp))
            yield folder

    def _walk(self, folder: Path, prefix: str, start: str) -> Iterator[ObjectInfo]:
        try:
            with os.scandir(folder) as entries:
                # A folder sorts as its name with a slash, so that whole paths come out in order ("a.b" before "a/b").
                found = sorted(
                    (f"{entry.name}/" if entry.is_dir(follow_symlinks=False) else entry.name, entry)
                    for entry in entries
                    if entry.name.startswith(start) and is_relative_path(entry.name)
                )
        except (FileNotFoundError, NotADirectoryError):
            return
        except OSError as err:
            raise store_error(f"{self.uri}: {prefix or '/'}", err) from err
        for name, entry in found:
            if name.endswith("/"):
                if prefix or name[:-1] not in RESERVED:
                    yield from self._walk(Path(entry.path), prefix + name, "")
                continue
            if not prefix and name in RESERVED:
                continue
            try:
                status = entry.stat(follow_symlinks=False)
            except FileNotFoundError:
                continue
            if stat.S_ISREG(status.st_mode):
                yield _info(prefix + name, status)

    def _checked_root(self) -> Path:
        with os_faults(self.uri):
            try:
                is_folder = stat.S_ISDIR(self.root.stat().st_mode)
            except (FileNotFoundError, NotADirectoryError):
                return self.root
            if not is_folder:
                raise StoreError(f"{self.uri} is a file, not a folder; give another --store")
            if self._has_layout is None:
                self._has_layout = self._read_layout()
        return self.root

    def _read_layout(self) -> bool:
        """Tell whether the store says its layout; raises StoreError where it is none that this release knows."""
        try:
            data = (self.root / LAYOUT_NAME).read_bytes()
        except FileNotFoundError:
            return False
        require_layout(self.uri, data)
        return True

    def _put_layout(self) -> None:
        with held_name(self._tmp) as temporary:
            with create_file(temporary, _MODE) as stream:
                stream.write(layout_document())
                sync_file(stream)
            self._place_new(temporary, self.root / LAYOUT_NAME)
        sync_folder(self.root)
        # Whoever was faster may be a newer release.
        self._has_layout = self._read_layout()

    def _locate(self, path: str) -> Path:
        check_path(path)
        with self._faults(path):
            # A plan asks for hundreds of objects: part by part this takes a tenth of what resolving the path does.
            file = str(self._checked_root())
            for part in path.split("/"):
                file = f"{file}/{part}"
                try:
                    mode = os.lstat(file).st_mode
                except (FileNotFoundError, NotADirectoryError):
                    break  # nor is there anything below it
                self._refuse_link(path, mode)
        return self.root / path

    def _refuse_link(self, path: str, mode: int) -> None:
        if stat.S_ISLNK(mode):
            raise StoreError(f"{self.uri}: {path} goes through a symbolic link, and the store follows none; move it")

    @contextmanager
    def _reading(self, path: str) -> Iterator[BinaryIO]:
        file = self._locate(path)
        with self._faults(path):
            try:
                stream = file.open("rb")
            except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as err:
                raise NotFoundError(self.uri, path) from err
            with stream:
                yield stream

    @contextmanager
    def _temporary(self) -> Iterator[Path]:
        make_folders(self._tmp)
        if not self._has_layout:
            self._put_layout()
        with held_name(self._tmp) as path:
            yield path

    def _place(self, temporary: Path, target: Path, *, if_absent: bool = False) -> bool:
        """Give a complete, synced file its name; the name too is on disk when this returns."""
        make_folders(target.parent)
        if not if_absent:
            temporary.replace(target)
        elif not self._place_new(temporary, target):
            return False
        sync_folder(target.parent)
        return True

    def _place_new(self, temporary: Path, target: Path) -> bool:
        """Give a file a name that does not exist; False where it does: of many writers, exactly one gets it."""
        try:
            os.link(temporary, target)
        except FileExistsError:
            return False
        except OSError as err:
            if err.errno not in NO_LINKS:
                raise
            # A file system without hard links (exFAT, some network disks): one writer after the other instead.
            with self.lock(f"version of {target.relative_to(self.root).as_posix()}"):
                if os.path.lexists(target):
                    return False
                temporary.replace(target)
        return True

    def _replace_by_copy(self, path: str, file: Path) -> bool:
        """Put a copy of another user's file, whose time only they may set, in its place."""
        try:
            with self._reading(path) as stream, self._temporary() as temporary:
                with create_file(temporary, stat.S_IMODE(os.fstat(stream.fileno()).st_mode) & _MODE) as copy:
                    shutil.copyfileobj(stream, copy, CHUNK_BYTES)
                    sync_file(copy)
                self._place(temporary, file)
        except NotFoundError:
            return False
        return True

    def _has_version(self, path: str, version: str) -> bool:
        try:
            return self.read_versioned(path)[1] == version
        except NotFoundError:
            return False

    def _may_link(self, source: Path, stream: BinaryIO) -> bool:
        # Only a scratch file that has no other name: nobody else can change its bytes, or mind that they turn read-only.
        return os.fstat(stream.fileno()).st_nlink == 1 and source.resolve().is_relative_to(self._tmp.resolve())

    def _faults(self, path: str) -> AbstractContextManager[None]:
        return os_faults(f"{self.uri}: {path}")


def _info(path: str, status: os.stat_result) -> ObjectInfo:
    return ObjectInfo(path, status.st_size, status.st_mtime)
