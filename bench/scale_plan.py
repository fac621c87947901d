"""Measure what it takes to plan a folder of recipes in which nothing is stale, from a folder store and from S3.

    python bench/scale_plan.py [RESULT.json] [--sizes 100 300 1000] [--stores folder s3 radosgw]

Every recipe has a graph of its own and eight engines; records, blobs and engines are those that a build leaves, of made-up
bytes. S3 is rclone's server (`rclone serve s3`), on this machine, over the same folder, or Ceph's radosgw (Debian's packages),
to which the folder is copied. Each figure is of a process of its own,
`enginery plan FOLDER --json` or a build, whose wall seconds are taken (median of three, where more than one is run), with seconds
of CPU of the command itself and of the S3 server, which share the machine:

* `records`: nothing is known of these recipes: a folder's records are read one by one; in S3 (only where asked for), too;
* `packs` (S3): no plan is remembered anywhere, but builds have packed what planning reads (docs/adr/0015-packs.md);
* `shared`: nothing is remembered here, and a build (elsewhere) has left its fresh plans in the store;
* `build`: as `shared`, of `enginery build FOLDER --json`, which finds nothing to do;
* `again`: this machine has planned them before.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import boto3

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from artifacts.folder import FolderStore  # noqa: E402  of this checkout
from artifacts.fresh_plans import PLANS  # noqa: E402
from artifacts.gathered import RECORDS_OF, Pack, keep_packs  # noqa: E402
from artifacts.observed import Sight  # noqa: E402
from artifacts.store import ObjectInfo, open_store  # noqa: E402
from recipes.plan import Plan  # noqa: E402
from tasks.session import BuildSession, open_session  # noqa: E402
from tasks.shared_plans import SharedPlans  # noqa: E402
from tests.ceph import radosgw_server  # noqa: E402
from tests.servers import careless_s3_server, s3_environment  # noqa: E402
from tests.simulated_builds import simulate_build, write_recipe  # noqa: E402

RUNS = 3
BUCKET = "scale"
SERVERS = ("rclone", "radosgw", "ceph-osd", "ceph-mon")


def run(what: str, top: Path, store: str, environment: dict[str, str], recipes: int) -> dict[str, float]:
    """Plan or build once, with nothing stale; return wall and CPU seconds (the command's own, not the server's)."""
    command = [sys.executable, "-m", "enginery", what, "recipes", "--store", store, "--json"]
    before, begin, served = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter(), server_seconds()
    done = subprocess.run(command, cwd=top, env=environment, capture_output=True, text=True, check=False)
    wall, after = time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode != 0:
        sys.exit(f"{command}: {done.returncode}\n{done.stderr}")
    plans = json.loads(done.stdout)
    states = {step["state"] for one in plans for step in one["steps"]}
    if len(plans) != recipes or states != {"cached"} or {len(one["engines"]) for one in plans} != {8}:
        sys.exit(f"{len(plans)} plans, of {states}")
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"wall": round(wall, 2), "cpu": round(cpu, 2), "server": round(server_seconds() - served, 2)}


def server_seconds() -> float:
    """Return the seconds of CPU that S3 servers, children of this process, have had."""
    ticks = 0
    for process in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            name, _end, rest = process.read_text().rpartition(")")
            fields = rest.split()
            if name.rpartition("(")[2] in SERVERS and int(fields[1]) == os.getpid():
                ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def measure(
    top: Path, store: str, environment: dict[str, str], planned: Planned, asked: set[str], records: bool
) -> dict[str, Any]:
    """Plan with all that builds leave in the store, with less of it, and as this machine remembers."""
    plans, far = top / "s3" / BUCKET / "cache" / "plans", "://" in store

    def times(what: str, *, runs: int = RUNS, keep: bool = False) -> dict[str, float]:
        found = []
        for _run in range(runs):
            if not keep:
                shutil.rmtree(top / "memory", ignore_errors=True)
            found.append(run(what, top, store, environment, len(planned)))
        return _median(found)

    shutil.rmtree(plans, ignore_errors=True)
    result: dict[str, Any] = {}
    if records:
        result["records"] = times("plan", runs=1)
    seed(planned, asked, store)
    result["shared"] = times("plan")
    result["again"] = times("plan", keep=True)
    result["build"] = times("build")
    if far:
        opened = open_store(store)
        for info in [info for info in opened.list(PLANS) if not info.path.startswith(f"{PLANS}{RECORDS_OF}/")]:
            opened.delete(info.path)
        result["packs"] = times("plan", runs=1)
    return result


Planned = list[tuple[BuildSession, Plan]]


def planned_from(folder: FolderStore, recipes: Path) -> Planned:
    """Plan all recipes of a folder from a folder store."""
    sessions = [open_session(path, folder) for path in sorted(recipes.glob("*.yaml"))]
    return [(session, session.plan()) for session in sessions]


def link(planned: Planned, target: Path) -> set[str]:
    """Make a store that has what these plans were made from, and nothing else; return the paths of that."""
    whole = planned[0][0].store
    asked = {path for session, _plan in planned for path in (*session.objects_read()[whole.uri], session.latest_path)}
    for path in ["store.json", *(info.path for info in whole.infos(asked).values())]:
        (target / path).parent.mkdir(parents=True, exist_ok=True)
        (target / path).hardlink_to(Path(whole.uri.removeprefix("file://")) / path)
    return asked


def seed(planned: Planned, asked: set[str], store: str) -> None:
    """Leave in a store what a build leaves that has found all fresh; planned from a folder, which is quicker than from S3."""
    shared = SharedPlans(open_store(store))
    infos = shared.store.infos(asked)
    stamps = {path: [info.size, info.version or info.modified] for path, info in infos.items()}
    packs = {}
    for session, plan in planned:
        objects = {path: stamps.get(path) for path in session.objects_read()[session.store.uri]}
        shared.offer(session, plan, objects, {session.latest_path: stamps.get(session.latest_path)})
        if "://" in store:
            packs[session.recipe_name] = packed(session, plan, infos)
    shared.share()
    if packs:
        keep_packs(shared.store, packs)


def packed(session: BuildSession, plan: Plan, infos: Mapping[str, ObjectInfo]) -> Pack:
    """Return what a session packs that has read from S3 what this one has read from the folder."""
    seen, latest = session._seen, session.latest_path  # noqa: SLF001
    for path in seen.sights:
        if path in infos:
            seen.sights[path] = Sight(there=True, size=infos[path].size, version=infos[path].version)
            if path.endswith(".json") and path.split("/")[0] in ("cache", "engines"):
                seen.texts[path] = session.store.read(path)
    session._latest = (session.store.read(latest), infos[latest].version)  # noqa: SLF001
    return session.pack(plan)


def _median(runs: list[dict[str, float]]) -> dict[str, float]:
    found = {name: round(statistics.median(one[name] for one in runs), 2) for name in runs[0]}
    return found if len(runs) == 1 else found | {"least": min(one["wall"] for one in runs)}


def main() -> None:
    """Measure, print, write the result."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument("result", nargs="?", type=Path, default=ROOT / "bench" / "results" / "scale_plan.json")
    parser.add_argument("--sizes", nargs="+", type=int, default=[125, 250, 500, 1000])
    parser.add_argument("--stores", nargs="+", choices=["folder", "s3", "radosgw"], default=["folder", "s3"])
    parser.add_argument("--records", nargs="*", default=["folder"], help="Of which stores records are read, too.")
    parser.add_argument("--top", type=Path, help="A folder for recipes and stores, kept, and gone on with.")
    options = parser.parse_args()
    rows: dict[str, dict[str, Any]] = {kind: {} for kind in options.stores}
    document = {
        "command": " ".join(["python", "bench/scale_plan.py", *sys.argv[2:]]),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "machine": {"cores": len(os.sched_getaffinity(0)), "python": platform.python_version()},
        "engines_of_each_recipe": 8,
        "runs": RUNS,
        "seconds": rows,
    }
    with tempfile.TemporaryDirectory(dir=options.top) as name:
        whole = options.top or Path(name)
        for size in sorted(options.sizes):
            fill(whole, size)
            top = Path(name) / str(size)
            (top / "recipes").mkdir(parents=True)
            for number in range(size):
                write_recipe(top / "recipes", f"m{number:04}")
            planned = planned_from(FolderStore(whole / "s3" / BUCKET), top / "recipes")
            paths = link(planned, top / "s3" / BUCKET)
            base = {key: value for key, value in os.environ.items() if not key.startswith("ENGINERY_")}
            base |= {"PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(top / "memory")}
            for kind in options.stores:
                records, load = kind in options.records, round(os.getloadavg()[0], 1)
                if kind == "folder":
                    found = measure(top, str(top / "s3" / BUCKET), base, planned, paths, records)
                else:
                    with careless_s3_server(top / "s3") if kind == "s3" else ceph(top / "s3") as endpoint:
                        os.environ.update(s3_environment(endpoint))
                        base |= s3_environment(endpoint)
                        found = measure(top, f"s3://{BUCKET}", base, planned, paths, records)
                rows[kind][str(size)] = {"load_before": load} | found
                print(size, kind, rows[kind][str(size)], flush=True)
                options.result.write_text(json.dumps(document, indent=2) + "\n")


@contextlib.contextmanager
def ceph(buckets: Path) -> Iterator[str]:
    """Serve the bucket by Ceph's radosgw, to which its objects are copied by rclone; yield its address."""
    with tempfile.TemporaryDirectory() as folder, radosgw_server(Path(folder)) as endpoint:
        os.environ.update(s3_environment(endpoint))
        boto3.client("s3").create_bucket(Bucket=BUCKET)
        keys = {"ACCESS_KEY_ID": "test", "SECRET_ACCESS_KEY": "test"}
        remote = {"TYPE": "s3", "PROVIDER": "Ceph", "ENDPOINT": endpoint, **keys}
        environment = {**os.environ, **{f"RCLONE_CONFIG_CEPH_{name}": value for name, value in remote.items()}}
        rclone = str(Path(sysconfig.get_path("scripts")) / "rclone")
        options = [
            "--config",
            os.devnull,
            "--transfers",
            "24",
            "--no-check-dest",
            "--s3-no-head",
            "--s3-no-check-bucket",
        ]
        command = [rclone, "copy", *options, str(buckets / BUCKET), f"ceph:{BUCKET}"]
        subprocess.run(command, env=environment, check=True)
        yield endpoint


def fill(top: Path, size: int) -> None:
    """Write so many recipes, and what builds of them leave, unless they are there."""
    (top / "recipes").mkdir(parents=True, exist_ok=True)
    (top / "scratch").mkdir(exist_ok=True)
    store = FolderStore(top / "s3" / BUCKET)
    for number in range(size):
        if not (top / "recipes" / f"m{number:04}.yaml").exists():
            simulate_build(write_recipe(top / "recipes", f"m{number:04}"), store, top / "scratch")
    written = time.time() - 100.0  # as if nobody had planned at once
    for path in store.root.rglob("*"):
        os.utime(path, (written, written))


if __name__ == "__main__":
    main()
