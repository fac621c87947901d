from __future__ import annotations

import importlib.util
import itertools
import json
import subprocess
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from onnx import TensorProto, helper

from tasks import calibrate, precision, verify
from tasks.emulate import emulated
from tasks.engines.trt_v8 import kept_beside_pairs
from tasks.errors import BackendError
from tasks.graphs import array_of
from tasks.halves import round_to_half
from tasks.process import Limits, run_stage
from tasks.references import save_arrays
from tasks.stage import StageRequest
from tests.unit.tasks.small_graphs import TENSORS, cnn, evaluate, graph, images, node, stage

HALF = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}
PARITY = {"subject": "graph", "executor": "onnxruntime", "batch": 8, "metric": None, "tensors": TENSORS}


def typed(folder, model, kind, keep=(), io="float32", **inputs):
    params = {"precision": kind, "keep": list(keep), "io": io}
    result, output = stage(precision.run, folder, params, model_onnx=model, **inputs)
    return onnx.load(output / "model.onnx"), result.facts


def ranges_of(folder, model, data=None, method="minmax"):
    params = {"method": method, "percentile": 99.99, "batch": 8, "tensors": TENSORS}
    data = {"x": images() if data is None else data}
    return stage(calibrate.run, folder, params, model_onnx=model, dataset_safetensors=data)[1] / "ranges.json"


def parity_of(folder, model, reference, x, kind_of_x="x"):
    arrays = {f"static/opt/in/{kind_of_x}": x}
    arrays |= {f"static/opt/out/{name}": value for name, value in reference.items()}
    return stage(verify.run, folder, PARITY, model_onnx=model, reference_safetensors=arrays)[0].facts["parity"]


def consumers(model, tensor):
    return [entry for entry in model.graph.node if tensor in entry.input]


def producer(model, tensor):
    return next(entry for entry in model.graph.node if tensor in entry.output)


def weights(model):
    return {tensor.name: tensor for tensor in model.graph.initializer}


@pytest.mark.parametrize("kind", ["fp32", "tf32"])
def test_full_precision_leaves_the_bytes_alone(tmp_path, kind):
    model = cnn()
    onnx.save(model, tmp_path / "model.onnx")
    params = {"precision": kind, "keep": [], "io": "float32"}
    result, output = stage(precision.run, tmp_path / "run", params, model_onnx=tmp_path / "model.onnx")
    assert (output / "model.onnx").read_bytes() == (tmp_path / "model.onnx").read_bytes()
    assert result.facts["inputs"] == {"x": "float32"}
    assert result.facts["casts"] == 0


@pytest.mark.parametrize("kind", ["fp16", "bf16"])
def test_half_types_every_weight_and_casts_only_at_the_ends(tmp_path, kind):
    model, facts = typed(tmp_path, cnn(), kind)
    assert {tensor.data_type for tensor in model.graph.initializer} == {HALF[kind]}
    assert model.graph.node[0].op_type == "Cast"
    assert facts["casts"] == sum(entry.op_type == "Cast" for entry in model.graph.node) == 2
    assert facts["inputs"] == {"x": "float32"}
    assert facts["outputs"] == {"y": "float32"}
    axes = [dim.dim_param or dim.dim_value for dim in model.graph.input[0].type.tensor_type.shape.dim]
    assert axes == ["batch", 1, "height", "width"]


@pytest.mark.parametrize(("kind", "name"), [("fp16", "float16"), ("bf16", "bfloat16")])
def test_native_inputs_and_outputs_have_the_half_type(tmp_path, kind, name):
    _model, facts = typed(tmp_path, cnn(), kind, io="native")
    assert facts["inputs"] == {"x": name}
    assert facts["outputs"] == {"y": name}
    assert facts["casts"] == 0


@pytest.mark.parametrize(("kind", "bound"), [("fp16", 2e-3), ("bf16", 2e-2)])
@pytest.mark.parametrize("io", ["float32", "native"])
def test_half_graphs_stay_close_at_other_shapes(tmp_path, kind, bound, io):
    model, _facts = typed(tmp_path, cnn(), kind, io=io)
    x = images(3, 12, 16)
    parity = parity_of(tmp_path, model, evaluate(cnn(), {"x": x}), x)
    assert 1e-6 < parity["relative_l2"] < bound  # some rounding must show, or nothing was typed
    assert parity["non_finite"] == 0


@pytest.mark.parametrize("kind", ["fp16", "bf16"])
def test_kept_nodes_compute_in_fp32_with_one_cast_for_each_tensor(tmp_path, kind):
    shared = graph(
        [
            node("Relu", ["x"], ["r"], "relu"),
            node("MatMul", ["r", "w"], ["a"], "left"),
            node("MatMul", ["r", "w"], ["b"], "right"),
            node("Add", ["a", "b"], ["y"], "add"),
        ],
        {"w": np.eye(4, dtype=np.float32)},
    )
    model, facts = typed(tmp_path, shared, kind, keep=["left", "right"])
    assert facts["kept"] == ["left", "right"]
    assert {tensor.data_type for tensor in model.graph.initializer} == {TensorProto.FLOAT}
    # in, r back to fp32 once for both readers, a and b to half, out
    assert facts["casts"] == 5
    assert len({entry.name for entry in model.graph.node}) == len(model.graph.node)


def test_a_weight_that_both_kinds_of_node_read_is_stored_twice(tmp_path):
    model = graph(
        [node("MatMul", ["x", "w"], ["a"], "first"), node("MatMul", ["a", "w"], ["y"], "second")],
        {"w": np.eye(4, dtype=np.float32) / 3},
    )
    typed_model, _facts = typed(tmp_path, model, "fp16", keep=["second"])
    kinds = sorted(tensor.data_type for tensor in typed_model.graph.initializer)
    assert kinds == [TensorProto.FLOAT, TensorProto.FLOAT16]
    exact = next(tensor for tensor in typed_model.graph.initializer if tensor.data_type == TensorProto.FLOAT)
    assert np.array_equal(array_of(exact), np.eye(4, dtype=np.float32) / 3)


def test_a_glob_that_matches_nothing_names_near_misses(tmp_path):
    with pytest.raises(BackendError) as caught:
        typed(tmp_path, cnn(), "fp16", keep=["stem/*", "haed/gemm"])
    assert caught.value.kind == "bad data"
    assert "'haed/gemm'" in caught.value.message
    assert "head/gemm" in caught.value.message
    assert "'stem/*'" not in caught.value.message


def test_int8_fp16_has_half_pairs_and_no_cast_between_them_and_what_they_belong_to(tmp_path):
    model, facts = typed(tmp_path, cnn(), "int8-fp16", ranges_json=ranges_of(tmp_path, cnn()))
    assert model.opset_import[0].version >= 19
    assert facts["quantized"] == 3
    assert facts["casts"] == 2  # at the input and the output of the graph
    types = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    for entry in model.graph.node:
        if entry.op_type in ("QuantizeLinear", "DequantizeLinear"):
            assert types[entry.input[1]] == TensorProto.FLOAT16
        if entry.op_type in ("Conv", "Gemm"):
            assert {producer(model, name).op_type for name in entry.input[:2]} == {"DequantizeLinear"}
            assert types[entry.input[2]] == TensorProto.FLOAT16


def test_int8_fp16_is_as_far_from_fp32_as_int8(tmp_path):
    ranges, x = ranges_of(tmp_path, cnn()), images(seed=7)
    reference = evaluate(cnn(), {"x": x})
    whole, _facts = typed(tmp_path, cnn(), "int8", ranges_json=ranges)
    mixed, _facts = typed(tmp_path, cnn(), "int8-fp16", ranges_json=ranges)
    alone, both = (parity_of(tmp_path, model, reference, x)["relative_l2"] for model in (whole, mixed))
    assert 1e-3 < both < 1.5 * alone
    # The emulation that verifies the graph, and ONNX Runtime's own kernels for half pairs.
    emulation = evaluate(emulated(onnx.ModelProto.FromString(mixed.SerializeToString())), {"x": x})["y"]
    assert np.linalg.norm(emulation - evaluate(mixed, {"x": x})["y"]) < 5e-3 * np.linalg.norm(emulation)


def test_what_int8_fp16_keeps_stays_fp32_and_out_of_the_pairs(tmp_path):
    model, facts = typed(tmp_path, cnn(), "int8-fp16", keep=["body/*"], ranges_json=ranges_of(tmp_path, cnn()))
    assert facts["kept"]
    types = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    kept = [entry for entry in model.graph.node if entry.name in facts["kept"] and entry.op_type == "Conv"]
    assert kept
    assert all(types[entry.input[1]] == TensorProto.FLOAT for entry in kept)


def test_what_tensorrt_8_is_to_keep_beside_pairs_are_nodes_and_no_pairs(tmp_path):
    model, _facts = typed(tmp_path, cnn(), "int8", ranges_json=ranges_of(tmp_path, cnn()))
    onnx.save(model, tmp_path / "model.onnx")
    kept = kept_beside_pairs(tmp_path / "model.onnx", ["*"])
    assert {entry.op_type for entry in model.graph.node if entry.name in kept} == {
        "Conv", "Relu", "GlobalAveragePool", "Gemm",
    }  # fmt: skip
    assert kept_beside_pairs(tmp_path / "model.onnx", []) == frozenset()


def test_scales_too_small_for_a_half_stay_fp32(tmp_path):
    tiny = np.full((4, 4), 1e-4, np.float32)  # scales of 8e-7: as halves they would be 25 % off
    model = graph([node("MatMul", ["x", "w"], ["m"], "m"), node("Relu", ["m"], ["y"])], {"w": tiny})
    x = np.random.default_rng(0).standard_normal((8, 4)).astype(np.float32)
    mixed, facts = typed(tmp_path, model, "int8-fp16", ranges_json=ranges_of(tmp_path, model, x))
    assert facts["overflowing"] == ["w_scale"]
    found = parity_of(tmp_path, mixed, evaluate(model, {"x": x}), x)
    assert found["relative_l2"] < 0.02


@pytest.mark.parametrize(("runtime", "gpu"), [("tensorrt-rtx", "sm89"), ("onnxruntime", "cpu")])
def test_int8_fp16_compiles(tmp_path, runtime, gpu):
    mixed, _facts = typed(tmp_path, cnn(), "int8-fp16", ranges_json=ranges_of(tmp_path, cnn()))
    onnx.save(mixed, tmp_path / "model.onnx")
    output = tmp_path / "compiled"
    output.mkdir()
    shapes = {"x": {"min": [1, 1, 8, 8], "opt": [4, 1, 8, 8], "max": [8, 1, 8, 8]}}
    options = {
        "tf32": False, "profiles": [{"name": "p", "inputs": shapes}], "workspace": None, "optimization_level": None,
        "hardware_compatibility": "none", "version_compatible": False,
    }  # fmt: skip
    params = {"runtime": runtime, "gpu": gpu, **(options if gpu != "cpu" else {})}
    result = run_stage("compile", params, {"model.onnx": tmp_path / "model.onnx"}, output, limits=Limits(120, 8 << 30))
    assert result.outputs
    if gpu == "cpu":
        x = images(4)
        compiled = evaluate(onnx.load(output / "model.onnx"), {"x": x})["y"]
        np.testing.assert_allclose(compiled, evaluate(mixed, {"x": x})["y"], rtol=0.05, atol=0.02)


@pytest.mark.parametrize("kind", ["fp16", "bf16", "int8", "int8-fp16"])
def test_typing_twice_gives_the_same_bytes(tmp_path, kind):
    extra = {"ranges_json": ranges_of(tmp_path, cnn())} if kind.startswith("int8") else {}
    first, _facts = typed(tmp_path, cnn(), kind, keep=["body/*"], **extra)
    second, _facts = typed(tmp_path, cnn(), kind, keep=["body/*"], **extra)
    assert first.SerializeToString(deterministic=True) == second.SerializeToString(deterministic=True)


FRAGILE = [  # x * x leaves float16 at 256
    node("Mul", ["x", "x"], ["s"], "square"),
    node("ReduceSum", ["s", "axes"], ["t"], "sum", keepdims=1),
    node("Sqrt", ["t"], ["y"], "root"),
]


def test_an_activation_that_overflows_fails_in_fp16_and_is_rescued_by_keep(tmp_path):
    model = graph(FRAGILE, {"axes": np.array([1])})
    x = np.array([[300, 1, 2, 3], [0.5, 1, 2, 3]], np.float32)
    reference = evaluate(model, {"x": x})
    broken, _facts = typed(tmp_path, model, "fp16")
    assert parity_of(tmp_path, broken, reference, x)["non_finite"] == 1
    rescued, _facts = typed(tmp_path, model, "fp16", keep=["square", "sum", "root"])
    found = parity_of(tmp_path, rescued, reference, x)
    assert found["non_finite"] == 0
    assert found["relative_l2"] < 1e-3
    bf16, _facts = typed(tmp_path, model, "bf16")
    assert parity_of(tmp_path, bf16, reference, x)["non_finite"] == 0


def test_mask_constants_saturate_and_masked_rows_stay_finite(tmp_path):
    model = graph(
        [
            node("Where", ["m", "x", "never"], ["w"]),
            node("Softmax", ["w"], ["y"], axis=-1),
        ],
        {"never": np.array(np.finfo(np.float32).min)},
        inputs={"x": (TensorProto.FLOAT, ["batch", 4]), "m": (TensorProto.BOOL, ["batch", 4])},
    )
    feeds = {"x": np.ones((2, 4), np.float32), "m": np.array([[1, 1, 0, 0], [0, 0, 0, 0]], bool)}
    for kind in HALF:
        result, facts = typed(tmp_path, model, kind)
        assert facts["clamped"] == ["never"]
        found = evaluate(emulated(result), feeds)["y"]
        assert np.allclose(found, [[0.5, 0.5, 0, 0], [0.25] * 4], atol=1e-3)


def test_a_kept_node_gets_the_saturated_constant_as_it_was(tmp_path):
    model = graph(
        [node("Add", ["x", "low"], ["a"], "first"), node("Max", ["a", "low"], ["y"], "second")],
        {"low": np.array(-1e9, np.float32)},
    )
    result, _facts = typed(tmp_path, model, "fp16", keep=["second"])
    values = {tensor.data_type: float(array_of(tensor)) for tensor in result.graph.initializer}
    assert values == {TensorProto.FLOAT16: -65504.0, TensorProto.FLOAT: -1e9}


def test_weights_that_overflow_keep_their_node_in_fp32(tmp_path):
    scale = np.array([1.0, 2.0, 3.0, 1e5], np.float32)
    model = graph([node("Mul", ["x", "scale"], ["m"], "scaling"), node("Relu", ["m"], ["y"])], {"scale": scale})
    result, facts = typed(tmp_path, model, "fp16")
    assert facts["overflowing"] == ["scale"]
    assert np.array_equal(array_of(weights(result)["scale"]), scale)


def test_a_division_keeps_its_epsilon(tmp_path):
    model = graph(
        [node("Add", ["x", "eps"], ["a"]), node("Div", ["x", "a"], ["y"])], {"eps": np.array(1e-12, np.float32)}
    )
    result, _facts = typed(tmp_path, model, "fp16")
    assert evaluate(emulated(result), {"x": np.zeros((1, 4), np.float32)})["y"].tolist() == [[0, 0, 0, 0]]


@pytest.mark.parametrize("kind", ["fp16", "bf16"])
def test_arithmetic_on_sizes_stays_exact(tmp_path, kind):
    # 3001 is no float16 and no bfloat16: the size would come out wrong
    model = graph(
        [
            node("Shape", ["x"], ["s"]),
            node("Cast", ["s"], ["f"], to=TensorProto.FLOAT),
            node("Mul", ["f", "one"], ["g"]),
            node("Cast", ["g"], ["i"], to=TensorProto.INT64),
            node("Relu", ["x"], ["r"]),
            node("Reshape", ["r", "i"], ["y"]),
        ],
        {"one": np.array(1, np.float32)},
    )
    result, facts = typed(tmp_path, model, kind)
    assert facts["counted"] == 3
    x = np.ones((3001, 4), np.float32)
    assert evaluate(emulated(result), {"x": x})["y"].shape == (3001, 4)


@pytest.mark.parametrize("kind", ["fp16", "bf16"])
def test_inputs_that_onnx_fixes_to_float32_stay_so(tmp_path, kind):
    model = graph(
        [
            node("Resize", ["x", "", "scales"], ["z"], "resize", mode="nearest"),
            node("Range", ["zero", "four", "one"], ["p"], "range"),
            node("Add", ["x", "p"], ["a"], "add"),
            node("TopK", ["a", "k"], ["v", "i"], "top"),
            node("Concat", ["z", "v"], ["y"], axis=1),
        ],
        {
            "scales": np.array([1, 2], np.float32),
            "zero": np.array(0, np.float32),
            "four": np.array(4, np.float32),
            "one": np.array(1, np.float32),
            "k": np.array([2]),
        },
    )
    result, _facts = typed(tmp_path, model, kind)
    assert weights(result)["scales"].data_type == TensorProto.FLOAT
    assert weights(result)["four"].data_type == TensorProto.FLOAT
    x = np.array([[1, 2, 3, 4]], np.float32)
    assert evaluate(emulated(result), {"x": x})["y"].tolist() == evaluate(model, {"x": x})["y"].tolist()


def test_constants_control_flow_and_constant_outputs(tmp_path):
    branch = [
        helper.make_graph(
            [node(op, ["r", "c"], [f"{op}_out"])],
            op,
            [],
            [helper.make_tensor_value_info(f"{op}_out", TensorProto.FLOAT, ["batch", 4])],
        )
        for op in ("Add", "Mul")
    ]
    model = graph(
        [
            node("Constant", [], ["c"], value=helper.make_tensor("c", TensorProto.FLOAT, [1], [2.0])),
            node("Relu", ["x"], ["r"]),
            node("If", ["flag"], ["y"], "choice", then_branch=branch[0], else_branch=branch[1]),
        ],
        {"w": np.array([1 / 3], np.float32)},
        inputs={"x": (TensorProto.FLOAT, ["batch", 4]), "flag": (TensorProto.BOOL, [])},
        outputs={"y": (TensorProto.FLOAT, ["batch", 4]), "w": (TensorProto.FLOAT, [1])},
    )
    result, facts = typed(tmp_path, model, "fp16")
    assert facts["outputs"] == {"y": "float32", "w": "float32"}
    assert facts["kept"] == ["choice"]  # told, since it is no half that was asked for
    assert facts["why_kept"] == {"choice": "If: what is inside of control flow stays fp32"}
    for flag in (True, False):
        feeds = {"x": np.array([[1, 2, 3, 4]], np.float32), "flag": np.array(flag)}
        assert evaluate(emulated(result), feeds)["y"].tolist() == evaluate(model, feeds)["y"].tolist()


@given(arrays.arrays(np.float32, 5, elements=st.floats(width=32, allow_nan=False)))
def test_bfloat16_rounds_to_nearest_even(values):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    with np.errstate(over="ignore"):
        expected = values.astype(ml_dtypes.bfloat16).view(np.uint16)
    assert np.array_equal(round_to_half(values, "bf16"), expected)


def test_int8_has_symmetric_pairs_that_tensorrt_takes(tmp_path):
    model, facts = typed(tmp_path, cnn(), "int8", ranges_json=ranges_of(tmp_path, cnn()))
    assert facts["quantized"] == 3
    known = weights(model)
    pairs = [entry for entry in model.graph.node if entry.op_type in ("QuantizeLinear", "DequantizeLinear")]
    assert len(pairs) == 12  # an activation and a weight for each of three nodes
    for pair in pairs:
        scale, zero = known[pair.input[1]], known[pair.input[2]]
        assert zero.data_type == TensorProto.INT8
        assert not array_of(zero).any()
        assert (array_of(scale) > 0).all()
    per_channel = {len(array_of(known[pair.input[1]])) for pair in pairs if array_of(known[pair.input[1]]).ndim}
    assert per_channel == {8, 16, 10}
    assert not any(entry.op_type == "DequantizeLinear" for entry in consumers(model, "b1"))
    assert producer(model, "y").op_type == "Gemm"  # outputs are left alone
    x = images(3, 12, 16)
    assert 1e-4 < parity_of(tmp_path, model, evaluate(cnn(), {"x": x}), x)["relative_l2"] < 0.05


def test_int8_keeps_what_is_kept(tmp_path):
    model, facts = typed(tmp_path, cnn(), "int8", keep=["stem/*"], ranges_json=ranges_of(tmp_path, cnn()))
    assert facts["quantized"] == 2
    stem = next(entry for entry in model.graph.node if entry.name == "stem/conv")
    assert list(stem.input) == ["x", "w1", "b1"]


def test_a_kept_node_reads_what_was_computed_though_its_neighbour_reads_the_pair(tmp_path):
    model = graph(
        [
            node("Relu", ["x"], ["r"]),
            node("MatMul", ["r", "w"], ["q"], "query"),
            node("MatMul", ["r", "w"], ["k"], "key"),
            node("Add", ["q", "k"], ["y"]),
        ],
        {"w": np.eye(4, dtype=np.float32)},
        outputs={"y": (TensorProto.FLOAT, ["batch", 4]), "k": (TensorProto.FLOAT, ["batch", 4])},
    )
    (tmp_path / "ranges.json").write_text(json.dumps({"r": [0.0, 1.0]}))
    result, _facts = typed(tmp_path, model, "int8", keep=["key"], ranges_json=tmp_path / "ranges.json")
    kept = {entry.name: list(entry.input) for entry in result.graph.node}["key"]
    assert kept == ["r", "w"]
    x = np.array([[0.3, 0.7, 0.1, 1000.0]], np.float32)  # far outside of the range: a pair would clip it
    found = evaluate(result, {"x": x})
    assert found["k"].tolist() == x.tolist()
    assert found["y"][0, 3] == pytest.approx(1001, abs=0.1)  # the quantised neighbour does clip


def test_an_output_of_the_graph_that_a_quantised_node_reads_stays_exact(tmp_path):
    model = graph(
        [node("Relu", ["x"], ["r"]), node("MatMul", ["r", "w"], ["y"])],
        {"w": np.eye(4, dtype=np.float32)},
        outputs={"y": (TensorProto.FLOAT, ["batch", 4]), "r": (TensorProto.FLOAT, ["batch", 4])},
    )
    (tmp_path / "ranges.json").write_text(json.dumps({"r": [0.0, 1.0]}))
    result, facts = typed(tmp_path, model, "int8", ranges_json=tmp_path / "ranges.json")
    x = np.array([[0.3, 0.7, 0.1, 2.0]], np.float32)
    found = evaluate(result, {"x": x})
    assert found["r"].tolist() == x.tolist()
    assert found["y"][0].tolist() == pytest.approx([0.3, 0.7, 0.1, 1.0], abs=5e-3)
    assert facts["outputs"] == {"y": "float32", "r": "float32"}


def test_int8_keeps_the_factor_of_a_bias(tmp_path):
    model = graph(
        [node("Gemm", ["x", "w", "b"], ["y"], alpha=2.0, beta=0.5)],
        {"w": np.eye(4, dtype=np.float32), "b": np.array([10, 20, 30, 40], np.float32)},
    )
    (tmp_path / "ranges.json").write_text(json.dumps({"x": [-1.0, 1.0]}))
    result, _facts = typed(tmp_path, model, "int8", ranges_json=tmp_path / "ranges.json")
    found = evaluate(result, {"x": np.zeros((1, 4), np.float32)})["y"]
    assert found.tolist() == [[5, 10, 15, 20]]


def test_int8_convolutions_state_their_kernel(tmp_path):
    """TensorRT 8.6 does not read a Conv whose kernel is to be seen on its quantised weights alone."""
    model = graph(
        [node("Conv", ["x", "w"], ["y"], pads=[1, 0, 1, 0])],
        {"w": np.ones((2, 1, 3, 1), np.float32)},
        inputs={"x": (TensorProto.FLOAT, ["batch", 1, "h", "w"])},
        outputs={"y": (TensorProto.FLOAT, ["batch", 2, "h", "w"])},
    )
    (tmp_path / "ranges.json").write_text(json.dumps({"x": [-1.0, 1.0]}))
    result, _facts = typed(tmp_path, model, "int8", ranges_json=tmp_path / "ranges.json")
    (conv,) = [each for each in result.graph.node if each.op_type == "Conv"]
    assert [list(a.ints) for a in conv.attribute if a.name == "kernel_shape"] == [[3, 1]]


def test_int8_that_would_quantise_nothing_is_refused(tmp_path):
    ranges = ranges_of(tmp_path, cnn())
    with pytest.raises(BackendError, match=r"int8 would quantise no node: 0 of Conv, .* left by precision.keep"):
        typed(tmp_path, cnn(), "int8", keep=["*"], ranges_json=ranges)
    idle = ranges_of(tmp_path, cnn(), data=np.zeros((8, 1, 8, 8), np.float32))
    with pytest.raises(BackendError, match=r"inputs of .*stem/conv were zero on all calibration data"):
        typed(tmp_path, cnn(), "int8", keep=["head/*", "body/*"], ranges_json=idle)


def test_an_input_that_is_always_zero_is_left_in_fp32(tmp_path):
    model = graph(
        [
            node("MatMul", ["x", "w"], ["a"], "used"),
            node("MatMul", ["z", "w"], ["b"], "idle"),
            node("Add", ["a", "b"], ["y"]),
        ],
        {"w": np.eye(4, dtype=np.float32)},
        inputs={"x": (TensorProto.FLOAT, ["batch", 4]), "z": (TensorProto.FLOAT, ["batch", 4])},
    )
    (tmp_path / "ranges.json").write_text(json.dumps({"x": [-1.0, 1.0], "z": [0.0, 0.0]}))
    result, facts = typed(tmp_path, model, "int8", ranges_json=tmp_path / "ranges.json")
    assert facts["constant"] == ["idle"]
    assert facts["quantized"] == 1
    x = np.array([[1, 0.5, -1, 0]], np.float32)
    found = evaluate(result, {"x": x, "z": x / 1000})["y"]
    assert np.allclose(found, x * 1.001, atol=5e-3)


def test_ranges_of_another_graph_are_refused(tmp_path):
    (tmp_path / "ranges.json").write_text(json.dumps({"x": [0.0, 1.0]}))
    with pytest.raises(BackendError, match="no calibrated range for 2 tensors, 'f'"):
        typed(tmp_path, cnn(), "int8", ranges_json=tmp_path / "ranges.json")


@pytest.mark.parametrize("kind", ["fp16", "bf16", "int8"])
def test_weights_beside_the_graph_stay_beside_it(tmp_path, kind):
    folder = tmp_path / "given"
    folder.mkdir()
    model = cnn()
    ranges = ranges_of(tmp_path, model)
    onnx.save_model(
        model, folder / "model.onnx", save_as_external_data=True, location="model.onnx.data", size_threshold=0
    )
    files = {"model_onnx": folder / "model.onnx", "model_onnx_data": folder / "model.onnx.data", "ranges_json": ranges}
    inputs = {name.replace("_", "."): path for name, path in files.items()}
    output = tmp_path / "typed"
    output.mkdir()
    params = {"precision": kind, "keep": [], "io": "float32"}
    result = precision.run(StageRequest("type", params, inputs, output))
    assert set(result.outputs) == {"model.onnx", "model.onnx.data"}
    assert {path.name for path in output.iterdir()} == set(result.outputs)
    x = images(3)
    arrays = {"a/min/in/x": x, "a/min/out/y": evaluate(cnn(), {"x": x})["y"]}
    save_arrays(arrays, tmp_path / "reference.safetensors")
    inputs = {name: output / name for name in result.outputs} | {
        "reference.safetensors": tmp_path / "reference.safetensors"
    }
    report = tmp_path / "report"
    report.mkdir()
    assert verify.run(StageRequest("verify", PARITY, inputs, report)).facts["parity"]["relative_l2"] < 0.05


@pytest.mark.parametrize(("kind", "scale"), [("fp8", TensorProto.FLOAT), ("fp8-fp16", TensorProto.FLOAT16)])
def test_fp8_has_symmetric_e4m3_pairs_whose_scales_reach_448(tmp_path, kind, scale):
    ranges = ranges_of(tmp_path, cnn())
    model, facts = typed(tmp_path, cnn(), kind, ranges_json=ranges)
    assert facts["quantized"] == 3
    assert model.opset_import[0].version == 19
    tensors = weights(model)
    pairs = [entry for entry in model.graph.node if entry.op_type in ("QuantizeLinear", "DequantizeLinear")]
    assert len(pairs) == 2 * 6
    for entry in pairs:
        zero = tensors[entry.input[2]]
        assert zero.data_type == TensorProto.FLOAT8E4M3FN
        assert set(zero.raw_data) == {0}
        assert tensors[entry.input[1]].data_type == scale
        assert zero.dims == tensors[entry.input[1]].dims
    known = json.loads(ranges.read_text())
    scales = {entry.input[0]: array_of(tensors[entry.input[1]]) for entry in pairs if entry.op_type == "QuantizeLinear"}
    assert scales["r1"] == pytest.approx(max(map(abs, known["r1"])) / 448, rel=1e-3)
    peaks = np.abs(array_of(weights(cnn())["w1"])).max(axis=(1, 2, 3))
    assert scales["w1"] == pytest.approx(peaks / 448, rel=1e-3)


def test_the_cpu_runs_fp8_pairs_as_the_type_is_defined(tmp_path):
    import ml_dtypes

    model, _facts = typed(tmp_path, cnn(), "fp8", ranges_json=ranges_of(tmp_path, cnn()))
    scale = next(array_of(weights(model)[one.input[1]]) for one in model.graph.node if one.input[0] == "x")
    pair = [one for one in model.graph.node if one.input[0] == "x" or one.input[0] == "x_QuantizeLinear_Output"]
    rounded = pair[-1].output[0]
    del model.graph.output[:]
    model.graph.output.append(helper.make_tensor_value_info(rounded, TensorProto.FLOAT, None))
    x = np.linspace(-2, 2, 128, dtype=np.float32).reshape(2, 1, 8, 8)  # the range is 0 to 1: half of it is clipped
    expected = (x / scale).clip(-448, 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * scale
    options = onnxruntime.SessionOptions()  # optimised, the pair would move into a QLinearConv, which knows no fp8
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    found = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    assert np.array_equal(found.run([rounded], {"x": x})[0], expected)


def test_fp8_is_close_to_fp32_and_keeps_what_is_kept(tmp_path):
    x, ranges = images(seed=3), ranges_of(tmp_path, cnn())
    reference = evaluate(cnn(), {"x": x})
    found = parity_of(tmp_path, typed(tmp_path, cnn(), "fp8", ranges_json=ranges)[0], reference, x)
    assert 1e-3 < found["relative_l2"] < 0.1
    part, facts = typed(tmp_path, cnn(), "fp8", keep=["body/conv"], ranges_json=ranges)
    assert facts["kept"] == ["body/conv"]
    assert producer(part, "c2").input[0] == "r1"


def test_dynamic_int8_needs_no_ranges_and_has_a_scale_for_each_column(tmp_path):
    x = images(seed=3)
    reference = evaluate(cnn(), {"x": x})
    model, facts = typed(tmp_path, cnn(), "int8-dynamic")
    assert facts["quantized"] == 1
    assert [one.op_type for one in model.graph.node].count("MatMulInteger") == 1
    assert any(tensor.data_type == TensorProto.INT8 and tensor.dims == [16, 10] for tensor in model.graph.initializer)
    assert any(
        tensor.data_type == TensorProto.FLOAT and tensor.dims == [10] and "scale" in name
        for name, tensor in weights(model).items()
    )
    assert 1e-4 < parity_of(tmp_path, model, reference, x)["relative_l2"] < 0.05
    with pytest.raises(BackendError, match="would quantise no node"):
        typed(tmp_path, cnn(), "int8-dynamic", keep=["head/*"])


BUILD = """
import sys
import tensorrt_rtx as trt

logger = trt.Logger(trt.Logger.ERROR)
for path in sys.argv[1:]:
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(path):
        sys.exit("; ".join(parser.get_error(index).desc() for index in range(parser.num_errors)))
    config, profile = builder.create_builder_config(), builder.create_optimization_profile()
    profile.set_shape("x", (1, 1, 8, 8), (2, 1, 8, 8), (4, 1, 16, 16))
    config.add_optimization_profile(profile)
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM89, 0)
    if builder.build_serialized_network(network, config) is None:
        sys.exit(f"{path} does not build")
"""


def test_tensorrt_rtx_builds_every_typed_graph(tmp_path):
    if importlib.util.find_spec("tensorrt_rtx") is None:
        pytest.skip("needs tensorrt-rtx: pip install 'enginery[tensorrt-rtx]'")
    paths = []
    for kind, keep in itertools.product(["fp16", "bf16", "int8", "fp8", "fp8-fp16"], [(), ("body/*",)]):
        extra = {"ranges_json": ranges_of(tmp_path, cnn())} if "8" in kind else {}
        model, _facts = typed(tmp_path, cnn(), kind, keep=keep, **extra)
        paths.append(tmp_path / f"{kind}-{len(keep)}.onnx")
        onnx.save(model, paths[-1])
    found = subprocess.run([sys.executable, "-c", BUILD, *map(str, paths)], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
