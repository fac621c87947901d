"""Refit on a GPU: plans get new weights without the compiler, compute what a compiled one would, and builds use it."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import yaml
from onnx import numpy_helper

from artifacts.folder import FolderStore
from artifacts.manifest import Manifest
from tasks import halves
from tasks.engines.trt_weights import Refittable
from tasks.errors import BackendError
from tasks.structure import structure_digest
from tests.gpu.compiling import PROFILES, VECTOR, at_opset, relative
from tests.gpu.recipes import write_recipe
from tests.integration.building import RECIPES, environment
from tests.unit.tasks.small_graphs import cnn, evaluate, graph, images, node

pytestmark = pytest.mark.gpu

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 400


@pytest.fixture
def work(compiler):
    """Compile and refit models as a build does, in processes of their own; what was found, and the folder of what was made."""
    said = ("refit", "phases", "weights", "constants", "warnings", "seconds")

    def run(stage, model, base=None, **params):
        names = ("model.plan", "refit.safetensors") if base is not None else ()
        files = {name: (base / name).read_bytes() for name in names}
        result, output = compiler(model, files=files, stage=stage, **{"refit": "weights", **params})
        sys.stdout.write(f"{stage}: {json.dumps({name: result.facts.get(name) for name in said})}\n")
        return result, output

    return run


@pytest.fixture
def execute(trt):
    from tasks.engines.trt_run import PlanRunner

    def outputs(folder, x):
        runner = PlanRunner(folder / "model.plan", None)
        try:
            return runner({"x": x})["y"]
        finally:
            runner.close()

    return outputs


def half(model):
    return halves.to_half(at_opset(model), "fp16", set(), native=False).model


@pytest.mark.parametrize(("typed", "precision", "bound"), [(lambda model: model, "fp32", 1e-5), (half, "fp16", 5e-3)])
def test_a_refitted_plan_computes_with_the_new_weights(work, execute, trt, typed, precision, bound):
    several = hasattr(trt, "OnnxParserRefitter")
    params = {"precision": precision, "profiles": PROFILES if several else PROFILES[1:]}
    compiled, base = work("compile", typed(cnn()), **params)
    assert "structure" in compiled.facts["refit"], compiled.facts["refit"]
    assert compiled.facts["refit"]["fixed"] == []
    assert compiled.facts["refit"]["structure"] == structure_digest(at_opset(typed(cnn(7))))
    refitted, output = work("refit", typed(cnn(7)), base, **params)
    for shape in [(1, 8, 8), (128, 8, 8), *([(4, 16, 16)] if several else [])]:
        x = images(*shape)
        found = execute(output, x)
        away = [relative(evaluate(cnn(seed), {"x": x})["y"], found) for seed in (7, 0)]
        sys.stdout.write(f"{shape}: {away} from the new weights and the old\n")
        assert relative(evaluate(cnn(7), {"x": x})["y"], found) < bound
        assert relative(evaluate(cnn(0), {"x": x})["y"], found) > 0.1
    assert refitted.facts["size"] == (output / "model.plan").stat().st_size
    assert refitted.facts["settings"] == compiled.facts["settings"]
    # What was refitted can be loaded by a process that never saw the graph, and the base is as it was.
    assert relative(evaluate(cnn(0), {"x": images(2)})["y"], execute(base, images(2))) < bound


def test_a_plan_of_8_6_with_several_profiles_is_not_offered(work, trt):
    if hasattr(trt, "OnnxParserRefitter"):
        pytest.skip(f"TensorRT {trt.__version__} refits from ONNX files, all profiles at once")
    compiled, _base = work("compile", cnn())
    assert "(online, bulk)" in compiled.facts["refit"]["refused"]
    assert "refit.safetensors" not in compiled.outputs


def attention(seed=0):
    """One block of a transformer: a normalisation, projections, attention and a GELU made of its parts."""
    draw = np.random.default_rng(seed)

    def weight(*shape):
        return (draw.normal(size=shape) / np.sqrt(shape[0])).astype(np.float32)

    weights = {
        "gain": (1 + 0.1 * draw.normal(size=32)).astype(np.float32),
        "shift": (0.1 * draw.normal(size=32)).astype(np.float32),
        **{name: weight(32, 32) for name in ("q", "k", "v", "o")},
        "up": weight(32, 64), "up_bias": weight(64), "down": weight(64, 32),
        "root": np.float32(32**0.5), "two": np.float32(2**0.5), "one": np.float32(1), "half": np.float32(0.5),
    }  # fmt: skip
    nodes = [
        node("LayerNormalization", ["x", "gain", "shift"], ["n"], "norm", axis=-1),
        *(node("MatMul", ["n", name], [f"{name}_out"], f"project_{name}") for name in "qkv"),
        node("Transpose", ["k_out"], ["k_turned"], "turn", perm=[0, 2, 1]),
        node("MatMul", ["q_out", "k_turned"], ["scores"], "scores"),
        node("Div", ["scores", "root"], ["scaled"], "scale"),
        node("Softmax", ["scaled"], ["shares"], "softmax", axis=-1),
        node("MatMul", ["shares", "v_out"], ["mixed"], "mix"),
        node("MatMul", ["mixed", "o"], ["projected"], "project_o"),
        node("Add", ["projected", "x"], ["r"], "residual"),
        node("MatMul", ["r", "up"], ["wide"], "up_matmul"),
        node("Add", ["wide", "up_bias"], ["h"], "up_add"),
        node("Div", ["h", "two"], ["h2"], "gelu_div"),
        node("Erf", ["h2"], ["e"], "gelu_erf"),
        node("Add", ["e", "one"], ["e1"], "gelu_add"),
        node("Mul", ["h", "e1"], ["g"], "gelu_mul"),
        node("Mul", ["g", "half"], ["gelu"], "gelu_half"),
        node("MatMul", ["gelu", "down"], ["y"], "down_matmul"),
    ]
    shape = (onnx.TensorProto.FLOAT, ["batch", 16, 32])
    return graph(nodes, weights, inputs={"x": shape}, outputs={"y": shape}, opset=17)


def test_a_transformer_block_is_refitted(work, execute):
    shapes = {"min": [1, 16, 32], "opt": [2, 16, 32], "max": [4, 16, 32]}
    params = {"precision": "fp16", "profiles": [{"name": "one", "inputs": {"x": shapes}}]}
    compiled, base = work("compile", half(attention()), **params)
    assert "structure" in compiled.facts["refit"], compiled.facts["refit"]
    _refitted, output = work("refit", half(attention(5)), base, **params)
    x = np.random.default_rng(1).normal(size=(2, 16, 32)).astype(np.float32)
    found = execute(output, x)
    assert relative(evaluate(attention(5), {"x": x})["y"], found) < 1e-2
    assert relative(evaluate(attention(0), {"x": x})["y"], found) > 0.1


def test_what_the_plan_does_not_take_back_stops_a_refit(work):
    """Whatever weights a version folds away: one that is written down as fixed must be what it was."""
    one = {"profiles": PROFILES[:1]}
    _compiled, base = work("compile", cnn(), **one)
    how = Refittable.read(base / "refit.safetensors")
    Refittable(how.slots, {**how.fixed, "b1": "0" * 64}).write(base)
    with pytest.raises(BackendError, match="does not take back: b1") as caught:
        work("refit", cnn(3), base, **one)
    assert caught.value.kind == "wrong result"


def test_a_normalisation_that_stays_one_is_told(work, trt):
    """8.6's parser computes a scale and a shift of it, which follow from no single weight."""
    values = {name: np.full(4, value, np.float32) for name, value in {"g": 1.5, "b": 0.5, "m": 0.25, "v": 2.0}.items()}
    weights = {"w": np.eye(4, dtype=np.float32), **values}
    nodes = [
        node("MatMul", ["x", "w"], ["p"], "m"),
        node("BatchNormalization", ["p", "g", "b", "m", "v"], ["y"], "norm"),
    ]
    compiled, _output = work("compile", graph(nodes, weights, opset=17), profiles=VECTOR)
    refit = compiled.facts["refit"]
    if hasattr(trt, "OnnxParserRefitter"):
        assert refit["fixed"] == ["b", "g", "m", "v"]
    else:
        assert "norm" in refit["refused"]
        assert "refit.safetensors" not in compiled.outputs


def test_a_stripped_plan_is_filled(work, execute, trt):
    if not hasattr(trt.BuilderFlag, "STRIP_PLAN"):
        pytest.skip(f"TensorRT {trt.__version__} has no stripped plans (10.0 and later)")
    compiled, base = work("compile", cnn(), refit="stripped")
    for seed in (0, 4):
        _result, output = work("refit", cnn(seed), base, refit="stripped")
        x = images(4, 16, 16)
        assert relative(evaluate(cnn(seed), {"x": x})["y"], execute(output, x)) < 1e-5
        assert (output / "model.plan").stat().st_size > compiled.facts["size"]


def build(recipe, store):
    command = [sys.executable, "-m", "enginery", "build", str(recipe), "--store", str(store), "--json"]
    done = subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=SECONDS, check=False
    )
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    made = {step["id"]: step for step in document["steps"] if step["stage"] in ("compile", "refit")}
    sys.stdout.write(
        f"{json.dumps({name: (step['state'], step['seconds'], step['why']) for name, step in made.items()})}\n"
    )
    return {name: step["state"] for name, step in made.items()}, document


@pytest.mark.timeout(SECONDS)
def test_a_build_refits_where_only_weights_changed(device, tmp_path):
    gpu, store = device["compute_capability"], tmp_path / "store"
    engine = f"tensorrt:{gpu}:fp32"
    assert build(write_recipe(tmp_path, gpu, refit="weights"), store)[0] == {f"compile:{engine}": "built"}
    recipe = write_recipe(tmp_path, gpu, seed=1, refit="weights")
    made, document = build(recipe, store)
    assert made == {f"refit:{engine}": "built"}
    (report,) = document["engines"]
    assert (report["executed"], report["state"]) == (True, "cached")
    manifest = Manifest.from_bytes(FolderStore(store).read(f"{report['path']}/manifest.json"))
    assert manifest.verification.passed
    assert manifest.verification.engine.parity.relative_l2 < 1e-4
    assert manifest.provenance.refitted_from.engine.startswith("small/")
    assert build(recipe, store)[0] == {f"refit:{engine}": "cached"}


@pytest.mark.timeout(SECONDS)
def test_digits_are_refitted_in_half_and_compiled_in_int8_whose_ranges_moved(device, tmp_path):
    gpu, store = device["compute_capability"], tmp_path / "store"
    shutil.copytree(RECIPES / "digits", tmp_path / "digits", ignore=shutil.ignore_patterns("__pycache__"))
    document = yaml.safe_load((RECIPES / "digits-gpu.yaml").read_text())
    document["targets"] = [{"runtime": "tensorrt", "gpus": [gpu]}]
    document["precision"] |= {"build": ["int8", "fp16"], "fallback": {}}
    document["profiles"].pop("online")  # 8.6 refits plans of one profile
    document["build"] |= {"refit": "weights", "optimization_level": 1}
    recipe = tmp_path / "digits-gpu.yaml"
    recipe.write_text(yaml.safe_dump(document, sort_keys=False))
    names = {precision: f"tensorrt:{gpu}:{precision}" for precision in ("int8", "fp16")}
    assert build(recipe, store)[0] == {f"compile:{name}": "built" for name in names.values()}

    path = tmp_path / "digits" / "digits.onnx"
    model = onnx.load(path)
    kernel = next(tensor for tensor in model.graph.initializer if len(tensor.dims) == 4)
    values = numpy_helper.to_array(kernel).copy()
    values.flat[int(np.abs(values).argmax())] *= 1.25
    kernel.CopyFrom(numpy_helper.from_array(values, kernel.name))
    onnx.save(model, path)
    made, document = build(recipe, store)
    assert made == {f"compile:{names['int8']}": "built", f"refit:{names['fp16']}": "built"}
    assert all(engine["executed"] for engine in document["engines"])
