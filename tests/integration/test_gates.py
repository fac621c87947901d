"""No precision passes: the target fails with the table of what was tried, and its fallback, which the same gate judged, stands in."""

from __future__ import annotations

import importlib.util
import json

import numpy as np
import onnx
import pytest
import yaml

from enginery.tables import print_build
from tasks.report import report
from tests.integration.building import build
from tests.unit.tasks.small_graphs import graph, node

pytestmark = pytest.mark.slow

METRICS = {
    "cer": ({"ceiling": 0.05}, 0.0, "cer 1 > ceiling 0.05"),
    "exact-match": ({"floor": 0.95, "max_drop": 0.01}, 1.0, "exact-match 0 < floor 0.95"),
}


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory):
    """Scores of a reader that are sure by less than half precision holds: parity passes, and every character is lost."""
    if importlib.util.find_spec("tensorrt_rtx") is None:
        pytest.skip("needs tensorrt-rtx: pip install 'enginery[tensorrt-rtx]'")
    folder = tmp_path_factory.mktemp("reader")
    model = graph(
        [node("MatMul", ["x", "w"], ["scores"], "read")],
        {"w": np.eye(5, dtype=np.float32)},
        inputs={"x": (onnx.TensorProto.FLOAT, ["batch", 6, 5])},
        outputs={"scores": (onnx.TensorProto.FLOAT, ["batch", 6, 5])},
    )
    onnx.save(model, folder / "reader.onnx")
    text = 1 + (np.arange(8)[:, None] + np.arange(6)) % 4  # no character after itself, and none that is CTC's blank
    scores = np.full((8, 6, 5), 100, np.float32)
    np.put_along_axis(scores, text[..., None], np.float32(100.01), axis=2)
    np.savez(folder / "lines.npz", x=scores, label=text)
    return folder


@pytest.mark.parametrize("metric", METRICS)
def test_a_metric_that_no_precision_keeps_fails_the_target_and_the_fallback_stands_in(reader, capsys, metric):
    bounds, right, words = METRICS[metric]
    recipe = {
        "enginery": 1,
        "name": "reader",
        "source": {"framework": "onnx", "model": {"file": "reader.onnx"}},
        "export": {"simplifier": "none"},
        "inputs": {"x": {"shape": ["batch", 6, 5]}},
        "profiles": {"online": {"batch": [1, 4, 8]}},
        "precision": {"build": ["bf16"], "fallback": {"bf16": ["fp16"]}},
        "acceptance": {"metric": {"name": metric, "data": {"data": "lines.npz"}, **bounds}},
        "fallback": "onnx",
        "targets": [{"runtime": "tensorrt-rtx", "gpus": ["sm89"]}],
    }
    (reader / "reader.yaml").write_text(yaml.safe_dump(recipe))
    _ran, planned, session = build(reader / "reader.yaml", reader / "store")
    engine, spare = planned.engines
    assert (engine.state, spare.state, planned.status) == ("failed", "cached", 1)
    assert [(trial.precision, trial.verdict.passed) for trial in engine.trials] == [("bf16", False), ("fp16", False)]
    assert all(words in trial.verdict.reasons[0] for trial in engine.trials)
    print_build(report(session, planned))
    said = " ".join(capsys.readouterr().out.split())
    table = f"tensorrt-rtx sm89: bf16 asked, none given: bf16: {words}"
    assert table in said
    assert f"fp16: {words}" in said.partition(table)[2]
    assert f"in place of what failed, the fallback is served: {spare.publish.facts['path']}" in said
    manifest = json.loads((reader / "store" / spare.publish.facts["path"] / "manifest.json").read_text())
    assert manifest["fallback"]["instead_of"] == ["tensorrt-rtx:sm89"]
    assert (manifest["precision"]["asked"], manifest["precision"]["given"]) == ("fp32", "fp32")
    measured = manifest["verification"]["engine"]["metric"]
    assert measured == {"name": metric, "value": right, "source": right, "samples": 8}
    assert manifest["verification"]["gates"]["metric"]["name"] == metric
