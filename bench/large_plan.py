"""Memory of publishing and pulling a plan of 4 GiB: how much a process takes beyond what it had at the start.

    python -m bench.large_plan RESULT.json [--gib 4] [--stores folder,rclone,moto] [--folder /tmp]

Each step runs in a process of its own: its resident memory when the store is open and everything is imported, and its peak
(VmRSS and VmHWM of /proc/self/status, the latter reset at the start), in MiB. The steps: `put` brings the plan into the store as a blob, `publish` makes it an engine (a copy inside the
store), `pull` brings the engine to a folder and checks it, `deep` is `verify --deep` of the store. The bound that is asserted: 150 MiB.
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
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

from artifacts.cache import blob_path
from artifacts.catalog import EngineCatalog, EngineId
from artifacts.deep import DeepCheck
from artifacts.manifest import Manifest
from artifacts.refs import ENGINE_PLAN, ArtifactRef, digest_file
from artifacts.store import Store, open_store
from bench.faults.servers import rclone_with_bucket, s3_with_bucket
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
    server = s3_with_bucket(_BUCKET) if kind == "moto" else rclone_with_bucket(_BUCKET, folder / "served")
    with server as environment:
        os.environ.update(environment)
        os.environ["ENGINERY_S3_LOCKS"] = str(folder / "locks")
        os.environ["ENGINERY_S3_TIMEOUT"] = (
            "1800"  # a copy of the whole is one request, which this server makes by hand
        )
        yield f"s3://{_BUCKET}/store"


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
    found: dict[str, dict[str, dict[str, float]]] = {}
    with tempfile.TemporaryDirectory(dir=asked.folder, prefix="large-plan-") as temporary:
        plan = Path(temporary) / "plan"
        ref = write_plan(plan, size)
        for kind in asked.stores.split(","):
            folder = Path(temporary) / kind
            folder.mkdir()
            with place(kind, folder) as uri:
                found[kind] = {}
                for step in asked.steps.split(","):
                    found[kind][step] = measure(step, uri, plan, ref, folder / "pulled")
                    print(kind, step, found[kind][step], flush=True)
            shutil.rmtree(folder)
    document = {
        "command": f"python -m bench.large_plan --gib {asked.gib:g} --stores {asked.stores} --steps {asked.steps}",
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "bytes": size,
        "limit_mib": LIMIT_MIB,
        "python": platform.python_version(),
        "boto3": version("boto3"),
        "stores": found,
    }
    asked.result.write_text(json.dumps(document, indent=1) + "\n")
    over = [(kind, step) for kind, steps in found.items() for step, row in steps.items() if row["over_mib"] > LIMIT_MIB]
    if over:
        raise SystemExit(f"more than {LIMIT_MIB} MiB over the start: {over}")


if __name__ == "__main__":
    main()
