"""Build digits in every precision for TensorRT-RTX and ONNX Runtime, and write what each was given with its parity.

    python bench/precisions.py

TensorRT-RTX compiles without a GPU and is not executed: the parity of its engines is that of the typed graph in ONNX Runtime.
Results go to bench/results/precisions.json, the words of a compiler that refuses among them.
"""

from __future__ import annotations

import asyncio
import json
import platform
import shutil
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from artifacts.catalog import EngineCatalog
from artifacts.store import open_store
from recipes.plan import Plan
from recipes.steps import Step
from tasks.drive import drive
from tasks.session import BuildSession, Outcome, open_session

ROOT = Path(__file__).resolve().parents[1]
GPUS = {
    "int8": ["sm80", "sm86", "sm89", "sm120", "sm121"],
    "int8-fp16": ["sm80", "sm86", "sm89", "sm120", "sm121"],
    "bf16": ["sm80", "sm86", "sm89", "sm120", "sm121"],
    "fp8": ["sm89", "sm120", "sm121"],
    "fp8-fp16": ["sm89", "sm120", "sm121"],
}
PACKAGES = ("onnx", "onnxruntime", "onnxsim", "tensorrt-rtx", "numpy")


def targets() -> list[dict[str, Any]]:
    """One target for each GPU, with every precision that it may have, and one for the CPU."""
    gpus = dict.fromkeys(gpu for found in GPUS.values() for gpu in found)
    return [
        {"runtime": "tensorrt-rtx", "gpus": [gpu], "precision": [name for name, has in GPUS.items() if gpu in has]}
        for gpu in gpus
    ] + [{"runtime": "onnxruntime", "gpus": ["cpu"], "precision": ["int8", "int8-fp16", "int8-dynamic", "fp16"]}]


def built(session: BuildSession) -> Plan:
    """Build a recipe and return its last plan."""

    async def run(step: Step, planned: Any) -> Outcome:
        return await asyncio.to_thread(session.ensure, step, planned)

    planned = asyncio.run(drive(session, run))
    session.finish(planned)
    return planned


def measure(folder: Path, change: dict[str, Any]) -> list[dict[str, Any]]:
    shutil.copytree(ROOT / "recipes" / "digits", folder / "digits", ignore=shutil.ignore_patterns("__pycache__"))
    document = yaml.safe_load((ROOT / "recipes" / "digits-onnx.yaml").read_text()) | {"targets": targets()} | change
    (folder / "recipe.yaml").write_text(yaml.safe_dump(document))
    session = open_session(folder / "recipe.yaml", open_store(str(folder / "store")))
    planned = built(session)
    manifests = {
        (one.compatibility.runtime, one.compatibility.gpus[0], one.precision.asked): one
        for one in EngineCatalog(session.store).manifests()
    }
    rows = []
    for engine in planned.engines:
        manifest = manifests.get((engine.runtime, engine.gpu, engine.asked))
        row: dict[str, Any] = {"runtime": engine.runtime, "gpu": engine.gpu, "asked": engine.asked, "given": None}
        if manifest is None:
            rows.append({**row, "why": engine.why})
            continue
        measured = manifest.verification.engine if engine.runtime == "onnxruntime" else manifest.verification.graph
        quantized = manifest.precision.quantized
        rows.append(
            {
                **row,
                "given": manifest.precision.given,
                "size": manifest.files[manifest.plan].size,
                "relative_l2": (measured.data or measured.parity).relative_l2 if measured.parity else None,
                "metric": measured.metric.value if measured.metric else None,
                "source_metric": measured.metric.source if measured.metric else None,
                "nodes": f"{quantized.nodes} of {quantized.of_nodes}" if quantized else None,
                "executed": manifest.verification.engine.executed,
            }
        )
    return rows


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        precision = {"build": ["int8"], "fallback": {}, "calibration": {"data": "digits/calibration.npz"}}
        rows = measure(Path(folder), {"precision": precision})
    document = {
        "command": "python bench/precisions.py",
        "model": "recipes/digits-onnx.yaml, as it is but for precisions and targets; ranges by entropy (fp8: minmax)",
        "host": f"{platform.machine()}, no GPU",
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in PACKAGES},
        "engines": rows,
    }
    results = ROOT / "bench" / "results" / "precisions.json"
    document["keep_auto"] = json.loads(results.read_text()).get("keep_auto", {})  # of bench/keep_auto.py
    results.write_text(json.dumps(document, indent=1) + "\n")
    for row in rows:
        print(row)


if __name__ == "__main__":
    main()
