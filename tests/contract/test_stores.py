"""One contract for every store: what is above the Protocol must not see which one it has."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import random
import stat
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from artifacts.cache import blob_path
from artifacts.channels import read_channel
from artifacts.errors import IntegrityError, NotFoundError, StoreError
from artifacts.refs import BYTES, ArtifactRef, digest_bytes
from artifacts.store import ObjectInfo, Store, open_store
from tests.contract import children
from tests.contract.children import ref_of

SPAWN = multiprocessing.get_context("spawn")
BAD_PATHS = [
    "",
    "/",
    "/a",
    "a/",
    "a//b",
    ".",
    "..",
    "../a",
    "a/../b",
    "a/./b",
    "a\\b",
    "a\0b",
    "a\nb",
    "\ud800",
    "x" * 901,
]
BAD_PATHS += ["a/" + "x" * 256, "tmp/a", "locks/a", "tmp", "store.json", "é" * 128]
GOOD_PATHS = ["a", "b/c/d", "with space/é 中.txt", "percent%20+plus", "x" * 255, ".hidden/..b", "a.b"]
# Empty, one byte, under, at and over one part of a multipart upload.
SIZES = [0, 1, (16 << 20) - 1, 16 << 20, (33 << 20) + 5]


@contextmanager
def started(*processes: BaseProcess) -> Iterator[None]:
    for process in processes:
        process.start()
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.join()
            process.close()


def finish(*processes: BaseProcess) -> None:
    for process in processes:
        process.join()
        assert process.exitcode == 0


class StoreContract:
    """Subclasses give `uri`, of an empty store, and `damage`, which changes an object behind the store's back."""

    kills = 6

    def seen_by(self, number: int, uri: str) -> str:
        """Return by which address a test's further process of this number, from 0, opens the store."""
        del number
        return uri

    @pytest.fixture
    def store(self, uri: str) -> Store:
        return open_store(uri)

    @pytest.fixture
    def make(self, tmp_path: Path) -> Callable[[bytes], Path]:
        def make_file(data: bytes) -> Path:
            path = tmp_path / f"source-{digest_bytes(data)[:8]}"
            path.write_bytes(data)
            return path

        return make_file

    # Small objects

    def test_what_is_written_is_read(self, store: Store) -> None:
        for path in GOOD_PATHS:
            assert store.write(path, b"\x00first") is True
            assert store.read(path) == b"\x00first"
            assert store.write(path, b"") is True
            assert store.read(path) == b""
        assert [found.path for found in store.list("")] == sorted(GOOD_PATHS)

    def test_missing_objects(self, store: Store, tmp_path: Path) -> None:
        for call in (
            lambda: store.read("a/b"),
            lambda: store.get_file("a/b", ref_of(b""), tmp_path / "target"),
            lambda: store.copy("a/b", "c"),
        ):
            with pytest.raises(NotFoundError, match="nothing at a/b") as caught:
                call()
            assert (caught.value.store, caught.value.path) == (store.uri, "a/b")
        assert store.info("a/b") is None
        assert list(store.list("")) == []
        store.delete("a/b")
        assert list(tmp_path.glob("*target*")) == []

    @pytest.mark.parametrize("path", BAD_PATHS)
    def test_paths_that_lead_elsewhere_are_refused(
        self, store: Store, make: Callable[[bytes], Path], path: str
    ) -> None:
        source = make(b"x")
        for call in (
            lambda: store.read(path),
            lambda: store.read_versioned(path),
            lambda: store.write(path, b"x"),
            lambda: store.write(path, b"x", if_version="1"),
            lambda: store.write(path, b"x", if_absent=True),
            lambda: store.put_file(path, source, ref_of(b"x")),
            lambda: store.get_file(path, ref_of(b"x"), source.with_name("target")),
            lambda: store.copy(path, "a"),
            lambda: store.copy("there", path),
            lambda: store.info(path),
            lambda: store.delete(path),
        ):
            with pytest.raises(StoreError, match="not an object path"):
                call()

    def test_write_if_absent(self, store: Store) -> None:
        assert store.write("a", b"first", if_absent=True) is True
        assert store.write("a", b"second", if_absent=True) is False
        assert store.read("a") == b"first"
        assert store.write("b", b"third", if_absent=True) is True
        store.delete("a")
        assert store.write("a", b"fourth", if_absent=True) is True
        assert store.read("a") == b"fourth"

    def test_an_object_that_was_there_before_stays(self, uri: str) -> None:
        open_store(uri).write("a", b"first")
        fresh = open_store(uri)
        assert fresh.write("a", b"second", if_absent=True) is False
        assert fresh.read("a") == b"first"

    def test_a_version_is_written_over_once(self, store: Store) -> None:
        store.write("a", b"first", if_absent=True)
        data, version = store.read_versioned("a")
        assert data == b"first"
        assert store.write("a", b"second", if_version=version) is True
        assert store.write("a", b"third", if_version=version) is False
        assert store.read("a") == b"second"
        newer = store.read_versioned("a")[1]
        assert newer != version
        assert open_store(store.uri).write("a", b"fourth", if_version=newer) is True
        assert store.read("a") == b"fourth"

    def test_what_is_gone_has_no_version(self, store: Store) -> None:
        store.write("a", b"first", if_absent=True)
        version = store.read_versioned("a")[1]
        store.delete("a")
        assert store.write("a", b"second", if_version=version) is False
        assert store.info("a") is None
        with pytest.raises(NotFoundError, match="nothing at a"):
            store.read_versioned("a")
        with pytest.raises(ValueError, match="not on both"):
            store.write("a", b"second", if_absent=True, if_version=version)

    def test_a_large_object_has_one_version(self, store: Store) -> None:
        data = random.Random(3).randbytes(5 << 20)
        store.write("a", data)
        found, version = store.read_versioned("a")
        assert found == data
        assert store.read_versioned("a")[1] == version

    def test_info(self, store: Store) -> None:
        store.write("a/b", b"12345")
        info = store.info("a/b")
        assert info == ObjectInfo("a/b", 5, info.modified)
        assert 1.7e9 < info.modified < 1e11
        assert store.info("a") is None

    @pytest.mark.parametrize("more", [0, 1100])  # asked for one by one, and listed
    def test_many_infos_at_once(self, store: Store, more: int) -> None:
        paths = ["cache/blobs/a/b", "cache/actions/x/y", "engines/a/b/c", "top"]
        for path in paths:
            store.write(path, path.encode())
        absent = [
            "cache/blobs/a",
            "cache/blobs/a/c",
            "nothing/here",
            "top/below",
            *(f"{'cdez'[i % 4]}/{i}" for i in range(more)),
        ]
        found = store.infos([*paths, *absent])
        assert found == {path: store.info(path) for path in paths}
        assert store.infos([]) == {}
        for bad in ("../up", "a/../b", "a//b", "tmp/x", "..", "a/.."):
            with pytest.raises(StoreError, match="not an object path"):
                store.infos(["top", bad])

    def test_list_is_sorted_by_whole_path_and_keeps_to_the_prefix(self, store: Store) -> None:
        paths = ["a-b", "a.b/c", "a/b/c", "a/b", "ab", "b/a", "é/x", "a/z"]
        paths = [*(path for path in paths if path != "a/b"), *(f"many/{number:02}" for number in range(17))]
        for path in paths:
            store.write(path, path.encode())
        listed = list(store.list(""))
        assert [found.path for found in listed] == sorted(paths)
        assert [found.size for found in listed] == [len(path.encode()) for path in sorted(paths)]
        info = store.info(listed[0].path)
        assert (info.path, info.size) == (listed[0].path, listed[0].size)
        assert info.modified == pytest.approx(listed[0].modified, abs=1.0)  # a HEAD's time is in whole seconds
        for prefix in ("a", "a/", "a/b/", "a/b/c", "many/", "many/1", "zz/", "é/", "a-b/"):
            expected = sorted(path for path in paths if path.startswith(prefix))
            assert [found.path for found in store.list(prefix)] == expected

    def test_bad_prefix(self, store: Store) -> None:
        for prefix in ("/", "../", "a//", "tmp/", "a/../"):
            with pytest.raises(StoreError, match="not an object path"):
                store.list(prefix)

    def test_delete(self, store: Store) -> None:
        store.write("a", b"1")
        store.write("b", b"2")
        store.delete("a")
        store.delete("a")
        assert [found.path for found in store.list("")] == ["b"]

    def test_copy(self, store: Store) -> None:
        store.write("a", b"1")
        store.copy("a", "b/c")
        store.copy("a", "b/c")
        assert store.read("b/c") == b"1"
        store.write("a", b"22")
        assert store.read("b/c") == b"1"
        store.copy("a", "b/c")
        assert store.read("b/c") == b"22"
        store.delete("a")
        assert store.read("b/c") == b"22"

    def test_uri_opens_the_same_store(self, store: Store) -> None:
        store.write("a", b"1")
        again = open_store(store.uri)
        assert again.uri == store.uri
        assert again.read("a") == b"1"
        assert store.uri in repr(store) or store.uri.removeprefix("file://") in repr(store)

    def test_a_store_says_its_layout(self, store: Store, put_layout: Callable[[bytes | None], bytes | None]) -> None:
        list(store.list(""))
        assert put_layout(None) is None  # reading creates nothing
        store.write("a", b"1")
        assert json.loads(put_layout(None)) == {"enginery": "store", "layout": 1}
        assert [found.path for found in store.list("")] == ["a"]

    @pytest.mark.parametrize(
        ("document", "said"),
        [
            (b'{"layout": 2}', "has layout 2, and this release knows layouts up to 1; .*upgrade this one"),
            (b'{"layout": "1"}', "does not say which layout"),
            (b"[" * 10**5, "does not say which layout"),
            (b"", "does not say which layout"),
        ],
    )
    def test_a_newer_or_strange_layout_is_refused_by_everything(
        self,
        uri: str,
        make: Callable[[bytes], Path],
        put_layout: Callable[[bytes | None], bytes | None],
        document: bytes,
        said: str,
    ) -> None:
        open_store(uri).write("a", b"1")
        put_layout(document)
        source = make(b"x")
        for call in (
            lambda store: store.read("a"),
            lambda store: store.read_versioned("a"),
            lambda store: store.write("a", b"x"),
            lambda store: store.write("b", b"x", if_absent=True),
            lambda store: store.put_file("b", source, ref_of(b"x")),
            lambda store: store.get_file("a", ref_of(b"1"), source.with_name("target")),
            lambda store: store.copy("a", "b"),
            lambda store: store.info("a"),
            lambda store: store.infos(["a"]),
            lambda store: list(store.list("")),
            lambda store: store.touch("a"),
            lambda store: store.delete("a"),
        ):
            with pytest.raises(StoreError, match=said):
                call(open_store(uri))
        put_layout(b'{"layout": 1, "more": "is ignored"}')
        assert [found.path for found in open_store(uri).list("")] == ["a"]

    # Files

    @pytest.mark.parametrize("size", SIZES)
    def test_files_arrive_as_they_left(self, store: Store, make: Callable[[bytes], Path], size: int) -> None:
        data = random.Random(size).randbytes(size)
        source, ref = make(data), ref_of(data)
        store.put_file("blob", source, ref)
        target = source.with_name("target")
        store.get_file("blob", ref, target)
        assert digest_bytes(target.read_bytes()) == ref.digest
        assert not target.stat().st_mode & 0o222
        assert source.read_bytes() == data
        assert store.info("blob").size == size
        assert sorted(path.name for path in source.parent.iterdir()) == sorted([source.name, "target", *self.beside()])

    def beside(self) -> list[str]:
        return []

    def test_put_file_refuses_other_bytes(self, store: Store, make: Callable[[bytes], Path]) -> None:
        for sent in (b"other", b"longer than said", b""):
            with pytest.raises(IntegrityError, match="expected"):
                store.put_file("blob", make(sent), ref_of(b"wants"))
        assert list(store.list("")) == []

    def test_put_file_needs_a_regular_file(self, store: Store, tmp_path: Path) -> None:
        with pytest.raises(StoreError, match="absent: No such file"):
            store.put_file("blob", tmp_path / "absent", ref_of(b""))
        with pytest.raises(StoreError, match="folder"):
            store.put_file("blob", tmp_path, ref_of(b""))
        with pytest.raises(StoreError, match="not a regular file"):
            store.put_file("blob", Path(os.devnull), ref_of(b""))
        assert list(store.list("")) == []

    def test_a_blob_that_is_there_is_not_sent_again(
        self, store: Store, make: Callable[[bytes], Path], damage: Callable[[str, bytes], None]
    ) -> None:
        store.put_file("blob", make(b"right"), ref_of(b"right"))
        damage("blob", b"wrong")
        store.put_file("blob", make(b"right"), ref_of(b"right"))
        assert store.read("blob") == b"wrong"
        damage("blob", b"cut")
        store.put_file("blob", make(b"right"), ref_of(b"right"))
        assert store.read("blob") == b"right"

    @pytest.mark.parametrize("found", [b"12345678X0", b"12345", b"", b"1234567890more"])
    def test_get_file_detects_damage(
        self,
        store: Store,
        make: Callable[[bytes], Path],
        damage: Callable[[str, bytes], None],
        tmp_path: Path,
        found: bytes,
    ) -> None:
        source = make(b"1234567890")
        store.put_file("blob", source, ref_of(b"1234567890"))
        damage("blob", found)
        arrivals = tmp_path / "arrivals"
        arrivals.mkdir()
        with pytest.raises(IntegrityError, match="blob"):
            store.get_file("blob", ref_of(b"1234567890"), arrivals / "target")
        assert list(arrivals.iterdir()) == []

    def test_get_file_does_not_write_over(self, store: Store, make: Callable[[bytes], Path]) -> None:
        source = make(b"new")
        store.put_file("blob", source, ref_of(b"new"))
        (source.parent / "target").write_bytes(b"old")
        with pytest.raises(StoreError, match="exists already"):
            store.get_file("blob", ref_of(b"new"), source.parent / "target")
        assert (source.parent / "target").read_bytes() == b"old"
        for folder in ("absent", source.name):
            with pytest.raises(StoreError, match=folder):
                store.get_file("blob", ref_of(b"new"), source.parent / folder / "target")

    # Scratch folders

    def test_scratch(self, store: Store) -> None:
        with store.scratch() as one, store.scratch() as two:
            assert one != two
            assert list(one.iterdir()) == []
            (one / "sub").mkdir()
            (one / "sub" / "file").write_bytes(b"x")
            assert list(store.list("")) == []
            assert stat.S_IMODE(one.stat().st_mode) == 0o700
        assert not one.exists()
        assert not two.exists()
        with pytest.raises(ZeroDivisionError), store.scratch() as three:
            raise ZeroDivisionError
        assert not three.exists()

    def test_files_of_a_scratch_folder_stay_when_it_goes(self, store: Store) -> None:
        with store.scratch() as folder:
            (folder / "out").write_bytes(b"made")
            store.put_file("blob", folder / "out", ref_of(b"made"))
            (folder / "wrong").write_bytes(b"evil")
            with pytest.raises(IntegrityError):
                store.put_file("other", folder / "wrong", ref_of(b"good"))
            store.get_file("blob", ref_of(b"made"), folder / "in")
            assert (folder / "in").read_bytes() == b"made"
            # A linked input, passed through as an output, is like any other file.
            store.put_file("again", folder / "in", ref_of(b"made"))
        assert store.read("blob") == store.read("again") == b"made"
        assert store.info("other") is None

    def test_what_a_killed_process_leaves_is_removed(self, store: Store) -> None:
        here, there = SPAWN.Pipe()
        child = SPAWN.Process(target=children.hold_lock, args=(self.seen_by(0, store.uri), there))
        with started(child):
            folder = Path(here.recv())
            with store.scratch():
                assert (folder / "sub" / "left").exists()
            child.kill()
            child.join()
            assert folder.exists()
            with store.scratch() as mine:
                assert not folder.exists()
                assert [path.name.split(".")[0] for path in mine.parent.iterdir()].count(folder.name) == 0

    def test_touching_makes_an_object_new_and_leaves_its_bytes(
        self, store: Store, make: Callable[[bytes], Path]
    ) -> None:
        ref = ArtifactRef(digest_bytes(b"blob"), 4, "application/onnx")
        store.put_file("a/blob", make(b"blob"), ref)
        store.write("a/small", b"small")
        before = store.infos(["a/blob", "a/small"])
        time.sleep(1.1)  # S3 tells seconds
        assert store.touch("a/blob") is True
        assert store.touch("a/small") is True
        after = store.infos(["a/blob", "a/small"])
        assert all(after[path].modified > before[path].modified for path in before)
        assert (store.read("a/blob"), store.read("a/small")) == (b"blob", b"small")
        assert store.touch("a/none") is False
        assert store.touch("a/small/none") is False
        assert store.info("a/none") is None

    # Many processes

    def test_of_many_writers_one_gets_the_name(self, store: Store) -> None:
        writers, races = 5, 6
        start, pipes = SPAWN.Barrier(writers), [SPAWN.Pipe() for _ in range(writers)]
        processes = [
            SPAWN.Process(target=children.write_if_absent, args=(uri, races, mark, start, pipes[mark][1]))
            for mark, uri in enumerate(self.seen_by(mark, store.uri) for mark in range(writers))
        ]
        with started(*processes):
            won = [here.recv() for here, _there in pipes]
            finish(*processes)
        for race in range(races):
            winners = [mark for mark in range(writers) if won[mark][race]]
            assert len(winners) == 1
            assert store.read(f"race/{race}") == bytes(winners) * (1 << 20)

    def test_of_many_writers_none_loses_an_update(self, store: Store) -> None:
        writers, updates = 3, 8
        store.write("log", b"", if_absent=True)
        start = SPAWN.Barrier(writers)
        processes = [
            SPAWN.Process(
                target=children.append_by_version, args=(self.seen_by(mark, store.uri), f"{mark}", updates, start)
            )
            for mark in range(writers)
        ]
        with started(*processes):
            finish(*processes)
        lines = store.read("log").decode().split()
        assert sorted(lines) == sorted(f"{mark}-{update}" for mark in range(writers) for update in range(updates))
        for mark in range(writers):
            mine = [line for line in lines if line.startswith(f"{mark}-")]
            assert mine == [f"{mark}-{update}" for update in range(updates)]

    def test_of_many_who_move_a_channel_each_gets_into_its_history(self, store: Store) -> None:
        movers, moves = 3, 4
        start = SPAWN.Barrier(movers)
        processes = [
            SPAWN.Process(
                target=children.move_channel_often, args=(self.seen_by(mark, store.uri), f"p{mark}", moves, start)
            )
            for mark in range(movers)
        ]
        with started(*processes):
            finish(*processes)
        history = [signed.move for signed in read_channel(store, "digits", "t", "production").moves]
        builds = [move.build for move in history]
        assert sorted(builds) == sorted(f"p{mark}-{number}" for mark in range(movers) for number in range(moves))
        # What each saw is what was there: no decision was taken on a state that another had changed.
        assert [move.reason for move in history] == [f"over {build}" for build in ["nothing", *builds[:-1]]]

    def test_readers_see_whole_versions(self, store: Store) -> None:
        versions = [bytes([mark]) * 300_000 for mark in range(4)]
        store.write("a", versions[0])
        writing = open_store(self.seen_by(0, store.uri))
        done, torn, reads = threading.Event(), [], 0

        def write() -> None:
            try:
                for number in range(60):
                    writing.write("a", versions[number % 4])
            finally:
                done.set()

        writer = threading.Thread(target=write)
        writer.start()
        while not done.is_set() or not reads:
            data = store.read("a")
            reads += 1
            if data not in versions:
                torn.append(len(data))
        writer.join()
        assert torn == []

    def test_killed_writers_leave_nothing_half_written(self, store: Store) -> None:
        choose = random.Random(7)
        for seed in range(self.kills):
            here, there = SPAWN.Pipe()
            child = SPAWN.Process(target=children.store_until_killed, args=(self.seen_by(0, store.uri), seed, there))
            with started(child):
                assert here.recv() == 1
                done = here.poll(choose.uniform(0, 0.15)) and here.recv()
                child.kill()
                child.join()
            assert store.info(f"records/{seed}-0.json") is not None
            assert not done or done >= 2
        listed = list(store.list(""))
        assert len(listed) > self.kills
        for found in listed:
            data = store.read(found.path)
            assert len(data) == found.size
            if found.path.endswith(".json"):
                ref = ArtifactRef.from_json(json.loads(data)["blob"])
                assert store.info(blob_path(ref.digest)).size == ref.size
            else:
                assert digest_bytes(data) == found.path.rsplit("/", 1)[1]
        with store.scratch() as folder:
            mine = {folder.name, f"{folder.name}.lock"}
            assert self.leftovers(folder) <= mine

    def leftovers(self, folder: Path) -> set[str]:
        return {path.name for path in folder.parent.iterdir() if path.suffix != ".fresh"}

    @pytest.mark.slow
    def test_memory_stays_flat(self, store: Store, tmp_path: Path) -> None:
        size, chunk = 200 << 20, random.Random(1).randbytes(1 << 20)
        digest = hashlib.sha256()
        with (tmp_path / "large").open("wb") as stream:
            for _ in range(200):
                stream.write(chunk)
                digest.update(chunk)
        source = (tmp_path / "large").rename(tmp_path / digest.hexdigest())
        here, there = SPAWN.Pipe()
        arguments = (store.uri, source, tmp_path / "back", size, there)
        child = SPAWN.Process(target=children.peak_growth, args=arguments)
        with started(child):
            growth = here.recv()
            finish(child)
        assert (tmp_path / "back").stat().st_size == size
        assert growth < 96 << 20  # some parts in flight, and never the 200 MiB

    def test_lock_excludes(self, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("ENGINERY_CLAIM_SECONDS", "30")
        store.write("counter", b"0")
        start = SPAWN.Barrier(3)
        processes = [
            SPAWN.Process(target=children.add_under_lock, args=(self.seen_by(number, store.uri), self.locks, start))
            for number in range(3)
        ]
        with started(*processes):
            finish(*processes)
        assert store.read("counter") == str(3 * self.locks).encode()

    def test_lock_dies_with_its_holder(self, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("ENGINERY_CLAIM_SECONDS", "2")  # of a store whose locks are claims
        here, there = SPAWN.Pipe()
        child = SPAWN.Process(target=children.hold_lock, args=(self.seen_by(0, store.uri), there))
        with started(child):
            here.recv()
            held = threading.Event()

            def take() -> None:
                with store.lock("held"):
                    held.set()

            waiting = threading.Thread(target=take)
            waiting.start()
            assert not held.wait(3)  # nobody else can have it while its holder lives
            child.kill()
            waiting.join()
            assert held.is_set()
        with store.lock("held"), store.lock("another/" + "x" * 300):
            pass


class TestFolderStore(StoreContract):
    kills = 12
    locks = 40

    @pytest.fixture
    def uri(self, tmp_path: Path) -> str:
        return f"file://{tmp_path}/store"

    def beside(self) -> list[str]:
        return ["store"]

    @pytest.fixture
    def damage(self, tmp_path: Path) -> Callable[[str, bytes], None]:
        def change(path: str, data: bytes) -> None:
            file = tmp_path / "store" / path
            file.chmod(0o600)
            file.write_bytes(data)

        return change

    @pytest.fixture
    def put_layout(self, tmp_path: Path) -> Callable[[bytes | None], bytes | None]:
        """Return what replaces the document of the layout, or (None) tells what it is."""
        path = tmp_path / "store" / "store.json"

        def put(data: bytes | None) -> bytes | None:
            if data is not None:
                path.write_bytes(data)
            return path.read_bytes() if path.exists() else None

        return put


class TestS3Store(StoreContract):
    kills = 3
    locks = 4

    @pytest.fixture
    def uri(self, s3_store_uri: str, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> str:
        # The scratch folders of this test alone, so that what it leaves there can be seen.
        monkeypatch.setenv("TMPDIR", str(tmp_path_factory.mktemp("system")))
        monkeypatch.setattr("tempfile.tempdir", None)
        return s3_store_uri

    @pytest.fixture
    def damage(self, uri: str) -> Iterator[Callable[[str, bytes], None]]:
        import boto3

        client = boto3.session.Session().client("s3")
        bucket, _slash, prefix = uri.removeprefix("s3://").partition("/")

        def change(path: str, data: bytes) -> None:
            client.put_object(Bucket=bucket, Key=f"{prefix}/{path}", Body=data)

        yield change
        client.close()

    @pytest.fixture
    def put_layout(self, uri: str) -> Iterator[Callable[[bytes | None], bytes | None]]:
        import boto3

        client = boto3.session.Session().client("s3")
        bucket, _slash, prefix = uri.removeprefix("s3://").partition("/")
        place = {"Bucket": bucket, "Key": f"{prefix}/store.json"}

        def put(data: bytes | None) -> bytes | None:
            if data is not None:
                client.put_object(Body=data, **place)
            try:
                return client.get_object(**place)["Body"].read()
            except client.exceptions.NoSuchKey:
                return None

        yield put
        client.close()

    def test_a_bucket_without_prefix(self, uri: str, s3_environ: str) -> None:
        import boto3

        client = boto3.session.Session().client("s3")
        client.create_bucket(Bucket="whole-bucket")
        client.put_object(Bucket="whole-bucket", Key="console-folder/", Body=b"")
        client.put_object(Bucket="whole-bucket", Key="tmp/strange", Body=b"")
        client.close()
        store = open_store("s3://whole-bucket/")
        store.write("a/b", b"1", if_absent=True)
        assert store.uri == "s3://whole-bucket"
        assert [found.path for found in store.list("")] == ["a/b"]
        assert store.read("a/b") == b"1"

    def test_the_digest_goes_along(self, store: Store, make: Callable[[bytes], Path], uri: str) -> None:
        import boto3

        ref = ArtifactRef(digest_bytes(b"data"), 4, "application/onnx")
        store.put_file("blob", make(b"data"), ref)
        client = boto3.session.Session().client("s3")
        bucket, _slash, prefix = uri.removeprefix("s3://").partition("/")
        head = client.head_object(Bucket=bucket, Key=f"{prefix}/blob")
        client.close()
        assert {name.lower(): value for name, value in head["Metadata"].items()} == {"sha256": ref.digest}
        assert head["ContentType"] == "application/onnx"
        assert ref.media_type != BYTES


class TestS3StoreThatIgnoresConditions(TestS3Store):
    """rclone's server, whose writers agree by locks in a folder that they share."""

    # What no server has a part in.
    test_paths_that_lead_elsewhere_are_refused = None
    test_put_file_needs_a_regular_file = None
    test_get_file_does_not_write_over = None
    test_scratch = None
    test_files_of_a_scratch_folder_stay_when_it_goes = None
    test_what_a_killed_process_leaves_is_removed = None
    test_memory_stays_flat = None
    test_a_newer_or_strange_layout_is_refused_by_everything = None

    @pytest.fixture
    def uri(
        self, careless_s3_store_uri: str, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
    ) -> str:
        monkeypatch.setenv("TMPDIR", str(tmp_path_factory.mktemp("system")))
        monkeypatch.setattr("tempfile.tempdir", None)
        monkeypatch.setenv("ENGINERY_S3_LOCKS", str(tmp_path_factory.mktemp("locks") / "new"))
        return careless_s3_store_uri
