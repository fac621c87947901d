"""Measure what a user waits for: start-up, planning, no-op builds, and what Prefect's server adds to a build.

    python bench/startup.py [RESULT.json]

Every figure is the wall time of a process of its own, as a shell sees it. A build is measured with the embedded Prefect
server (a new database, and one that is there already) and without Prefect; the server's start is measured alone, too.
Their sum is what a build would take if the stages waited for the server.
"""

from __future__ import annotations

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
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[1]
RUNS = 10
SETTLED = 3.0  # plans of what has just been written are not remembered
QUIET_LOAD = 0.5
PACKAGES = ("prefect", "torch", "onnx", "onnxruntime", "tensorrt-rtx", "pydantic", "typer")
ALONE = """
import asyncio, sys
from pathlib import Path
from artifacts.store import open_store
from tasks.drive import drive
from tasks.session import open_session
session = open_session(Path("recipes/digits.yaml"), open_store(sys.argv[1]))
async def run(step, planned):
    return await asyncio.to_thread(session.ensure, step, planned)
planned = asyncio.run(drive(session, run))
session.finish(planned)
sys.exit(planned.status)
"""
SERVER = """
from enginery.building import PREFECT_SETTINGS
import os
os.environ.update(PREFECT_SETTINGS)
from enginery.prefect_server import embedded_server
embedded_server().wait()
os._exit(0)
"""
EDITS = {"opset: 18": "opset: 20", "gpus: [sm80, sm86, sm89, sm120]": "gpus: [sm80, sm86, sm89, sm120, sm121]"}


def seconds(command: list[str], folder: Path, *, home: Path, cache: str = "cache") -> float:
    """Return the wall seconds of one process, which has to succeed; fresh plans are remembered in the folder `cache`."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "ENGINERY_"))}
    env = {**kept, "PYTHONPATH": str(ROOT), "PREFECT_HOME": str(home), "XDG_CACHE_HOME": str(folder / cache)}
    begin = time.perf_counter()
    result = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)
    taken = time.perf_counter() - begin
    if result.returncode != 0:
        sys.exit(f"{command}: {result.returncode}\n{result.stderr}")
    return taken


def many(command: list[str], folder: Path, home: Path, cache: str = "cache") -> dict[str, float]:
    """Measure a quick command: once to warm the file cache, then `RUNS` times; `cpu` is the median of its CPU seconds."""
    seconds(command, folder, home=home, cache=cache)
    taken, used = [], []
    for _ in range(RUNS):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        taken.append(seconds(command, folder, home=home, cache=cache))
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        used.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return {
        "median": round(statistics.median(taken), 3),
        "least": round(min(taken), 3),
        "most": round(max(taken), 3),
        "cpu": round(statistics.median(used), 3),
    }


def measure(top: Path) -> dict[str, dict[str, float]]:
    """Measure everything in a new folder."""
    home, python = top / "prefect", sys.executable
    enginery = [python, "-m", "enginery"]
    # Without the Python package that lies beside the recipes: its copy, never compiled, would be imported from here.
    (top / "recipes").mkdir()
    shutil.copytree(
        ROOT / "recipes" / "digits", top / "recipes" / "digits", ignore=shutil.ignore_patterns("__pycache__")
    )
    recipe = Path(shutil.copy(ROOT / "recipes" / "digits.yaml", top / "recipes"))
    (top / "nowhere").touch()  # no folder, so that nothing can be remembered below it
    build = [*enginery, "build", "recipes/digits.yaml", "--json"]
    once: dict[str, float] = {}

    once["embedded server alone, new database"] = seconds([python, "-c", SERVER], top, home=top / "other")
    once["embedded server alone, again"] = seconds([python, "-c", SERVER], top, home=top / "other")
    once["first build, stages alone (no Prefect)"] = seconds([python, "-c", ALONE, "alone"], top, home=home)
    once["first build"] = seconds(build, top, home=home)
    time.sleep(SETTLED)
    rows = {
        "enginery --help": many([*enginery, "--help"], top, home),
        "plan, nothing remembered": many([*enginery, "plan", "recipes/digits.yaml"], top, home, "nowhere"),
        "build, nothing stale, nothing remembered": many(build, top, home, "nowhere"),
        "plan": many([*enginery, "plan", "recipes/digits.yaml"], top, home),
        "plan --explain": many([*enginery, "plan", "recipes/digits.yaml", "--explain"], top, home),
        "build, nothing stale": many(build, top, home),
    }
    for old, new in EDITS.items():
        text = recipe.read_text()
        if text.count(old) != 1:
            sys.exit(f"the digits recipe has no {old!r} to edit")
        recipe.write_text(text.replace(old, new))
        what = f"build after {old.partition(':')[0]} changed"
        once[f"{what}, stages alone (no Prefect)"] = seconds([python, "-c", ALONE, "alone"], top, home=home)
        once[what] = seconds(build, top, home=home)
    return rows | {name: {"median": round(taken, 3)} for name, taken in once.items()}


def machine() -> dict[str, Any]:
    """Describe the machine by what matters for these figures."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")
    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in PACKAGES},
    }


def main() -> None:
    """Measure, print a table, write the result."""
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "bench" / "results" / "startup.json"
    load = os.getloadavg()[0]
    if load > QUIET_LOAD:
        print(f"warning: the machine is busy (load {load:.1f}); the figures are upper bounds", file=sys.stderr)
    with tempfile.TemporaryDirectory() as top:
        rows = measure(Path(top))
    document = {
        "command": "python bench/startup.py",
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "machine": machine(),
        "load_before": round(load, 2),
        "runs": RUNS,
        "seconds": rows,
    }
    target.write_text(json.dumps(document, indent=2) + "\n")
    for name, row in rows.items():
        spread = f"  ({row['least']:.2f} to {row['most']:.2f})" if "least" in row else ""
        print(f"{name:60} {row['median']:7.2f} s{spread}")


if __name__ == "__main__":
    main()
