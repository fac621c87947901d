from __future__ import annotations

import json

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from tasks import outliers, precision
from tasks.emulate import emulated
from tests.unit.tasks.small_graphs import evaluate, graph, node, stage

X = {"x": {"dtype": "float32", "shape": ["batch", 4]}}


def overflowing():
    """300 * x squared overflows fp16 for x = 300, and is divided back to where it came from."""
    return graph(
        [
            node("Mul", ["x", "x"], ["squared"], "square"),
            node("Div", ["squared", "d"], ["small"], "shrink"),
            node("Relu", ["small"], ["y"], "end"),
        ],
        {"d": np.float32(300)},
    )


def find(folder, model, reference, data=None):
    arrays = {"p/opt/in/x": reference, "p/opt/out/y": np.zeros(1, np.float32)}
    more = {"dataset_safetensors": {"x": data}} if data is not None else {}
    params = {"batch": 2, "tensors": X} if data is not None else {}
    result, output = stage(outliers.run, folder, params, model_onnx=model, reference_safetensors=arrays, **more)
    return result.facts, output / "outliers.json"


def test_tensors_that_fp16_cannot_hold_are_found_with_their_peak(tmp_path):
    facts, path = find(tmp_path, overflowing(), np.full((2, 4), 300, np.float32))
    assert json.loads(path.read_text()) == {"squared": 90000.0}
    assert facts == {"outliers": ["squared"], "tensors": 4}


@pytest.mark.parametrize(("value", "found"), [(65519.0, []), (65520.0, ["x", "y"]), (-65520.0, ["x", "y"])])
def test_what_rounds_to_infinity_is_an_outlier(tmp_path, value, found):
    model = graph([node("Identity", ["x"], ["y"])], {})
    assert find(tmp_path, model, np.full((1, 4), value, np.float32))[0]["outliers"] == found


def test_calibration_data_counts_too_and_empty_tensors_do_not(tmp_path):
    low, high = np.ones((0, 4), np.float32), np.full((3, 4), -300, np.float32)
    assert find(tmp_path, overflowing(), low)[0]["outliers"] == []
    assert find(tmp_path, overflowing(), low, high)[0]["outliers"] == ["squared"]


def test_a_mask_of_infinities_is_no_outlier(tmp_path):
    model = graph([node("Mul", ["x", "m"], ["masked"]), node("Relu", ["masked"], ["y"])], {"m": np.float32(-1e9)})
    assert find(tmp_path, model, np.ones((1, 4), np.float32))[0]["outliers"] == []


@pytest.mark.parametrize("kind", ["fp16"])
def test_the_nodes_that_give_or_take_an_outlier_stay_fp32(tmp_path, kind):
    x = np.full((2, 4), 300, np.float32)
    path = find(tmp_path, overflowing(), x)[1]
    params = {"precision": kind, "keep": [], "io": "float32"}
    expected = evaluate(overflowing(), {"x": x})["y"]
    _result, lost = stage(precision.run, tmp_path, params, model_onnx=overflowing())
    assert not np.isfinite(evaluate(emulated(onnx.load(lost / "model.onnx")), {"x": x})["y"]).all()
    result, folder = stage(precision.run, tmp_path, params, model_onnx=overflowing(), outliers_json=path)
    assert result.facts["outliers"] == ["squared"]
    assert result.facts["kept"] == ["shrink", "square"]
    model = onnx.load(folder / "model.onnx")
    assert next(one for one in model.graph.node if one.name == "end").input[0] != "small"  # half, through a cast
    assert any(attribute.i == TensorProto.FLOAT16 for one in model.graph.node for attribute in one.attribute)
    assert evaluate(emulated(model), {"x": x})["y"] == pytest.approx(expected, rel=1e-3)
