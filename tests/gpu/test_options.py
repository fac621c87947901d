"""Options of the compiler on the device: weak typing, TensorRT's own calibration, and flags that are read back."""

import json
import shutil
import sys

import numpy as np
import onnx
import pytest
import yaml
from onnx import TensorProto
from safetensors.numpy import save

from tests.gpu.compiling import VECTOR, at_opset, relative
from tests.integration.building import RECIPES, build
from tests.unit.tasks.small_graphs import cnn, evaluate, graph, images, node

pytestmark = pytest.mark.gpu

SMALL = [{"name": "one", "inputs": {"x": {"min": [1, 1, 8, 8], "opt": [4, 1, 8, 8], "max": [8, 1, 8, 8]}}}]
TENSORS = {"x": {"dtype": "float32", "shape": ["batch", 1, "height", "width"]}}


def digits(folder, gpu, **precision):
    """The digits recipe for the GPU that is here, in int8 alone."""
    shutil.copytree(RECIPES / "digits", folder / "digits", ignore=shutil.ignore_patterns("__pycache__"))
    document = yaml.safe_load((RECIPES / "digits-gpu.yaml").read_text())
    document["precision"] |= {"build": ["int8"], "fallback": {}} | precision
    document["targets"] = [{"runtime": "tensorrt", "gpus": [gpu]}]
    document["build"] |= {"optimization_level": 3}  # below it, what is weakly typed was not found to be faster in int8
    path = folder / "digits-gpu.yaml"
    path.write_text(yaml.safe_dump(document, sort_keys=False))
    return path


def weak(trt):
    if not hasattr(trt.BuilderFlag, "FP16"):
        pytest.skip(f"TensorRT {trt.__version__} knows strongly typed networks only")
    return {"typing": "weak"}


@pytest.mark.timeout(600)
def test_digits_are_as_right_by_tensorrts_calibration_as_by_pairs(device, trt, tmp_path):
    own = {"build": {"typing": "weak"}} if hasattr(trt.DataType, "BF16") else {}
    weak(trt)
    calibration = yaml.safe_load((RECIPES / "digits-gpu.yaml").read_text())["precision"]["calibration"]
    ways = {
        "qdq": {"int8": "qdq"},
        "entropy": {"int8": "calibrator"},
        "minmax": {"int8": "calibrator", "calibration": calibration | {"method": "minmax"}},
        "entropy, rest in fp16": {"int8": "calibrator", "build": ["int8-fp16"]},
    }
    found = {}
    for name, precision in ways.items():
        recipe = digits(tmp_path / name, device["compute_capability"], **precision)
        if own and name != "qdq":
            document = yaml.safe_load(recipe.read_text())
            document["targets"][0] |= own
            recipe.write_text(yaml.safe_dump(document))
        _ran, planned, _session = build(recipe, tmp_path / "store")
        (engine,) = planned.engines
        assert (engine.given, engine.state) == (engine.asked, "cached"), engine.why
        compiled = engine.compile.record
        found[name] = {
            "top1": engine.engine_verify.facts["metric"]["value"],
            "source": engine.engine_verify.facts["metric"]["source"],
            "relative_l2": engine.engine_verify.facts["data"]["relative_l2"],
            "seconds": compiled.facts["seconds"],
            "kept": compiled.facts.get("kept"),
        }
        if own == {} or name != "qdq":
            assert compiled.facts["settings"]["INT8"] is True
        assert compiled.facts["settings"].get("FP16", False) is (engine.given == "int8-fp16")
        for step in planned.steps:
            if step.id.startswith("calibrate:tensorrt"):
                found[name]["calibrated"] = {**step.record.facts, "stage_seconds": step.record.seconds}
        assert ("calibrated" in found[name]) is (name != "qdq")
    sys.stdout.write(f"CALIBRATION {json.dumps(found)}\n")
    for name, figures in found.items():
        assert figures["top1"] >= 0.97, (name, found)
        assert abs(figures["top1"] - found["qdq"]["top1"]) <= 0.01, (name, found)
        assert 1e-5 < figures["relative_l2"] < 0.25, (name, found)  # 0 would mean that nothing is in int8
    assert found["entropy"]["calibrated"]["samples"] == 256
    assert found["entropy"]["calibrated"]["tensors"] > 0

    # Another option of the compiler uses the calibration again.
    again = tmp_path / "entropy" / "digits-gpu.yaml"
    again.write_text(again.read_text().replace("optimization_level: 3", "optimization_level: 2"))
    ran, _planned, _session = build(again, tmp_path / "store")
    assert not any(step.startswith("calibrate") for step in ran)
    assert any(step.startswith("compile") for step in ran)


def test_ranges_and_channels_of_zeros_are_found_before_the_compiler_is_asked(compiler, load, trt):
    """What ended 8.6 with `quantizeBiasCommon: Assertion getter(i) != 0`."""
    model = at_opset(cnn())
    for tensor in model.graph.initializer:
        values = onnx.numpy_helper.to_array(tensor).copy()
        if tensor.name == "w2":
            values[3] = 0  # a filter of zeros
        if tensor.name == "b1":
            values[:] = -1e3  # so that the first Relu gives zero on all data
        tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    data = {"dataset.safetensors": save({"x": images(16)})}
    asked = {"method": "entropy", "batch": 4, "tensors": TENSORS, **weak(trt)}
    calibrated, output = compiler(model, stage="calibrate", files=data, **asked)
    sys.stdout.write(f"{calibrated.facts}\n{(output / 'calibration.cache').read_text()}\n")
    assert calibrated.facts["constant"]
    files = {"calibration.cache": (output / "calibration.cache").read_bytes()}
    result, output = compiler(model, files=files, precision="int8", calibrator="entropy", profiles=SMALL, **weak(trt))
    assert "body/conv" in result.facts["kept"]
    x = images(4)
    expected = evaluate(model, {"x": x})["y"]
    assert relative(expected, load(output / "model.plan")({"x": x})["y"]) < 5e-2


def test_a_cache_of_another_graph_is_refused(compiler, trt):
    asked = {"precision": "int8", "calibrator": "entropy", "profiles": SMALL, **weak(trt)}
    error = compiler.refuse(cnn(), files={"calibration.cache": b"TRT-1-Nothing\n"}, **asked)
    assert error.kind == "bad data"
    assert "calibration cache" in error.message


def test_data_of_another_shape_than_the_network_is_refused(compiler, trt):
    data = {"dataset.safetensors": save({"x": np.zeros((8, 3, 8, 8), np.float32)})}
    error = compiler.refuse(
        cnn(), stage="calibrate", files=data, method="minmax", batch=4, tensors=TENSORS, **weak(trt)
    )
    assert error.kind == "bad profile"


@pytest.mark.parametrize("level", [1, 3])
def test_what_is_kept_is_not_lowered_by_a_weakly_typed_compiler(compiler, load, trt, level):
    # (x * 300) * 300 leaves float16 (65504): right only where p, q and r run in fp32.
    weights = {"a": np.float32(300), "w": np.full((4, 4), 0.25, np.float32)}
    nodes = [
        node("Mul", ["x", "a"], ["p"], "p"),
        node("Mul", ["p", "a"], ["q"], "q"),
        node("Div", ["q", "a"], ["r"], "r"),
        node("MatMul", ["r", "w"], ["y"], "m"),
    ]
    model = graph(nodes, weights, opset=17)
    asked = {"precision": "fp16", "keep": ["p", "q", "r"], "profiles": VECTOR, "optimization_level": level}
    result, output = compiler(model, **asked, **weak(trt))
    assert result.facts["settings"]["FP16"] is True
    assert result.facts["settings"]["OBEY_PRECISION_CONSTRAINTS"] is True
    assert result.facts["kept"] == ["p", "q", "r"]
    x = np.linspace(0.5, 4, 8, dtype=np.float32).reshape(2, 4)
    np.testing.assert_allclose(load(output / "model.plan")({"x": x})["y"], x @ weights["w"] * 300, rtol=5e-3)


def test_flags_sources_and_streams_are_set_and_the_engine_is_right(compiler, load):
    sources = ["edge-mask-convolutions", "jit-convolutions"]
    asked = {"sparse_weights": True, "tactic_sources": sources, "max_aux_streams": 0, "workspace": 256 << 20}
    result, output = compiler(cnn(), profiles=SMALL, **asked)
    settings = result.facts["settings"]
    assert settings["SPARSE_WEIGHTS"] is True
    assert settings["tactic_sources"] == 0b11000
    assert settings["max_aux_streams"] == 0
    assert settings["workspace"] == 256 << 20
    x = images(4)
    assert relative(evaluate(cnn(), {"x": x})["y"], load(output / "model.plan")({"x": x})["y"]) < 1e-5


def test_libraries_of_others_are_called_only_where_they_are_asked_for(trt):
    """8.6 leaves cuBLAS and cuDNN alone whatever the tactic sources say, unless a preview feature is switched off."""
    from tasks.engines.trt_log import Log
    from tasks.engines.trt_settings import _NO_EXTERNAL, Settings

    if not hasattr(trt.TacticSource, "CUBLAS_LT"):
        pytest.skip(f"TensorRT {trt.__version__} has no TacticSource.CUBLAS_LT")
    log = Log(lambda _fraction, _text: None)
    builder = trt.Builder(log.for_runtime(trt))
    switch = getattr(trt.PreviewFeature, _NO_EXTERNAL, None)
    for sources, off in ((["jit-convolutions"], False), (["cublas-lt", "jit-convolutions"], True)):
        config = builder.create_builder_config()
        settings = Settings(trt, log, config)
        settings._tactic_sources(sources)
        assert config.get_tactic_sources() == sum(1 << int(_member(trt, name)) for name in sources)
        if switch is not None:
            assert config.get_preview_feature(switch) is not off


def _member(trt, name):
    return getattr(trt.TacticSource, name.upper().replace("-", "_"))


def test_refittable_engines_keep_their_weights_replaceable(compiler, load):
    result, output = compiler(cnn(), profiles=SMALL, refit="weights")
    assert result.facts["settings"]["REFIT"] is True
    runner = load(output / "model.plan")
    assert runner._open.loaded.engine.refittable
    x = images(4)
    assert relative(evaluate(cnn(), {"x": x})["y"], runner({"x": x})["y"]) < 1e-5


@pytest.mark.parametrize(
    ("params", "words"), [({"refit": "stripped"}, "STRIP_PLAN"), ({"weight_streaming": True}, "WEIGHT_STREAMING")]
)
def test_options_that_came_with_10_are_refused_before_it(compiler, trt, params, words):
    if hasattr(trt.BuilderFlag, words):
        pytest.skip(f"TensorRT {trt.__version__} has {words}")
    error = compiler.refuse(cnn(), profiles=SMALL, **params)
    assert (error.kind, "10.0 and later" in error.advice) == ("version mismatch", True)
    assert words in error.message


def test_an_accelerator_that_is_not_here_is_no_device(compiler):
    error = compiler.refuse(cnn(), profiles=SMALL, dla={"core": 0, "gpu_fallback": True})
    assert error.kind == "no device"
    assert "DLA core 0" in error.message


def test_weights_may_stay_in_host_memory(compiler, load, trt):
    if not hasattr(trt.BuilderFlag, "WEIGHT_STREAMING"):
        pytest.skip(f"TensorRT {trt.__version__} has no weight streaming")
    weights = {"w": np.full((4, 4), 0.25, np.float32)}
    model = graph(
        [node("MatMul", ["x", "w"], ["y"])], weights, outputs={"y": (TensorProto.FLOAT, ["batch", 4])}, opset=17
    )
    result, output = compiler(model, profiles=VECTOR, weight_streaming=True)
    assert result.facts["settings"]["WEIGHT_STREAMING"] is True
    x = np.ones((2, 4), np.float32)
    np.testing.assert_allclose(load(output / "model.plan")({"x": x})["y"], x @ weights["w"], rtol=1e-5)
