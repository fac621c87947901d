"""The nine cases, with real stages: each change re-runs exactly the stages it should, and nothing else."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml

from tests.integration.building import build, copy_digits

pytestmark = pytest.mark.slow

GRAPHS = {"verify:export", "verify:simplify", "verify:int8", "verify:fp16", "verify:fp32"}
TYPES = {"type:int8", "type:fp16", "type:fp32"}
RTX = {"compile:tensorrt-rtx:sm89:int8", "compile:tensorrt-rtx:sm89:fp16"}
ORT = {"compile:onnxruntime:cpu:fp32", "compile:onnxruntime:cpu:int8"}
ORT_VERIFY = {"verify:onnxruntime:cpu:fp32", "verify:onnxruntime:cpu:int8"}
PUBLISH = {
    "publish:tensorrt-rtx:sm89:int8",
    "publish:tensorrt-rtx:sm89:fp16",
    "publish:onnxruntime:cpu:fp32",
    "publish:onnxruntime:cpu:int8",
}
ENGINES = RTX | ORT | ORT_VERIFY | PUBLISH
FETCH = {"fetch:code", "fetch:weights", "fetch:calibration", "fetch:labelled"}
REFERENCE = {"reference:parity", "reference:labelled"}
EVERYTHING = FETCH | REFERENCE | {"export", "simplify", "calibrate"} | TYPES | GRAPHS | ENGINES
FROM_EXPORT = {"export", "simplify", "calibrate"} | TYPES | GRAPHS | ENGINES
INT8 = {step for step in EVERYTHING if step.endswith(":int8")}
FP16 = {step for step in EVERYTHING if step.endswith(":fp16")}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    ran, planned, _session = build(copy_digits(folder), folder / "store")
    assert ran == EVERYTHING
    assert planned.status == 0
    return folder


def edit(change):
    def apply(folder: Path) -> None:
        document = yaml.safe_load((folder / "digits.yaml").read_text())
        change(document)
        (folder / "digits.yaml").write_text(yaml.safe_dump(document, sort_keys=False))

    return apply


def change_one_sample(folder: Path) -> None:
    path = folder / "digits" / "calibration.npz"
    with np.load(path) as data:
        arrays = {name: data[name].copy() for name in data.files}
    arrays["image"][0, 0, 3, 3] = 1.0 - arrays["image"][0, 0, 3, 3]
    # A range must move for calibration to find something else: one pixel beyond what the set held.
    arrays["image"][0, 0, 4, 4] = 1.7
    np.savez(path, **arrays)


def change_one_weight(folder: Path) -> None:
    from safetensors.numpy import load_file, save_file

    path = folder / "digits" / "weights.safetensors"
    weights = load_file(path)
    name = next(name for name in sorted(weights) if weights[name].ndim == 4)
    weights[name] = weights[name].copy()
    weights[name].flat[0] += 0.01
    save_file(weights, path)


def change_model_code(folder: Path) -> None:
    path = folder / "digits" / "layers.py"
    path.write_text(path.read_text() + "\n# a comment: other code, the same network\n")


CASES = {
    "opset": (edit(lambda d: d["export"].update(opset=20)), FROM_EXPORT),
    "profile": (
        edit(lambda d: d["profiles"]["bulk"].update(batch=[1, 64, 512])),
        {"reference:parity", "simplify"} | GRAPHS | RTX | ORT_VERIFY | PUBLISH,
    ),
    "precision": (
        edit(lambda d: d["precision"].update(build=["int8", "fp32"])),
        {"compile:tensorrt-rtx:sm89:fp32", "publish:tensorrt-rtx:sm89:fp32"},
    ),
    "calibration sample": (change_one_sample, INT8 | {"fetch:calibration", "calibrate"}),
    "kept layers": (None, INT8 | FP16),  # the glob needs a node of the graph: see the test
    "weight": (change_one_weight, EVERYTHING - {"fetch:code", "fetch:calibration", "fetch:labelled"}),
    # The exported bytes are the same, so nothing after the export runs again.
    "model code": (change_model_code, {"fetch:code", "export", *REFERENCE}),
    "simplifier": (
        edit(lambda d: d["export"].update(simplifier="onnxslim")),
        FROM_EXPORT - {"export", "verify:export"},
    ),
    "target": (
        edit(lambda d: d["targets"][0].update(gpus=["sm89", "sm120"])),
        {
            f"{stage}:tensorrt-rtx:sm120:{precision}"
            for stage in ("compile", "publish")
            for precision in ("int8", "fp16")
        },
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_change_runs_exactly_the_stages_that_it_touches(base: Path, tmp_path: Path, case: str):
    folder = tmp_path / "work"
    shutil.copytree(base, folder, copy_function=_link_or_copy)
    change, expected = CASES[case]
    if change is None:
        from enginery_graph import last_node  # noqa: F401
    change(folder)
    ran, planned, _session = build(folder / "digits.yaml", folder / "store")
    assert ran == expected
    assert planned.fresh


def _link_or_copy(source: str, target: str) -> None:
    if "/store/" in source:
        Path(target).hardlink_to(source)
    else:
        shutil.copyfile(source, target)
