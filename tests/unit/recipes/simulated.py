"""A build without stages: records are made up from keys, so that planning can be tested on its own."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from artifacts.host import Host
from artifacts.records import ActionRecord
from artifacts.refs import ArtifactRef
from recipes.files import CodeBundle, DatasetFiles, LocalFile, RecipeFiles
from recipes.plan import Plan, Selection
from recipes.planner import plan
from recipes.refitting import Bases
from recipes.schema import Recipe
from recipes.steps import Step

OUTPUTS = {
    "export": ["model.onnx"],
    "simplify": ["model.onnx"],
    "type": ["model.onnx"],
    "calibrate": ["ranges.json", "calibration.json"],
    "outliers": ["outliers.json"],
    "sensitivity": ["keep.json", "sensitivity.json"],
    "reference:parity": ["reference.safetensors"],
    "reference:labelled": ["outputs.safetensors"],
    "reference:together": ["outputs.safetensors"],
    "fetch:together": ["code.tar"],
    "reference:held-out": ["held-out.safetensors"],
    "fetch:weights": ["weights.safetensors"],
    "fetch:code": ["code.tar"],
    "fetch:metric": ["code.tar"],
    "fetch:model": ["model.onnx"],
    "fetch:calibration": ["dataset.safetensors"],
    "calibrate:tensorrt:sm90": ["calibration.cache"],
    "fetch:plugin-aaaaaaaaaaaaaaaa.so": ["plugin-aaaaaaaaaaaaaaaa.so"],
    "fetch:labelled": ["dataset.safetensors"],
    "check": [],
    "explain": [],
    "verify": [],
    "save": ["model.pt2"],
    "benchmark": [],
    "publish": [],
}
GOOD = {
    "executed": True,
    "parity": {"relative_l2": 1e-6, "max_abs": 1e-5, "cosine": 1.0, "non_finite": 0},
    "metric": {"name": "top1", "value": 0.99, "source": 0.99},
}
VERSIONS = {
    "torch": "2.13.0",
    "onnx": "1.17.0",
    "onnxscript": "0.7.2",
    "onnxruntime": "1.31.1",
    "onnxsim": "0.8.1",
    "onnxslim": "0.1.98",
    "numpy": "2.4.6",
    "pillow": "13.0.0",
    "tensorrt_rtx_cu13": "1.7.1.116",
}
HOST = Host("here", "linux", "x86_64", runtimes={"tensorrt-rtx": "1.7.1.116", "onnxruntime": "1.31.1"})

RECIPE = """
enginery: 1
name: digits
source: {framework: torch, model: 'model.py:build', weights: {file: weights.safetensors}}
export: {opset: 18}
inputs: {image: {shape: [batch, 1, height, width]}}
outputs: [logits]
profiles:
  online: {batch: [1, 1, 4], height: [8, 8, 16], width: [8, 8, 16]}
  bulk: {batch: [1, 64, 256], height: [8, 8, 8], width: [8, 8, 8]}
precision:
  build: [int8, fp16]
  fallback: {int8: [fp16, fp32], fp16: [fp32]}
  calibration: {data: calibration.npz, samples: 256}
acceptance: {metric: {name: top1, data: {data: heldout.npz}, floor: 0.97, max_drop: 0.01}}
targets:
  - {runtime: tensorrt-rtx, gpus: [sm89, sm120]}
  - {runtime: onnxruntime, precision: [fp32, int8]}
"""


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def bundle(**members: str) -> CodeBundle:
    digests = {f"{name}.py": digest(text) for name, text in sorted(members.items())}
    return CodeBundle(
        digest(str(digests)), 10240, "model:build", {name: Path(name) for name in digests}, digests, ("torch",)
    )


FILES = RecipeFiles(
    code=bundle(model="import layers", layers="..."),
    weights=LocalFile("weights.safetensors", digest("weights"), 10, "weights.safetensors"),
    calibration=DatasetFiles("npz", digest("calibration"), Path("calibration.npz")),
    labelled=DatasetFiles("npz", digest("heldout"), Path("heldout.npz")),
)


def recipe(change: Callable[[dict[str, Any]], object] = lambda _document: None) -> Recipe:
    document = yaml.safe_load(RECIPE)
    change(document)
    return Recipe.model_validate(document)


@dataclass
class World:
    """A store of made-up records, a host, and the last build's preimages."""

    records: dict[tuple[str, str], ActionRecord] = field(default_factory=dict)
    previous: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=lambda: dict(VERSIONS))
    host: Host = HOST
    facts: dict[str, Mapping[str, Any]] = field(default_factory=dict)  # step id or stage -> facts
    same_bytes: set[str] = field(default_factory=set)  # step ids whose output does not depend on their key
    failures: dict[str, str] = field(default_factory=dict)
    spent: dict[str, float] = field(default_factory=dict)  # seconds of this build's steps, by key
    bases: Bases = lambda _identity: ()

    def plan(self, made: Recipe, files: RecipeFiles = FILES, targets: tuple[str, ...] = ()) -> Plan:
        return plan(
            made,
            files,
            self.host,
            version=self.versions.get,
            lookup=lambda stage, key: self.records.get((stage, key)),
            previous=lambda: self.previous,
            failures=self.failures,
            spent=self.spent,
            selection=Selection(targets),
            bases=self.bases,
        )

    def build(self, made: Recipe, files: RecipeFiles = FILES, targets: tuple[str, ...] = ()) -> tuple[list[str], Plan]:
        """Run ready steps until none is left; return the ids in the order in which they ran, and the last plan."""
        ran: list[str] = []
        while True:
            planned = self.plan(made, files, targets)
            if not planned.ready:
                break
            for step in planned.ready:
                self.records[step.stage, step.action.key] = self.run(step)
                ran.append(step.id)
        self.previous |= {step.id: step.action.preimage() for step in planned.steps if step.record is not None}
        return ran, planned

    def run(self, step: Step) -> ActionRecord:
        of_a_part = OUTPUTS.get(f"{step.stage}:{step.subject.rpartition(':')[2]}", OUTPUTS.get(step.stage))
        names = OUTPUTS.get(step.id, of_a_part)
        if names is None and isinstance(step.local, LocalFile):
            names = [step.local.name]
        if names is None:
            names = ["model.plan" if "tensorrt" in step.id else "model.onnx"]
        # A simplifier makes the same graph whatever the profiles are that it is checked in.
        params = {name: value for name, value in step.action.params.items() if name not in ("profiles", "cases")}
        seed = replace(step.action, params=params).key if step.stage == "simplify" else step.action.key
        # No tensor overflows, whatever the data.
        seed = step.id if step.id in self.same_bytes or step.stage == "outliers" else seed
        outputs = {name: ArtifactRef(digest(f"{name} {seed}"), 100, "x/y") for name in names}
        facts = self.facts.get(step.id, self.facts.get(step.stage, GOOD if step.stage == "verify" else {}))
        return ActionRecord(step.action.preimage(), outputs, facts, seconds=1.0)
