"""The structure of a graph: values of weights leave it as it is, everything else changes it."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from tasks.halves import to_half
from tasks.precision import run
from tasks.stage import StageRequest
from tasks.structure import structure_digest, weights_of
from tests.contract import graphs
from tests.unit.tasks.small_graphs import cnn, graph, node


def perceptron(**values):
    """Two layers, a clip and a reshape: weights, bounds and shapes side by side."""
    weights = {
        "w": np.arange(16, dtype=np.float32).reshape(4, 4),
        "b": np.ones(4, np.float32),
        "scale": np.float32(0.5),
        "low": np.float32(-1),
        "shape": np.array([-1, 4], np.int64),
    } | values
    nodes = [
        node("Gemm", ["x", "w", "b"], ["h"], "gemm"),
        node("Mul", ["h", "scale"], ["s"], "scale_it"),
        node("Clip", ["s", "low"], ["c"], "clip"),
        node("Reshape", ["c", "shape"], ["y"], "reshape"),
    ]
    return graph(nodes, weights)


BASE = structure_digest(perceptron())


def floats(*shape):
    count = int(np.prod(shape))
    values = st.lists(st.floats(-1e3, 1e3, width=32), min_size=count, max_size=count)
    return values.map(lambda found: np.array(found, np.float32).reshape(shape))


@given(floats(4, 4), floats(4), floats())
@settings(max_examples=50, deadline=None)
def test_values_of_weights_do_not_matter(w, b, scale):
    assert structure_digest(perceptron(w=w, b=b, scale=scale)) == BASE


def test_which_tensors_are_weights():
    assert set(weights_of(perceptron())) == {"w", "b", "scale"}  # not a clip's bound, and not a shape
    assert set(weights_of(cnn())) == {t.name for t in cnn().graph.initializer if t.data_type == TensorProto.FLOAT}


def _rename(model):
    model.graph.initializer[0].name = "v"
    model.graph.node[0].input[1] = "v"


def _node(model):
    model.graph.node[1].op_type = "Add"


def _order(model):
    model.graph.node.extend([model.graph.node[0]])
    del model.graph.node[0]


CHANGES = {
    "shape": lambda m: m.graph.initializer[0].dims.__setitem__(slice(None), [2, 8]),
    "type": lambda m: m.graph.initializer[1].CopyFrom(numpy_helper.from_array(np.ones(4, np.float16), "b")),
    "name of a weight": _rename,
    "name of a node": lambda m: setattr(m.graph.node[0], "name", "other"),
    "operator": _node,
    "order of nodes": _order,
    "attribute": lambda m: m.graph.node[0].attribute.append(helper.make_attribute("alpha", 2.0)),
    "bound of a clip": lambda m: m.graph.initializer[3].CopyFrom(numpy_helper.from_array(np.float32(-2), "low")),
    "shape constant": lambda m: m.graph.initializer[4].CopyFrom(numpy_helper.from_array(np.array([4, -1]), "shape")),
    "one weight more": lambda m: m.graph.initializer.append(numpy_helper.from_array(np.float32(1), "more")),
    "opset": lambda m: setattr(m.opset_import[0], "version", m.opset_import[0].version - 1),
    "input": lambda m: setattr(m.graph.input[0].type.tensor_type, "elem_type", TensorProto.DOUBLE),
    "output": lambda m: setattr(m.graph.output[0], "name", "c"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_everything_else_matters(what):
    model = perceptron()
    CHANGES[what](model)
    assert structure_digest(model) != BASE


def test_notes_order_of_storage_and_inferred_shapes_do_not_matter():
    model = perceptron()
    model.producer_name, model.doc_string, model.graph.node[0].doc_string = "someone", "words", "words"
    weights = list(model.graph.initializer)
    del model.graph.initializer[:]
    model.graph.initializer.extend(reversed(weights))
    assert structure_digest(onnx.shape_inference.infer_shapes(model)) == BASE


def test_values_are_compared_however_they_are_stored():
    model = perceptron()
    shape = model.graph.initializer[4]
    shape.CopyFrom(helper.make_tensor("shape", TensorProto.INT64, [2], [-1, 4]))  # int64_data instead of raw_data
    assert structure_digest(model) == BASE


def test_a_constant_node_may_hold_a_weight():
    def model(value):
        constant = onnx.helper.make_node("Constant", [], ["w"], name="k", value=numpy_helper.from_array(value, "w"))
        return graph([constant, node("MatMul", ["x", "w"], ["y"], "m")], {})

    first, second = np.eye(4, dtype=np.float32), np.ones((4, 4), np.float32)
    assert structure_digest(model(first)) == structure_digest(model(second))
    assert structure_digest(model(first)) != structure_digest(model(np.ones((4, 2), np.float32)))


def test_what_a_branch_reads_is_no_weight():
    def model(value):
        body = helper.make_graph(
            [helper.make_node("Add", ["x", "w"], ["r"])], "b", [], [helper.make_tensor_value_info("r", TensorProto.FLOAT, None)]
        )  # fmt: skip
        branch = helper.make_node("If", ["yes"], ["y"], name="if", then_branch=body, else_branch=body)
        return graph([branch], {"w": value, "yes": np.bool_(1)})

    assert weights_of(model(np.ones(4, np.float32))) == {}
    assert structure_digest(model(np.ones(4, np.float32))) != structure_digest(model(np.zeros(4, np.float32)))


def test_scales_of_quantisation_are_structure_and_the_weights_they_quantise_are_not():
    model = graphs.classifier(quantised=True)
    weights = weights_of(model)
    quantised = {n.input[0] for n in model.graph.node if n.op_type == "QuantizeLinear"} & {
        t.name for t in model.graph.initializer
    }
    scales = {
        n.input[1] for n in model.graph.node if n.op_type.endswith("quantizeLinear") or n.op_type == "QuantizeLinear"
    }
    assert quantised <= set(weights)
    assert not scales & set(weights)
    before = structure_digest(model)
    for name in quantised:
        weights[name].CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weights[name]) * 0.5, name))
    assert structure_digest(model) == before
    scale = next(tensor for tensor in model.graph.initializer if tensor.name in scales)
    scale.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(scale) * np.float32(2), scale.name))
    assert structure_digest(model) != before


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_typing_tells_the_structure_where_it_is_asked_for(tmp_path, precision):
    def typed(name, factor, **asked):
        model = cnn()
        for tensor in model.graph.initializer:
            if tensor.data_type == TensorProto.FLOAT:
                tensor.CopyFrom(
                    numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(factor), tensor.name)
                )
        folder = tmp_path / name
        folder.mkdir()
        (folder / "in.onnx").write_bytes(model.SerializeToString())
        params = {"precision": precision, "keep": [], "io": "float32", **asked}
        return run(StageRequest("type", params, {"model.onnx": folder / "in.onnx"}, folder)), folder / "model.onnx"

    (first, path), (second, other) = typed("a", 1, structure=True), typed("b", 1.5, structure=True)
    assert first.facts["structure"] == second.facts["structure"] == structure_digest(onnx.load(path))
    assert path.read_bytes() != other.read_bytes()
    assert "structure" not in typed("c", 1)[0].facts


def test_a_weight_that_leaves_half_changes_the_structure():
    small, large = np.ones((4, 4), np.float32), np.full((4, 4), 70000.0, np.float32)
    halves = [to_half(perceptron(w=w), "fp16", set(), native=False).model for w in (small, large)]
    assert structure_digest(halves[0]) != structure_digest(halves[1])  # its node stays fp32
