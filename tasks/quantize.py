"""int8 graphs: symmetric Q/DQ pairs from calibrated ranges, with exactly the options that TensorRT's parser accepts.

The options are those of NVIDIA's ModelOpt, tried on TensorRT-RTX 1.7: int8 (never uint8), zero points of zero,
per-channel weights, no quantised bias, no pairs on outputs (a following activation fuses better without).
"""

from __future__ import annotations

import contextlib
import json
import logging
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx

from tasks.errors import BackendError
from tasks.graphs import hoist_constants
from tasks.onnx_files import opset_of

OPERATORS: Final = ("Conv", "ConvTranspose", "MatMul", "Gemm")
# QuantizeLinear per channel needs opset 13; older graphs cannot carry the pairs.
_LEAST_OPSET: Final = 13
# ONNX Runtime's scale is bound / 127.5, and below the least normal float32 it would be replaced by 1.
_LEAST_BOUND: Final = float(np.finfo(np.float32).tiny) * 128


@dataclass(frozen=True)
class Quantized:
    """A graph with Q/DQ pairs, the nodes quantised, and those left in fp32 because an input was always zero."""

    model: onnx.ModelProto
    nodes: tuple[str, ...]
    constant: tuple[str, ...]


def activations(model: onnx.ModelProto) -> list[str]:
    """Return the tensors that quantisation may put a pair on: what Conv, MatMul and Gemm take, weights excepted.

    Sorted. Biases stay fp32, and so do outputs. Constant nodes must have been hoisted (`graphs.hoist_constants`).
    """
    weights = {tensor.name for tensor in model.graph.initializer}
    return sorted(
        {
            name
            for node in model.graph.node
            if node.op_type in OPERATORS and node.domain in ("", "ai.onnx")
            for name in node.input[:2]
            if name and name not in weights
        }
    )


def zero_range(low: float, high: float) -> bool:
    """Say whether a range is too narrow to become a scale: the tensor was zero on all calibration data."""
    return max(abs(low), abs(high)) < _LEAST_BOUND


def quantize(model: onnx.ModelProto, ranges: Mapping[str, tuple[float, float]], keep: set[str]) -> Quantized:
    """Return the graph with symmetric int8 Q/DQ pairs around what OPERATORS take, nodes of `keep` excepted.

    `ranges` are calibrated float32 bounds by tensor. A node that takes a tensor whose range is zero stays fp32: any
    scale for it would be invented, and a scale of zero breaks TensorRT. Node names must be unique. The model given is
    changed. Raises BackendError("bad data") where a range is missing, "unsupported operator" below opset 13.
    """
    hoist_constants(model)
    if opset_of(model) < _LEAST_OPSET:
        raise BackendError(
            "unsupported operator",
            f"int8 needs ONNX opset {_LEAST_OPSET} or later, the graph has {opset_of(model)}",
            f"set export.opset to {_LEAST_OPSET} or more",
        )
    missing = [name for name in activations(model) if name not in ranges]
    if missing:
        raise BackendError(
            "bad data",
            f"no calibrated range for {len(missing)} tensors, {missing[0]!r} the first",
            "the ranges belong to another graph: build again",
        )
    zero = {name for name, (low, high) in ranges.items() if zero_range(low, high)}
    candidates = [node for node in model.graph.node if node.op_type in OPERATORS and node.name not in keep]
    constant = {node.name for node in candidates if zero.intersection(node.input[:2])}
    nodes = tuple(node.name for node in candidates if node.name not in constant)
    if nodes:
        model = _with_pairs(model, ranges, exclude=sorted(keep | constant))
    return Quantized(model, nodes, tuple(sorted(constant)))


def _with_pairs(
    model: onnx.ModelProto, ranges: Mapping[str, tuple[float, float]], exclude: list[str]
) -> onnx.ModelProto:
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.calibrate import TensorData, TensorsData, save_tensors_data

    data = {
        name: TensorData(lowest=np.array(low, np.float32), highest=np.array(high, np.float32))
        for name, (low, high) in sorted(ranges.items())
    }
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr), _without_advice():
        cache, output = Path(folder, "ranges.json"), Path(folder, "out", "model.onnx")
        output.parent.mkdir()
        save_tensors_data(TensorsData(CalibrationMethod.MinMax, data), cache)
        quantize_static(
            model,
            output,
            None,
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=list(OPERATORS),
            per_channel=True,
            reduce_range=False,
            activation_type=QuantType.QInt8,
            weight_type=QuantType.QInt8,
            nodes_to_exclude=exclude,
            use_external_data_format=True,  # so that size never matters here
            calibrate_method=CalibrationMethod.MinMax,  # the ranges are final: nothing is calibrated again
            calibration_cache_path=cache,
            extra_options=_options(model),
        )
        return onnx.load(output)


def _options(model: onnx.ModelProto) -> dict[str, Any]:
    return {
        "ActivationSymmetric": True,
        "WeightSymmetric": True,
        "QuantizeBias": False,
        "AddQDQPairToWeight": True,
        "DedicatedQDQPair": False,
        "ForceQuantizeNoInputCheck": True,
        "QDQDisableWeightAdjustForInt32Bias": True,
        "OpTypesToExcludeOutputQuantization": sorted({node.op_type for node in model.graph.node}),
        "QDQOpTypePerChannelSupportToAxis": {"Conv": 0, "ConvTranspose": 1, "MatMul": -1},
    }


@contextlib.contextmanager
def _without_advice() -> Iterator[None]:
    """Drop the advice to run quant_pre_process: the graph was simplified, and that step may lose dynamic axes."""

    def wanted(record: logging.LogRecord) -> bool:
        return "pre-processing before quantization" not in record.getMessage()

    logging.getLogger().addFilter(wanted)
    try:
        yield
    finally:
        logging.getLogger().removeFilter(wanted)


def read_ranges(path: Path) -> dict[str, tuple[float, float]]:
    """Read "ranges.json": {tensor: [low, high]}."""
    return {name: (float(low), float(high)) for name, (low, high) in json.loads(path.read_text("utf-8")).items()}
