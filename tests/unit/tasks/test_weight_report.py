"""What each weight costs in int8 and fp8: the report foretells what the typed graph states, and its ratios are true."""

from __future__ import annotations

import json

import numpy as np
import onnx
import pytest

from tasks import calibrate, precision
from tasks.graphs import array_of
from tasks.weight_report import stated_ranges, stated_weights, weights_to_be
from tests.unit.tasks.small_graphs import graph, node, stage


def drawn(*shape):
    """Weights of which the last along the last axis are a thousand times the others."""
    array = np.random.default_rng(len(shape)).normal(size=shape).astype(np.float32)
    array[..., -1] *= 1000
    return array


def model():
    return graph(
        [
            node("MatMul", ["x", "m"], ["a"], "dense"),
            node("Gemm", ["a", "g"], ["b"], "gemm"),
            node("Gemm", ["b", "t"], ["c"], "turned", transB=1),
            node("Reshape", ["c", "shape"], ["d"], "reshape"),
            node("Conv", ["d", "k"], ["e"], "conv"),
            node("ConvTranspose", ["e", "u"], ["y"], "up"),
        ],
        {
            "m": drawn(8, 8), "g": drawn(8, 8), "t": drawn(8, 8), "k": drawn(4, 2, 2, 2), "u": drawn(4, 3, 2, 2),
            "shape": np.array([-1, 2, 2, 2], np.int64),
        },
        inputs={"x": (onnx.TensorProto.FLOAT, ["batch", 8])},
        outputs={"y": (onnx.TensorProto.FLOAT, ["batch", 3, 2, 2])},
    )  # fmt: skip


def typed(folder, as_what):
    tensors = {"x": {"dtype": "float32", "shape": ["batch", 8]}}
    data = {"x": np.random.default_rng(0).normal(size=(16, 8)).astype(np.float32)}
    params = {"method": "minmax", "percentile": None, "batch": 4, "tensors": tensors}
    _result, found = stage(calibrate.run, folder, params, model_onnx=model(), dataset_safetensors=data)
    asked = {"precision": as_what, "keep": [], "io": "float32"}
    ranges = found / "ranges.json"
    _result, made = stage(precision.run, folder / "typed", asked, model_onnx=model(), ranges_json=ranges)
    return json.loads((found / "calibration.json").read_text()), onnx.load(made / "model.onnx")


@pytest.mark.parametrize("as_what", ["int8", "fp8"])
def test_the_report_foretells_what_the_typed_graph_states(tmp_path, as_what):
    report, made = typed(tmp_path, as_what)
    stated = {row["tensor"]: row for row in stated_weights(made)}
    foretold = {row["tensor"]: row for row in report["weights"]}
    assert stated.keys() == foretold.keys() == {"m", "g", "t", "k", "u"}
    for name, row in foretold.items():
        assert row["channels"] == stated[name]["channels"] > 1, name
        assert row["axis"] == stated[name]["axis"], name
        assert row["nodes"], name
        if as_what == "int8":
            assert row["range"] == pytest.approx(stated[name]["range"], rel=1e-5), name
        assert row["nodes"] == stated[name]["nodes"], name
        assert row["snr_db" if as_what == "int8" else "snr_fp8_db"] == pytest.approx(stated[name]["snr_db"], abs=0.05)
    assert {row["tensor"]: row["range"][1] for row in stated_ranges(made)}.keys() == {"x", "a", "b", "d", "e"}


def test_the_ratio_is_that_of_the_values_and_the_worst_channel_is_named():
    values = np.ones((4, 64), np.float32)
    values[1] = np.linspace(-1, 1, 64)
    values[3] = 0.001
    values[3, 0] = 1  # which leaves the others of this channel no level
    made = graph(
        [node("Gemm", ["x", "w"], ["y"], "gemm", transB=1)],
        {"w": values},
        inputs={"x": (onnx.TensorProto.FLOAT, ["batch", 64])},
        outputs={"y": (onnx.TensorProto.FLOAT, ["batch", 4])},
    )
    (row,) = weights_to_be(made)
    steps = np.abs(values).max(axis=1, keepdims=True) / 127
    rounded = np.rint(values / steps) * steps
    noise, power = np.square(values - rounded), np.square(values)
    assert row["snr_db"] == pytest.approx(10 * np.log10(power.sum() / noise.sum()), abs=0.01)
    assert row["worst_channel"]["channel"] == 3
    assert row["worst_channel"]["snr_db"] == pytest.approx(10 * np.log10(power[3].sum() / noise[3].sum()), abs=0.01)
    assert (row["clipped"], row["observed"], row["shape"]) == (0.0, [-1.0, 1.0], [4, 64])


def test_a_graph_without_pairs_states_nothing():
    assert stated_weights(model()) == stated_ranges(model()) == []


def test_scales_that_are_too_small_are_seen_as_clipped(tmp_path):
    _report, made = typed(tmp_path, "int8")
    pair = next(one for one in made.graph.node if one.op_type == "QuantizeLinear" and one.input[0] == "m")
    scale = next(one for one in made.graph.initializer if one.name == pair.input[1])
    halved = onnx.numpy_helper.from_array(array_of(scale) / 4, scale.name)
    scale.CopyFrom(halved)
    row = next(one for one in stated_weights(made) if one["tensor"] == "m")
    assert row["clipped"] > 0.2
    assert row["snr_db"] < 15


def pairs(tensor, scale, zero):
    """A graph with one pair, of an activation "x" or a weight "w"."""
    return graph(
        [
            node("QuantizeLinear", [tensor, "scale", "zero"], ["q"], axis=0),
            node("DequantizeLinear", ["q", "scale", "zero"], ["d"], axis=0),
            node("Add", ["x", "d"], ["y"]),
        ],
        {"w": np.ones(4, np.float32), "scale": np.float32(scale), "zero": zero},
    )


@pytest.mark.parametrize(
    ("zero", "ends"),
    [(np.uint8(128), [-64.0, 63.5]), (np.uint8(0), [0.0, 127.5]), (np.int8(0), [-64.0, 63.5])],
)
def test_a_range_is_that_around_the_zero_point(zero, ends):
    assert stated_ranges(pairs("x", 0.5, zero)) == [{"tensor": "x", "range": ends, "type": zero.dtype.name}]


def test_weights_with_a_scale_for_each_block_are_left_out():
    made = pairs("w", [1, 1, 1, 1], np.zeros(4, np.int8))
    assert len(stated_weights(made)) == 1
    scale = next(one for one in made.graph.initializer if one.name == "scale")
    scale.CopyFrom(onnx.numpy_helper.from_array(np.ones((2, 2), np.float32), "scale"))
    assert stated_weights(made) == []
