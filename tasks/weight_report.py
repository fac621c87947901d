"""What int8 and fp8 cost each weight: its range, the share of values that are clipped, and how far its error is below it.

Of a graph with Q/DQ pairs the scales are those that it states (`stated_weights`); before it has any they are those that
`tasks.quantize` will write (`weights_to_be`), so that weights stand in the calibration report beside activations.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any, Final

import numpy as np
import onnx
from onnx import TensorProto

from tasks.calibration_report import to_e4m3
from tasks.datasets import Array
from tasks.fp8 import LARGEST
from tasks.graphs import array_of
from tasks.quantize import OPERATORS, weight_axis

_INT8: Final = 127.0
_TYPES: Final = {TensorProto.INT8: "int8", TensorProto.UINT8: "uint8", TensorProto.FLOAT8E4M3FN: "float8e4m3fn"}
_STANDARD: Final = ("", "ai.onnx")


def weights_to_be(model: onnx.ModelProto) -> list[dict[str, Any]]:
    """Return a row for each weight that quantisation may put a pair on, as int8 and as fp8, the worst first.

    {"tensor", "nodes", "shape", "axis", "channels", "range": [-bound, bound] of the widest channel, "observed", "clipped",
    "snr_db", "snr_fp8_db", "worst_channel": {"channel", "snr_db", "bound"}}; ratios as in `calibration_report.measured`, null
    where there is no error or no signal. Constant nodes must have been hoisted.
    """
    weights = {tensor.name: tensor for tensor in model.graph.initializer if tensor.data_type == TensorProto.FLOAT}
    taken: dict[str, tuple[int | None, list[str]]] = {}
    for node in model.graph.node:
        if node.op_type in OPERATORS and node.domain in _STANDARD and node.input[1] in weights:
            rank = len(weights[node.input[1]].dims)
            taken.setdefault(node.input[1], (weight_axis(node, rank), []))[1].append(node.name)
    return _worst_first(_row(name, weights[name], axis, nodes) for name, (axis, nodes) in taken.items())


def stated_weights(model: onnx.ModelProto) -> list[dict[str, Any]]:
    """Return a row for each weight that the graph quantises (an initialiser that QuantizeLinear takes), the worst first.

    As `weights_to_be`, of the type that the pair has ("type") and with its own scales, so without "snr_fp8_db". Weights with a
    scale for each block are left out.
    """
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    nodes = list(model.graph.node)
    readers: dict[str, list[str]] = {}
    for node in nodes:
        for name in node.input:
            readers.setdefault(name, []).append(node.name)
    restored = {node.input[0]: node.output[0] for node in nodes if node.op_type == "DequantizeLinear"}
    rows = []
    for node in nodes:
        if node.op_type != "QuantizeLinear" or node.input[0] not in tensors or node.input[1] not in tensors:
            continue
        kind = (
            tensors[node.input[2]].data_type if len(node.input) > 2 and node.input[2] in tensors else TensorProto.UINT8
        )
        if kind not in (TensorProto.INT8, TensorProto.FLOAT8E4M3FN):
            continue
        scales = array_of(tensors[node.input[1]]).astype(np.float32)
        if scales.ndim > 1:  # blocks, which no row of channels shows
            continue
        axis = next((one.i for one in node.attribute if one.name == "axis"), 1) if scales.ndim else None
        users = readers.get(restored.get(node.output[0], ""), [])
        row = _row(node.input[0], tensors[node.input[0]], axis, users, scales=scales, kind=kind)
        rows.append({**row, "type": _TYPES[kind]})
    return _worst_first(rows)


def stated_ranges(model: onnx.ModelProto) -> list[dict[str, Any]]:
    """Return {"tensor", "range", "type"} of each activation that the graph has a pair for, in the graph's order."""
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    rows = []
    for node in model.graph.node:
        if node.op_type != "QuantizeLinear" or node.input[0] in tensors or node.input[1] not in tensors:
            continue
        kind = (
            tensors[node.input[2]].data_type if len(node.input) > 2 and node.input[2] in tensors else TensorProto.UINT8
        )
        scale = float(np.max(array_of(tensors[node.input[1]]).astype(np.float32)))
        least, most = {TensorProto.INT8: (-128, 127), TensorProto.FLOAT8E4M3FN: (-LARGEST, LARGEST)}.get(kind, (0, 255))
        if kind in _TYPES:
            stated = tensors.get(node.input[2]) if len(node.input) > 2 else None
            zero = float(array_of(stated).reshape(-1)[0]) if stated is not None else 0.0
            row = {"tensor": node.input[0], "range": [(least - zero) * scale, (most - zero) * scale]}
            rows.append({**row, "type": _TYPES[kind]})
    return rows


def _row(
    name: str,
    tensor: onnx.TensorProto,
    axis: int | None,
    nodes: list[str],
    *,
    scales: Array | None = None,
    kind: int = TensorProto.INT8,
) -> dict[str, Any]:
    values = array_of(tensor).astype(np.float32)
    rows = np.moveaxis(values, axis, 0).reshape(values.shape[axis], -1) if axis is not None else values.reshape(1, -1)
    bounds = np.abs(rows).max(axis=1, initial=0.0)
    levels = LARGEST if kind == TensorProto.FLOAT8E4M3FN else _INT8
    steps = bounds / np.float32(levels) if scales is None else np.broadcast_to(scales.reshape(-1), bounds.shape)
    measured = list(_channels(rows, steps, fp8=kind == TensorProto.FLOAT8E4M3FN))
    power, noise, beyond = (sum(one[index] for one in measured) for index in range(3))
    ratios = [_ratio(one[0], one[1]) for one in measured]
    worst = min((index for index, one in enumerate(ratios) if one is not None), key=lambda at: ratios[at], default=None)  # type: ignore[arg-type,return-value]
    found: dict[str, Any] = {
        "tensor": name,
        "nodes": nodes,
        "shape": list(tensor.dims),
        "axis": axis % max(values.ndim, 1) if axis is not None else None,
        "channels": len(rows),
        "range": [-float(steps.max(initial=0.0) * levels), float(steps.max(initial=0.0) * levels)],
        "observed": [float(values.min(initial=0.0)), float(values.max(initial=0.0))],
        "clipped": beyond / values.size if values.size else 0.0,
        "snr_db": _ratio(power, noise),
        "worst_channel": (
            {"channel": worst, "snr_db": ratios[worst], "bound": float(bounds[worst])} if worst is not None else None
        ),
    }
    if scales is None:
        own = list(_channels(rows, bounds / np.float32(LARGEST), fp8=True))
        found["snr_fp8_db"] = _ratio(sum(one[0] for one in own), sum(one[1] for one in own))
    return found


def _channels(rows: Array, steps: Array, *, fp8: bool) -> Iterator[tuple[float, float, int]]:
    """Yield of each channel the sum of its squares, that of its errors, and how many of its values are clipped."""
    for values, step in zip(rows, steps, strict=True):
        exact, scale = values.astype(np.float64), float(step)
        if not scale > 0:
            yield float(np.square(exact).sum()), float(np.square(exact).sum()), 0
            continue
        levels = exact / scale
        rounded = to_e4m3(levels) if fp8 else np.rint(levels).clip(-128, 127)
        beyond = int((np.abs(levels) > (LARGEST if fp8 else _INT8 + 0.5) * (1 + 1e-6)).sum())
        yield float(np.square(exact).sum()), float(np.square(rounded * scale - exact).sum()), beyond


def _ratio(power: float, noise: float) -> float | None:
    return round(10 * math.log10(power / noise), 2) if power > 0 and noise > 0 else None


def _worst_first(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(rows, key=lambda row: (row["snr_db"] is None, row["snr_db"] or 0.0, row["tensor"]))
