"""Compile the digits recipe with TensorRT on the GPU that is here, execute it, and judge it: fp32, tf32, fp16, int8.

    python bench/trt86_digits.py INPUTS RESULT.json

INPUTS is what bench/digits_inputs.py wrote (typed graphs, references, held-out data, made without a GPU). Each build and
each verification is the product's own stage in its own process, bounded by a time-out; RESULT.json is written after each,
so that a lease that ends leaves what was measured. Parity is over min, opt and max of both profiles.
"""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from recipes.gates import judge
from recipes.schema import Acceptance
from tasks.engines.cuda import device_properties, driver_version
from tasks.errors import TaskError
from tasks.process import Limits, run_stage

SECONDS = 150
LIMITS = Limits(timeout_s=SECONDS, memory_bytes=64 << 30)
GPU = device_properties()["compute_capability"]


def compile_params(precision: str, profiles: list) -> dict:
    return {
        "runtime": "tensorrt",
        "gpu": GPU,
        "precision": precision,
        "tf32": precision == "tf32",
        "profiles": profiles,
        "workspace": None,
        "optimization_level": None,
        "hardware_compatibility": "none",
        "version_compatible": False,
    }


def compiled(graph: Path, params: dict, folder: Path, cache: Path | None = None) -> dict:
    inputs = {"model.onnx": graph, **({"timing.cache": cache} if cache is not None else {})}
    folder.mkdir(parents=True)
    started = time.monotonic()
    result = run_stage("compile", params, inputs, folder, limits=LIMITS, entry="tasks.engines.trt:compile_plan")
    return {**result.facts, "stage_seconds": round(time.monotonic() - started, 3)}


def verified(plan: Path, inputs: Path, recipe: dict, folder: Path) -> dict:
    folder.mkdir(parents=True)
    files = {name: inputs / name for name in ("reference.safetensors", "dataset.safetensors", "outputs.safetensors")}
    params = {
        "subject": "engine",
        "executor": "tensorrt",
        "batch": 32,
        "metric": recipe["metric"],
        "tensors": recipe["tensors"],
        "gpu": GPU,
    }
    return dict(run_stage("verify", params, {"model.plan": plan, **files}, folder, limits=LIMITS).facts)


def shown(facts: dict) -> dict:
    """What of a compilation's facts is worth keeping in a result."""
    kept = {
        name: facts[name]
        for name in ("seconds", "stage_seconds", "workspace", "settings", "layers", "timing_cache", "size")
    }
    return kept | {"warnings": [words[:200] for words in facts["warnings"][:5]], "log_lines": facts["log_lines"]}


def types_of(listing: Path) -> dict:
    """Count the layers' outputs by type, as the inspector words it: whether fp16 and int8 were used at all."""
    layers = [layer for layer in json.loads(listing.read_text())["Layers"] if isinstance(layer, dict)]
    words = [output.get("Format/Datatype", "?") for layer in layers for output in layer.get("Outputs", ())]
    kinds = ("Half", "FP16", "Int8", "INT8", "FP32", "Float")
    return dict(Counter(next((kind for kind in kinds if kind.lower() in word.lower()), word) for word in words))


def main() -> None:
    inputs, target = Path(sys.argv[1]), Path(sys.argv[2])
    recipe = json.loads((inputs / "recipe.json").read_text())
    acceptance = Acceptance.model_validate(recipe["acceptance"])
    work = Path(tempfile.mkdtemp())
    smi = ["nvidia-smi", "--query-gpu=name,driver_version,clocks.sm,clocks.mem", "--format=csv,noheader"]
    result: dict = {
        "command": "python bench/trt86_digits.py INPUTS RESULT.json",
        "device": device_properties(),
        "nvidia_smi": subprocess.run(smi, capture_output=True, text=True, check=False).stdout.strip(),
        "cuda": driver_version(),
        "python": platform.python_version(),
        "time_limit_of_each_stage_s": SECONDS,
        "profiles": recipe["profiles"],
        "engines": {},
    }

    def keep() -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(result, indent=1, sort_keys=True) + "\n", "utf-8")

    for precision in ("fp32", "tf32", "fp16", "int8"):
        graph = inputs / ("fp32" if precision == "tf32" else precision) / "model.onnx"
        row: dict = {}
        result["engines"][precision] = row
        try:
            facts = compiled(graph, compile_params(precision, recipe["profiles"]), work / precision)
            result["tensorrt"] = facts["runtime_version"]
            row["compile"] = shown(facts) | {"outputs_by_type": types_of(work / precision / "layers.json")}
            row["verify"] = verified(work / precision / "model.plan", inputs, recipe, work / f"{precision}-verify")
            verdict = judge(row["verify"], acceptance, precision)  # type: ignore[arg-type]
            row["gates"] = {"passed": verdict.passed, "reasons": list(verdict.reasons)}
            again = compiled(
                graph,
                compile_params(precision, recipe["profiles"]),
                work / f"{precision}-again",
                work / precision / "timing.cache",
            )
            row["compile_with_timing_cache"] = shown(again)
        except TaskError as err:
            row["error"] = str(err)
        keep()
        print(precision, json.dumps(row.get("verify", row.get("error")))[:1500], flush=True)
        for name in ("compile", "compile_with_timing_cache"):
            print("  ", name, json.dumps(row.get(name))[:900], flush=True)
    shutil.rmtree(work)


if __name__ == "__main__":
    main()
