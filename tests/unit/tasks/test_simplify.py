import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from tasks.errors import BackendError
from tasks.onnx_files import dims_of
from tasks.simplify import _distance, _require_same_interface, run
from tests.unit.tasks.bundles import fresh, request, tensor

IMAGE = {"image": tensor(["batch", 2, "height", "width"])}
CASES = [
    {"name": "p/min", "shapes": {"image": [1, 2, 4, 4]}},
    {"name": "p/random-0", "shapes": {"image": [3, 2, 6, 5]}},
]


def foldable(*, metadata=False):
    """Flatten by Shape > Gather > Concat > Reshape (which folds to one Reshape), then an addition of constants."""
    constants = {
        "zero": np.array([0]),
        "minus": np.array([-1]),
        "one": np.ones(1, np.float32),
        "two": np.full(1, 2, np.float32),
    }
    nodes = [
        helper.make_node("Shape", ["image"], ["shape"]),
        helper.make_node("Gather", ["shape", "zero"], ["rows"], axis=0),
        helper.make_node("Concat", ["rows", "minus"], ["flat"], axis=0),
        helper.make_node("Reshape", ["image", "flat"], ["h"]),
        helper.make_node("Add", ["one", "two"], ["three"]),
        helper.make_node("Mul", ["h", "three"], ["k"]),
        helper.make_node("Identity", ["k"], ["y"], doc_string="File /somewhere/x.py"),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 2, "height", "width"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", "features"])],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    if metadata:
        model.metadata_props.add(key="classes", value="a,b")
    return model


def simplified(tmp_path, simplifier, model, cases=CASES, tensors=IMAGE, rewrites=(), **save):
    folder = fresh(tmp_path, "in")
    onnx.save(model, folder / "model.onnx", **save)
    params = {"simplifier": simplifier, "profiles": [], "cases": cases, "tensors": tensors, "input_seed": 1}
    params |= {"rewrites": list(rewrites)} if rewrites else {}
    inputs = {path.name: path for path in folder.iterdir()}
    for path in inputs.values():
        path.chmod(0o444)
    asked = request("simplify", params, inputs, tmp_path)
    return run(asked), asked.output_dir


@pytest.mark.parametrize("simplifier", ["onnxsim", "onnxslim"])
def test_constants_fold_and_axes_names_and_metadata_stay(tmp_path, simplifier):
    result, folder = simplified(tmp_path, simplifier, foldable(metadata=True))
    assert result.facts["nodes_before"] == 7
    assert result.facts["nodes_after"] < 7
    assert result.facts["checked"] == ["p/min", "p/random-0"]
    assert result.facts["max_abs"] <= 1e-5
    written = onnx.load(folder / "model.onnx")
    assert dims_of(written.graph.input[0]) == ["batch", 2, "height", "width"]
    assert dims_of(written.graph.output[0])[0] == "batch"
    assert {entry.key: entry.value for entry in written.metadata_props} == {"classes": "a,b"}
    data = (folder / "model.onnx").read_bytes()
    assert b"/somewhere" not in data
    assert data == (simplified(tmp_path / "again", simplifier, foldable(metadata=True))[1] / "model.onnx").read_bytes()


def test_none_copies_the_graph_and_still_runs_it(tmp_path):
    result, folder = simplified(tmp_path, "none", foldable())
    assert result.facts["nodes_before"] == result.facts["nodes_after"] == 7
    assert onnx.load(folder / "model.onnx") == foldable()
    cases = [{"name": "p/odd", "shapes": {"image": [1, 3, 4, 4]}}]
    with pytest.raises(BackendError, match=r"bad profile: .*case p/odd \(image \[1, 3, 4, 4\]\)"):
        simplified(tmp_path, "none", foldable(), cases)


def test_a_graph_that_only_a_plugin_can_run_is_copied_and_not_run(tmp_path):
    model = foldable()
    model.graph.node[-1].domain = "acme"
    model.opset_import.append(helper.make_opsetid("acme", 1))
    folder = fresh(tmp_path, "in")
    onnx.save(model, folder / "model.onnx")
    params = {"simplifier": "none", "profiles": [], "cases": CASES, "tensors": IMAGE, "input_seed": 1}
    with pytest.raises(BackendError):
        run(request("simplify", params, {"model.onnx": folder / "model.onnx"}, tmp_path))
    asked = request("simplify", params | {"plugins": True}, {"model.onnx": folder / "model.onnx"}, tmp_path)
    facts = run(asked).facts
    assert (facts["checked"], facts["max_abs"]) == ([], None)
    assert onnx.load(asked.output_dir / "model.onnx") == model


@pytest.mark.parametrize("simplifier", ["onnxsim", "onnxslim", "none"])
def test_external_data_stays_beside_the_graph(tmp_path, simplifier):
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("Identity", ["h"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 64])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 64])],
        [numpy_helper.from_array(np.eye(64, dtype=np.float32), "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    cases = [{"name": "p/min", "shapes": {"x": [2, 64]}}]
    save = {"save_as_external_data": True, "location": "model.onnx.data"}
    result, folder = simplified(tmp_path, simplifier, model, cases, {"x": tensor(["batch", 64])}, **save)
    assert set(result.outputs) == {"model.onnx", "model.onnx.data"}
    assert {path.name for path in folder.iterdir()} == {"model.onnx", "model.onnx.data"}
    assert (folder / "model.onnx.data").stat().st_size == 64 * 64 * 4


def guarded(mask, batch="batch"):
    """A softmax under a mask, with the guard against NaN that PyTorch writes."""
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["s"]),
        helper.make_node("Add", ["s", "mask"], ["m"]),
        helper.make_node("Softmax", ["m"], ["p"], axis=-1),
        helper.make_node("IsNaN", ["p"], ["n"]),
        helper.make_node("Where", ["n", "zero", "p"], ["g"]),
        helper.make_node("Sqrt", ["g"], ["y"]),
    ]
    constants = {"w": np.eye(64, dtype="f"), "mask": np.asarray(mask, "f"), "zero": np.zeros(1, "f")}
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, 64])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [batch, 64])],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.mark.parametrize("simplifier", ["onnxsim", "onnxslim", "none"])
@pytest.mark.parametrize("save", [{}, {"save_as_external_data": True, "location": "model.onnx.data"}])
def test_what_is_asked_for_is_rewritten_after_any_simplifier(tmp_path, monkeypatch, simplifier, save):
    monkeypatch.setattr("tasks.simplify.APART", 1 << 10)  # so that the matrix is no part of the graph meanwhile
    cases, tensors = [{"name": "p/min", "shapes": {"x": [2, 64]}}], {"x": tensor(["batch", 64])}
    passes = ["drop-moves", "plain-softmax"]
    result, folder = simplified(tmp_path, simplifier, guarded(np.zeros(64)), cases, tensors, passes, **save)
    assert [node.op_type for node in onnx.load(folder / "model.onnx").graph.node] == ["MatMul", "Softmax", "Sqrt"]
    assert result.facts["rewritten"]["plain-softmax"] > 0
    assert result.facts["max_abs"] == 0
    asked = {"nodes": result.facts["nodes_after"], "files": {path.name for path in folder.iterdir()}}
    assert asked == {"nodes": 3, "files": {"model.onnx", *(["model.onnx.data"] if save else [])}}


def test_a_rewrite_that_fails_is_not_the_simplifiers_fault(tmp_path, monkeypatch):
    def failing(_graph):
        raise IndexError("list index out of range")

    monkeypatch.setattr("tasks.rewrite.PASSES", {"drop-moves": failing})
    cases, tensors = [{"name": "p/min", "shapes": {"x": [64, 64]}}], {"x": tensor([64, 64])}
    with pytest.raises(BackendError, match=r"export\.rewrites failed: .*list index.*\n.*set export\.rewrites to \[\]"):
        simplified(tmp_path, "none", guarded(np.zeros(64), 64), cases, tensors, ["drop-moves"])


def test_a_rewrite_that_changes_the_result_is_named(tmp_path, monkeypatch):
    def wrong(graph):
        graph.model.graph.node[0].op_type = "Add"
        return 1

    monkeypatch.setattr("tasks.rewrite.PASSES", {"drop-moves": wrong})
    cases, tensors = [{"name": "p/min", "shapes": {"x": [64, 64]}}], {"x": tensor([64, 64])}
    with pytest.raises(BackendError, match="after drop-moves, output 'y' differs") as caught:
        simplified(tmp_path, "none", guarded(np.zeros(64), 64), cases, tensors, ["drop-moves"])
    assert "set export.rewrites to []" in str(caught.value)


def test_attention_is_not_fused_into_an_operator_that_tensorrt_lacks(tmp_path):
    # The eager attention that onnxsim 0.8.1 turns into com.microsoft::Attention (facts: toolchain.md section 0.3).
    rng = np.random.Generator(np.random.PCG64(0))
    nodes, weights = (
        [],
        {"four": np.array([0, 0, 2, 8]), "three": np.array([0, 0, 16]), "scale": np.full(1, 8**0.5, "f")},
    )
    for part in "qkv":
        weights |= {
            f"w{part}": rng.standard_normal((16, 16)).astype("f"),
            f"b{part}": rng.standard_normal(16).astype("f"),
        }
        nodes += [
            helper.make_node("MatMul", ["x", f"w{part}"], [f"{part}0"]),
            helper.make_node("Add", [f"{part}0", f"b{part}"], [f"{part}1"]),
            helper.make_node("Reshape", [f"{part}1", "four"], [f"{part}2"]),
            helper.make_node("Transpose", [f"{part}2"], [part], perm=[0, 2, 3, 1] if part == "k" else [0, 2, 1, 3]),
        ]
    nodes += [
        helper.make_node("MatMul", ["q", "k"], ["s0"]),
        helper.make_node("Div", ["s0", "scale"], ["s1"]),
        helper.make_node("Softmax", ["s1"], ["s2"], axis=-1),
        helper.make_node("MatMul", ["s2", "v"], ["c0"]),
        helper.make_node("Transpose", ["c0"], ["c1"], perm=[0, 2, 1, 3]),
        helper.make_node("Reshape", ["c1", "three"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 5, 16])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 5, 16])],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    cases = [{"name": "p/min", "shapes": {"x": [2, 5, 16]}}]
    result, folder = simplified(tmp_path, "onnxsim", model, cases, {"x": tensor(["batch", 5, 16])})
    assert {node.domain for node in onnx.load(folder / "model.onnx").graph.node} == {""}
    assert result.facts["max_abs"] <= 1e-5


def spoiled(change):
    model = foldable()
    change(model)
    return model


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda m: setattr(m.graph.input[0].type.tensor_type.shape.dim[0], "dim_value", 1), r"input 'image' .* became"),
        (lambda m: setattr(m.graph.output[0].type.tensor_type.shape.dim[0], "dim_value", 1), r"output 'y' .* became"),
        (lambda m: setattr(m.graph.output[0], "name", "z"), "output 'y'"),
        (lambda m: setattr(m.graph.output[0].type.tensor_type, "elem_type", TensorProto.FLOAT16), "output 'y'"),
        (lambda m: setattr(m.graph.node[3], "domain", "com.microsoft"), "brought in com.microsoft::Reshape"),
    ],
)
def test_a_changed_interface_is_a_wrong_result(change, expected):
    with pytest.raises(BackendError, match=expected) as caught:
        _require_same_interface(foldable(), spoiled(change), "onnxsim")
    assert caught.value.kind == "wrong result"
    assert "onnxslim" in caught.value.advice
    _require_same_interface(foldable(), foldable(), "onnxsim")


@pytest.mark.parametrize(
    ("left", "right", "gap"),
    [
        ([1.0, -4.0], [1.0, -4.5], 0.5),
        ([1.0, np.nan], [1.5, np.nan], 0.5),
        ([1.0, np.inf], [1.0, -np.inf], np.inf),
        ([1.0, 2.0], [1.0, np.nan], np.inf),
        ([1.0], [1.0, 2.0], np.inf),
        ([], [], 0.0),
    ],
)
def test_distance_is_the_largest_difference_and_never_hides_a_nan(left, right, gap):
    assert _distance(np.array(left, np.float32), np.array(right, np.float32))[0] == gap


def test_integers_are_equal_or_not():
    assert _distance(np.array([1, 2]), np.array([1, 2]))[0] == 0
    assert _distance(np.array([1, 2]), np.array([1, 3]))[0] == np.inf
    assert _distance(np.array([1, 2]), np.array([1, 2], np.int32))[0] == np.inf
