"""The contract of stores on CephFS, a network disk, mounted twice: the test on one mount, its processes on both. Long: a cluster."""

from __future__ import annotations

import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from artifacts.store import open_store
from tests.ceph import CEPHFS_PROGRAMS, cephfs_mounts, missing_programs
from tests.contract import children, test_stores
from tests.contract.test_stores import SPAWN, started

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def clients() -> Iterator[dict[Path, subprocess.Popen[bytes]]]:
    """Where the one file system is mounted by three clients, as by three hosts; the last is for what ends it."""
    missing = missing_programs(CEPHFS_PROGRAMS)
    if missing:
        pytest.skip(
            f"{', '.join(missing)} not installed (Debian: ceph-mon, ceph-osd, ceph-common, ceph-mds, ceph-fuse)"
        )
    if not Path("/dev/fuse").exists():
        pytest.skip("no /dev/fuse here")
    folder = Path(tempfile.mkdtemp(prefix="ceph-"))  # pytest's own are too long for paths of sockets
    try:
        with cephfs_mounts(folder, 3) as found:
            yield found
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def mounts(clients: dict[Path, subprocess.Popen[bytes]]) -> list[Path]:
    return list(clients)


@pytest.fixture
def tmp_path(mounts: list[Path]) -> Path:
    """A new folder on the first mount."""
    return Path(tempfile.mkdtemp(dir=mounts[0]))


class TestTwoMounts(test_stores.TestFolderStore):
    """Each write is three or four to the disk of the cluster: fewer of them than on a local disk."""

    kills = 6
    locks = 10

    @pytest.fixture(autouse=True)
    def _mounts(self, mounts: list[Path]) -> None:
        self.mounts = mounts

    def seen_by(self, number: int, uri: str) -> str:
        first, second = (f"file://{mount}/" for mount in self.mounts[:2])
        assert uri.startswith(first)
        return uri if number % 2 else uri.replace(first, second, 1)

    def test_the_mounts_are_two_and_show_one_store(self, uri: str) -> None:
        one, two = open_store(uri), open_store(self.seen_by(0, uri))
        assert one.uri != two.uri
        assert len({Path(store.uri.removeprefix("file://")).parent.stat().st_dev for store in (one, two)}) == 2
        for number in range(2):  # what the other host has just changed is slow to see: seconds each
            one.write(f"a/{number}", b"first", if_absent=True)
            assert two.write(f"a/{number}", b"second", if_absent=True) is False
            data, version = two.read_versioned(f"a/{number}")
            assert data == b"first"
            assert one.write(f"a/{number}", b"third") is True
            assert two.write(f"a/{number}", b"fourth", if_version=version) is False
            assert two.read(f"a/{number}") == b"third"
            one.delete(f"a/{number}")
            assert two.info(f"a/{number}") is None


def test_a_host_that_hangs_loses_its_locks_and_writes_nothing_afterwards(
    clients: dict[Path, subprocess.Popen[bytes]], tmp_path: Path
) -> None:
    *_others, hung = clients
    here, there = SPAWN.Pipe()
    uri = f"file://{hung}/{tmp_path.name}"
    with started(SPAWN.Process(target=children.write_late, args=(uri, there))):
        assert here.recv() == "held"
        clients[hung].send_signal(signal.SIGSTOP)
        try:
            store = open_store(f"file://{tmp_path}")
            with store.lock("held"):  # after the minute that Ceph waits for a client
                store.write("document", b"after")
        finally:
            clients[hung].send_signal(signal.SIGCONT)
        here.send("write")
        assert "shut this host out" in here.recv()
        assert store.read("document") == b"after"
