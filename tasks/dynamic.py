"""int8-dynamic: weights in int8, activations quantised as they come, by the least and greatest value of each run.

ONNX Runtime's own `quantize_dynamic`, for its CPU kernels: no calibration, and nothing that TensorRT reads. MatMul and Gemm
alone: their weights get a scale for each output channel; ConvInteger is slower than fp32 convolutions on most CPUs.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Final

import onnx

from tasks.errors import BackendError
from tasks.onnx_files import opset_of
from tasks.quantize import without_advice

OPERATORS: Final = ("MatMul", "Gemm")
_LEAST_OPSET: Final = 11


def quantize_dynamic(model: onnx.ModelProto, keep: set[str]) -> tuple[onnx.ModelProto, tuple[str, ...]]:
    """Return the graph whose products of activations and weights run in int8, `keep` excepted, and those nodes' names.

    Weights are symmetric int8, one scale for each column; activations uint8. Raises BackendError("bad data") where no
    product with a constant weight is left, "unsupported operator" below opset 11.
    """
    from onnxruntime.quantization import QuantType
    from onnxruntime.quantization import quantize_dynamic as quantized

    if opset_of(model) < _LEAST_OPSET:
        raise BackendError(
            "unsupported operator",
            f"int8-dynamic needs ONNX opset {_LEAST_OPSET} or later, the graph has {opset_of(model)}",
            f"set export.opset to {_LEAST_OPSET} or more",
        )
    constant = {tensor.name for tensor in model.graph.initializer}
    nodes = [
        node.name
        for node in model.graph.node
        if node.op_type in OPERATORS and node.name not in keep and constant.intersection(node.input[:2])
    ]
    if not nodes:
        raise BackendError(
            "bad data",
            f"int8-dynamic would quantise no node: no {' or '.join(OPERATORS)} with constant weights is left",
            "keep fewer nodes, or build int8 with calibration data, which convolutions take too",
        )
    # By what stays, since a Gemm becomes a MatMul (of a longer name) and an Add on the way.
    left = [node.name for node in model.graph.node if node.op_type in OPERATORS and node.name not in nodes]
    excluded = [name for one in left for name in (one, f"{one}_MatMul")]
    with tempfile.TemporaryDirectory() as folder, without_advice():
        source, target = Path(folder, "model.onnx"), Path(folder, "quantized.onnx")
        onnx.save(model, source, save_as_external_data=True, location="model.onnx.data")
        quantized(
            source,
            target,
            op_types_to_quantize=list(OPERATORS),
            per_channel=True,
            weight_type=QuantType.QInt8,
            nodes_to_exclude=excluded,
            use_external_data_format=True,
            extra_options={"MatMulConstBOnly": True, "WeightSymmetric": True},
        )
        return onnx.load(target), tuple(nodes)
