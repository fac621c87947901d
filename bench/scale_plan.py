"""Measure what it takes to plan a folder of recipes in which nothing is stale, from a folder store and from S3.

    python bench/scale_plan.py [RESULT.json] [--sizes 100 300 1000] [--stores folder s3]

Every recipe has a graph of its own and eight engines; records, blobs and engines are those that a build leaves, of made-up
bytes. S3 is rclone's server (`rclone serve s3`), on this machine, over the same folder. Each figure is of a process of its own,
`enginery plan FOLDER --json`, or `build`, whose wall seconds are taken, and its own seconds of CPU (not the server's):

* `records`: a plan (S3: that build) that knows of no fresh plan, and reads every record;
* `shared` (median of three): nothing is remembered here, and a build (elsewhere) has left its fresh plans in the store;
* `again` (median of three): this machine has planned them before.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from artifacts.folder import FolderStore  # noqa: E402  of this checkout
from tests.servers import careless_s3_server, s3_environment  # noqa: E402
from tests.simulated_builds import simulate_build, write_recipe  # noqa: E402

RUNS = 3
BUCKET = "scale"


def run(what: str, top: Path, store: str, environment: dict[str, str], recipes: int) -> dict[str, float]:
    """Plan or build once, with nothing stale; return wall and CPU seconds (the command's own, not the server's)."""
    command = [sys.executable, "-m", "enginery", what, "recipes", "--store", store, "--json"]
    before, begin = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(command, cwd=top, env=environment, capture_output=True, text=True, check=False)
    wall, after = time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode != 0:
        sys.exit(f"{command}: {done.returncode}\n{done.stderr}")
    plans = json.loads(done.stdout)
    states = {step["state"] for one in plans for step in one["steps"]}
    if len(plans) != recipes or states != {"cached"} or {len(one["engines"]) for one in plans} != {8}:
        sys.exit(f"{len(plans)} plans, of {states}")
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"wall": round(wall, 2), "cpu": round(cpu, 2)}


def measure(top: Path, store: str, environment: dict[str, str], recipes: int) -> dict[str, Any]:
    """Plan with nothing known, with what this machine remembers, and with what a build left in the store."""

    def forget() -> None:
        shutil.rmtree(top / "memory", ignore_errors=True)

    def plan_anew() -> dict[str, float]:
        forget()
        return run("plan", top, store, environment, recipes)

    is_folder = "://" not in store
    forget()
    shutil.rmtree(top / "s3" / BUCKET / "cache" / "plans", ignore_errors=True)
    records = run("plan" if is_folder else "build", top, store, environment, recipes)
    again = _median([run("plan", top, store, environment, recipes) for _ in range(RUNS)])
    if is_folder:
        forget()
        run("build", top, store, environment, recipes)
    return {"records": records, "shared": _median([plan_anew() for _ in range(RUNS)]), "again": again}


def _median(runs: list[dict[str, float]]) -> dict[str, float]:
    return {
        "wall": round(statistics.median(one["wall"] for one in runs), 2),
        "least": min(one["wall"] for one in runs),
        "cpu": round(statistics.median(one["cpu"] for one in runs), 2),
    }


def main() -> None:
    """Measure, print, write the result."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument("result", nargs="?", type=Path, default=ROOT / "bench" / "results" / "scale_plan.json")
    parser.add_argument("--sizes", nargs="+", type=int, default=[100, 300, 1000])
    parser.add_argument("--stores", nargs="+", choices=["folder", "s3"], default=["folder", "s3"])
    asked = parser.parse_args()
    rows: dict[str, dict[str, Any]] = {kind: {} for kind in asked.stores}
    document = {
        "command": "python bench/scale_plan.py",
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "machine": {"cores": len(os.sched_getaffinity(0)), "python": platform.python_version()},
        "nice": os.nice(0),
        "engines_of_each_recipe": 8,
        "runs": RUNS,
        "seconds": rows,
    }
    with tempfile.TemporaryDirectory() as name:
        top = Path(name)
        (top / "recipes").mkdir()
        (top / "scratch").mkdir()
        base = {key: value for key, value in os.environ.items() if not key.startswith("ENGINERY_")}
        base |= {"PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(top / "memory")}
        store, made = FolderStore(top / "s3" / BUCKET), 0
        for size in sorted(asked.sizes):
            while made < size:
                simulate_build(write_recipe(top / "recipes", f"m{made:04}"), store, top / "scratch")
                made += 1
            written = time.time() - 100.0  # as if nobody had planned at once
            for path in store.root.rglob("*"):
                os.utime(path, (written, written))
            for kind in asked.stores:
                load = round(os.getloadavg()[0], 1)
                if kind == "folder":
                    found = measure(top, str(store.root), base, size)
                else:
                    with careless_s3_server(top / "s3") as endpoint:
                        found = measure(top, f"s3://{BUCKET}", base | s3_environment(endpoint), size)
                rows[kind][str(size)] = {"load_before": load} | found
                print(size, kind, rows[kind][str(size)], flush=True)
                asked.result.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
