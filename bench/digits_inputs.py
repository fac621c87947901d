"""Do the portable part of the digits recipe and lay out what a GPU host needs to compile and judge it.

    python bench/digits_inputs.py FOLDER

Writes FOLDER/{fp32,fp16,int8}/model.onnx (typed, ONNX opset 17: what TensorRT 8.6 reads), reference.safetensors,
dataset.safetensors and outputs.safetensors (held-out data and the source's answers), and recipe.json (profiles, inputs,
acceptance, and what was measured of the typed graphs in ONNX Runtime). A few seconds on two cores.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import sys
import tempfile
from pathlib import Path

import yaml

from artifacts.cache import blob_path
from artifacts.store import open_store
from recipes.plan import Plan
from recipes.shapes import profile_shapes
from recipes.steps import Step
from tasks.drive import drive
from tasks.session import Outcome, open_session

RECIPES = Path(__file__).resolve().parent.parent / "recipes"
FILES = {
    "fp32/model.onnx": ("type:fp32", "model.onnx"),
    "fp16/model.onnx": ("type:fp16", "model.onnx"),
    "int8/model.onnx": ("type:int8", "model.onnx"),
    "reference.safetensors": ("reference:parity", "reference.safetensors"),
    "dataset.safetensors": ("fetch:labelled", "dataset.safetensors"),
    "outputs.safetensors": ("reference:labelled", "outputs.safetensors"),
}


def recipe_for_8_6(folder: Path) -> Path:
    """Copy the recipe, exported at opset 17 (which the dynamo exporter does not write) in every precision of 8.6."""
    shutil.copytree(RECIPES / "digits", folder / "digits", ignore=shutil.ignore_patterns("__pycache__"))
    document = yaml.safe_load((RECIPES / "digits.yaml").read_text())
    document["export"] = {"opset": 17, "exporter": "torchscript", "simplifier": "onnxsim"}
    document["precision"] |= {"build": ["fp32", "tf32", "fp16", "int8"], "fallback": {}}
    document["targets"] = [{"runtime": "tensorrt", "gpus": ["sm90"]}]
    path = folder / "digits.yaml"
    path.write_text(yaml.safe_dump(document, sort_keys=False))
    return path


def main() -> None:
    out = Path(sys.argv[1])
    with tempfile.TemporaryDirectory() as work:
        store = open_store(str(Path(work, "store")))
        session = open_session(recipe_for_8_6(Path(work)), store)

        async def run(step: Step, planned: Plan) -> Outcome:
            return await asyncio.to_thread(session.ensure, step, planned)

        planned = asyncio.run(drive(session, run))
        session.finish(planned)
        records = {step.id: step.record for step in planned.steps if step.record is not None}
        for name, (step, made) in FILES.items():
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            ref = records[step].outputs[made]
            (out / name).write_bytes(store.read(blob_path(ref.digest)))
        recipe = session.loaded.recipe
        metric = recipe.acceptance.metric
        description = {
            "profiles": profile_shapes(recipe),
            "tensors": {name: tensor.model_dump() for name, tensor in recipe.inputs.items()},
            "acceptance": recipe.acceptance.model_dump(),
            "metric": {"name": metric.name, "entry": None, "label": metric.labels, "output": metric.output}
            if metric
            else None,
            "graphs": {name[7:]: dict(record.facts) for name, record in records.items() if name.startswith("verify:")},
        }
    (out / "recipe.json").write_text(json.dumps(description, indent=1, sort_keys=True) + "\n", "utf-8")


if __name__ == "__main__":
    main()
