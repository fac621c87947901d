"""Masks that hide nothing and guards that never act go; those that matter stay."""

from collections import Counter

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from tasks.rewrite import rewrite
from tests.unit.tasks.small_graphs import evaluate, graph, node

LENGTH, SIZE = 5, 4
SHAPE = [2, 3, LENGTH, SIZE]
HIDDEN = np.where(np.arange(LENGTH) < 3, 0, -np.inf).astype(np.float32)


def masked(mask, *, guard=True, shape=SHAPE, extra=(), rank=4, **outputs):
    """Attention of q, k and v as PyTorch exports it with a mask: scores plus the mask, a softmax, a guard against NaN."""
    weights = {"mask": np.asarray(mask, np.float32), "zero": np.zeros(1, np.float32)}
    nodes = [
        node("Transpose", ["k"], ["kt"], perm=[0, 1, 3, 2]),
        node("MatMul", ["q", "kt"], ["s"]),
        node("Add", ["s", "mask"], ["m"]),
        node("Softmax", ["m"], ["p"], axis=-1),
    ]
    if guard:
        nodes += [node("IsNaN", ["p"], ["n"]), node("Where", ["n", "zero", "p"], ["w"])]
    nodes += [node("MatMul", ["w" if guard else "p", "v"], ["y"]), *extra]
    inputs = dict.fromkeys("qkv", (TensorProto.FLOAT, shape))
    return graph(nodes, weights, inputs=inputs, outputs={"y": (TensorProto.FLOAT, [None] * rank), **outputs})


def rewritten(model):
    """Apply the pass, check that the results are equal, and return how many of each operator are left."""
    draw = np.random.default_rng(0)
    feeds = {name: draw.normal(size=SHAPE).astype(np.float32) for name in "qkv"}
    before = evaluate(model, feeds)
    counts = rewrite(model, ("plain-softmax",))
    onnx.checker.check_model(model, full_check=True)
    for name, values in evaluate(model, feeds).items():
        np.testing.assert_array_equal(values, before[name])
    return Counter(one.op_type for one in model.graph.node), counts["plain-softmax"]


@pytest.mark.parametrize("shape", [(2, 1, LENGTH, LENGTH), (1, 1, 1, 1), (LENGTH,)])
def test_a_mask_of_zeros_and_its_guard_go(shape):
    operators, count = rewritten(masked(np.zeros(shape)))
    assert (operators, count) == ({"Transpose": 1, "MatMul": 2, "Softmax": 1}, 2)


def test_a_mask_that_hides_something_stays_and_its_guard_goes():
    operators, count = rewritten(masked(HIDDEN))
    assert (operators, count) == ({"Transpose": 1, "MatMul": 2, "Add": 1, "Softmax": 1}, 1)


def test_the_guard_of_a_row_that_sees_nothing_stays():
    mask = np.zeros((LENGTH, LENGTH))
    mask[2] = -np.inf
    operators, count = rewritten(masked(mask))
    assert count == 0
    assert operators["Where"] == 1


def test_zeros_that_give_the_scores_their_shape_stay():
    operators, count = rewritten(masked(np.zeros((4, 1, 1, 1, 1)), guard=False, rank=5))
    assert (operators["Add"], count) == (1, 0)


def test_zeros_stay_where_the_extents_of_the_scores_are_unknown():
    operators, count = rewritten(masked(np.zeros((1, 1, LENGTH, LENGTH)), guard=False, shape=[None, None, "n", SIZE]))
    assert (operators["Add"], count) == (1, 0)


def test_what_others_read_stays():
    extra = [node("Not", ["n"], ["seen"]), node("Relu", ["m"], ["r"])]
    spec = {"seen": (TensorProto.BOOL, [None] * 4), "r": (TensorProto.FLOAT, [None] * 4)}
    operators, count = rewritten(masked(np.zeros((1, LENGTH)), extra=extra, **spec))
    assert (operators["IsNaN"], operators["Add"], operators["Where"], count) == (1, 1, 0, 1)


def test_a_guard_against_what_no_softmax_gives_stays():
    nodes = [
        node("Log", ["x"], ["l"]), node("Softmax", ["l"], ["p"], axis=-1), node("IsNaN", ["p"], ["n"]),
        node("Where", ["n", "zero", "p"], ["y"]),
    ]  # fmt: skip
    model = graph(nodes, {"zero": np.zeros(1, np.float32)})
    assert rewrite(model, ("plain-softmax",)) == {"plain-softmax": 0}
