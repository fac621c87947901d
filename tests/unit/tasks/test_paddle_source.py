import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from safetensors.numpy import load_file, save_file

from tasks.engines.saved_run import Saved, open_saved
from tasks.errors import BackendError, ModelCodeError
from tasks.onnx_files import dims_of
from tasks.onnx_sessions import GraphRunner
from tasks.paddle_weights import read_weights
from tasks.sources import run_export, run_reference, run_save
from tests.unit.tasks.bundles import code_tar, frames, fresh, request, tensor

pytest.importorskip("paddle2onnx", reason="paddle2onnx is not installed")
pytestmark = pytest.mark.filterwarnings("ignore")  # Paddle's own, at its import and in its tracer

IMAGE = {"image": tensor(["batch", 3, 8, "width"])}
CASES = [
    {"name": "a/min", "shapes": {"image": [1, 3, 8, 8]}},
    {"name": "a/max", "shapes": {"image": [3, 3, 8, 20]}},
]
NET = """
import paddle
from paddle import nn

class Net(nn.Layer):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.drop = nn.Conv2D(3, 4, 3, padding=1), nn.BatchNorm2D(4), nn.Dropout(0.5)

    def forward(self, image):
        found = self.drop(nn.functional.relu(self.norm(self.conv(image))))
        return {"z": found.mean([2, 3]), "columns": found.mean(2)}

def build():
    net = Net()
    net.eval()
    return net

def training():
    net = build()
    net.drop.train()
    return net
"""


@pytest.fixture(autouse=True)
def _restored_interpreter():
    path, modules = list(sys.path), set(sys.modules)
    yield
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        if "enginery-code-" in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def params(**changes):
    return {
        "framework": "paddle", "entry": "model:build", "arguments": {}, "seed": 3, "opset": 17, "tensors": IMAGE,
        "trace": {"image": [2, 3, 8, 16]}, "outputs": ["columns", "z"],
    } | changes  # fmt: skip


def code(tmp_path, source=NET):
    return {"code.tar": code_tar(fresh(tmp_path, "in"), {"model.py": source})}


def both(tmp_path, inputs, **changes):
    """Export, and compare the graph in ONNX Runtime with Paddle's own outputs at two shapes; return the graph."""
    asked = request("export", params(**changes), inputs, tmp_path)
    run_export(asked)
    path = asked.output_dir / "model.onnx"
    told = request("reference", params(kind="parity", cases=CASES, input_seed=0, **changes), inputs, tmp_path)
    run_reference(told)
    arrays = load_file(told.output_dir / "reference.safetensors")
    runner = GraphRunner(path)
    for case in CASES:
        name = case["name"]
        found = runner.run({"image": arrays[f"{name}/in/image"]}, name)
        assert list(found) == params(**changes)["outputs"]
        for output, array in found.items():
            np.testing.assert_allclose(array, arrays[f"{name}/out/{output}"], rtol=1e-4, atol=1e-5)
    return onnx.load(path)


def saved(folder, *, pir, shape=(None, 3, 8, None)):
    """Save the network as Paddle 3 or 2 does (a process has one way), and return the files as a stage has them."""
    (folder / "net.py").write_text(
        f"{NET}\npaddle.seed(3)\n"
        f"spec = paddle.static.InputSpec({list(shape)}, 'float32', name='picture')\n"
        "paddle.jit.save(build(), 'net', input_spec=[spec])\n"
    )
    flags = {**os.environ, "FLAGS_enable_pir_api": str(int(pir))}
    subprocess.run([sys.executable, "net.py"], cwd=folder, env=flags, check=True, capture_output=True)
    suffix = ".json" if pir else ".pdmodel"
    return {f"model{suffix}": folder / f"net{suffix}", "model.pdiparams": folder / "net.pdiparams"}


@pytest.mark.parametrize("source", ["a layer", ".json", ".pdmodel"])
def test_a_saved_model_serves_what_the_source_gives_from_its_files_alone(tmp_path, source):
    inputs = code(tmp_path) if source == "a layer" else saved(tmp_path, pir=source == ".json")
    asked = request("save", params(), inputs, tmp_path)
    facts = run_save(asked).facts
    plan = asked.output_dir / facts["plan"]
    assert plan.suffix == (".pdmodel" if source == ".pdmodel" else ".json")
    told = request("reference", params(kind="parity", cases=CASES, input_seed=0), inputs, tmp_path)
    run_reference(told)
    arrays = load_file(told.output_dir / "reference.safetensors")
    outputs = dict.fromkeys(facts["outputs"], "float32")
    runner = open_saved("paddle", Saved(plan, facts["form"], {"image": "float32"}, outputs, profiles=(), cpu=True))
    assert (facts["inputs"], list(outputs), runner.device) == (["image"], ["columns", "z"], "cpu")
    for case in CASES:
        name = case["name"]
        for output, array in runner.run({"image": arrays[f"{name}/in/image"]}, 0, {}, name).items():
            np.testing.assert_allclose(array, arrays[f"{name}/out/{output}"], rtol=1e-4, atol=1e-5)
    with pytest.raises(BackendError, match="has its weights in a file of its own"):
        open_saved("paddle", Saved(plan.read_bytes(), facts["form"], {"image": "float32"}, outputs, profiles=()))


@pytest.mark.parametrize("opset", [13, 17, 21])
def test_a_layer_becomes_a_graph_of_the_recipes_names_axes_and_opset(tmp_path, opset):
    graph = both(tmp_path, code(tmp_path), opset=opset)
    assert graph.opset_import[0].version == opset
    assert dims_of(graph.graph.input[0]) == ["batch", 3, 8, "width"]
    assert [dims_of(value) for value in graph.graph.output] == [["batch", 4, "width"], ["batch", 4]]


@pytest.mark.parametrize("pir", [True, False])
def test_a_graph_that_paddle_3_or_2_saved_is_renamed_and_compared_with_paddle_inference(tmp_path, pir):
    graph = both(tmp_path, saved(tmp_path, pir=pir))
    assert [value.name for value in graph.graph.input] == ["image"]
    assert dims_of(graph.graph.output[0]) == ["batch", 4, "width"]


@pytest.mark.parametrize(
    ("entry", "source", "words"),
    [
        ("training", NET, "training mode (drop): Dropout would drop"),
        ("build", NET.replace("self.drop(", "nn.functional.dropout("), "'columns' is random"),
        ("Net", NET, "training mode (the layer itself, conv, norm and 1 more)"),
    ],
)
def test_a_layer_that_is_not_for_inference_is_refused_with_the_reason(tmp_path, entry, source, words):
    asked = request("export", params(entry=f"model:{entry}"), code(tmp_path, source), tmp_path)
    with pytest.raises(ModelCodeError) as error:
        run_export(asked)
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        ("    net = Net()", "    net = Net(undefined)", 15),
        ("found = self.drop(", "found = self.drop(undefined * ", 11),
    ],
)
def test_what_a_layers_code_raises_is_told_by_its_own_lines_alone(tmp_path, old, new, line):
    with pytest.raises(ModelCodeError, match=f"(?s)line {line}, in .*NameError: name 'undefined'") as error:
        run_export(request("export", params(), code(tmp_path, NET.replace(old, new)), tmp_path))
    assert set(frames(error.value)) == {"model.py"}


def test_a_saved_graph_whose_axis_is_fixed_is_refused(tmp_path):
    asked = request(
        "export", params(trace={"image": [2, 3, 8, 8]}), saved(tmp_path, pir=True, shape=(None, 3, 8, 8)), tmp_path
    )
    with pytest.raises(BackendError, match="'width' \\(input 'image' axis 3\\) is 8"):
        run_export(asked)


@pytest.mark.parametrize(
    ("name", "content"), [("model.json", '{"a": 1}'), ("model.json", "no"), ("model.pdmodel", "no")]
)
def test_what_is_no_paddle_graph_is_refused_before_paddle_crashes_on_it(tmp_path, name, content):
    for file in (name, "model.pdiparams"):
        Path(tmp_path, file).write_text(content)
    inputs = {file: tmp_path / file for file in (name, "model.pdiparams")}
    with pytest.raises(BackendError, match=f"{name} is no Paddle graph"):
        run_export(request("export", params(), inputs, tmp_path))


class Evil:
    def __reduce__(self):
        return (print, ("run",))


def test_weights_are_read_from_pdparams_without_running_what_they_hold(tmp_path, capsys):
    import paddle

    path = tmp_path / "weights.pdparams"
    wanted = {"a.weight": paddle.rand([3, 4]), "b": paddle.ones([2], dtype="int64")}
    paddle.save(wanted, str(path))
    found = read_weights(path)
    assert {name: array.tolist() for name, array in found.items()} == {n: t.numpy().tolist() for n, t in wanted.items()}
    path.write_bytes(pickle.dumps({"a": Evil()}))
    with pytest.raises(BackendError, match="reading it could run code"):
        read_weights(path)
    path.write_bytes(pickle.dumps({"a": np.array([Evil()], dtype=object)}))
    with pytest.raises(BackendError, match="reading it could run code"):
        read_weights(path)
    assert capsys.readouterr().out == ""


def test_weights_of_another_layer_are_refused_by_name(tmp_path):
    save_file(
        {"conv.weight": np.zeros((4, 3, 5, 5), np.float32), "other": np.zeros(1)}, tmp_path / "weights.safetensors"
    )
    inputs = code(tmp_path) | {"weights.safetensors": tmp_path / "weights.safetensors"}
    with pytest.raises(BackendError) as error:
        run_export(request("export", params(), inputs, tmp_path))
    assert "not in the layer: other" in str(error.value)
    assert "conv.weight is [4, 3, 5, 5] in the file, [4, 3, 3, 3] in the layer" in str(error.value)


def test_operators_that_the_converter_may_not_know_are_told_before_it_ends_the_process(tmp_path):
    from tasks.paddle_nodes import unknown_operators

    def operator(name, *outputs, **more):
        made = [{"TT": {"#": "0.t_dtensor", "D": [{"#": "0.t_f32"}, list(shape), "NCHW", [], 0]}} for shape in outputs]
        return {"#": name, "I": [], "O": made, **more}

    inner = [{"blocks": [{"ops": [operator("1.digamma", (2, 2))]}]}]
    operators = [
        operator("p"),
        operator("1.mean", (-1, 4)),
        operator("1.lgamma", (-1, 4)),
        operator("1.if", regions=inner),
    ]
    graph = tmp_path / "model.json"
    graph.write_text(json.dumps({"program": {"regions": [{"blocks": [{"ops": operators}]}]}}))
    assert unknown_operators(graph, {"conv2d"}) == [
        "lgamma (operator 3 of 5, makes [?, 4])",
        "digamma (operator 5 of 5, makes [2, 2])",
    ]
    assert unknown_operators(graph, {"lgamma", "digamma"}) == []


@pytest.mark.long
def test_a_model_that_paddle2onnx_aborts_over_is_told_as_an_operator_that_it_does_not_know(tmp_path):
    """It ends the process with SIGABRT, and names nothing."""
    from tasks.process import Limits, run_stage

    source = NET.replace('"columns": found.mean(2)', '"columns": paddle.lgamma(found.mean(2))')
    tar = code_tar(fresh(tmp_path, "in"), {"model.py": source})
    with pytest.raises(BackendError) as caught:
        run_stage("export", params(), {"code.tar": tar}, fresh(tmp_path), limits=Limits(300, 8 << 30))
    assert caught.value.kind == "unsupported operator"
    assert "paddle2onnx may not know: lgamma (operator " in caught.value.message
    assert "the conversion is aborted" in caught.value.message
