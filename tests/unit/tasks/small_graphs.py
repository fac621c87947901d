"""Small ONNX graphs, and requests to run a stage on them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from tasks.references import save_arrays
from tasks.stage import StageRequest

TENSORS = {"x": {"dtype": "float32", "shape": ["batch", 1, "height", "width"], "low": 0.0, "high": 1.0}}


def graph(nodes, weights, *, inputs=None, outputs=None, opset=18):
    """A checked model; inputs and outputs as {name: (elem type, shape)}, by default one dynamic vector each."""
    inputs = inputs or {"x": (TensorProto.FLOAT, ["batch", 4])}
    outputs = outputs or {"y": (TensorProto.FLOAT, ["batch", None])}
    model = helper.make_model(
        helper.make_graph(
            nodes,
            "small",
            [helper.make_tensor_value_info(name, *spec) for name, spec in inputs.items()],
            [helper.make_tensor_value_info(name, *spec) for name, spec in outputs.items()],
            [numpy_helper.from_array(np.asarray(value), name) for name, value in weights.items()],
        ),
        opset_imports=[helper.make_opsetid("", opset)],
        ir_version=8,
    )
    onnx.checker.check_model(model, full_check=True)
    return model


def node(op, inputs, outputs, name=None, **attributes):
    return helper.make_node(op, inputs, outputs, name=name or f"{op}_{outputs[0]}", **attributes)


def cnn(seed=0):
    """Two convolutions, pooling and a classifier; dynamic batch, height and width, like the digits recipe."""
    draw = np.random.default_rng(seed)

    def weight(*shape):
        return (draw.normal(size=shape) * np.sqrt(2 / np.prod(shape[1:]))).astype(np.float32)

    return graph(
        [
            node("Conv", ["x", "w1", "b1"], ["c1"], "stem/conv", pads=[1, 1, 1, 1]),
            node("Relu", ["c1"], ["r1"], "stem/relu"),
            node("Conv", ["r1", "w2", "b2"], ["c2"], "body/conv", pads=[1, 1, 1, 1]),
            node("Relu", ["c2"], ["r2"], "body/relu"),
            node("GlobalAveragePool", ["r2"], ["p"], "pool"),
            node("Flatten", ["p"], ["f"], "flatten"),
            node("Gemm", ["f", "w3", "b3"], ["y"], "head/gemm", transB=1),
        ],
        {
            "w1": weight(8, 1, 3, 3),
            "b1": weight(8, 1)[:, 0],
            "w2": weight(16, 8, 3, 3),
            "b2": weight(16, 1)[:, 0],
            "w3": weight(10, 16),
            "b3": weight(10, 1)[:, 0],
        },
        inputs={"x": (TensorProto.FLOAT, ["batch", 1, "height", "width"])},
        outputs={"y": (TensorProto.FLOAT, ["batch", 10])},
    )


def images(count=24, height=8, width=8, seed=0):
    return np.random.default_rng(seed).uniform(0, 1, (count, 1, height, width)).astype(np.float32)


def evaluate(model, feeds):
    """Run a float32 graph in ONNX Runtime: outputs by name."""
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return dict(zip([value.name for value in session.get_outputs()], session.run(None, feeds), strict=True))


def stage(run, folder, params, **inputs):
    """Run a stage in a new folder on models, arrays (dicts) or paths, whose names have "_" for "."; its result and folder."""
    folder.mkdir(parents=True, exist_ok=True)
    number = len(list(folder.iterdir()))
    source, output = folder / f"{number}-in", folder / f"{number}-out"
    source.mkdir()
    output.mkdir()
    paths = {}
    for key, value in inputs.items():
        name = key.replace("_", ".")
        paths[name] = value if isinstance(value, Path) else source / name
        if isinstance(value, onnx.ModelProto):
            onnx.save(value, paths[name])
        elif isinstance(value, dict):
            save_arrays(value, paths[name])
    return run(StageRequest(run.__module__, params, paths, output)), output
