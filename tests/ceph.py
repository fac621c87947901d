"""Ceph for long tests, on loopback: a monitor and a store on a sparse file, with radosgw (S3) or with CephFS, mounted through FUSE.

From Debian's packages ceph-mon, ceph-osd, ceph-common, and radosgw, or ceph-mds and ceph-fuse. About half a gigabyte of memory; ten
seconds to begin with. Mounts need /dev/fuse and the right to mount.
"""

from __future__ import annotations

import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

_CLUSTER_PROGRAMS = ("ceph", "ceph-authtool", "ceph-mon", "ceph-osd", "monmaptool")
PROGRAMS = (*_CLUSTER_PROGRAMS, "radosgw", "radosgw-admin")
CEPHFS_PROGRAMS = (*_CLUSTER_PROGRAMS, "ceph-mds", "ceph-fuse", "fusermount")
_DISK_BYTES = 24 << 30
_MEMORY_BYTES = 1 << 30
_SECONDS = 120
_CONFIGURATION = """\
[global]
fsid = {fsid}
mon host = {monitor}
public addr = 127.0.0.1
cluster addr = 127.0.0.1
ms bind ipv6 = false
keyring = {folder}/keyring
run dir = {folder}
crash dir = {folder}
log file = {folder}/$name.log
pid file = {folder}/$name.pid
admin socket = {folder}/$name.$pid.asok
mon data = {folder}/mon
osd data = {folder}/osd
rgw data = {folder}/rgw
mds data = {folder}/mds
mon allow pool size one = true
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 4
osd crush chooseleaf type = 0
osd objectstore = bluestore
osd memory target = {memory}
bluestore block size = {disk}
"""
_GATEWAY = """\
[client.rgw]
rgw frontends = beast endpoint={host}:{port}
rgw dns name = localhost
"""
_KEYS = {
    "mon.": ("mon", "allow *"),
    "client.admin": ("mon", "allow *", "osd", "allow *", "mds", "allow *"),
    "osd.0": ("mon", "allow profile osd", "osd", "allow *"),
    "mds.a": ("mon", "allow profile mds", "osd", "allow rwx", "mds", "allow *"),
    "client.rgw": ("mon", "allow rw", "osd", "allow rwx"),
}


def missing_programs(programs: tuple[str, ...] = PROGRAMS) -> list[str]:
    """Return which of the programs that this needs are not installed."""
    return [name for name in programs if shutil.which(name) is None]


@contextmanager
def radosgw_server(folder: Path, host: str = "127.0.0.1") -> Iterator[str]:
    """Run it with all that it holds in a new folder, for the credentials test, test; yield http://HOST:PORT.

    A path of a socket has about 100 bytes, so that the folder's has to be short. Raises AssertionError with the last of its log.
    """
    port = _free_ports(1)[0]
    with _cluster(folder, _GATEWAY.format(host=host, port=port)) as run:
        # Waits for the pools, which the gateway makes, and so for the disk.
        run("radosgw-admin", "-n", "client.rgw", "user", "create", "--uid", "test", "--display-name", "test",
            "--access-key", "test", "--secret-key", "test")  # fmt: skip
        with _running(folder, "radosgw", "-n", "client.rgw") as gateway:
            _wait_for(f"http://{host}:{port}", gateway, folder / "radosgw.out")
            yield f"http://{host}:{port}"


@contextmanager
def cephfs_mounts(folder: Path, count: int = 2) -> Iterator[dict[Path, subprocess.Popen[bytes]]]:
    """Run CephFS with all that it holds in a new folder; yield where it is mounted, with the client of each, which stands for a host.

    The folder as for `radosgw_server`. Raises AssertionError.
    """
    with ExitStack() as stack:
        run = stack.enter_context(_cluster(folder))
        stack.enter_context(_running(folder, "ceph-mds", "-i", "a"))
        run("ceph", "osd", "pool", "create", "names", "4")
        run("ceph", "osd", "pool", "create", "files", "4")
        run("ceph", "fs", "new", "cephfs", "names", "files")
        until = time.monotonic() + _SECONDS
        while "up:active" not in run("ceph", "mds", "stat"):
            if time.monotonic() > until:
                raise AssertionError(f"no MDS is active: {run('ceph', '-s')}")
            time.sleep(0.2)
        mounts = [folder / f"mount{number}" for number in range(count)]
        yield {mount: stack.enter_context(_mounted(folder, mount)) for mount in mounts}


@contextmanager
def _mounted(folder: Path, mount: Path) -> Iterator[subprocess.Popen[bytes]]:
    mount.mkdir()
    with _running(folder, "ceph-fuse", "-n", "client.admin", str(mount), output=f"{mount.name}.out") as client:
        until = time.monotonic() + _SECONDS
        while not mount.is_mount():
            if time.monotonic() > until or client.poll() is not None:
                said = (folder / f"{mount.name}.out").read_text(errors="replace")
                raise AssertionError(f"CephFS is not mounted: {said[-2000:]}")
            time.sleep(0.2)
        try:
            yield client
        finally:
            subprocess.run(["fusermount", "-u", "-z", str(mount)], check=False, timeout=_SECONDS)


@contextmanager
def _cluster(folder: Path, more: str = "") -> Iterator[Callable[..., str]]:
    """Run a monitor and a disk, with so much more in their configuration; yield what runs a program with that. Raises AssertionError."""
    monitor = _free_ports(2)
    configuration = folder / "ceph.conf"
    for name in ("mon", "osd", "rgw", "mds"):
        (folder / name).mkdir(parents=True)
    fsid, addresses = str(uuid.uuid4()), f"[v2:127.0.0.1:{monitor[0]},v1:127.0.0.1:{monitor[1]}]"
    values = {"fsid": fsid, "monitor": addresses, "folder": folder, "memory": _MEMORY_BYTES, "disk": _DISK_BYTES}
    configuration.write_text(_CONFIGURATION.format(**values) + more)

    def run(program: str, *arguments: str) -> str:
        said = subprocess.run(
            [program, "-c", str(configuration), *arguments],
            capture_output=True, text=True, check=False, cwd=folder, timeout=_SECONDS,
        )  # fmt: skip
        if said.returncode:
            raise AssertionError(f"{program} {' '.join(arguments)}: status {said.returncode}: {said.stderr[-2000:]}")
        return said.stdout

    for number, (name, caps) in enumerate(_KEYS.items()):
        create = () if number else ("--create-keyring",)
        pairs = [word for who, what in zip(caps[::2], caps[1::2], strict=True) for word in ("--cap", who, what)]
        run("ceph-authtool", "keyring", *create, "--gen-key", "-n", name, *pairs)
    run("monmaptool", "--create", "--fsid", fsid, "--addv", "a", addresses, "monmap")
    run("ceph-mon", "-i", "a", "--mkfs", "--monmap", "monmap", "--keyring", "keyring")
    with _running(folder, "ceph-mon", "-i", "a"):
        run("ceph", "--connect-timeout", str(_SECONDS), "osd", "new", fsid, "0")
        run("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", fsid)
        with _running(folder, "ceph-osd", "-i", "0"):
            yield run


@contextmanager
def _running(folder: Path, program: str, *arguments: str, output: str = "") -> Iterator[subprocess.Popen[bytes]]:
    command = [program, "-c", str(folder / "ceph.conf"), *arguments, "-f"]
    with (
        (folder / (output or f"{program}.out")).open("wb") as written,
        subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=written, stderr=written, cwd=folder) as process,
    ):
        try:
            yield process
        finally:
            process.kill()


def _wait_for(address: str, process: subprocess.Popen[bytes], output: Path) -> None:
    until = time.monotonic() + _SECONDS
    while time.monotonic() < until and process.poll() is None:
        with suppress(urllib.error.URLError), urllib.request.urlopen(address, timeout=5):
            return
        time.sleep(0.2)
    raise AssertionError(f"radosgw does not answer: {output.read_text(errors='replace')[-2000:]}")


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
