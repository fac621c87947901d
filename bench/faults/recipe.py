"""The smallest recipe that has real stages: a graph of three operators, built for ONNX Runtime."""

from __future__ import annotations

from pathlib import Path

TEXT = """enginery: 1
name: tiny
source: {framework: onnx, model: {file: tiny.onnx}}
export: {opset: 18}
inputs: {x: {shape: [batch, 1, 8, 8]}}
profiles: {online: {batch: [1, 1, 2]}}
precision: {build: [fp32]}
targets: [{runtime: onnxruntime, gpus: [cpu]}]
"""


def write_tiny(folder: Path) -> Path:
    """Write the recipe and its graph into a folder; return the recipe's path."""
    import numpy as np
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    weight = np.random.default_rng(0).normal(size=(4, 1, 3, 3)).astype(np.float32)
    graph = helper.make_graph(
        [
            helper.make_node("Conv", ["x", "w"], ["c"], name="conv", pads=[1, 1, 1, 1]),
            helper.make_node("Relu", ["c"], ["y"], name="relu"),
        ],
        "tiny",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 1, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 4, 8, 8])],
        [numpy_helper.from_array(weight, "w")],
    )
    folder.mkdir(parents=True, exist_ok=True)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8), folder / "tiny.onnx")
    path = folder / "tiny.yaml"
    path.write_text(TEXT)
    return path
