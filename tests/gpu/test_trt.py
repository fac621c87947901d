"""Classic TensorRT on a GPU: compiled in child processes as a build does, executed, compared, and made to fail."""

import json

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from artifacts.refs import digest_bytes
from tasks import halves
from tasks.errors import BackendError
from tests.contract import graphs
from tests.gpu.compiling import OPSET, VECTOR, at_opset, relative
from tests.unit.tasks.small_graphs import cnn, evaluate, graph, images, node

pytestmark = pytest.mark.gpu


def is_weak(trt):
    return not hasattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED")


def test_facts_say_what_was_built_and_on_what(plan, trt, device):
    path, facts, progress = plan
    assert facts["runtime_version"] == trt.__version__
    assert facts["device"]["compute_capability"] == device["compute_capability"]
    assert facts["device"]["sm_count"] > 0
    assert facts["device"]["l2_bytes"] > 0
    assert facts["device"]["bus_width_bits"] > 0
    assert facts["workspace"] == {"asked": 256 << 20, "limit": 256 << 20, "tried": [256 << 20]}
    assert facts["settings"]["TF32"] is False
    assert facts["settings"]["builder_optimization_level"] == 1
    assert facts["layers"]["count"] > 0
    assert facts["size"] == path.stat().st_size
    assert len(json.loads((path.parent / "layers.json").read_text())["Layers"]) == facts["layers"]["count"]
    assert progress


def test_both_profiles_agree_with_onnx_runtime_at_every_corner(plan, load):
    runner = load(plan[0])
    for shape in [(1, 8, 8), (4, 16, 16), (64, 8, 8), (128, 8, 8), (1, 8, 8), (3, 11, 13)]:
        x = images(*shape)
        assert relative(evaluate(cnn(), {"x": x})["y"], runner({"x": x})["y"]) < 1e-5, shape


def test_shapes_of_no_profile_are_refused_and_the_runner_goes_on(plan, load):
    runner = load(plan[0])
    with pytest.raises(BackendError, match=r"bad profile.*no profile of the plan admits x \[129, 1, 8, 8\]"):
        runner({"x": images(129)})
    with pytest.raises(BackendError, match="no input x"):
        runner({"y": images(1)})
    assert runner({"x": images(2)})["y"].shape == (2, 10)


def test_a_graph_replays_what_was_captured(plan, load):
    runner, plain = load(plan[0], graphs=True), load(plan[0])
    for seed in range(6):
        x = images(2, seed=seed)
        np.testing.assert_array_equal(runner({"x": x})["y"], plain({"x": x})["y"])
    large = images(4, 16, 16)  # the buffers grow, and what was captured must not be replayed into freed memory
    np.testing.assert_array_equal(runner({"x": large})["y"], plain({"x": large})["y"])
    for seed in range(6):
        x = images(2, seed=seed)
        np.testing.assert_array_equal(runner({"x": x})["y"], plain({"x": x})["y"])


def test_a_plan_with_another_digest_is_not_loaded(plan, load):
    data = plan[0].read_bytes()
    load(plan[0], digest=digest_bytes(data))
    with pytest.raises(BackendError, match=r"bad data.*is not loaded"):
        load(plan[0], digest="0" * 64)


def test_bytes_that_are_no_plan_are_refused(trt, load, tmp_path):
    (tmp_path / "model.plan").write_bytes(b"\0" * 4096)
    with pytest.raises(BackendError) as caught:
        load(tmp_path / "model.plan")
    assert caught.value.kind == "version mismatch"


def test_a_typed_fp16_graph_is_compiled_as_it_is_typed(compiler, load, trt):
    model = at_opset(cnn())
    typed = halves.to_half(model, "fp16", set(), native=False).model
    result, output = compiler(typed, precision="fp16")
    x = images(4, 16, 16)
    difference = relative(evaluate(cnn(), {"x": x})["y"], load(output / "model.plan")({"x": x})["y"])
    assert 1e-6 < difference < 5e-3  # 0 would mean that nothing was in half
    assert (
        "HALF" in (output / "layers.json").read_text().upper() or "FP16" in (output / "layers.json").read_text().upper()
    )
    assert result.facts["inputs"]["x"]["dtype"] == "FLOAT"
    assert result.facts["settings"].get("FP16") == (True if is_weak(trt) else None)


def test_what_the_graph_keeps_in_fp32_is_not_lowered(compiler, load, trt):
    # (x * 300) * 300 leaves float16 (65504); the two products are kept, the rest is half.
    weights = {"a": np.float32(300), "w": np.full((4, 4), 0.25, np.float32)}
    nodes = [
        node("Mul", ["x", "a"], ["p"], "p"),
        node("Mul", ["p", "a"], ["q"], "q"),
        node("Div", ["q", "a"], ["r"], "r"),
        node("MatMul", ["r", "w"], ["y"], "m"),
    ]
    typed = halves.to_half(graph(nodes, weights, opset=OPSET), "fp16", {"p", "q", "r"}, native=False).model
    result, output = compiler(typed, precision="fp16", profiles=VECTOR)
    if is_weak(trt):
        assert result.facts["settings"]["FP16"] is True
        assert result.facts["settings"]["OBEY_PRECISION_CONSTRAINTS"] is True
    x = np.linspace(0.5, 4, 8, dtype=np.float32).reshape(2, 4)
    found = load(output / "model.plan")({"x": x})["y"]
    np.testing.assert_allclose(found, x @ weights["w"] * 300, rtol=5e-3)


def quantised(folder):
    """The classifier with the Q/DQ pairs that typing places: per channel on weights, which 8.6's Conv asks for."""
    from tasks.precision import run
    from tasks.stage import StageRequest

    graph_path, ranges = folder / "graph" / "model.onnx", folder / "graph" / "ranges.json"
    graph_path.parent.mkdir()
    onnx.save(at_opset(graphs.classifier()), graph_path)
    ranges.write_text('{"x": [-1.0, 1.0], "f": [-4.0, 4.0]}')
    params = {"precision": "int8", "keep": [], "io": "float32"}
    run(StageRequest("type", params, {"model.onnx": graph_path, "ranges.json": ranges}, folder))
    return onnx.load(folder / "model.onnx")


def test_a_quantised_graph_is_compiled_in_int8(compiler, load, trt, tmp_path):
    model = quantised(tmp_path)
    shapes = {"min": [1, 3, 8, 8], "opt": [4, 3, 16, 16], "max": [4, 3, 16, 16]}
    result, output = compiler(model, precision="int8", profiles=[{"name": "one", "inputs": {"x": shapes}}])
    x = np.random.default_rng(0).uniform(-1, 1, (4, 3, 16, 16)).astype(np.float32)
    found = load(output / "model.plan")({"x": x})["y"]
    assert relative(evaluate(at_opset(model), {"x": x})["y"], found) < 2e-2
    assert relative(evaluate(at_opset(graphs.classifier()), {"x": x})["y"], found) > 1e-4
    assert "INT8" in (output / "layers.json").read_text().upper()
    assert result.facts["settings"].get("INT8") == (True if is_weak(trt) else None)


def test_beside_int8_pairs_the_rest_may_be_half(compiler, load, trt, tmp_path):
    if not is_weak(trt):
        pytest.skip("later versions get half pairs in the graph (tests/unit/tasks/test_precision.py)")
    model = quantised(tmp_path)
    shapes = {"min": [1, 3, 8, 8], "opt": [4, 3, 16, 16], "max": [4, 3, 16, 16]}
    profiles = [{"name": "one", "inputs": {"x": shapes}}]
    result, output = compiler(model, precision="int8-fp16", profiles=profiles)
    assert (result.facts["settings"]["INT8"], result.facts["settings"]["FP16"]) == (True, True)
    x = np.random.default_rng(0).uniform(-1, 1, (4, 3, 16, 16)).astype(np.float32)
    expected = evaluate(at_opset(model), {"x": x})["y"]
    assert relative(expected, load(output / "model.plan")({"x": x})["y"]) < 2e-2
    kept, output = compiler(model, precision="int8-fp16", profiles=profiles, keep=["pool"])
    assert kept.facts["settings"]["OBEY_PRECISION_CONSTRAINTS"] is True
    assert relative(expected, load(output / "model.plan")({"x": x})["y"]) < 2e-2


def test_a_timing_cache_is_used_and_a_foreign_one_is_not(compiler):
    _result, output = compiler(cnn())
    cache = (output / "timing.cache").read_bytes()
    again, _output = compiler(cnn(), cache=cache)
    used = again.facts["timing_cache"]
    assert used["used"] is True  # by 8.6 without what the graph compiler measured
    foreign, _output = compiler(cnn(), cache=b"not a timing cache" * 100)
    assert foreign.facts["timing_cache"]["used"] is False
    assert any("timing cache is not used" in words for words in foreign.facts["warnings"])


def test_integers_and_outputs_whose_size_depends_on_data(compiler, load):
    model = graph(
        [node("NonZero", ["x"], ["n"]), node("Cast", ["n"], ["y"], to=TensorProto.INT32)],
        {},
        inputs={"x": (TensorProto.INT64, ["batch", 4])},
        outputs={"y": (TensorProto.INT32, [2, "count"])},
    )
    _result, output = compiler(model, profiles=VECTOR)
    runner = load(output / "model.plan")
    for x in (np.eye(4, dtype=np.int64), np.ones((8, 4), np.int64), np.zeros((2, 4), np.int64)):
        np.testing.assert_array_equal(runner({"x": x})["y"], np.stack(np.nonzero(x)))
    if runner.inputs["x"] == "INT32":
        with pytest.raises(BackendError, match="beyond int32"):
            runner({"x": np.full((1, 4), 1 << 40)})


def test_a_gpu_that_is_not_here_is_named(compiler, device):
    error = compiler.refuse(cnn(), gpu="sm21")
    assert error.kind == "no device"
    assert device["name"] in error.message


def test_operators_that_no_one_knows_need_a_plugin(compiler):
    nodes = [onnx.helper.make_node("Frobnicate", ["x"], ["y"], name="f", domain="acme")]
    spec = [onnx.helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 4]) for name in "xy"]
    opsets = [onnx.helper.make_opsetid("", OPSET), onnx.helper.make_opsetid("acme", 1)]
    model = onnx.helper.make_model(
        onnx.helper.make_graph(nodes, "g", spec[:1], spec[1:]), opset_imports=opsets, ir_version=8
    )
    error = compiler.refuse(model, profiles=VECTOR, keep_opset=True)
    assert error.kind == "missing plugin"
    assert "acme::Frobnicate" in error.advice


def test_operators_of_the_standard_that_are_not_taken(compiler):
    model = graph(
        [node("Det", ["x"], ["y"])],
        {},
        inputs={"x": (TensorProto.FLOAT, ["batch", 4, 4])},
        outputs={"y": (TensorProto.FLOAT, ["batch"])},
    )
    shape = {"name": "one", "inputs": {"x": {"min": [1, 4, 4], "opt": [1, 4, 4], "max": [2, 4, 4]}}}
    error = compiler.refuse(model, profiles=[shape])
    assert error.kind == "unsupported operator"
    assert "Det" in error.advice


@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        ({"min": [1, 3, 8, 8], "opt": [1, 3, 8, 8], "max": [1, 3, 8, 8]}, "does not fit the network's"),
        ({"min": [1, 1, 8], "opt": [1, 1, 8], "max": [1, 1, 8]}, "does not fit the network's"),
        ({"min": [4, 1, 8, 8], "opt": [2, 1, 8, 8], "max": [8, 1, 8, 8]}, "profile odd"),
    ],
)
def test_profiles_that_cannot_be(compiler, shapes, words):
    error = compiler.refuse(cnn(), profiles=[{"name": "odd", "inputs": {"x": shapes}}])
    assert error.kind == "bad profile"
    assert words in error.message


def test_what_this_version_lacks_is_refused_by_name(compiler, trt):
    if hasattr(trt.DataType, "BF16"):
        pytest.skip(f"TensorRT {trt.__version__} has all of it")
    error = compiler.refuse(cnn(), precision="bf16")
    assert (error.kind, "10.0 or later" in error.advice) == ("version mismatch", True)
    error = compiler.refuse(at_opset(cnn(), 18), keep_opset=True)
    assert (error.kind, "export.opset to 17" in error.advice) == ("version mismatch", True)
    error = compiler.refuse(cnn(), hardware_compatibility="same-compute-capability")
    assert (error.kind, "10.9 and later" in error.advice) == ("version mismatch", True)


def test_settings_that_are_out_of_range_are_rejected(compiler):
    error = compiler.refuse(cnn(), optimization_level=9)
    assert error.kind == "rejected setting"
    assert "builder_optimization_level" in error.message


def test_plans_for_other_gpus(compiler, load):
    result, output = compiler(cnn(), hardware_compatibility="ampere+")
    assert result.facts["settings"]["hardware_compatibility_level"] == "AMPERE_PLUS"
    x = images(2)
    assert relative(evaluate(cnn(), {"x": x})["y"], load(output / "model.plan")({"x": x})["y"]) < 1e-5


def test_plans_for_later_versions(compiler, load):
    try:
        result, output = compiler(cnn(), version_compatible=True)
    except BackendError as err:
        if err.kind == "missing package":
            pytest.skip(err.message)  # the wheel of 8.6.0 comes without the lean runtime
        raise
    assert result.facts["settings"]["VERSION_COMPATIBLE"] is True
    x = images(2)
    found = load(output / "model.plan", host_code=True)({"x": x})["y"]
    assert relative(evaluate(cnn(), {"x": x})["y"], found) < 1e-5


def test_memory_that_runs_out_is_said_with_what_was_tried(compiler, device):
    from tasks.engines.cuda import Cuda

    # Activations of 4 GiB each where 3 GiB are left; no tensor has 2^31 elements, which 8.6 refuses by itself.
    side = 8192
    weights = {"w": np.ones((16, 1, 3, 3), np.float32), "v": np.ones((16, 16, 3, 3), np.float32)}
    nodes = [node("Conv", ["x", "w"], ["c"], pads=[1, 1, 1, 1]), node("Conv", ["c", "v"], ["y"], pads=[1, 1, 1, 1])]
    spec = {"x": (TensorProto.FLOAT, ["batch", 1, "h", "w"])}, {"y": (TensorProto.FLOAT, ["batch", 16, "h", "w"])}
    model = graph(nodes, weights, inputs=spec[0], outputs=spec[1])
    shape = [1, 1, side, side]
    profile = {"name": "large", "inputs": {"x": {"min": shape, "opt": shape, "max": shape}}}
    cuda = Cuda()
    try:
        cuda.allocate(cuda.free_bytes() - (3 << 30))
        error = compiler.refuse(model, profiles=[profile], workspace=1 << 30)
    finally:
        cuda.close()
    assert error.kind == "out of memory"
    assert "tried workspaces: 1024 MiB, 512 MiB" in error.message
