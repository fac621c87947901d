"""Networks of known architectures with seeded weights, made with numpy alone: files that would be large are never carried.

Both are opset 17 with a dynamic batch, which TensorRT 8.6 and later read. Activations stay finite in half: weights are drawn by
He's rule, residual branches are scaled down.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


class Net:
    """A graph in the making."""

    def __init__(self, name: str, shape: list, seed: int = 0) -> None:
        self.name, self.shape = name, shape
        self.draw = np.random.default_rng(seed)
        self.nodes: list = []
        self.weights: list = []

    def add(self, op: str, *inputs: str, **attributes: object) -> str:
        output = f"{op}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, list(inputs), [output], name=output, **attributes))
        return output

    def weight(self, array: np.ndarray) -> str:
        name = f"weight_{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
        return name

    def random(self, *shape: int, fan: int, scale: float = 1.0) -> str:
        values = self.draw.standard_normal(shape, dtype=np.float32) * np.float32(scale * np.sqrt(2 / fan))
        return self.weight(values)

    def conv(self, x: str, into: int, out: int, kernel: int, stride: int = 1, *, scale: float = 1.0) -> str:
        weight = self.random(out, into, kernel, kernel, fan=into * kernel * kernel, scale=scale)
        bias = self.weight(np.zeros(out, np.float32))
        pad, strides = [kernel // 2] * 4, [stride, stride]
        return self.add("Conv", x, weight, bias, kernel_shape=[kernel, kernel], pads=pad, strides=strides)

    def linear(self, x: str, into: int, out: int, *, scale: float = 1.0) -> str:
        product = self.add("MatMul", x, self.random(into, out, fan=into, scale=scale))
        return self.add("Add", product, self.weight(np.zeros(out, np.float32)))

    def norm(self, x: str, width: int) -> str:
        scale, bias = self.weight(np.ones(width, np.float32)), self.weight(np.zeros(width, np.float32))
        return self.add("LayerNormalization", x, scale, bias, axis=-1, epsilon=1e-6)

    def save(self, output: str, shape: list, path: Path) -> Path:
        graph = helper.make_graph(
            [*self.nodes, helper.make_node("Identity", [output], ["y"], name="out")],
            self.name,
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, self.shape)],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
            self.weights,
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
        return path


def resnet50(path: Path, side: int = 224) -> Path:
    """ResNet-50 (He et al. 2015, table 1) with batch normalisation folded into the convolutions; 25.5 million weights."""
    net = Net("resnet50", ["batch", 3, side, side])
    x = net.add("Relu", net.conv("x", 3, 64, 7, 2))
    x = net.add("MaxPool", x, kernel_shape=[3, 3], pads=[1, 1, 1, 1], strides=[2, 2])
    width = 64
    for stage, blocks in enumerate((3, 4, 6, 3)):
        inner = 64 << stage
        for block in range(blocks):
            stride = 2 if stage and not block else 1
            y = net.add("Relu", net.conv(x, width, inner, 1))
            y = net.add("Relu", net.conv(y, inner, inner, 3, stride))
            y = net.conv(y, inner, 4 * inner, 1, scale=0.2)
            short = net.conv(x, width, 4 * inner, 1, stride) if not block else x
            x, width = net.add("Relu", net.add("Add", y, short)), 4 * inner
    x = net.add("Flatten", net.add("GlobalAveragePool", x))
    out = net.add("Gemm", x, net.random(1000, width, fan=width), net.weight(np.zeros(1000, np.float32)), transB=1)
    return net.save(out, ["batch", 1000], path)


def vit(path: Path, *, side: int = 224, layers: int = 12, width: int = 768, heads: int = 12) -> Path:
    """A vision transformer encoder with patches of 16 (Dosovitskiy et al. 2020, table 1: 12, 768, 12 is B/16)."""
    net = Net("vit", ["batch", 3, side, side])
    tokens, head = (side // 16) ** 2, width // heads
    patches = net.add(
        "Conv",
        "x",
        net.random(width, 3, 16, 16, fan=768),
        net.weight(np.zeros(width, np.float32)),
        kernel_shape=[16, 16],
        strides=[16, 16],
    )
    x = net.add("Reshape", patches, net.weight(np.array([0, width, tokens], np.int64)))
    x = net.add("Transpose", x, perm=[0, 2, 1])
    x = net.add("Add", x, net.weight(net.draw.standard_normal((1, tokens, width), dtype=np.float32) * np.float32(0.02)))
    split = net.weight(np.array([0, tokens, heads, head], np.int64))
    joined = net.weight(np.array([0, tokens, width], np.int64))
    half, one = net.weight(np.array(0.5, np.float32)), net.weight(np.array(1.0, np.float32))
    root, scale = net.weight(np.array(np.sqrt(2), np.float32)), net.weight(np.array(head**-0.5, np.float32))
    for _ in range(layers):
        normed = net.norm(x, width)
        q, k, v = (net.add("Reshape", net.linear(normed, width, width), split) for _ in range(3))
        scores = net.add(
            "MatMul", net.add("Transpose", q, perm=[0, 2, 1, 3]), net.add("Transpose", k, perm=[0, 2, 3, 1])
        )
        weights = net.add("Softmax", net.add("Mul", scores, scale), axis=-1)
        mixed = net.add("MatMul", weights, net.add("Transpose", v, perm=[0, 2, 1, 3]))
        merged = net.add("Reshape", net.add("Transpose", mixed, perm=[0, 2, 1, 3]), joined)
        x = net.add("Add", x, net.linear(merged, width, width, scale=0.2))
        wide = net.linear(net.norm(x, width), width, 4 * width)
        curve = net.add("Add", net.add("Erf", net.add("Div", wide, root)), one)
        gelu = net.add("Mul", net.add("Mul", wide, curve), half)
        x = net.add("Add", x, net.linear(gelu, 4 * width, width, scale=0.2))
    return net.save(net.norm(x, width), ["batch", tokens, width], path)


def convolutions(path: Path, side: int = 32) -> Path:
    """Three convolutions and nothing else: no part of it goes to TensorRT's graph compiler."""
    net = Net("convolutions", ["batch", 3, side, side])
    x = net.add("Relu", net.conv("x", 3, 32, 3))
    x = net.add("Relu", net.conv(x, 32, 32, 3, 2))
    return net.save(net.conv(x, 32, 16, 1), ["batch", 16, side // 2, side // 2], path)
