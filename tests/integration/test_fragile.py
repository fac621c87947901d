"""A deliberately fragile model: an activation that overflows float16, and a layer that int8 ruins, really compiled."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import yaml

from artifacts.errors import IntegrityError
from artifacts.manifest import Manifest
from enginery.engine_reports import engine_report, print_engine_report
from enginery.tables import print_build
from tasks.report import report
from tests.integration.building import build
from tests.unit.tasks.small_graphs import graph, node

pytestmark = pytest.mark.slow

RECIPE = {
    "enginery": 1,
    "name": "fragile",
    "source": {"framework": "onnx", "model": {"file": "fragile.onnx"}},
    "export": {"simplifier": "none"},
    "inputs": {"x": {"shape": ["batch", 8], "low": 100.0, "high": 300.0}},
    "profiles": {"online": {"batch": [1, 4, 8]}},
    "precision": {"calibration": {"data": "calibration.npz", "method": "minmax"}},
    "targets": [{"runtime": "tensorrt-rtx", "gpus": ["sm89"]}],
}


def project(folder: Path, targets: list[dict[str, object]] = RECIPE["targets"], **precision: object) -> Path:
    """x squared reaches 90000; then one channel is 10000 times the others, of which alone the next layer makes anything."""
    draw = np.random.default_rng(0)
    spread = np.ones(8, np.float32)
    spread[0] = 1e4
    ruined = draw.normal(size=(8, 8)).astype(np.float32)
    ruined[0] = 0
    model = graph(
        [
            node("Mul", ["x", "x"], ["squared"], "square"),
            node("Div", ["squared", "limit"], ["unit"], "shrink"),
            node("Mul", ["unit", "spread"], ["uneven"], "spread"),
            node("MatMul", ["uneven", "w1"], ["hidden"], "ruined"),
            node("Tanh", ["hidden"], ["bounded"], "bound"),
            node("MatMul", ["bounded", "w2"], ["second"], "fine"),
            node("Tanh", ["second"], ["third"], "bound2"),
            node("MatMul", ["third", "w3"], ["fourth"], "fine2"),
            node("Tanh", ["fourth"], ["fifth"], "bound3"),
            node("MatMul", ["fifth", "w4"], ["y"], "fine3"),
        ],
        {
            "limit": np.float32(90000),
            "spread": spread,
            "w1": ruined,
            "w2": draw.normal(size=(8, 8)).astype(np.float32),
            "w3": draw.normal(size=(8, 8)).astype(np.float32),
            "w4": draw.normal(size=(8, 4)).astype(np.float32),
        },
        inputs={"x": (onnx.TensorProto.FLOAT, ["batch", 8])},
        outputs={"y": (onnx.TensorProto.FLOAT, ["batch", 4])},
    )
    folder.mkdir(exist_ok=True)
    onnx.save(model, folder / "fragile.onnx")
    np.savez(folder / "calibration.npz", x=draw.uniform(100, 300, (64, 8)).astype(np.float32))
    document = {**RECIPE, "precision": {**RECIPE["precision"], **precision}, "targets": targets}
    (folder / "fragile.yaml").write_text(yaml.safe_dump(document))
    return folder / "fragile.yaml"


@pytest.fixture(autouse=True)
def compiler():
    if importlib.util.find_spec("tensorrt_rtx") is None:
        pytest.skip("needs tensorrt-rtx: pip install 'enginery[tensorrt-rtx]'")


def test_a_fragile_model_is_rescued_by_fallback_and_by_kept_layers(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    store = tmp_path / "store"
    ran, planned, session = build(project(tmp_path / "a", build=["int8"], fallback={"int8": ["fp16"]}), store)
    (engine,) = planned.engines
    assert "compile:tensorrt-rtx:sm89:fp16" in ran
    assert "compile:tensorrt-rtx:sm89:int8" not in ran
    assert (engine.asked, engine.given, engine.state) == ("int8", "fp16", "cached")
    print_build(report(session, planned))
    said = " ".join(capsys.readouterr().out.split())
    assert "int8 asked, fp16 given: int8: relative_l2" in said
    assert "on held-out calibration data" in said

    both = [RECIPE["targets"][0], {"runtime": "onnxruntime", "gpus": ["cpu"]}]
    ran, planned, _session = build(project(tmp_path / "a", both, build=["int8-fp16"], keep="auto"), store)
    assert {"sensitivity:int8-fp16", "compile:tensorrt-rtx:sm89:int8-fp16"} <= ran
    assert [(engine.given, engine.state) for engine in planned.engines] == [("int8-fp16", "cached")] * 2

    found = {one.precision.given: one for one in _manifests(store)}
    assert set(found["fp16"].precision.kept) == {"square", "shrink"}
    assert found["fp16"].precision.outliers == ("squared",)
    assert [one.precision for one in found["fp16"].precision.tried] == ["int8"]
    assert set(found["int8-fp16"].precision.kept) == {"square", "shrink", "ruined"}
    assert found["int8-fp16"].precision.outliers == ("squared",)
    why = found["int8-fp16"].precision.kept_why
    assert why["ruined"].startswith("int8-fp16 of it alone moves the outputs by relative_l2 ")
    assert why["ruined"].endswith(", place 1 of 4")
    assert why["square"] == "gives or takes a tensor that overflows float16"
    (file,) = {path.read_text() for path in store.glob("engines/**/sensitivity.json")}
    layers = json.loads(file)
    assert layers["groups"][0]["nodes"] == ["ruined"]
    assert [group["kept"] for group in layers["groups"]] == [True, False, False, False]
    assert layers["groups"][0]["relative_l2"] > 5 * layers["groups"][1]["relative_l2"]
    assert [(one["kept_groups"], one["passed"]) for one in layers["tried"]] == [(0, False), (1, True)]

    where = next(path for path in store.glob("engines/**/manifest.json") if "int8-fp16" in str(path))
    document = engine_report(where)
    assert (document["given"], set(document["kept"])) == ("int8-fp16", {"square", "shrink", "ruined"})
    weights = {row["tensor"]: row for row in document["reports"][""]["weights"]}
    assert weights.keys() == {"w1", "w2", "w3", "w4"}
    assert all(row["channels"] == row["shape"][1] and 20 < row["snr_db"] < 60 for row in weights.values())
    print_engine_report(document)
    said = capsys.readouterr().out
    assert "3 nodes kept high" in said
    assert "4 weights" in said
    (where.parent / "calibration.json").unlink()
    with pytest.raises(IntegrityError, match="pull the engine again"):
        engine_report(where)


def _manifests(store: Path):
    return [Manifest.from_bytes(path.read_bytes()) for path in store.glob("engines/**/manifest.json")]
