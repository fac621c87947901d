from __future__ import annotations

import json

import numpy as np
import pytest
from onnxruntime.quantization.calibrate import HistogramCollector

from tasks import calibrate, precision, verify
from tasks.entropy import FastCollector
from tasks.errors import BackendError
from tests.unit.tasks.small_graphs import TENSORS, cnn, evaluate, graph, images, node, stage


def params(method="minmax", batch=8, percentile=None, tensors=None):
    return {"method": method, "percentile": percentile, "batch": batch, "tensors": tensors or TENSORS}


def run(folder, data, model=None, **settings):
    data = data if isinstance(data, dict) else {"x": data}
    result, output = stage(
        calibrate.run, folder, params(**settings), model_onnx=model or cnn(), dataset_safetensors=data
    )
    text = (output / "ranges.json").read_text("utf-8")
    return json.loads(text), result.facts, text


def test_ranges_are_of_what_is_quantised_and_true(tmp_path):
    x = images(20)
    ranges, facts, _text = run(tmp_path, x)
    assert list(ranges) == ["f", "r1", "x"]
    assert {**facts, "worst": None} == {"tensors": 3, "samples": 20, "method": "minmax", "constant": [], "worst": None}
    assert ranges["x"] == [float(x.min()), float(x.max())]
    assert ranges["r1"][0] == 0


@pytest.mark.parametrize(("method", "percentile"), [("minmax", None), ("entropy", None), ("percentile", 99.0)])
def test_ranges_do_not_depend_on_the_batch(tmp_path, method, percentile):
    x = images(20) * np.linspace(0.01, 1, 20, dtype=np.float32)[:, None, None, None]
    texts = {run(tmp_path, x, method=method, percentile=percentile, batch=batch)[2] for batch in (3, 8, 8, 20)}
    assert len(texts) == 1


def test_entropy_and_percentile_cut_outliers_off(tmp_path):
    # not minmax in disguise, which is what quantize_static's entropy is
    x = np.random.default_rng(0).normal(0, 1, (40, 1, 8, 8)).astype(np.float32)
    x[0, 0, 0, 0] = 40
    found = {
        method: run(tmp_path, x, method=method, percentile=99.0)[0]["x"]
        for method in ("minmax", "entropy", "percentile")
    }
    assert found["minmax"][1] == 40
    assert 2.5 < found["entropy"][1] < 20
    assert found["percentile"][1] == pytest.approx(np.percentile(np.abs(x), 99), abs=0.05)


def test_what_a_relu_cuts_off_does_not_narrow_entropy(tmp_path):
    model = graph([node("Relu", ["x"], ["r"]), node("MatMul", ["r", "w"], ["y"])], {"w": np.eye(4, dtype=np.float32)})
    data = np.random.default_rng(0).normal(size=(20_000, 4)).astype(np.float32)
    tensors = {"x": {"dtype": "float32", "shape": ["batch", 4]}}
    ranges, _facts, _text = run(tmp_path, data, model, method="entropy", batch=5000, tensors=tensors)
    assert ranges["r"][1] > 3.2  # of 4.3; with zeros counted it is 2.7


@pytest.mark.parametrize("seed", range(3))
def test_the_fast_search_finds_what_the_slow_one_does(seed):
    draw = np.random.default_rng(seed)
    data = [draw.normal(size=3000), np.maximum(draw.normal(size=3000), 0), draw.standard_t(2, 500)][seed]
    data = data.astype(np.float32)
    bound = np.abs(data).max()
    counts, edges = np.histogram(data, 512, range=(-bound, bound))
    histogram = (counts, edges.astype(np.float32), data.min(), data.max(), bound)
    fast, slow = (
        kind("entropy", symmetric=False, num_bins=512, num_quantized_bins=128, percentile=None, scenario="same")
        for kind in (FastCollector, HistogramCollector)
    )
    assert fast.get_entropy_threshold(histogram, 128) == slow.get_entropy_threshold(histogram, 128)


@pytest.mark.parametrize("method", ["minmax", "entropy", "percentile"])
def test_tensors_that_are_always_zero_are_reported(tmp_path, method):
    model = graph([node("Mul", ["x", "zero"], ["z"]), node("MatMul", ["z", "w"], ["y"])], {
        "zero": np.zeros(4, np.float32),
        "w": np.eye(4, dtype=np.float32),
    })  # fmt: skip
    tensors = {"x": {"dtype": "float32", "shape": ["batch", 4]}}
    ranges, facts, _text = run(
        tmp_path, np.ones((9, 4), np.float32), model, method=method, percentile=99.9, tensors=tensors
    )
    assert facts["constant"] == ["z"]
    assert ranges["z"] == [0, 0]


def test_nan_in_an_activation_is_refused_by_name(tmp_path):
    model = graph([node("Log", ["x"], ["l"]), node("MatMul", ["l", "w"], ["y"])], {"w": np.eye(4, dtype=np.float32)})
    data = np.ones((9, 4), np.float32)
    data[8] = -1
    tensors = {"x": {"dtype": "float32", "shape": ["batch", 4]}}
    with pytest.raises(BackendError, match="tensor 'l' is NaN or infinite on calibration batch 2"):
        run(tmp_path, data, model, tensors=tensors)


def test_an_input_without_data_is_refused(tmp_path):
    with pytest.raises(BackendError, match=r"the data set lacks x \(it has: image\)"):
        run(tmp_path, {"image": images(4)})


def test_data_of_another_shape_is_refused_with_its_shape(tmp_path):
    with pytest.raises(BackendError, match=r"x \[4, 3, 8, 8\]"):
        run(tmp_path, np.ones((4, 3, 8, 8), np.float32))


def test_a_fixed_batch_is_filled_up(tmp_path):
    tensors = {"x": TENSORS["x"] | {"shape": [6, 1, "height", "width"]}}
    x = images(20)
    assert run(tmp_path, x, tensors=tensors)[0]["x"] == [float(x.min()), float(x.max())]


@pytest.mark.parametrize("method", ["minmax", "entropy", "percentile"])
def test_int8_of_a_calibrated_network_is_close_to_fp32(tmp_path, method):
    result = run(tmp_path, images(32), method=method, percentile=99.99)
    (tmp_path / "ranges.json").write_text(result[2])
    settings = {"precision": "int8", "keep": [], "io": "float32"}
    output = stage(precision.run, tmp_path, settings, model_onnx=cnn(), ranges_json=tmp_path / "ranges.json")[1]
    x = images(16, seed=1)
    arrays = {"a/min/in/x": x, "a/min/out/y": evaluate(cnn(), {"x": x})["y"]}
    check = {"subject": "graph", "executor": "onnxruntime", "batch": 8, "metric": None, "tensors": TENSORS}
    facts = stage(verify.run, tmp_path, check, model_onnx=output / "model.onnx", reference_safetensors=arrays)[0].facts
    assert 1e-5 < facts["parity"]["relative_l2"] < 0.03


def tensor_report(folder, data, model=None, **settings):
    _result, output = stage(
        calibrate.run, folder, params(**settings), model_onnx=model or cnn(), dataset_safetensors={"x": data}
    )
    return json.loads((output / "calibration.json").read_text("utf-8")), _result.facts


@pytest.mark.parametrize(("method", "percentile"), [("minmax", None), ("entropy", None), ("percentile", 99.0)])
def test_the_report_says_what_a_range_costs(tmp_path, method, percentile):
    x = np.random.default_rng(0).standard_t(3, (64, 1, 8, 8)).astype(np.float32)
    report, facts = tensor_report(tmp_path, x, method=method, percentile=percentile)
    assert (report["method"], report["samples"]) == (method, 64)
    ratios = [row["snr_db"] for row in report["tensors"]]
    assert ratios == sorted(ratios)
    assert facts["worst"] == {name: report["tensors"][0][name] for name in ("tensor", "clipped", "snr_db")}
    (row,) = [row for row in report["tensors"] if row["tensor"] == "x"]
    bound = max(map(abs, row["range"]))
    assert row["observed"] == [float(x.min()), float(x.max())]
    assert row["nodes"] == ["stem/conv"]
    # by the values themselves
    values = x.astype(np.float64)
    rounded = np.rint(values / (bound / 127.5)).clip(-128, 127) * bound / 127.5
    exact = 10 * np.log10((values**2).sum() / ((rounded - values) ** 2).sum())
    assert row["snr_db"] == pytest.approx(exact, abs=0.5)
    assert row["clipped"] == pytest.approx((np.abs(values) > bound).mean(), abs=2e-3)
    assert (row["clipped"] > 0) == (method != "minmax")


def test_the_report_does_not_depend_on_the_batch_and_knows_fp8(tmp_path):
    import ml_dtypes

    x = np.exp(np.random.default_rng(0).normal(0, 2, (64, 1, 8, 8))).astype(np.float32)
    first, second = (tensor_report(tmp_path, x, batch=batch)[0] for batch in (5, 64))
    (row,) = [row for row in first["tensors"] if row["tensor"] == "x"]
    assert row in second["tensors"]
    scale = x.max() / 448
    rounded = (x / scale).astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * scale
    exact = 10 * np.log10((x**2).sum() / ((rounded - x) ** 2).sum())
    assert row["snr_fp8_db"] == pytest.approx(exact, abs=0.5)
    assert row["snr_minmax_db"] == row["snr_db"]


def test_a_tensor_that_is_always_zero_has_no_ratio(tmp_path):
    model = graph([node("Mul", ["x", "zero"], ["z"]), node("MatMul", ["z", "w"], ["y"])], {
        "zero": np.zeros(4, np.float32),
        "w": np.eye(4, dtype=np.float32),
    })  # fmt: skip
    tensors = {"x": {"dtype": "float32", "shape": ["batch", 4]}}
    report, facts = tensor_report(tmp_path, np.ones((9, 4), np.float32), model, tensors=tensors)
    assert [(row["tensor"], row["snr_db"], row["clipped"]) for row in report["tensors"]] == [("z", None, 0.0)]
    assert facts["worst"]["snr_db"] is None
