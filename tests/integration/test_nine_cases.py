"""The nine cases, with real stages: each change re-runs exactly the stages it should, and nothing else.

A step is named by what it is applied to, but runs by its key. So a change travels only as far as bytes differ: what a
re-run step makes again, bit for bit, leaves all that follows cached (early cut-off). And the fp32 graph is the
simplified one, unchanged: `verify:fp32` has the key of `verify:simplify`, which is first in the plan and runs for both.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from artifacts.catalog import EngineCatalog
from artifacts.folder import FolderStore
from recipes.plan import Plan
from tests.integration.building import build, copy_digits, edit_recipe, enginery, link_store

pytestmark = pytest.mark.slow

GRAPHS = {"verify:export", "verify:simplify", "verify:int8", "verify:fp16"}
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
CHECK = "check:tensorrt-rtx"
EVERYTHING = FETCH | REFERENCE | {"export", "simplify", CHECK, "calibrate", "outliers"} | TYPES | GRAPHS | ENGINES
FROM_SIMPLIFY = {"simplify", CHECK, "calibrate", "outliers"} | TYPES | (GRAPHS - {"verify:export"}) | ENGINES
INT8 = {step for step in EVERYTHING if step.endswith(":int8")}
FP16 = {step for step in EVERYTHING if step.endswith(":fp16")}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the recipe and the store of its first build, which ran everything."""
    folder = tmp_path_factory.mktemp("base")
    ran, planned, _session = build(copy_digits(folder), folder / "store")
    assert ran == EVERYTHING
    assert {step.id for step in planned.steps} == EVERYTHING | {"verify:fp32"}
    assert planned.fresh
    assert planned.status == 0
    return folder


def test_what_each_range_costs_is_published_with_int8_and_shown_worst_first(base: Path):
    shown = enginery("show", "cpu/int8", "--ranges", "--json", "--store", str(base / "store"), cwd=base)
    report = json.loads(shown.stdout)[""]
    rows = report["tensors"]
    assert [row["snr_db"] for row in rows] == sorted(row["snr_db"] for row in rows)
    assert 15 < rows[0]["snr_db"] < rows[-1]["snr_db"] < 60
    assert all(row["nodes"] and 0 <= row["clipped"] < 0.2 for row in rows)
    manifests = {
        one.precision.given: one for one in EngineCatalog(FolderStore(base / "store")).manifests() if one.calibration
    }
    assert manifests["int8"].calibration.worst.tensor == rows[0]["tensor"]
    assert "calibration.json" in manifests["int8"].files
    refused = enginery("show", "cpu/fp32", "--ranges", "--store", str(base / "store"), cwd=base)
    assert (refused.returncode, "has no calibration report" in refused.stderr) == (1, True)


def _one_sample(folder: Path) -> None:
    """One pixel beyond the range of the set, so that calibration, too, finds something else."""
    path = folder / "digits" / "calibration.npz"
    with np.load(path) as data:
        arrays = {name: data[name].copy() for name in data.files}
    arrays["image"][0, 0, 4, 4] = 1.7
    np.savez(path, **arrays)


def _one_weight(folder: Path) -> None:
    from safetensors.numpy import load_file, save_file

    path = folder / "digits" / "weights.safetensors"
    weights = load_file(path)
    name = min(name for name in weights if weights[name].ndim == 4)
    weights[name] = weights[name].copy()
    weights[name].flat[0] += 0.01
    save_file(weights, path)


def _model_code(folder: Path) -> None:
    path = folder / "digits" / "layers.py"
    path.write_text(f"# Other code, the same network.\n\n{path.read_text()}")


@dataclass(frozen=True)
class Case:
    """A change; the steps that it re-runs; what `plan --explain` says of one of them, as a regular expression."""

    change: Callable[[Path], None]
    reruns: set[str]
    step: str
    why: str


DIGEST = "[0-9a-f]{12}…"
CASES = {
    # The graph's header states the opset, so every graph differs. The source's own outputs do not depend on it. TensorRT
    # may compile the very same plan (see `_compiled_the_same`).
    "opset": Case(
        edit_recipe(lambda recipe: recipe["export"].update(opset=20)),
        {"export", "verify:export"} | FROM_SIMPLIFY,
        "export",
        r"miss: params\.opset 18 -> 20",
    ),
    # Exporters see no maximum, and the simplified graph comes out the same: calibration and typing stay cached, and so
    # does ONNX Runtime's model, which knows no profiles. Parity is measured at the new maximum for every graph, and
    # TensorRT compiles for the new range.
    "profile": Case(
        edit_recipe(lambda recipe: recipe["profiles"]["bulk"].update(batch=[1, 64, 512])),
        {"reference:parity", "simplify", "outliers"} | GRAPHS | RTX | ORT_VERIFY | PUBLISH,
        "compile:tensorrt-rtx:sm89:int8",
        r"miss: params\.profiles\[0\]\.inputs\.image\.max\[0\] 256 -> 512",
    ),
    # fp32 instead of fp16 for TensorRT: the fp32 graph was typed and verified for ONNX Runtime before.
    "precision": Case(
        edit_recipe(lambda recipe: recipe["precision"].update(build=["int8", "fp32"], fallback={"int8": ["fp16"]})),
        {"compile:tensorrt-rtx:sm89:fp32", "publish:tensorrt-rtx:sm89:fp32"},
        "compile:tensorrt-rtx:sm89:fp32",
        "miss: never built",
    ),
    "calibration sample": Case(
        _one_sample,
        {"fetch:calibration", "calibrate", "outliers"} | INT8,
        "fetch:calibration",
        rf"miss: inputs\.data\.npz {DIGEST} -> {DIGEST}",
    ),
    # The last layer stays in high precision. Ranges are kept apart from the graph: nothing is calibrated again. What
    # fp32 makes has nothing to keep high.
    "kept layers": Case(
        edit_recipe(lambda recipe: recipe["precision"].update(keep=["node_linea*"])),
        INT8 | FP16,
        "type:int8",
        r'miss: params\.keep \[\] -> \["node_linea\*"\]',
    ),
    "weight": Case(
        _one_weight,
        EVERYTHING - {"fetch:code", "fetch:calibration", "fetch:labelled"},
        "fetch:weights",
        rf"miss: inputs\.weights\.safetensors {DIGEST} -> {DIGEST}",
    ),
    # Other code may be another network, so the export and the source's outputs are made again; they come out the same,
    # bit for bit, and nothing that follows runs.
    "model code": Case(
        _model_code,
        {"fetch:code", "export"} | REFERENCE,
        "fetch:code",
        rf"miss: params\.members\.layers\.py {DIGEST} -> {DIGEST}",
    ),
    # The exported graph is as before, and so is its verification. The other simplifier orders weights otherwise and
    # notes more shapes; of this, casting to fp16 leaves nothing, so the fp16 graph comes out the same.
    "simplifier": Case(
        edit_recipe(lambda recipe: recipe["export"].update(simplifier="onnxslim")),
        FROM_SIMPLIFY - (FP16 - {"type:fp16"}),
        "simplify",
        r"miss: params\.simplifier onnxsim -> onnxslim",
    ),
    # Portable stages know no GPU.
    "target": Case(
        edit_recipe(lambda recipe: recipe["targets"][0].update(gpus=["sm89", "sm120"])),
        {
            f"{stage}:tensorrt-rtx:sm120:{precision}"
            for stage in ("compile", "publish")
            for precision in ("int8", "fp16")
        },
        "compile:tensorrt-rtx:sm120:int8",
        "miss: never built",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_change_runs_exactly_the_stages_that_it_touches(base: Path, tmp_path: Path, case: str):
    folder = tmp_path / "work"
    shutil.copytree(base, folder, copy_function=link_store)
    CASES[case].change(folder)

    explained = enginery("plan", "digits.yaml", "--explain", "--store", "store", cwd=folder)
    assert explained.returncode == 0, explained.stderr
    assert re.search(CASES[case].why, _row(explained.stdout, CASES[case].step)), explained.stdout
    announced = _states(explained.stdout)

    ran, planned, _session = build(folder / "digits.yaml", folder / "store")
    assert ran == CASES[case].reruns - _compiled_the_same(base, planned)
    assert planned.fresh
    # `plan` said so before: what it was sure of ran, and nothing ran that it did not at least expect.
    assert {step for step, state in announced.items() if state == "run"} <= ran
    assert ran <= {step for step, state in announced.items() if state in ("run", "follows")}

    again, _planned, _session = build(folder / "digits.yaml", folder / "store")
    assert again == set()


def test_undoing_a_change_runs_nothing(base: Path, tmp_path: Path):
    folder = tmp_path / "work"
    shutil.copytree(base, folder, copy_function=link_store)
    before = (folder / "digits.yaml").read_text()
    CASES["precision"].change(folder)
    assert build(folder / "digits.yaml", folder / "store")[0]
    (folder / "digits.yaml").write_text(before)
    assert build(folder / "digits.yaml", folder / "store")[0] == set()


def test_the_engines_are_those_of_the_issue(base: Path):
    """sm89 in fp16 and int8 is published; int8 is within one point of the source on the held-out digits."""
    _ran, planned, _session = build(base / "digits.yaml", base / "store")
    engines = {(engine.gpu, engine.given): engine for engine in planned.engines}
    assert set(engines) == {("sm89", "int8"), ("sm89", "fp16"), ("cpu", "fp32"), ("cpu", "int8")}
    for engine in engines.values():
        assert engine.state == "cached"
        metric = engine.verify.facts["metric"]
        assert metric["value"] >= metric["source"] - 0.01
        assert metric["samples"] == 450
        path = base / "store" / engine.publish.facts["path"]
        names = {file.name for file in path.iterdir() if file.is_file()}
        plan = "model.plan" if engine.gpu == "sm89" else "model.onnx"
        assert names == {"manifest.json", *engine.publish.facts["files"]}
        (provenance,) = names - {"manifest.json", plan, "calibration.json"}
        assert provenance.endswith(".intoto.json")


def _compiled_the_same(base: Path, planned: Plan) -> set[str]:
    """Return what need not be published again: the plan has the same bytes as before, and measured the same.

    Whether TensorRT makes the same bytes is its own affair: it does not always, even of equal graphs.
    """
    _ran, before, _session = build(base / "digits.yaml", base / "store")
    old = {engine.publish.id: engine for engine in before.engines if engine.compile.id in RTX}
    return {
        engine.publish.id
        for engine in planned.engines
        if engine.publish.id in old
        and engine.compile.action.key != old[engine.publish.id].compile.action.key
        and engine.compile.record.outputs == old[engine.publish.id].compile.record.outputs
        and engine.verify.facts == old[engine.publish.id].verify.facts
    }


def _rows(table: str) -> list[tuple[str, str, str]]:
    """Read the rows of a plan's table: (step, state, why)."""
    rows: list[tuple[str, str, str]] = []
    for line in table.splitlines():
        match = re.match(r" *(\w+) +(\S*) +(run|follows|cached|failed|blocked)(?: +(.*?))? *$", line)
        if match:
            stage, subject, state, why = match.groups()
            rows.append((f"{stage}:{subject}" if subject else stage, state, why or ""))
        elif rows and line.startswith("  ") and line.strip():  # further reasons of the row above
            step, state, why = rows[-1]
            rows[-1] = (step, state, f"{why}\n{line.strip()}")
    return rows


def _states(table: str) -> dict[str, str]:
    return {step: state for step, state, _why in _rows(table)}


def _row(table: str, step: str) -> str:
    return next(why for name, _state, why in _rows(table) if name == step)
