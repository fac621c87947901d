"""Shapes of graphs that say wrong things about themselves."""

import onnx
import pytest
from onnx import TensorProto, helper

from tasks.errors import BackendError
from tasks.onnx_files import dims_of, infer_shapes


def says(*, inside=("batch", 8), output=("batch", 8)):
    """A graph whose inner tensor "h" and output are [batch, 8], which it says or not."""
    nodes = [helper.make_node("Relu", ["x"], ["h"]), helper.make_node("Neg", ["h"], ["y"])]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, output)],
        value_info=[helper.make_tensor_value_info("h", TensorProto.FLOAT, inside)],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.mark.parametrize("inside", [(), ("batch", 8, 1), ("batch", 9)])
def test_a_wrong_note_inside_of_a_graph_is_inferred_anew(tmp_path, inside):
    onnx.save(says(inside=inside), tmp_path / "model.onnx")
    (inner,) = infer_shapes(tmp_path).graph.value_info
    assert dims_of(inner) == ["batch", 8]
    assert onnx.load(tmp_path / "model.onnx").graph.value_info == [inner]


def test_a_wrong_shape_of_an_output_is_a_fault(tmp_path):
    onnx.save(says(output=("batch", 9)), tmp_path / "model.onnx")
    with pytest.raises(BackendError, match=r"shape inference failed: .*\(8\) vs \(9\)"):
        infer_shapes(tmp_path)
