from __future__ import annotations

import io
import json
import tarfile

import numpy as np
import pytest
from onnx import TensorProto

from recipes.gates import judge
from recipes.schema import Acceptance
from tasks import verify
from tasks.errors import BackendError, ModelCodeError
from tests.unit.tasks.bundles import frames
from tests.unit.tasks.small_graphs import TENSORS, cnn, evaluate, graph, images, node, stage

PARAMS = {"subject": "graph", "executor": "onnxruntime", "batch": 8, "metric": None, "tensors": TENSORS}
TOP1 = {"name": "top1", "entry": None, "label": "label", "output": None}


def reference(model, **cases):
    """Arrays of reference.safetensors: the model's own outputs, at cases given as name -> input "x"."""
    arrays = {}
    for name, x in cases.items():
        case = name.replace("_", "/")
        arrays[f"{case}/in/x"] = x
        arrays |= {f"{case}/out/{output}": value for output, value in evaluate(model, {"x": x}).items()}
    return arrays


def run(folder, model, arrays, params=PARAMS, **more):
    result, output = stage(verify.run, folder, params, model_onnx=model, reference_safetensors=arrays, **more)
    return result.facts, json.loads((output / "report.json").read_text("utf-8"))


def bundle(folder, source):
    path = folder / "code.tar"
    with tarfile.open(path, "w") as archive:
        member = tarfile.TarInfo("judge.py")
        member.size = len(source)
        archive.addfile(member, io.BytesIO(source))
    return path


def test_a_graph_agrees_with_itself(tmp_path):
    facts, report = run(tmp_path, cnn(), reference(cnn(), online_min=images(1), bulk_max=images(5, 12, 16)))
    assert facts["executed"] is True
    assert facts["parity"]["relative_l2"] < 1e-6
    assert facts["parity"]["cosine"] > 1 - 1e-9
    assert [case["name"] for case in facts["cases"]] == ["bulk/max", "online/min"]
    assert report["cases"][0]["outputs"]["y"]["non_finite"] == 0
    assert facts["emulated"] is None


def test_the_worst_case_is_named(tmp_path):
    arrays = reference(cnn(), online_min=images(1), online_max=images(4))
    arrays["online/max/out/y"] = arrays["online/max/out/y"] * 2
    facts, _report = run(tmp_path, cnn(), arrays)
    assert facts["parity"]["worst"] == "online/max/y"
    assert facts["parity"]["relative_l2"] == pytest.approx(0.5, abs=1e-5)


def test_slashes_in_output_names(tmp_path):
    model = graph(
        [node("Relu", ["x"], ["/head/out/y"])], {}, outputs={"/head/out/y": (TensorProto.FLOAT, ["batch", 4])}
    )
    facts, _report = run(tmp_path, model, reference(model, static_opt=np.ones((2, 4), np.float32)))
    assert facts["parity"]["worst"] == "static/opt//head/out/y"


def test_nan_is_counted_and_stated_as_null(tmp_path):
    model = graph([node("Log", ["x"], ["y"])], {})
    arrays = {"a/min/in/x": np.full((1, 4), -1, np.float32), "a/min/out/y": np.ones((1, 4), np.float32)}
    facts, _report = run(tmp_path, model, arrays)
    assert facts["parity"] == {
        "relative_l2": None,
        "max_abs": None,
        "cosine": None,
        "non_finite": 4,
        "worst": "a/min/y",
    }


def test_what_is_wrong_with_the_source_itself_is_told_where_a_graph_fails(tmp_path):
    model = graph([node("Log", ["x"], ["y"])], {})
    arrays = {"a/min/in/x": np.full((1, 4), -1, np.float32), "a/min/out/y": np.full((1, 4), np.nan, np.float32)}
    facts, _report = run(tmp_path, model, arrays)
    assert judge(facts, Acceptance(), "fp32").reasons == (
        "4 NaN or Inf in the outputs",
        "relative_l2 not finite > 0.0001",
        "the source's own outputs have them too (y at a/min)",
    )
    drawing = graph([node("RandomNormalLike", ["x"], ["r"], "noise"), node("Add", ["x", "r"], ["y"])], {})
    x = np.zeros((2, 4), np.float32)
    facts, _report = run(tmp_path, drawing, {"a/min/in/x": x, "a/min/out/y": x + 1})
    told = judge(facts, Acceptance(), "fp32").reasons[-1]
    assert told == "it draws random numbers (RandomNormalLike 'noise', node 0 of 2): let it take them as an input"
    calm = graph([node("Identity", ["x"], ["y"])], {})
    assert "told" not in run(tmp_path, calm, {"a/min/in/x": x, "a/min/out/y": x})[0]


def test_outputs_are_paired_by_name(tmp_path):
    arrays = reference(cnn(), a_min=images(1))
    arrays["a/min/out/boxes"] = arrays["a/min/out/y"]
    with pytest.raises(BackendError, match="the graph gives y, its source boxes, y"):
        run(tmp_path, cnn(), arrays)


def test_a_shape_that_differs_is_an_error(tmp_path):
    arrays = reference(cnn(), a_min=images(2))
    arrays["a/min/out/y"] = arrays["a/min/out/y"][:1]
    with pytest.raises(BackendError, match=r"a/min: y has shape \[2, 10\], the source gave \[1, 10\]"):
        run(tmp_path, cnn(), arrays)


def test_a_graph_that_does_not_run_is_an_error_with_its_words(tmp_path):
    arrays = reference(cnn(), a_min=images(1))
    arrays["a/min/in/x"] = np.ones((1, 3, 8, 8), np.float32)
    with pytest.raises(BackendError, match="case a/min: ONNX Runtime:") as caught:
        run(tmp_path, cnn(), arrays)
    assert caught.value.kind == "crash"


def test_a_graph_that_only_a_plugin_can_run_is_not_executed_where_the_recipe_names_plugins(tmp_path):
    from tests.contract import graphs

    arrays = {"online/min/in/x": np.ones((1, 3, 8, 8), np.float32), "online/min/out/y": np.ones(1, np.float32)}
    with pytest.raises(BackendError) as caught:
        run(tmp_path, graphs.unknown_operator("acme"), arrays)
    assert caught.value.kind == "unsupported operator"
    result, output = stage(
        verify.run,
        tmp_path,
        PARAMS | {"plugins": True},
        model_onnx=graphs.unknown_operator("acme"),
        reference_safetensors=arrays,
    )
    assert (result.facts["executed"], result.facts["plugin"]) == (False, True)
    assert "acme" in result.facts["reason"]
    assert not (output / "report.json").exists()
    facts, _report = run(tmp_path, cnn(), reference(cnn(), online_min=images(1)), PARAMS | {"plugins": True})
    assert facts["executed"] is True  # what ONNX Runtime can run is measured all the same


def test_an_unknown_executor_executes_nothing(tmp_path):
    params = PARAMS | {"executor": "abacus"}
    result, output = stage(verify.run, tmp_path, params, model_onnx=cnn())
    assert result.facts["executed"] is False
    assert "abacus" in result.facts["reason"]
    assert list(output.iterdir()) == []


def test_float16_overflow_is_not_hidden_by_the_cpu(tmp_path):
    # ONNX Runtime alone computes 300 * 300 in float32 and answers 300
    halves = graph(
        [
            node("Cast", ["x"], ["h"], to=TensorProto.FLOAT16),
            node("Mul", ["h", "h"], ["s"]),
            node("Sqrt", ["s"], ["r"]),
            node("Cast", ["r"], ["y"], to=TensorProto.FLOAT),
        ],
        {},
    )
    x = np.array([[300, 1, 2, 3]], np.float32)
    facts, _report = run(tmp_path, halves, {"a/min/in/x": x, "a/min/out/y": x})
    assert facts["parity"]["non_finite"] == 1
    assert "rounded" in facts["emulated"]
    engine, _report = run(tmp_path, halves, {"a/min/in/x": x, "a/min/out/y": x}, PARAMS | {"subject": "engine"})
    assert engine["emulated"] is None


def test_the_fp32_graph_of_a_tf32_engine_rounds_what_it_multiplies(tmp_path):
    half, whole = np.float32(1 + 2**-11), np.float32(1 + 2**-10)  # ten bits hold 2^-10, and ties go to even
    model = graph([node("MatMul", ["x", "w"], ["h"]), node("Relu", ["h"], ["y"])], {"w": np.eye(4, dtype=np.float32)})
    x = np.array([[half, whole, 1 + 3 * 2**-11, 1000.25]], np.float32)
    rounded = np.array([[1, whole, 1 + 2**-9, 1000.0]], np.float32)
    arrays = {"a/min/in/x": x, "a/min/out/y": rounded}
    facts, _report = run(tmp_path, model, arrays, PARAMS | {"tf32": True})
    assert facts["parity"]["max_abs"] == 0
    assert "TF32" in facts["emulated"]
    exact, _report = run(tmp_path, model, arrays)
    assert exact["parity"]["max_abs"] == 0.25
    scale = np.random.default_rng(0).normal(size=(3, 1, 8, 8)).astype(np.float32)
    facts, _report = run(tmp_path, cnn(), reference(cnn(), a_min=scale), PARAMS | {"tf32": True})
    assert 1e-5 < facts["parity"]["relative_l2"] < 2e-3


@pytest.mark.parametrize("subject", ["graph", "engine"])
def test_native_float16_inputs_and_outputs_are_widened(tmp_path, subject):
    model = graph(
        [node("Relu", ["x"], ["y"])],
        {},
        inputs={"x": (TensorProto.FLOAT16, ["batch", 4])},
        outputs={"y": (TensorProto.FLOAT16, ["batch", 4])},
    )
    x = np.array([[0.1, 1, 2, 3]], np.float32)
    facts, _report = run(tmp_path, model, {"a/min/in/x": x, "a/min/out/y": x}, PARAMS | {"subject": subject})
    assert 1e-7 < facts["parity"]["relative_l2"] < 1e-3


@pytest.mark.parametrize("shape", [["batch", 1, "height", "width"], [5, 1, "height", "width"]])
def test_the_metric_sees_every_sample_once(tmp_path, shape):
    x = images(19)
    scores = evaluate(cnn(), {"x": x})["y"]
    labels = scores.argmax(-1)
    labels[[0, 6, 18]] = (labels[[0, 6, 18]] + 1) % 10
    params = PARAMS | {"metric": TOP1, "tensors": {"x": TENSORS["x"] | {"shape": shape}}}
    facts, report = run(
        tmp_path,
        cnn(),
        reference(cnn(), a_min=images(1)),
        params,
        dataset_safetensors={"x": x, "label": labels},
        outputs_safetensors={"y": np.eye(10, dtype=np.float32)[scores.argmax(-1)]},
    )
    assert facts["metric"] == {"name": "top1", "value": 16 / 19, "source": 16 / 19, "samples": 19}
    assert report["metric"] == facts["metric"]


def test_outputs_on_the_labelled_data_are_compared_too(tmp_path):
    """float16 overflows on the real inputs here, and on no seeded one; top1 alone would not see it."""
    halves = graph(
        [
            node("Cast", ["x"], ["h"], to=TensorProto.FLOAT16),
            node("Mul", ["h", "h"], ["s"]),
            node("Cast", ["s"], ["y"], to=TensorProto.FLOAT),
        ],
        {},
    )
    seeded, real = np.array([[1, 2, 3, 4]], np.float32), np.array([[1, 2, 3, 300], [1, 2, 3, 4]], np.float32)
    facts, report = run(
        tmp_path,
        halves,
        {"a/min/in/x": seeded, "a/min/out/y": seeded**2},
        PARAMS | {"metric": TOP1, "tensors": {"x": {"dtype": "float32", "shape": ["batch", 4]}}},
        dataset_safetensors={"x": real, "label": np.array([3, 3])},
        outputs_safetensors={"y": real**2},
    )
    assert facts["metric"]["value"] == 1.0
    assert facts["parity"]["non_finite"] == 0
    assert facts["data"] == {"relative_l2": None, "max_abs": None, "cosine": None, "non_finite": 1, "worst": "y"}
    assert report["data"]["y"]["non_finite"] == 1


def test_nothing_is_rounded_that_the_graph_does_not_round(tmp_path):
    """ONNX Runtime's basic level would bring the bias to int32 steps of 1/8; the graph keeps it in float."""
    pairs = {
        "s": np.array(0.25, np.float32),
        "ws": np.array(0.5, np.float32),
        "cs": np.array(0.01, np.float32),
        "z": np.array(0, np.int8),
    }
    model = graph(
        [
            node("QuantizeLinear", ["x", "s", "z"], ["xq"]),
            node("DequantizeLinear", ["xq", "s", "z"], ["xd"]),
            node("QuantizeLinear", ["w", "ws", "z"], ["wq"]),
            node("DequantizeLinear", ["wq", "ws", "z"], ["wd"]),
            node("Conv", ["xd", "wd", "b"], ["c"]),
            node("QuantizeLinear", ["c", "cs", "z"], ["cq"]),
            node("DequantizeLinear", ["cq", "cs", "z"], ["y"]),
        ],
        {"w": np.ones((1, 1, 1, 1), np.float32), "b": np.array([0.05], np.float32), **pairs},
        inputs={"x": (TensorProto.FLOAT, ["batch", 1, 2, 2])},
        outputs={"y": (TensorProto.FLOAT, ["batch", 1, 2, 2])},
    )
    x = np.array([[[[0.25, 0.5], [1.0, 0.0]]]], np.float32)
    facts, _report = run(tmp_path, model, {"a/min/in/x": x, "a/min/out/y": x + np.float32(0.05)})
    assert facts["parity"]["max_abs"] < 1e-6


def test_a_metric_of_the_recipe(tmp_path):
    code = bundle(tmp_path, b"def judge(outputs, labels):\n    return float(outputs['y'].mean() - labels.mean())\n")
    x = images(3)
    params = PARAMS | {"metric": TOP1 | {"name": "callable", "entry": "judge:judge"}}
    more = {
        "dataset_safetensors": {"x": x, "label": np.full(3, 2.0, np.float32)},
        "outputs_safetensors": {"y": np.full((3, 10), 5.0, np.float32)},
        "code_tar": code,
    }
    facts, _report = run(tmp_path / "a", cnn(), reference(cnn(), a_min=x), params, **more)
    assert facts["metric"]["source"] == 3.0
    assert facts["metric"]["value"] == pytest.approx(evaluate(cnn(), {"x": x})["y"].mean() - 2, rel=1e-4)
    more["code_tar"] = bundle(tmp_path, b"def judge(outputs, labels):\n    return 'good'\n")
    with pytest.raises(ModelCodeError, match="expected a number, got str"):
        run(tmp_path / "b", cnn(), reference(cnn(), a_min=x), params, **more)
    more["code_tar"] = bundle(tmp_path, b"def judge(outputs, labels):\n    return outputs['z'].mean()\n")
    with pytest.raises(ModelCodeError, match=r"(?s)line 2, in judge.*KeyError: 'z'") as error:
        run(tmp_path / "c", cnn(), reference(cnn(), a_min=x), params, **more)
    assert frames(error.value) == ["judge.py"]


def test_faults_of_the_metric_are_said(tmp_path):
    x = images(3)
    more = {
        "dataset_safetensors": {"x": x, "labels": np.zeros(3, np.int64)},
        "outputs_safetensors": {"y": np.zeros((3, 10), np.float32)},
    }
    arrays = reference(cnn(), a_min=x)
    with pytest.raises(BackendError, match=r"no labels 'label' \(it has: labels, x\)"):
        run(tmp_path, cnn(), arrays, PARAMS | {"metric": TOP1}, **more)
    spec = TOP1 | {"label": "labels", "output": "logits"}
    with pytest.raises(BackendError, match="'logits', which is not among y"):
        run(tmp_path, cnn(), arrays, PARAMS | {"metric": spec}, **more)


def test_the_report_is_the_same_every_time(tmp_path):
    arrays = reference(cnn(1), a_min=images(4))
    first, second = (
        stage(verify.run, tmp_path, PARAMS, model_onnx=cnn(), reference_safetensors=arrays)[1] for _ in range(2)
    )
    assert (first / "report.json").read_bytes() == (second / "report.json").read_bytes()
