"""Build every recipe that is given from an empty store, then again; write the times and sizes that the README states.

    python bench/shipped.py recipes/digits.yaml recipes/digits-onnx.yaml recipes/swin-tiny.yaml

Wall time of `python -m enginery build`, as a user sees it: start-up, Prefect's embedded server and all. Results go to
bench/results/recipes.json, or to another file there: `--to sources.json` before the recipes. Run it on a quiet machine: the load before each build is written beside its time.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results"
PACKAGES = (
    "torch",
    "onnx",
    "onnxruntime",
    "onnxsim",
    "onnxslim",
    "tensorrt-rtx",
    "prefect",
    "paddlepaddle",
    "paddle2onnx",
    "transformers",
)


def timed_build(recipe: str, store: Path, environment: dict[str, str]) -> tuple[float, dict]:
    begin = time.perf_counter()
    command = [sys.executable, "-m", "enginery", "build", recipe, "--store", str(store), "--json"]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True)
    return round(time.perf_counter() - begin, 2), json.loads(done.stdout)


def measure(recipe: str) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder, "store")
        environment = {**os.environ, "PREFECT_HOME": str(Path(folder, "prefect"))}
        load = round(os.getloadavg()[0], 2)
        first, report = timed_build(recipe, store, environment)
        again, same = timed_build(recipe, store, environment)
        if any(step["state"] != "cached" for step in same["steps"]):
            raise SystemExit(f"{recipe}: the second build was not cached throughout")
        return {
            "recipe": recipe,
            "load_before": load,
            "first_seconds": first,
            "cached_seconds": again,
            "stages": {step["id"]: step["seconds"] for step in report["steps"] if step["state"] == "built"},
            "engines": [
                {
                    key: engine[key]
                    for key in ("target", "precision", "size", "parity", "metric", "source_metric", "executed")
                }
                for engine in report["engines"]
            ],
            # Engines may be hard links to blobs, which take their space once.
            "store_bytes": sum(
                {(found := path.lstat()).st_ino: found.st_blocks * 512 for path in store.rglob("*")}.values()
            ),
        }


def main() -> None:
    arguments = sys.argv[1:]
    name, recipes = (arguments[1], arguments[2:]) if arguments[:1] == ["--to"] else ("recipes.json", arguments)
    model = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), "")
    document = {
        "command": f"python bench/shipped.py {' '.join(sys.argv[1:])}",
        "cpu": f"{len(os.sched_getaffinity(0))} x {model.partition(': ')[2] or platform.machine()}, no GPU",
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in PACKAGES},
        "recipes": [measure(recipe) for recipe in recipes],
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / name).write_text(json.dumps(document, indent=1) + "\n")
    for found in document["recipes"]:
        print(
            f"{found['recipe']}: first {found['first_seconds']} s, then {found['cached_seconds']} s, {found['store_bytes'] / 1e6:.0f} MB"
        )


if __name__ == "__main__":
    main()
