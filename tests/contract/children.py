"""What the store tests run in processes of their own."""

from __future__ import annotations

import json
import random
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

from artifacts.cache import blob_path
from artifacts.channels import Channel, move_channel
from artifacts.errors import StoreError
from artifacts.refs import BYTES, ArtifactRef, digest_bytes
from artifacts.store import open_store


def ref_of(data: bytes) -> ArtifactRef:
    return ArtifactRef(digest_bytes(data), len(data), BYTES)


def write_if_absent(uri: str, races: int, mark: int, start: Barrier, answer: Connection) -> None:
    """Write a MiB of one's own mark where nothing is, together with others; answer which writes were one's own."""
    store = open_store(uri)
    list(store.list("warm/"))  # whatever is made lazily is made before the race
    data, won = bytes([mark]) * (1 << 20), []
    for race in range(races):
        start.wait()
        won.append(store.write(f"race/{race}", data, if_absent=True))
    answer.send(won)


def append_by_version(uri: str, mark: str, updates: int, start: Barrier) -> None:
    """Append lines to an object that others append to as well, by compare and swap."""
    store = open_store(uri)
    start.wait()
    for update in range(updates):
        written = False
        while not written:
            data, version = store.read_versioned("log")
            written = store.write("log", data + f"{mark}-{update}\n".encode(), if_version=version)


def move_channel_often(uri: str, mark: str, moves: int, start: Barrier) -> None:
    """Promote builds of one's own to a channel that others move as well, each only over what one has seen."""
    store = open_store(uri)
    start.wait()
    for number in range(moves):

        def decide(found: Channel | None, number: int = number) -> dict[str, Any]:
            seen = found.head.move.build if found is not None else "nothing"
            fields = {"action": "promote", "build": f"{mark}-{number}", "manifest": "0" * 64, "by": mark}
            return fields | {"time": "2026-01-02T03:04:05Z", "reason": f"over {seen}"}

        move_channel(store, "digits", "t", "production", decide)


def add_under_lock(uri: str, times: int, start: Barrier) -> None:
    """Count up in an object, read and written apart, so that only a lock keeps counts from being lost."""
    store = open_store(uri)
    start.wait()
    for _ in range(times):
        with store.lock("export/counter"):
            store.write("counter", str(int(store.read("counter")) + 1).encode())


def hold_lock(uri: str, answer: Connection) -> None:
    """Hold a lock, and a scratch folder with something in it, until killed."""
    store = open_store(uri)
    with store.lock("held"), store.scratch() as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "left").write_bytes(b"left")
        answer.send(str(folder))
        answer.recv()


def write_late(uri: str, answer: Connection) -> None:
    """Hold a lock, and write under it when told to; answer what came of that: an error's text, if any."""
    store, said = open_store(uri), ""
    store.write("document", b"before")
    try:
        with store.lock("held"):
            answer.send("held")
            answer.recv()
            store.write("document", b"late")
    except StoreError as err:
        said = str(err)
    answer.send(said)


def store_until_killed(uri: str, seed: int, answer: Connection) -> None:
    """Store blobs and documents, each of which can be checked by itself, until killed."""
    store, choose, count = open_store(uri), random.Random(seed), 0
    while True:
        with store.scratch() as folder:
            data = choose.randbytes(choose.randrange(1, 3 << 20))
            ref = ref_of(data)
            (folder / "blob").write_bytes(data)
            store.put_file(blob_path(ref.digest), folder / "blob", ref)
            text = json.dumps({"blob": ref.to_json(), "padding": "x" * choose.randrange(1 << 16)})
            store.write("channels/latest.json", text.encode())
            store.write(f"records/{seed}-{count}.json", text.encode(), if_absent=True)
            store.copy(blob_path(ref.digest), f"engines/{seed}-{count}/{ref.digest}")
        count += 1
        answer.send(count)


def peak_growth(uri: str, source: Path, target: Path, size: int, answer: Connection) -> None:
    """Put and get a large file; answer by how many bytes peak memory grew, from that of a small file."""
    store = open_store(uri)
    with store.scratch() as folder:
        (folder / "small").write_bytes(b"small")
        store.put_file("warm", folder / "small", ref_of(b"small"))
        store.get_file("warm", ref_of(b"small"), folder / "warm")
        ref = ArtifactRef(source.name, size, BYTES)
        before = _peak()
        store.put_file("large", source, ref)
        store.get_file("large", ref, target)
        answer.send(_peak() - before)


def _peak() -> int:
    # Not getrusage: its peak is inherited from the process that forked this one.
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("VmHWM:"))
