"""Memory of publishing and pulling a plan of 4 GiB: how much a process takes beyond what it had at the start.

    python -m bench.large_plan RESULT.json [--gib 4] [--stores folder,rclone,radosgw,moto] [--folder /tmp]

Each step runs in a process of its own: its resident memory when the store is open and everything is imported, and its peak
(VmRSS and VmHWM of /proc/self/status, the latter reset at the start), in MiB. The steps: `put` brings the plan into the store as a blob, `publish` makes it an engine (a copy inside the
store), `pull` brings the engine to a folder and checks it, `deep` is `verify --deep` of the store. The bound that is asserted: 150 MiB.
Limits of time are the default ones, but for rclone's server. What the server takes is told beside: moto's keeps objects in memory, and several times over. A result that is
there already keeps what it says of other stores.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from threading import Event, Thread
from typing import Any, Final

import psutil

from artifacts.cache import blob_path
from artifacts.catalog import EngineCatalog, EngineId
from artifacts.deep import DeepCheck
from artifacts.manifest import Manifest
from artifacts.refs import ENGINE_PLAN, ArtifactRef, digest_file
from artifacts.store import Store, open_store
from bench.faults.servers import radosgw_with_bucket, rclone_with_bucket, s3_with_bucket
from enginery import client
from tests.engines import digest, make_manifest

LIMIT_MIB: Final = 150
_BUCKET: Final = "enginery-large"
STEPS: Final = ("put", "publish", "pull", "deep")


def write_plan(path: Path, size: int) -> ArtifactRef:
    """Write a file of so many bytes, no two MiB of which are alike."""
    block = os.urandom(1 << 20)
    with path.open("wb") as stream:
        for number in range(size >> 20):
            stream.write(number.to_bytes(8, "big") + block[8:])
    return ArtifactRef(digest_file(path), size, ENGINE_PLAN)


def manifest_of(ref: ArtifactRef) -> Manifest:
    """Return the manifest of the engine that has this plan."""
    names = {"identity.recipe": "large", "identity.target": "t", "identity.build": "fp16-large"}
    return make_manifest({**names, "files": {"model.plan": ref.to_json()}, "provenance.key": digest("large")})


def _step(name: str, uri: str, plan: Path, ref: ArtifactRef, folder: Path) -> None:
    store = open_store(uri)
    manifest = manifest_of(ref)
    engine = EngineId.of(manifest.identity)
    steps: Mapping[str, Callable[[], object]] = {
        "put": lambda: store.put_file(blob_path(ref.digest), plan, ref),
        "publish": lambda: EngineCatalog(store).publish(manifest),
        "pull": lambda: client.pull(store, engine, folder),
        "deep": lambda: _sound(store),
    }
    steps[name]()


def _sound(store: Store) -> None:
    damages = DeepCheck(store).run()
    if damages:
        raise AssertionError(damages)


def _measured(name: str, uri: str, plan: Path, ref: ArtifactRef, folder: Path, answer: Any) -> None:
    open_store(uri).info("nothing")  # imports and connects
    os.environ["TMPDIR"] = str(folder.parent)
    Path("/proc/self/clear_refs").write_text("5")
    before = _memory("VmRSS")
    begin = time.monotonic()
    _step(name, uri, plan, ref, folder)
    answer.send((before, _memory("VmHWM"), time.monotonic() - begin))


def _memory(field: str) -> float:
    """Return a field of this process's status, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{field}:"))


def measure(name: str, uri: str, plan: Path, ref: ArtifactRef, folder: Path) -> dict[str, float]:
    """Run a step in a new process; return MiB at its start and at its peak, and seconds."""
    context = multiprocessing.get_context("spawn")
    mine, theirs = context.Pipe()
    process = context.Process(target=_measured, args=(name, uri, plan, ref, folder, theirs))
    process.start()
    theirs.close()
    try:
        before, peak, seconds = mine.recv()
    except EOFError:
        raise AssertionError(f"{name} on {uri} failed") from None
    process.join()
    return {
        "start_mib": round(before, 1),
        "peak_mib": round(peak, 1),
        "over_mib": round(peak - before, 1),
        "seconds": round(seconds, 1),
    }


@contextmanager
def place(kind: str, folder: Path) -> Iterator[str]:
    """Run what serves a store of this kind; yield its URI, with the environment that leads to it."""
    if kind == "folder":
        yield str(folder / "store")
        return
    servers = {
        "moto": lambda: s3_with_bucket(_BUCKET),
        "rclone": lambda: rclone_with_bucket(_BUCKET, folder / "served"),
        "radosgw": lambda: radosgw_with_bucket(_BUCKET, folder / "ceph"),
    }
    with servers[kind]() as environment:
        os.environ.update(environment)
        if kind == "rclone":  # hashes the whole object before it answers each HEAD, since an ETag is an MD5 for it
            os.environ["ENGINERY_S3_TIMEOUT"] = "1800"
        os.environ["ENGINERY_S3_LOCKS"] = str(folder / "locks") if kind == "rclone" else ""
        yield f"s3://{_BUCKET}/store"


@contextmanager
def server_memory() -> Iterator[list[float]]:
    """Yield a list that grows by what the servers started here take together, in MiB, each second: the measured process left out."""
    found, over = [0.0], Event()

    def watch() -> None:
        while not over.wait(1):
            total = 0
            for process in psutil.Process().children():
                with suppress(psutil.Error):
                    if "multiprocessing" not in " ".join(process.cmdline()):
                        total += process.memory_info().rss
            found.append(total / (1 << 20))

    thread = Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        over.set()
        thread.join()


def main() -> None:
    """Measure every step on every store, write the result, and end in an error where one took more than the bound."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path)
    parser.add_argument("--gib", type=float, default=4.0)
    parser.add_argument("--stores", default="folder,rclone")
    parser.add_argument("--steps", default=",".join(STEPS))
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    asked = parser.parse_args()
    size = int(asked.gib * (1 << 30)) >> 20 << 20
    document: dict[str, Any] = json.loads(asked.result.read_text()) if asked.result.exists() else {}
    document |= {"what": "python -m bench.large_plan: MiB and seconds of each step", "limit_mib": LIMIT_MIB}
    found: dict[str, dict[str, Any]] = document.setdefault("stores", {})
    with tempfile.TemporaryDirectory(dir=asked.folder, prefix="large-plan-") as temporary:
        plan = Path(temporary) / "plan"
        ref = write_plan(plan, size)
        for kind in asked.stores.split(","):
            folder = Path(temporary) / kind
            folder.mkdir()
            with place(kind, folder) as uri:
                about = {"date": time.strftime("%Y-%m-%d", time.gmtime()), "python": platform.python_version()}
                found[kind] = {"bytes": size, **about, "boto3": version("boto3"), "steps": {}}
                for step in asked.steps.split(","):
                    with server_memory() as taken:
                        row = measure(step, uri, plan, ref, folder / "pulled")
                    found[kind]["steps"][step] = row | (
                        {"server_peak_mib": round(max(taken), 1)} if kind != "folder" else {}
                    )
                    print(kind, step, found[kind]["steps"][step], flush=True)
                    asked.result.write_text(json.dumps(document, indent=1) + "\n")
            shutil.rmtree(folder)
    rows = [(kind, step, row) for kind, told in found.items() for step, row in told["steps"].items()]
    over = [(kind, step) for kind, step, row in rows if row["over_mib"] > LIMIT_MIB]
    if over:
        raise SystemExit(f"more than {LIMIT_MIB} MiB over the start: {over}")


if __name__ == "__main__":
    main()
