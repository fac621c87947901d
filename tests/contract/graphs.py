"""Small ONNX graphs, good and bad, for the contract of engine backends."""

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

FLOAT = TensorProto.FLOAT
IMAGE = [helper.make_tensor_value_info("x", FLOAT, ["n", 3, "h", "w"])]


def value(name, shape, dtype=FLOAT):
    return helper.make_tensor_value_info(name, dtype, shape)


def constant(name, array):
    return numpy_helper.from_array(np.asarray(array), name)


def model(nodes, inputs, outputs, constants=(), *, opset=18, domains=()):
    graph = helper.make_graph(nodes, "graph", inputs, outputs, list(constants))
    opsets = [helper.make_opsetid("", opset), *(helper.make_opsetid(domain, 1) for domain in domains)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=9)


def classifier(*, dtype=np.float32, quantised=False, zero_point=0):
    """Conv, Relu, GlobalAveragePool, Gemm, with dynamic batch, height and width; 10 logits."""
    random = np.random.default_rng(0)
    element = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    constants = [
        constant("w", random.standard_normal((16, 3, 3, 3)).astype(dtype)),
        constant("b", random.standard_normal(16).astype(dtype)),
        constant("w2", random.standard_normal((16, 10)).astype(dtype)),
        constant("b2", random.standard_normal(10).astype(dtype)),
    ]
    nodes = [
        helper.make_node("Conv", ["x", "w", "b"], ["c"], name="conv", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c"], ["r"], name="relu"),
        helper.make_node("GlobalAveragePool", ["r"], ["g"], name="pool"),
        helper.make_node("Flatten", ["g"], ["f"], name="flatten"),
        helper.make_node("Gemm", ["f", "w2", "b2"], ["y"], name="fc"),
    ]
    if quantised:
        constants += [constant("s", np.float32(0.05)), constant("z", np.int8(zero_point))]
        for node, position in ((nodes[0], 0), (nodes[0], 1), (nodes[4], 0), (nodes[4], 1)):
            name = node.input[position]
            nodes[:0] = pair(name) if name in ("x", "w", "w2") else []
            if name == "f":
                nodes[nodes.index(node) : nodes.index(node)] = pair(name)
            node.input[position] = f"{name}_dq"
    return model(nodes, [value("x", ["n", 3, "h", "w"], element)], [value("y", ["n", 10], element)], constants)


def pair(name):
    """A QuantizeLinear and a DequantizeLinear on one tensor."""
    return [
        helper.make_node("QuantizeLinear", [name, "s", "z"], [f"{name}_q"], name=f"{name}_quantize"),
        helper.make_node("DequantizeLinear", [f"{name}_q", "s", "z"], [f"{name}_dq"], name=f"{name}_dequantize"),
    ]


def unknown_operator(domain=""):
    node = helper.make_node("Frobnicate", ["x"], ["y"], name="frob", domain=domain)
    return model([node], IMAGE, [value("y", ["n", 3, "h", "w"])], domains=[domain] if domain else [])


def nonzero():
    node = helper.make_node("NonZero", ["x"], ["y"], name="nz")
    return model([node], IMAGE, [value("y", [4, "k"], TensorProto.INT64)])


def determinant():
    """An operator that the parser of TensorRT-RTX refuses without a word."""
    return model([helper.make_node("Det", ["x"], ["y"], name="det")], IMAGE, [value("y", ["n", 3])])


def suppression():
    node = helper.make_node("NonMaxSuppression", ["boxes", "scores", "most"], ["y"], name="nms")
    inputs = [value("boxes", [1, 10, 4]), value("scores", [1, 2, 10])]
    return model([node], inputs, [value("y", ["k", 3], TensorProto.INT64)], [constant("most", np.array([5]))])


def fixed_volume():
    """Reshapes every image to 3 x 64: right for 8 x 8 pixels only."""
    nodes = [helper.make_node("Reshape", ["x", "s"], ["r"]), helper.make_node("Relu", ["r"], ["y"])]
    return model(nodes, IMAGE, [value("y", [1, 3, 64])], [constant("s", np.array([1, 3, 64]))])


def float8():
    """FP8 Q/DQ, which needs sm89 or later."""
    base = classifier()
    base.opset_import[0].version = 19
    base.graph.initializer.extend(
        [constant("s", np.float32(0.1)), helper.make_tensor("z", TensorProto.FLOAT8E4M3FN, [], [0])]
    )
    for offset, node in enumerate(pair("x")):
        base.graph.node.insert(offset, node)
    base.graph.node[2].input[0] = "x_dq"
    return base


def double_convolution():
    """A convolution of doubles, for which ONNX Runtime has no CPU kernel."""
    inputs = [value("x", ["n", 3, 8, 8], TensorProto.DOUBLE), value("w", [3, 3, 3, 3], TensorProto.DOUBLE)]
    outputs = [value("y", ["n", 3, 6, 6], TensorProto.DOUBLE)]
    return model([helper.make_node("Conv", ["x", "w"], ["y"], name="conv")], inputs, outputs)


def save(graph, folder, *, external=False):
    """Write a graph as the stages find it and return the inputs by name."""
    path = folder / "model.onnx"
    named = {"save_as_external_data": True, "location": "model.onnx.data", "size_threshold": 0} if external else {}
    onnx.save_model(graph, path, **named)
    return {name: folder / name for name in ("model.onnx", "model.onnx.data") if (folder / name).exists()}
