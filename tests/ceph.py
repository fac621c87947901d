"""Ceph's object gateway as an S3 server for long tests: a monitor, a store on a sparse file and radosgw, on loopback.

From Debian's packages ceph-mon, ceph-osd, ceph-common and radosgw. About half a gigabyte of memory; ten seconds to begin with.
"""

from __future__ import annotations

import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

PROGRAMS = ("ceph", "ceph-authtool", "ceph-mon", "ceph-osd", "monmaptool", "radosgw", "radosgw-admin")
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
admin socket = {folder}/$name.asok
mon data = {folder}/mon
osd data = {folder}/osd
rgw data = {folder}/rgw
mon allow pool size one = true
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 4
osd crush chooseleaf type = 0
osd objectstore = bluestore
osd memory target = {memory}
bluestore block size = {disk}
[client.rgw]
rgw frontends = beast endpoint={host}:{port}
rgw dns name = {names}
"""
_KEYS = {
    "mon.": ("mon", "allow *"),
    "client.admin": ("mon", "allow *", "osd", "allow *"),
    "osd.0": ("mon", "allow profile osd", "osd", "allow *"),
    "client.rgw": ("mon", "allow rw", "osd", "allow rwx"),
}


def missing_programs() -> list[str]:
    """Return which of the programs that this needs are not installed."""
    return [name for name in PROGRAMS if shutil.which(name) is None]


@contextmanager
def radosgw_server(folder: Path, host: str = "127.0.0.1") -> Iterator[str]:
    """Run it with all that it holds in a new folder, for the credentials test, test; yield http://HOST:PORT.

    A path of a socket has about 100 bytes, so that the folder's has to be short. Raises AssertionError with the last of its log.
    """
    port, *monitor = _free_ports(3)
    configuration = folder / "ceph.conf"
    for name in ("mon", "osd", "rgw"):
        (folder / name).mkdir(parents=True)
    fsid, addresses = str(uuid.uuid4()), f"[v2:127.0.0.1:{monitor[0]},v1:127.0.0.1:{monitor[1]}]"
    values = {"fsid": fsid, "monitor": addresses, "folder": folder, "memory": _MEMORY_BYTES, "disk": _DISK_BYTES}
    configuration.write_text(_CONFIGURATION.format(**values, host=host, port=port, names="localhost"))

    def run(program: str, *arguments: str) -> None:
        said = subprocess.run(
            [program, "-c", str(configuration), *arguments],
            capture_output=True, text=True, check=False, cwd=folder, timeout=_SECONDS,
        )  # fmt: skip
        if said.returncode:
            raise AssertionError(f"{program} {' '.join(arguments)}: status {said.returncode}: {said.stderr[-2000:]}")

    for number, (name, caps) in enumerate(_KEYS.items()):
        create = () if number else ("--create-keyring",)
        pairs = [word for who, what in zip(caps[::2], caps[1::2], strict=True) for word in ("--cap", who, what)]
        run("ceph-authtool", "keyring", *create, "--gen-key", "-n", name, *pairs)
    run("monmaptool", "--create", "--fsid", fsid, "--addv", "a", addresses, "monmap")
    run("ceph-mon", "-i", "a", "--mkfs", "--monmap", "monmap", "--keyring", "keyring")
    with ExitStack() as stack:
        stack.enter_context(_running(folder, "ceph-mon", "-i", "a"))
        run("ceph", "--connect-timeout", str(_SECONDS), "osd", "new", fsid, "0")
        run("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", fsid)
        stack.enter_context(_running(folder, "ceph-osd", "-i", "0"))
        # Waits for the pools, which the gateway makes, and so for the disk.
        run("radosgw-admin", "-n", "client.rgw", "user", "create", "--uid", "test", "--display-name", "test",
            "--access-key", "test", "--secret-key", "test")  # fmt: skip
        gateway = stack.enter_context(_running(folder, "radosgw", "-n", "client.rgw"))
        _wait_for(f"http://{host}:{port}", gateway, folder / "radosgw.out")
        yield f"http://{host}:{port}"


@contextmanager
def _running(folder: Path, program: str, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    command = [program, "-c", str(folder / "ceph.conf"), *arguments, "-f"]
    with (
        (folder / f"{program}.out").open("wb") as output,
        subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, cwd=folder) as process,
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
