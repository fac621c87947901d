"""What is added to a convolution's result is int8 too, so that a compiler may run the sum inside of the convolution."""

import numpy as np
import pytest
from onnx import TensorProto

from tasks.graphs import array_of
from tasks.quantize import activations, quantize, residuals
from tests.unit.tasks.small_graphs import evaluate, graph, node


def block(*, shortcut=True, extra=(), outputs=("y",)):
    """The first block of a ResNet stage (a convolution on the shortcut), or a later one (none)."""
    draw = np.random.default_rng(0)
    weights = {name: draw.normal(size=(4, 4, 1, 1)).astype(np.float32) for name in ("w1", "w2", "w3", "w4")}
    nodes = [
        node("Conv", ["x", "w1"], ["c1"], "stem"),
        node("Relu", ["c1"], ["r1"], "stem_relu"),
        node("Conv", ["r1", "w2"], ["c2"], "main_1"),
        node("Relu", ["c2"], ["r2"], "main_relu"),
        node("Conv", ["r2", "w3"], ["c3"], "main_2"),
        *([node("Conv", ["r1", "w4"], ["c4"], "shortcut")] if shortcut else []),
        node("Add", ["c4", "c3"] if shortcut else ["r1", "c3"], ["sum"], "sum"),
        node("Relu", ["sum"], ["y"], "last_relu"),
        *extra,
    ]
    if not shortcut:
        del weights["w4"]
    spec = (TensorProto.FLOAT, ["batch", 4, 3, 3])
    return graph(nodes, weights, inputs={"x": spec}, outputs=dict.fromkeys(outputs, spec))


def ranges(model):
    return dict.fromkeys(activations(model), (-3.0, 3.0))


def producer(model, tensor):
    return next(entry for entry in model.graph.node if tensor in entry.output)


def sum_of(model):
    return next(entry for entry in model.graph.node if entry.name == "sum")


def test_the_shortcut_is_the_residual_and_is_calibrated():
    model = block()
    assert [(one.add, one.conv, one.tensor) for one in residuals(model)] == [("sum", "main_2", "c4")]
    assert "c4" in activations(model)
    assert "c3" not in activations(model)


def test_the_residual_gets_a_pair_and_the_main_path_none():
    model = block()
    x = np.random.default_rng(1).normal(size=(2, 4, 3, 3)).astype(np.float32)
    expected = evaluate(model, {"x": x})["y"]
    typed = quantize(model, ranges(model) | {"c4": (-20.0, 10.0)}, set()).model
    left, right = sum_of(typed).input
    pair = producer(typed, left)
    assert pair.op_type == "DequantizeLinear"
    assert producer(typed, producer(typed, pair.input[0]).input[0]).name == "shortcut"
    assert producer(typed, right).name == "main_2"
    scale = next(array_of(tensor) for tensor in typed.graph.initializer if tensor.name == pair.input[1])
    assert scale == pytest.approx(20 / 127.5)
    assert np.linalg.norm(evaluate(typed, {"x": x})["y"] - expected) < 0.3 * np.linalg.norm(expected)


def test_a_residual_that_a_convolution_reads_shares_its_pair():
    typed = quantize(block(shortcut=False), ranges(block(shortcut=False)), set()).model
    left, _right = sum_of(typed).input
    readers = [entry.name for entry in typed.graph.node if left in entry.input]
    assert producer(typed, left).op_type == "DequantizeLinear"
    assert sorted(readers) == ["main_1", "sum"]


def test_a_sum_of_a_convolution_that_stays_fp32_reads_what_was_computed():
    model = block()
    typed = quantize(model, ranges(model), {"main_2"}).model
    assert {producer(typed, name).name for name in sum_of(typed).input} == {"shortcut", "main_2"}


def test_a_residual_that_was_always_zero_gets_no_scale():
    model = block()
    typed = quantize(model, ranges(model) | {"c4": (0.0, 0.0)}, set()).model
    assert {producer(typed, name).name for name in sum_of(typed).input} == {"shortcut", "main_2"}


def test_results_that_others_read_are_not_fused():
    model = block(extra=[node("Relu", ["c3"], ["z"])], outputs=("y", "z"))
    assert [(one.conv, one.tensor) for one in residuals(model)] == [("shortcut", "c3")]
    model = block(outputs=("y", "c3", "c4"))
    assert residuals(model) == []
