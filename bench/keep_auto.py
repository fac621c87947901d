"""Run `keep: auto` on a real architecture at full size, and write what it took and chose into bench/results/precisions.json.

    python bench/keep_auto.py recipes/resnet50.yaml --relative-l2 0.05

The recipe is built as int8-fp16 for TensorRT-RTX, with ranges by entropy from crops of scikit-learn's photographs, and the parity bound
given. Beside the whole stage, one group is quantised alone by typing the graph anew, as every group was before `tasks.quantized_groups`.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import os
import shutil
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from artifacts.cache import blob_path
from artifacts.store import open_store
from bench.precisions import PACKAGES, ROOT, built
from tasks.onnx_files import GRAPH
from tasks.onnx_sessions import GraphRunner
from tasks.precision import KEEP
from tasks.precision import run as typed
from tasks.sensitivity import MOST_SAMPLES
from tasks.session import BuildSession, open_session
from tasks.stage import StageRequest

RESULTS = ROOT / "bench" / "results" / "precisions.json"


def measure(recipe: Path, bound: float, samples: int, store: Path) -> dict[str, Any]:
    folder = store.parent / "recipe"
    shutil.copytree(recipe.parent, folder, ignore=shutil.ignore_patterns("__pycache__", "*.py", "*.safetensors"))
    for code in (recipe.with_suffix(""), recipe.parent / "swin-tiny"):
        shutil.copytree(code, folder / code.name, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
    document = yaml.safe_load(recipe.read_text())
    data = {"data": "swin-tiny/images.py:crops", "samples": samples, "method": "entropy", "batch": 4}
    document["precision"] = {"build": ["int8-fp16"], "keep": "auto", "calibration": data}
    document["acceptance"] = {"parity": {"int8-fp16": {"relative_l2": bound}}}
    document["targets"] = [{"runtime": "tensorrt-rtx", "gpus": ["sm89"]}]
    document["profiles"] = {"default": {"batch": [1, 1, 2]}}
    (folder / recipe.name).write_text(yaml.safe_dump(document))
    load = os.getloadavg()[0]
    session = open_session(folder / recipe.name, open_store(str(store)))
    planned = built(session)
    steps = {step.id: step for step in planned.steps}
    record = steps["sensitivity:int8-fp16"].record
    found = json.loads(session.store.read(blob_path(record.outputs["sensitivity.json"].digest)))
    facts = steps["verify:int8-fp16"].facts
    return {
        "recipe": str(recipe),
        "date": dt.datetime.now(tz=dt.timezone.utc).date().isoformat(),
        "bound": bound,
        "samples": samples,
        "load_before": round(load, 1),
        "given": planned.engines[0].given,
        "why": planned.engines[0].why,
        "parity_on_held_out_data": facts["data"],
        "seconds": round(record.seconds, 1),
        "ranked_on_samples": MOST_SAMPLES,
        "groups": len(found["groups"]),
        "kept_groups": record.facts["kept_groups"],
        "kept": record.facts["kept"],
        "tried": found["tried"],
        "first": found["groups"][:5],
        "last": found["groups"][-1],
        "one_group_by_typing_s": by_typing(session, steps, found["groups"]),
    }


def by_typing(session: BuildSession, steps: dict[str, Any], groups: list[dict[str, Any]]) -> float:
    """Return the seconds that typing one group and loading its graph take: what each group cost, its run not counted."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for step, file in (("simplify", GRAPH), ("calibrate", "ranges.json")):
            ref = steps[step].record.outputs[file]
            session.store.get_file(blob_path(ref.digest), ref, folder / file)
        others = [node for group in groups[1:] for node in group["nodes"]]
        (folder / KEEP).write_text(json.dumps(dict.fromkeys(others, "")))
        (folder / "typed").mkdir()
        begin = time.perf_counter()
        inputs = {file: folder / file for file in (GRAPH, "ranges.json", KEEP)}
        params = {"precision": "int8", "keep": [], "io": "float32"}
        typed(StageRequest("type", params, inputs, folder / "typed"))
        GraphRunner(folder / "typed" / GRAPH)
        return round(time.perf_counter() - begin, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--relative-l2", type=float, default=0.05)
    parser.add_argument("--samples", type=int, default=16)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(asked.recipe.resolve(), asked.relative_l2, asked.samples, Path(folder, "store"))
    found["recipe"] = str(asked.recipe)
    document = json.loads(RESULTS.read_text())
    document["keep_auto"] = {
        **document.get("keep_auto", {}),
        str(asked.recipe): {
            "command": f"python bench/keep_auto.py {asked.recipe} --relative-l2 {asked.relative_l2:g}",
            "versions": {name: metadata.version(name) for name in PACKAGES},
            **found,
        },
    }
    RESULTS.write_text(json.dumps(document, indent=1) + "\n")
    print({name: found[name] for name in ("given", "seconds", "groups", "kept_groups", "one_group_by_typing_s")})


if __name__ == "__main__":
    main()
