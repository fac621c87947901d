"""Every rewrite gives what the graph gave, and does what it is there for; graphs that do not fit stay as they are."""

from collections import Counter

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from tasks.rewrite import PASSES, rewrite
from tests.unit.tasks.small_graphs import evaluate, graph, node

HEADS, SIZE, LENGTH = 2, 4, 5
WIDTH = HEADS * SIZE
CONTEXT = ["batch", HEADS, LENGTH, SIZE]


def attention(*, bias=True, scale="each", extra=(), **outputs):
    """Self-attention as exporters write it: three projections, a scale on queries and keys or on the scores."""
    draw = np.random.default_rng(0)
    weights = {name: draw.normal(size=(WIDTH, WIDTH)).astype(np.float32) for name in ("wq", "wk", "wv")}
    weights |= {name: draw.normal(size=WIDTH).astype(np.float32) for name in ("bq", "bk", "bv")}
    weights |= {"half": np.float32(0.7), "whole": np.float32(2.0), "heads": np.array([0, LENGTH, HEADS, SIZE])}
    nodes = []
    for letter, order in (("q", [0, 2, 1, 3]), ("k", [0, 2, 3, 1]), ("v", [0, 2, 1, 3])):
        product = f"{letter}0" if bias else f"{letter}1"
        nodes.append(node("MatMul", ["x", f"w{letter}"], [product], f"{letter}_proj"))
        if bias:
            nodes.append(node("Add", [f"b{letter}", product], [f"{letter}1"]))
        nodes.append(node("Reshape", [f"{letter}1", "heads"], [f"{letter}2"]))
        nodes.append(node("Transpose", [f"{letter}2"], [f"{letter}3"], perm=order))
        if scale == "each" and letter != "v":
            nodes.append(node("Mul", [f"{letter}3", "half"], [f"{letter}4"]))
    scaled = scale == "each"
    nodes.append(node("MatMul", ["q4", "k4"] if scaled else ["q3", "k3"], ["s0"], "scores"))
    if not scaled:
        nodes.append(node("Div", ["s0", "whole"], ["s1"]))
    nodes.append(node("Softmax", ["s0" if scaled else "s1"], ["p"], axis=-1))
    nodes.append(node("MatMul", ["p", "v3"], ["y"], "context"))
    return graph(
        [*nodes, *extra],
        weights,
        inputs={"x": (TensorProto.FLOAT, ["batch", LENGTH, WIDTH])},
        outputs={"y": (TensorProto.FLOAT, CONTEXT), **outputs},
    )


def rewritten(model, *passes, x=None):
    """Apply passes, check the result and that it computes the same; return it and the counts."""
    x = np.random.default_rng(1).normal(size=(3, LENGTH, WIDTH)).astype(np.float32) if x is None else x
    before = evaluate(model, {"x": x})
    counts = rewrite(model, passes)
    onnx.checker.check_model(model, full_check=True)
    after = evaluate(model, {"x": x})
    for name, expected in before.items():
        np.testing.assert_allclose(after[name], expected, rtol=2e-5, atol=2e-6)
    return model, counts


def operators(model):
    return Counter(one.op_type for one in model.graph.node)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("scale", ["each", "scores"])
def test_a_scale_goes_into_the_projections_it_comes_from(bias, scale):
    model, counts = rewritten(attention(bias=bias, scale=scale), "fold-scales")
    assert counts == {"fold-scales": 2 if scale == "each" else 1}
    assert not {"Mul", "Div"} & set(operators(model))


@pytest.mark.parametrize("bias", [True, False])
def test_projections_of_one_tensor_become_one(bias):
    model, counts = rewritten(attention(bias=bias), "fold-scales", "merge-projections")
    assert counts["merge-projections"] == 1
    assert operators(model)["MatMul"] == 3
    assert operators(model)["Split"] == 1
    shapes = {tensor.name: list(tensor.dims) for tensor in model.graph.initializer}
    assert [WIDTH, 3 * WIDTH] in shapes.values()
    assert [WIDTH, WIDTH] not in shapes.values(), "the matrices that were merged are kept"


def test_a_projection_without_bias_is_merged_with_those_that_have_one():
    model = attention()
    added = next(one for one in model.graph.node if one.op_type == "Add" and "bk" in one.input)
    product = next(one for one in model.graph.node if one.output[0] == "k0")
    product.output[0] = "k1"
    model.graph.node.remove(added)
    model, counts = rewritten(model, "merge-projections")
    assert counts["merge-projections"] == 1
    assert operators(model)["Add"] == 1


def test_a_tensor_that_others_read_keeps_its_scale():
    model, counts = rewritten(
        attention(extra=[node("Relu", ["q3"], ["z"])], z=(TensorProto.FLOAT, CONTEXT)), "fold-scales"
    )
    assert counts == {"fold-scales": 1}
    assert operators(model)["Mul"] == 1
    _model, counts = rewritten(
        attention(bias=False, extra=[node("Relu", ["q1"], ["z"])], z=(TensorProto.FLOAT, ["batch", LENGTH, WIDTH])),
        "fold-scales",
    )
    assert counts == {"fold-scales": 1}


def test_a_number_divided_by_a_tensor_is_no_scale():
    weights = {"w": np.eye(4, dtype=np.float32), "one": np.float32(3)}
    nodes = [node("MatMul", ["x", "w"], ["h"]), node("Div", ["one", "h"], ["y"])]
    _model, counts = rewritten(graph(nodes, weights), "fold-scales", x=np.ones((2, 4), np.float32))
    assert counts == {"fold-scales": 0}


def test_a_scale_at_the_end_leaves_the_output_its_name():
    weights = {"w": np.eye(4, dtype=np.float32), "three": np.full((1,), 3, np.float32)}
    nodes = [node("MatMul", ["x", "w"], ["h"]), node("Mul", ["h", "three"], ["y"])]
    model, counts = rewritten(graph(nodes, weights), "fold-scales", x=np.ones((2, 4), np.float32))
    assert counts == {"fold-scales": 1}
    assert [value.name for value in model.graph.output] == ["y"]


def test_matrices_of_different_types_stay_apart():
    weights = {"w": np.ones((4, 3), np.float32), "v": np.ones((4, 2), np.float32), "scale": np.float32(2)}
    nodes = [
        node("MatMul", ["x", "w"], ["a"]),
        node("MatMul", ["x", "v"], ["b"]),
        node("Concat", ["a", "b"], ["y"], axis=1),
    ]
    x = np.arange(8, dtype=np.float32).reshape(2, 4)
    _model, counts = rewritten(graph(nodes, weights), "merge-projections", x=x)
    assert counts == {"merge-projections": 1}
    weights["v"] = np.ones((4, 2), np.float32).astype(np.float64)
    nodes[1] = node("MatMul", ["wide", "v"], ["b0"])
    nodes[1:1] = [node("Cast", ["x"], ["wide"], to=TensorProto.DOUBLE)]
    nodes[3:3] = [node("Cast", ["b0"], ["b"], to=TensorProto.FLOAT)]
    model, counts = rewritten(graph(nodes, weights), "merge-projections", x=x)
    assert counts == {"merge-projections": 0}
    assert operators(model)["MatMul"] == 2


def test_moves_that_move_nothing_go():
    weights = {
        "none": np.zeros(4, np.int64), "some": np.array([0, 1, 0, 0]), "flat": np.array([-1]), "two": np.array([-1, 5]),
        "kept": np.array([0, 5]),
    }  # fmt: skip
    nodes = [
        node("Identity", ["x"], ["a"]),
        node("Pad", ["a", "none"], ["b"]),
        node("Pad", ["b", "some"], ["c"]),
        node("Reshape", ["c", "flat"], ["d"]),
        node("Reshape", ["d", "two"], ["e"]),
        node("Reshape", ["e", "kept"], ["y"]),
    ]
    model, counts = rewritten(graph(nodes, weights), "drop-moves", x=np.arange(8, dtype=np.float32).reshape(2, 4))
    assert counts == {"drop-moves": 3}
    assert operators(model) == {"Pad": 1, "Reshape": 2}, "a shape that copies an extent needs the tensor before it"


@pytest.mark.parametrize("bias", [True, False])
def test_layer_normalisation_is_written_out(bias):
    draw = np.random.default_rng(0)
    weights = {"scale": draw.normal(size=4).astype(np.float32), "bias": draw.normal(size=4).astype(np.float32)}
    inputs = ["x", "scale", *(["bias"] if bias else [])]
    model = graph([node("LayerNormalization", inputs, ["y"], axis=-1, epsilon=1e-3)], weights, opset=17)
    model, counts = rewritten(model, "decompose-layernorm", x=draw.normal(size=(3, 4)).astype(np.float32))
    assert counts == {"decompose-layernorm": 1}
    assert "LayerNormalization" not in operators(model)


def test_layer_normalisation_over_other_axes_or_with_more_outputs_stays():
    model = graph([node("LayerNormalization", ["x", "scale"], ["y"], axis=0)], {"scale": np.ones((2, 4), np.float32)})
    _model, counts = rewritten(model, "decompose-layernorm", x=np.eye(2, 4, dtype=np.float32))
    assert counts == {"decompose-layernorm": 0}


def test_an_unknown_pass_is_an_error():
    with pytest.raises(KeyError, match="fuse-everything"):
        rewrite(attention(), ("fuse-everything",))
    assert set(PASSES) >= {"drop-moves", "fold-scales", "merge-projections"}


def test_a_graph_with_control_flow_stays_as_it_is():
    """Its branches may read any tensor, also one that a pass would drop."""
    branch = helper.make_graph(
        [helper.make_node("Neg", ["same"], ["taken"])], "branch", [], [helper.make_tensor_value_info("taken", 1, [2])]
    )
    nodes = [
        helper.make_node("Identity", ["x"], ["same"]),
        helper.make_node("If", ["which"], ["y"], then_branch=branch, else_branch=branch),
    ]
    model = graph(
        nodes,
        {"which": np.array(True)},
        inputs={"x": (TensorProto.FLOAT, [2])},
        outputs={"y": (TensorProto.FLOAT, [2])},
    )
    before = model.SerializeToString()
    assert rewrite(model, ("drop-moves", "plain-softmax")) == {"drop-moves": 0, "plain-softmax": 0}
    assert model.SerializeToString() == before


def test_a_pad_of_an_early_opset_stays():
    nodes = [node("Pad", ["x", "pads"], ["p"]), node("Neg", ["p"], ["y"])]
    pads = {"pads": np.zeros(2, np.int64)}
    model = graph(nodes, pads, inputs={"x": (TensorProto.FLOAT, [2])}, outputs={"y": (TensorProto.FLOAT, [2])})
    del model.graph.node[0].input[1:]  # before opset 11, `pads` was an attribute
    assert rewrite(model, ("drop-moves",)) == {"drop-moves": 0}
