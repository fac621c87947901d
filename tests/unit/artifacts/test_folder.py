"""What only a folder store has: modes, links, and the file system's refusals."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from artifacts.errors import NotFoundError, StoreError, UnavailableError
from artifacts.folder import FolderStore
from artifacts.refs import BYTES, ArtifactRef, digest_bytes
from artifacts.scratch import sweep, system_scratch, temporary_folder
from artifacts.signing import check_signature

REPOSITORY = Path(__file__).resolve().parents[3]


def ref_of(data: bytes) -> ArtifactRef:
    return ArtifactRef(digest_bytes(data), len(data), BYTES)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture
def store(tmp_path: Path) -> FolderStore:
    return FolderStore(tmp_path / "store")


@pytest.fixture
def open_place() -> Iterator[Path]:
    """A folder that every user may enter (pytest's own are private)."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


def test_reading_creates_nothing(store: FolderStore, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        store.read("cache/actions/export/x.json")
    assert store.info("a") is None
    assert list(store.list("")) == list(store.list("engines/")) == []
    store.delete("a")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("umask", "document", "blob"), [(0o000, 0o644, 0o444), (0o022, 0o644, 0o444), (0o077, 0o600, 0o400)]
)
def test_modes(store: FolderStore, tmp_path: Path, umask: int, document: int, blob: int) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"x")
    source.chmod(0o666)
    before = os.umask(umask)
    try:
        store.write("document", b"x")
        store.write("new", b"x", if_absent=True)
        store.put_file("blob", source, ref_of(b"x"))
        with store.scratch() as folder:
            (folder / "out").write_bytes(b"x")
            store.put_file("linked", folder / "out", ref_of(b"x"))
    finally:
        os.umask(before)
    assert [mode(store.root / name) for name in ("document", "new", "blob", "linked")] == [
        document,
        document,
        blob,
        blob,
    ]
    assert mode(source) == 0o666


def test_links_share_bytes_only_where_nobody_else_can_change_them(store: FolderStore, tmp_path: Path) -> None:
    foreign = tmp_path / "weights"
    foreign.write_bytes(b"w")
    with store.scratch() as folder:
        (folder / "out").write_bytes(b"o")
        store.put_file("own", folder / "out", ref_of(b"o"))
        assert (folder / "out").samefile(store.root / "own")
        # The user's own file, linked or symlinked into the scratch folder, is neither shared nor made read-only.
        os.link(foreign, folder / "linked")
        (folder / "symlinked").symlink_to(foreign)
        store.put_file("linked", folder / "linked", ref_of(b"w"))
        store.put_file("symlinked", folder / "symlinked", ref_of(b"w"))
        store.get_file("own", ref_of(b"o"), folder / "in")
        assert (folder / "in").samefile(store.root / "own")
    store.put_file("foreign", foreign, ref_of(b"w"))
    for name in ("linked", "symlinked", "foreign"):
        assert not foreign.samefile(store.root / name)
    assert mode(foreign) & 0o200
    store.copy("own", "copied")
    assert (store.root / "copied").samefile(store.root / "own")


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="needs /dev/shm, a second file system")
def test_other_file_systems_get_copies(store: FolderStore, tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(b"x" * 3_000_000)
    ref = ref_of(b"x" * 3_000_000)
    store.put_file("blob", tmp_path / "source", ref)
    with tempfile.TemporaryDirectory(dir="/dev/shm") as other:
        if Path(other).stat().st_dev == store.root.stat().st_dev:
            pytest.skip("/dev/shm is the same file system as the temporary folder")
        target = Path(other, "target")
        store.get_file("blob", ref, target)
        assert not target.samefile(store.root / "blob")
        assert digest_bytes(target.read_bytes()) == ref.digest
        assert mode(target) == 0o444


def test_objects_that_can_be_linked_no_more_are_copied(store: FolderStore, tmp_path: Path) -> None:
    store.write("a", b"often used")
    try:
        for number in range(100_000):
            os.link(store.root / "a", tmp_path / str(number))
    except OSError:
        pass
    else:
        pytest.skip("this file system links one file more than 100,000 times")
    store.get_file("a", ref_of(b"often used"), tmp_path / "target")
    store.copy("a", "b")
    assert (tmp_path / "target").read_bytes() == store.read("b") == b"often used"
    assert not (store.root / "b").samefile(store.root / "a")


@pytest.mark.parametrize("link", ["cache", "cache/blob", "inside"])
def test_symbolic_links_are_not_followed(store: FolderStore, tmp_path: Path, link: str) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "blob").write_bytes(b"secret")
    store.write("real/blob", b"real")
    (store.root / link).parent.mkdir(exist_ok=True)
    goal = {"cache": outside, "cache/blob": outside / "blob", "inside": store.root / "real"}[link]
    (store.root / link).symlink_to(goal)
    path = link if link.endswith("blob") else f"{link}/blob"
    for call in (
        lambda: store.read(path),
        lambda: store.write(path, b"x"),
        lambda: store.write(path, b"x", if_absent=True),
        lambda: store.put_file(path, outside / "blob", ref_of(b"secret")),
        lambda: store.get_file(path, ref_of(b"secret"), tmp_path / "target"),
        lambda: store.copy(path, "b"),
        lambda: store.copy("real/blob", path),
        lambda: store.info(path),
        lambda: store.delete(path),
    ):
        with pytest.raises(StoreError, match="symbolic link"):
            call()
    assert (outside / "blob").read_bytes() == b"secret"
    assert [found.path for found in store.list("")] == ["real/blob"]
    assert not (tmp_path / "target").exists()


def test_the_root_itself_may_be_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    store = FolderStore(tmp_path / "link")
    store.write("a/b", b"1")
    assert (tmp_path / "real" / "a" / "b").read_bytes() == store.read("a/b") == b"1"


def test_the_root_does_not_move_with_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    store = FolderStore(Path("store"))
    store.write("a", b"1")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert store.read("a") == b"1"
    assert store.uri == f"file://{tmp_path}/store"


def test_a_root_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    store = FolderStore(tmp_path / "file")
    for call in (
        lambda: store.read("a"),
        lambda: store.write("a", b""),
        lambda: store.info("a"),
        lambda: store.list(""),
        lambda: store.list("a/"),
        lambda: store.lock("a").__enter__(),
        lambda: store.scratch().__enter__(),
    ):
        with pytest.raises(StoreError, match="is a file, not a folder; give another --store"):
            call()
    below = FolderStore(tmp_path / "file" / "store")
    with pytest.raises(NotFoundError):
        below.read("a")
    with pytest.raises(StoreError, match="a file lies where a folder is expected"):
        below.write("a", b"")


def test_objects_and_folders_in_each_others_way(store: FolderStore) -> None:
    store.write("a", b"1")
    store.write("b/c", b"1")
    with pytest.raises(NotFoundError):
        store.read("a/b")
    with pytest.raises(NotFoundError):
        store.read("b")
    assert store.info("a/b") is None
    assert store.info("b") is None
    assert list(store.list("a/")) == []
    store.delete("a/b")
    with pytest.raises(StoreError, match="a file lies where a folder is expected"):
        store.write("a/b", b"1")
    with pytest.raises(StoreError, match="a folder lies where a file is expected"):
        store.write("b", b"1")
    with pytest.raises(StoreError, match="a folder lies where a file is expected"):
        store.delete("b")
    assert [found.path for found in store.list("")] == ["a", "b/c"]


def test_names_that_are_no_paths_are_not_listed(store: FolderStore) -> None:
    store.write("a", b"1")
    (store.root / "new\nline").write_bytes(b"")
    Path(os.fsdecode(os.fsencode(store.root) + b"/\xff")).write_bytes(b"")
    os.mkfifo(store.root / "pipe")
    assert [found.path for found in store.list("")] == ["a"]
    assert store.info("pipe") is None


def test_a_listing_survives_what_vanishes(store: FolderStore) -> None:
    for path in ("a", "b", "c/d", "e"):
        store.write(path, b"")
    listing = store.list("")
    assert next(listing).path == "a"
    store.delete("b")
    shutil.rmtree(store.root / "c")
    assert [found.path for found in listing] == ["e"]


def test_a_disk_that_goes_away_under_a_lock_is_told_in_words(
    store: FolderStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock_file = fcntl.flock

    def shut_out(descriptor: int, operation: int) -> None:
        if operation & fcntl.LOCK_UN:
            raise OSError(errno.ESHUTDOWN, os.strerror(errno.ESHUTDOWN))
        lock_file(descriptor, operation)

    def fail(path: Path, *, missing_ok: bool = False) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO), path)

    with monkeypatch.context() as away:
        away.setattr("fcntl.flock", shut_out)
        with pytest.raises(UnavailableError, match=r"locks/a: .*shut this host out.*mount it anew"), store.lock("a"):
            pass
        with pytest.raises(ZeroDivisionError), store.lock("b"):
            raise ZeroDivisionError
    with monkeypatch.context() as away, store.scratch() as folder:
        away.setattr(Path, "unlink", fail)
    assert not folder.exists()
    with store.scratch() as mine:
        assert {path.name for path in mine.parent.iterdir()} == {mine.name, f"{mine.name}.lock"}


def in_child(code: str, *arguments: str, prefix: tuple[str, ...] = ()) -> str:
    """Run code that ends in a StoreError in a process of its own, and return the error's text."""
    script = f"""
import sys, os
sys.path.insert(0, {str(REPOSITORY)!r})
from pathlib import Path
from artifacts.errors import StoreError
from artifacts.folder import FolderStore
from artifacts.refs import ArtifactRef, BYTES, digest_bytes
import filelock
try:
{code}
except StoreError as err:
    print(err)
"""
    command = [*prefix, sys.executable, "-c", script, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


LARGE = """
    store = FolderStore(Path(sys.argv[1]))
    store.write("small", b"x")
    data = os.urandom(3 << 20)
    Path(sys.argv[2]).write_bytes(data)
    {limit}
    for call in (
        lambda: store.write("large", data),
        lambda: store.write("large", data, if_absent=True),
        lambda: store.put_file("large", Path(sys.argv[2]), ArtifactRef(digest_bytes(data), len(data), BYTES)),
    ):
        try:
            call()
        except StoreError as err:
            print(err)
    assert [found.path for found in store.list("")] == ["small"], list(store.list(""))
    left = os.listdir(store.root / "tmp")
    assert not left, left
"""


def test_a_full_disk(open_place: Path) -> None:
    disk = open_place / "disk"
    disk.mkdir()
    mount = f"mount -t tmpfs -o size=1m tmpfs {disk}"
    prefix = ("unshare", "--user", "--map-root-user", "--mount", "sh", "-c", f'{mount} && exec "$@"', "sh")
    if (
        shutil.which("unshare") is None
        or subprocess.run([*prefix, "true"], capture_output=True, check=False).returncode
    ):
        pytest.skip("needs unshare and the right to mount a small tmpfs")
    said = in_child(LARGE.format(limit=""), f"{disk}/store", str(open_place / "source"), prefix=prefix).splitlines()
    assert len(said) == 3
    for line in said:
        assert f"file://{disk}/store: large: No space left on device: the disk is full; free some space" in line


def test_a_file_size_limit(tmp_path: Path) -> None:
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))"
    said = in_child(LARGE.format(limit=limit), str(tmp_path / "store"), str(tmp_path / "source")).splitlines()
    assert len(said) == 3
    for line in said:
        assert "large: File too large" in line
        assert "ulimit -f" in line


def test_no_permission(open_place: Path) -> None:
    store = FolderStore(open_place / "store")
    store.write("a/b", b"1")
    store.write("private/b", b"1")
    (store.root / "private").chmod(0o700)
    (store.root / "private" / "b").chmod(0o600)
    code = """
    if os.getuid() == 0:
        os.setgid(65534)
        os.setuid(65534)  # nobody; root may do anything
    else:
        for folder in ("", "a", "tmp"):
            os.chmod(os.path.join(sys.argv[1], folder), 0o555)
        os.chmod(os.path.join(sys.argv[1], "private"), 0)
    store = FolderStore(Path(sys.argv[1]))
    assert store.read("a/b") == b"1"
    for call in (
        lambda: store.write("a/b", b"2"),
        lambda: store.write("a/c", b"2", if_absent=True),
        lambda: store.delete("a/b"),
        lambda: store.copy("a/b", "a/c"),
        lambda: store.read("private/b"),
        lambda: list(store.list("private/")),
        lambda: store.lock("x").__enter__(),
        lambda: store.scratch().__enter__(),
    ):
        try:
            call()
        except StoreError as err:
            print(err)
"""
    said = in_child(code, str(store.root)).splitlines()
    for folder in ("", "a", "tmp", "private"):
        (store.root / folder).chmod(0o755)
    assert len(said) == 8
    for line in said:
        assert "Permission denied: no permission; check who owns the folder" in line
    assert store.read("a/b") == b"1"
    assert [found.path for found in store.list("a/")] == ["a/b"]


def test_sweep_keeps_what_it_cannot_judge(tmp_path: Path) -> None:
    old, new, other = tmp_path / "1.fresh", tmp_path / "2.fresh", tmp_path / "notes.txt"
    for path in (old, new, other):
        path.write_bytes(b"")
    an_hour_ago = time.time() - 3700
    os.utime(old, (an_hour_ago, an_hour_ago))
    os.utime(other, (an_hour_ago, an_hour_ago))
    (tmp_path / "dead.lock").write_bytes(b"")
    (tmp_path / "dead").mkdir()
    (tmp_path / "dead" / "file").write_bytes(b"")
    (tmp_path / "trap.lock").symlink_to(other)
    sweep(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"2.fresh", "notes.txt", "trap.lock"}
    sweep(tmp_path / "absent")


def test_a_scratch_folder_that_became_a_link_is_not_followed(store: FolderStore, tmp_path: Path) -> None:
    with store.scratch() as folder:
        folder.rename(tmp_path / "moved")
        folder.symlink_to(tmp_path / "moved")
        (tmp_path / "moved" / "file").write_bytes(b"x")
    assert (tmp_path / "moved" / "file").exists()
    assert list(folder.parent.iterdir()) == []


def test_no_folder_for_temporary_files_is_told_with_the_reason_and_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Root may write everywhere: what is a file is no folder to anybody.
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("TMPDIR", str(tmp_path / "file"))
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: [str(tmp_path / "file")])
    with (
        pytest.raises(StoreError, match=r"file, for temporary files: Not a directory: .*set TMPDIR to a folder"),
        temporary_folder(),
    ):
        pass
    with pytest.raises(StoreError, match="set TMPDIR to a folder"):
        check_signature(b"{}", {}, b"")


def test_system_scratch_refuses_a_place_that_others_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folder = system_scratch()
    assert folder == system_scratch()
    assert mode(folder) == 0o700
    folder.chmod(0o777)
    with pytest.raises(StoreError, match="not a private folder of this user"):
        system_scratch()
    folder.rmdir()
    (tmp_path / "target").mkdir(mode=0o700)
    folder.symlink_to(tmp_path / "target")
    with pytest.raises(StoreError, match="not a private folder of this user"):
        system_scratch()


def test_where_there_are_no_hard_links_one_writer_still_gets_a_new_name(tmp_path, monkeypatch):
    def refuse(*_names):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    store, together = FolderStore(tmp_path / "store"), threading.Barrier(8)

    def write(number):
        together.wait()
        return FolderStore(store.root).write("a/b", b"%d" % number, if_absent=True)

    with ThreadPoolExecutor(8) as pool:
        written = list(pool.map(write, range(8)))
    assert written.count(True) == 1
    data, version = store.read_versioned("a/b")
    assert data == b"%d" % written.index(True)
    assert store.write("a/b", b"next", if_version=version)
    assert not store.write("a/b", b"again", if_absent=True)
    assert (store.root / "store.json").exists()
    store.copy("a/b", "a/c")
    assert store.read("a/c") == b"next"
