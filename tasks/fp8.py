"""fp8 (e4m3) graphs: the int8 Q/DQ pairs of `quantize`, with scales for 448, the largest number of the type, in place of 127.

Own scales rather than those of ONNX Runtime's quantiser, which for fp8 takes them from means and deviations alone: amax / 448
from the calibrated ranges is what NVIDIA's ModelOpt writes (its quantization guide, "FP8 per-tensor"), and what TensorRT
and TensorRT-RTX compile. E4M3 without infinities: OCP 8-bit floating point specification 1.0; ONNX has it from opset 19 on.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from tasks.graphs import array_of, fresh_names

LARGEST: Final = 448.0


def as_fp8(model: onnx.ModelProto, ranges: Mapping[str, tuple[float, float]], known: set[str]) -> onnx.ModelProto:
    """Return the graph with its symmetric int8 pairs turned into e4m3 ones; pairs whose results were `known` before stay.

    The scale of an activation is the greater bound of its range over 448, that of a weight's channel its largest absolute
    value over 448 (1 where all are zero). The model given is changed.
    """
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    zero = fresh_names(model)("fp8_zero")
    made: dict[str, onnx.TensorProto] = {}
    sources: dict[str, str] = {}
    for node in model.graph.node:
        if node.op_type == "QuantizeLinear" and node.output[0] not in known:
            sources[node.output[0]] = node.input[0]
    for node in model.graph.node:
        pair = node.op_type in ("QuantizeLinear", "DequantizeLinear")
        level = node.output[0] if node.op_type == "QuantizeLinear" else node.input[0]
        if not pair or level not in sources:
            continue
        source, scale = sources[level], node.input[1]
        if scale not in made:
            weight = weights.get(source)
            values = (
                _bound(ranges[source])
                if weight is None
                else _channels(array_of(weight), array_of(weights[scale]), node)
            )
            made[scale] = numpy_helper.from_array(np.asarray(values / np.float32(LARGEST), np.float32), scale)
        node.input[2] = zero if weights[scale].dims == [] else f"{zero}_{weights[scale].dims[0]}"
    sizes = {tuple(weights[scale].dims) for scale in made}
    kept = [tensor for tensor in model.graph.initializer if tensor.name not in made]
    read = {name for node in model.graph.node for name in node.input} | {value.name for value in model.graph.output}
    kept = [tensor for tensor in kept if tensor.name in read]
    zeros = [
        onnx.helper.make_tensor(
            f"{zero}_{size[0]}" if size else zero,
            TensorProto.FLOAT8E4M3FN,
            size,
            bytes(size[0] if size else 1),
            raw=True,
        )
        for size in sorted(sizes)
    ]
    copied = [onnx.TensorProto.FromString(tensor.SerializeToString()) for tensor in (*kept, *made.values(), *zeros)]
    del model.graph.initializer[:]
    model.graph.initializer.extend(copied)
    model.ir_version = max(model.ir_version, 9)
    return model


def _bound(span: tuple[float, float]) -> np.float32:
    bound: np.float32 = np.float32(max(abs(span[0]), abs(span[1])))
    return bound


def _channels(
    values: np.ndarray[Any, np.dtype[Any]], scales: np.ndarray[Any, np.dtype[Any]], node: onnx.NodeProto
) -> np.ndarray[Any, np.dtype[Any]]:
    """Return the largest absolute value of the weight, or of each of its channels, as the int8 scales were."""
    magnitudes = np.abs(values)
    axis = next((attribute.i for attribute in node.attribute if attribute.name == "axis"), 1)
    others = tuple(index for index in range(values.ndim) if index != axis % max(values.ndim, 1))
    peaks = magnitudes.max(axis=others) if scales.ndim else magnitudes.max()
    found: np.ndarray[Any, np.dtype[Any]] = np.where(peaks > 0, peaks, np.float32(LARGEST)).astype(np.float32)
    return found
