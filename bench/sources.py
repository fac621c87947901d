"""Build shipped recipes, each from an empty store, and write what each architecture became; then the tables of docs/sources.md.

    python -m bench.sources                       all of them, the small ones first: hours on two busy cores
    python -m bench.sources --stale               those that today's stages would build otherwise, or whose recipe has changed
    python -m bench.sources recipes/resnet50.yaml
    python -m bench.sources --docs                only the tables, from what was measured

Figures are those of the manifests that `enginery build` published and of its report. A recipe's entry in
bench/results/sources.json takes the place of the one it had there; the others stay. `--variant NAME` gives the entry a name of its
own (recipe#NAME). Seconds are the sum of the stages' own, beside whatever else the machine did: the load is written with them.
"""

from __future__ import annotations

import argparse
import datetime as dt
import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from bench.sources_table import DOCUMENT, RESULTS, ROOT, TABLES, entries, written
from recipes.steps import STAGE_VERSIONS

PACKAGES = (
    "torch",
    "transformers",
    "paddlepaddle",
    "paddle2onnx",
    "onnx",
    "onnxruntime",
    "onnxsim",
    "onnxscript",
    "tensorrt-rtx",
)


def measure(recipe: Path, store: Path) -> dict[str, Any]:
    """Build one recipe and return its entry."""
    load = round(os.getloadavg()[0], 1)
    command = [sys.executable, "-m", "enginery", "build", str(recipe), "--store", str(store), "--json"]
    environment = {**os.environ, "PREFECT_HOME": str(store / "prefect")}
    done = subprocess.run(command, env=environment, capture_output=True, check=False)
    if not done.stdout:
        raise SystemExit(f"{recipe}: exit status {done.returncode}\n{done.stderr.decode()}")
    report = json.loads(done.stdout)
    stages = {step["id"]: round(record(step, store)["seconds"], 2) for step in report["steps"] if record(step, store)}
    return {
        "recipe": str(recipe),
        "export": exported(yaml.safe_load(recipe.read_text()), report, store),
        "recipe_sha256": digest(recipe),
        "stage_versions": dict(STAGE_VERSIONS),
        "versions": {name: metadata.version(name) for name in PACKAGES},
        "date": dt.datetime.now(tz=dt.timezone.utc).date().isoformat(),
        "status": done.returncode,
        "load_before": load,
        "seconds": round(sum(stages.values()), 1),
        "stages": stages,
        "engines": [published(engine, store) for engine in report["engines"]],
        **together(report, store),
    }


def digest(recipe: Path) -> str:
    """Return the digest of what a recipe says, its comments apart."""
    return hashlib.sha256(json.dumps(yaml.safe_load(recipe.read_text())).encode()).hexdigest()


def stale(measured: Mapping[str, Any]) -> list[Path]:
    """Return the recipes whose entry is not of today's stages and of the recipe's text as it is; of its code, nothing is known."""
    return [
        recipe
        for recipe in shipped()
        if (entry := measured.get(recipe.stem)) is None
        or entry.get("stage_versions") != dict(STAGE_VERSIONS)
        or entry.get("recipe_sha256") != digest(recipe)
    ]


def shipped() -> list[Path]:
    """Return the recipes of the tables, the least work first."""
    slow = ["swin-tiny", "resnet50", "paddle-resnet50", "hunyuan-small", "swin-tiny-int8", "rtdetr"]
    names = [name for rows in TABLES.values() for name in rows]
    return [
        Path("recipes", f"{name}.yaml")
        for name in sorted(names, key=lambda name: slow.index(name) if name in slow else -1)
    ]


def together(report: dict[str, Any], store: Path) -> dict[str, Any]:
    """Return what the parts did together, by step: the metric, and the share of samples that are as the source has them."""
    found = {
        step["subject"].removeprefix("together:"): {
            key: record(step, store)["facts"][key] for key in ("metric", "same")
        }
        for step in report["steps"]
        if step["id"].startswith("verify:together:") and record(step, store)
    }
    return {"together": found} if found else {}


def record(step: dict[str, Any], store: Path) -> dict[str, Any]:
    """Return the action record of a step: empty where it never ran."""
    path = store / "cache" / "actions" / step["stage"] / f"{step['key']}.json"
    return json.loads(path.read_bytes()) if path.is_file() else {}


def exported(document: dict[str, Any], report: dict[str, Any], store: Path) -> dict[str, Any]:
    """Return which exporter wrote which opset, for each part: as the record of the stage has it."""
    framework = document["source"]["framework"] if "source" in document else None  # else each part has its own
    exporter = {"paddle": "paddle2onnx", "onnx": "none", None: "of each part"}.get(framework)
    found: dict[str, Any] = {
        "exporter": exporter or document.get("export", {}).get("exporter", "dynamo"),
        "simplifier": document.get("export", {}).get("simplifier"),
    }
    for step in report["steps"]:
        if step["stage"] == "export" and record(step, store):
            facts = record(step, store)["facts"]
            kept = {key: facts[key] for key in ("opset", "parameters") if facts.get(key) is not None}
            found["parts" if ":" in step["id"] else "graph"] = (
                {**found.get("parts", {}), step["id"].partition(":")[2]: kept} if ":" in step["id"] else kept
            )
    return found


def published(engine: dict[str, Any], store: Path) -> dict[str, Any]:
    """Return what was asked, given and measured of one engine; of one that was not published, why."""
    keys = ("target", "precision", "size", "tried", "executed")
    found = {key: engine[key] for key in keys}
    if engine["path"] is None:
        return {**found, "published": False, "why": engine["why"]}
    manifest = json.loads((store / engine["path"] / "manifest.json").read_bytes())
    found["kept"], found["outliers"] = (manifest["precision"].get(key, []) for key in ("kept", "outliers"))
    parts = manifest.get("parts")
    if parts:
        found["parts"] = {name: measured(part["verification"]) for name, part in parts.items()}
    if manifest.get("calibration"):
        found["calibration"] = manifest["calibration"]
    return {**found, **measured(manifest["verification"])}


def measured(verification: dict[str, Any]) -> dict[str, Any]:
    """Return parity (over all cases, and on labelled data) and metric of the engine where it was executed, else of its graph."""
    of = "engine" if verification["engine"]["executed"] else "graph"
    return {
        "measured": of,
        **{key: verification[of].get(key) for key in ("parity", "data", "metric") if verification[of].get(key)},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="*", type=Path)
    parser.add_argument("--stale", action="store_true", help="those that are not as today's code would build them")
    parser.add_argument("--docs", action="store_true", help="write the tables of docs/sources.md alone")
    parser.add_argument("--variant")
    parser.add_argument("--store", type=Path, help="keep the store there, and take what it has (default: an empty one)")
    arguments = parser.parse_args()
    os.chdir(ROOT)
    for recipe in [] if arguments.docs else arguments.recipes or (stale(entries()) if arguments.stale else shipped()):
        with tempfile.TemporaryDirectory() as folder:
            entry = measure(recipe, arguments.store or Path(folder, "store"))
        name = entry["recipe"] + (f"#{arguments.variant}" if arguments.variant else "")
        before = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
        document = {
            "command": "python -m bench.sources",
            "cpu": f"{len(os.sched_getaffinity(0))} x {platform.machine()}, no GPU",
            "python": platform.python_version(),
            "recipes": {**before.get("recipes", {}), name: entry},
        }
        RESULTS.write_text(json.dumps(document, indent=1) + "\n")
        for engine in entry["engines"]:
            given, parity = engine["precision"], (engine.get("parity") or {}).get("relative_l2")
            print(f"{name}: {engine['target']} {given['asked']} -> {given['given']}, relative_l2 {parity}", flush=True)
    DOCUMENT.write_text(written(DOCUMENT.read_text(), entries()))


if __name__ == "__main__":
    main()
