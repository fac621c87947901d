"""Graphs whose weights stay on disk: what is read, rounded, set apart and saved equals what is done in memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper

from tasks import calibrate, halves, onnx_weights, precision, quantize, simplify
from tasks.graphs import array_of, name_nodes
from tasks.onnx_files import DATA, GRAPH, check_graph, load_graph, save_graph
from tasks.onnx_weights import external_bytes, is_external, load_streamed, put_back, set_apart
from tasks.sources import run_export
from tests.unit.tasks.small_graphs import graph, node, stage

X = {"x": {"dtype": "float32", "shape": ["batch", 64], "low": -1.0, "high": 1.0}}
CASES = [{"name": "one", "shapes": {"x": [2, 64]}}]


def wide():
    """Two linear layers, with a mask that stands for infinity and a weight that overflows halves."""
    draw = np.random.default_rng(0)
    weights = {
        "w1": draw.normal(size=(64, 64)).astype(np.float32),
        "w2": draw.normal(size=(64, 32)).astype(np.float32),
        "mask": np.full(1024, -1e9, np.float32),
        "large": np.full((32, 32), 1e5, np.float32),
    }
    nodes = [
        node("MatMul", ["x", "w1"], ["a"]),
        node("Identity", ["a"], ["i"]),
        node("MatMul", ["i", "w2"], ["b"]),
        node("MatMul", ["b", "large"], ["c"]),
        node("ReduceMax", ["mask"], ["m"], keepdims=0),
        node("Max", ["c", "m"], ["y"]),
    ]
    shapes = {"x": (TensorProto.FLOAT, ["batch", 64])}, {"y": (TensorProto.FLOAT, ["batch", 32])}
    return graph(nodes, weights, inputs=shapes[0], outputs=shapes[1])


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir()
    save_graph(wide(), tmp_path / "in", external=True)
    return tmp_path / "in" / GRAPH


def contents(model):
    tensors = {tensor.name: (tensor.data_type, array_of(tensor).tobytes()) for tensor in model.graph.initializer}
    return tensors, [(one.op_type, list(one.input), list(one.output)) for one in model.graph.node]


def test_a_streamed_graph_holds_no_large_tensor_and_each_can_be_read(path: Path):
    model = load_streamed(path)
    assert all(is_external(tensor) and not tensor.raw_data for tensor in model.graph.initializer)
    assert external_bytes(model) == path.with_name(DATA).stat().st_size
    assert contents(model) == contents(wide())


def test_what_is_saved_again_is_whole_and_names_the_file_beside_it(path: Path, tmp_path: Path):
    (tmp_path / "out").mkdir()
    # Whatever `external` says: what lies elsewhere is not pulled into the graph.
    assert set(save_graph(load_streamed(path), tmp_path / "out")) == {GRAPH, DATA}
    assert (tmp_path / "out" / DATA).read_bytes() == path.with_name(DATA).read_bytes()
    assert str(tmp_path).encode() not in (tmp_path / "out" / GRAPH).read_bytes()
    check_graph(tmp_path / "out" / GRAPH)


def test_a_data_file_that_ends_too_early_is_an_error(path: Path, tmp_path: Path):
    model = load_streamed(path)
    path.with_name(DATA).write_bytes(path.with_name(DATA).read_bytes()[:-100])
    with pytest.raises(OSError, match="ended before tensor 'large' did"):
        save_graph(model, tmp_path)


@pytest.mark.parametrize("half", ["fp16", "bf16"])
def test_halves_are_the_same_whether_weights_are_in_memory_or_rounded_when_they_are_saved(
    path: Path, tmp_path: Path, half
):
    made = {}
    for name, model in (("memory", load_graph(path)), ("streamed", load_streamed(path))):
        name_nodes(model)
        typed = halves.to_half(model, half, set(), native=False)
        (tmp_path / name).mkdir()
        save_graph(typed.model, tmp_path / name, external=True)
        check_graph(tmp_path / name / GRAPH)
        saved = load_graph(tmp_path / name / GRAPH)
        made[name] = contents(saved), typed.clamped, typed.overflowing
    assert made["memory"] == made["streamed"]
    assert made["memory"][1] == (["mask"] if half == "fp16" else [])


def test_weights_set_apart_come_back_as_far_as_they_are_read(path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(onnx_weights, "LARGE", 4096)
    model = load_streamed(path)
    apart = set_apart(model)
    assert sorted(apart) == ["large", "mask", "w1", "w2"]
    assert not list(model.graph.initializer)
    del model.graph.node[4:]  # nothing reads the mask any more
    put_back(model, apart)
    assert [value.name for value in model.graph.input] == ["x"]
    assert sorted(tensor.name for tensor in model.graph.initializer) == ["large", "w1", "w2"]


@pytest.mark.parametrize("simplifier", ["onnxsim", "onnxslim"])
def test_a_large_graph_is_simplified_without_its_weights(path: Path, tmp_path: Path, monkeypatch, simplifier):
    monkeypatch.setattr(onnx_weights, "LARGE", 4096)
    monkeypatch.setattr(simplify, "APART", 4096)
    params = {"simplifier": simplifier, "cases": CASES, "tensors": X, "input_seed": 1}
    files = {"model_onnx": path, "model_onnx_data": path.with_name(DATA)}
    result, folder = stage(simplify.run, tmp_path / "stage", params, **files)
    assert set(result.outputs) == {GRAPH, DATA}
    assert result.facts["nodes_after"] < result.facts["nodes_before"]
    assert result.facts["max_abs"] == 0.0
    simplified = load_graph(folder / GRAPH)
    found = {tensor.name: numpy_helper.to_array(tensor) for tensor in simplified.graph.initializer}
    expected = {tensor.name: numpy_helper.to_array(tensor) for tensor in wide().graph.initializer}
    assert {name: found[name].tobytes() for name in ("w1", "w2")} == {
        name: expected[name].tobytes() for name in ("w1", "w2")
    }
    assert (
        onnx.load(folder / GRAPH, load_external_data=False).graph.initializer[0].data_location == TensorProto.EXTERNAL
    )


@pytest.mark.parametrize("as_what", ["int8", "int8-fp16", "fp8", "fp8-fp16", "bf16"])
def test_a_large_graph_is_typed_as_a_small_one_without_its_weights(path: Path, tmp_path: Path, monkeypatch, as_what):
    ranges = tmp_path / "ranges.json"
    ranges.write_text('{"x": [-1.0, 1.0], "i": [-3.0, 2.0], "b": [-4.0, 5.0]}')
    params = {"precision": as_what, "keep": [], "io": "float32"}
    files = {"model_onnx": path, "model_onnx_data": path.with_name(DATA), "ranges_json": ranges}
    found, read = {}, []
    for name in ("memory", "streamed"):
        if name == "streamed":
            monkeypatch.setattr(onnx_weights, "LARGE", 4096)
            monkeypatch.setattr(quantize, "APART", 4096)
            monkeypatch.setattr(precision, "APART", 4096)
            monkeypatch.setattr(precision, "load_graph", lambda *_given, **_named: read.append(_given))
        result, folder = stage(precision.run, tmp_path / name, params, **files)
        saved = load_graph(folder / GRAPH)
        check_graph(folder / GRAPH)
        found[name] = contents(saved), result.facts
    assert found["streamed"] == found["memory"]
    assert not read  # the graph as a whole


def test_a_large_graph_is_calibrated_as_a_small_one(path: Path, tmp_path: Path):
    params = {"method": "minmax", "percentile": None, "batch": 4, "tensors": X}
    data = {"x": np.random.default_rng(0).uniform(-1, 1, (8, 64)).astype(np.float32)}
    files = {"model_onnx": path, "model_onnx_data": path.with_name(DATA)}
    texts = [
        (stage(calibrate.run, tmp_path / name, params, dataset_safetensors=data, **given)[1] / file).read_bytes()
        for name, given in (("external", files), ("inline", {"model_onnx": wide()}))
        for file in ("ranges.json", "calibration.json")
    ]
    assert texts[:2] == texts[2:]


def test_a_large_graph_gets_another_opset_without_its_weights(path: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(onnx_weights, "LARGE", 4096)
    params = {"framework": "onnx", "opset": 21, "tensors": X, "outputs": None}
    found = {}
    for name, files in (
        ("external", {"model_onnx": path, "model_onnx_data": path.with_name(DATA)}),
        ("inline", {"model_onnx": wide()}),
    ):
        result, folder = stage(run_export, tmp_path / name, params, **files)
        saved = load_graph(folder / GRAPH)
        assert saved.opset_import[0].version == 21
        assert [value.name for value in saved.graph.input] == ["x"]
        tensors = load_graph(folder / GRAPH, weights=False).graph.initializer
        assert any(map(is_external, tensors)) is (name == "external")
        found[name] = contents(saved), result.facts
    assert found["external"] == found["inline"]
