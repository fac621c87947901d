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
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
from onnx import numpy_helper

from tasks.errors import BackendError
from tasks.graphs import array_of, fresh_names, hoist_constants, inferred_values
from tasks.onnx_files import opset_of
from tasks.onnx_weights import APART, external_bytes, put_back, set_apart

OPERATORS: Final = ("Conv", "ConvTranspose", "MatMul", "Gemm")
# QuantizeLinear per channel needs opset 13; older graphs cannot carry the pairs.
_LEAST_OPSET: Final = 13
# Which axis of a weight has a scale for each index; of Gemm it depends on transB.
_AXES: Final = {"Conv": 0, "ConvTranspose": 1, "MatMul": -1}
# ONNX Runtime's scale is bound / 127.5, and below the least normal float32 it would be replaced by 1.
_LEAST_BOUND: Final = float(np.finfo(np.float32).tiny) * 128


@dataclass(frozen=True)
class Quantized:
    """A graph with Q/DQ pairs, the nodes quantised, and those left in fp32 because an input was always zero."""

    model: onnx.ModelProto
    nodes: tuple[str, ...]
    constant: tuple[str, ...]


def activations(model: onnx.ModelProto) -> list[str]:
    """Return the tensors that quantisation may put a pair on: what Conv, MatMul and Gemm take, and `residuals`.

    Sorted, weights excepted. Biases stay fp32, and so do outputs. Constant nodes must have been hoisted
    (`graphs.hoist_constants`).
    """
    weights = {tensor.name for tensor in model.graph.initializer}
    taken = {
        name
        for node in model.graph.node
        if node.op_type in OPERATORS and node.domain in ("", "ai.onnx")
        for name in node.input[:2]
        if name and name not in weights
    }
    return sorted(taken | {residual.tensor for residual in residuals(model)})


@dataclass(frozen=True)
class Residual:
    """An Add of a Conv's result (`conv` names the node) and another tensor, the residual."""

    add: str
    conv: str
    tensor: str


def residuals(model: onnx.ModelProto) -> list[Residual]:
    """Find sums that a compiler runs inside of an int8 convolution, if what is added to its result is int8 too.

    NVIDIA, TensorRT developer guide, "Q/DQ layer-placement recommendations": quantise the residual input of an element-wise
    addition, not the output of the convolution that it is fused with. Where both are convolutions' results, the residual
    is the one whose input others read as well (the shortcut of a ResNet's first block), else the second.
    """
    readers = Counter(name for node in model.graph.node for name in node.input)
    readers.update(value.name for value in model.graph.output)
    convolutions = {node.output[0]: node for node in model.graph.node if node.op_type == "Conv"}
    constants = {tensor.name for tensor in model.graph.initializer}
    found = []
    for node in model.graph.node:
        if node.op_type != "Add" or constants.intersection(node.input) or node.input[0] == node.input[1]:
            continue
        alone = [name for name in node.input if name in convolutions and readers[name] == 1]
        if not alone:
            continue
        # Of two, the convolution whose input nothing else reads goes on with the sum.
        conv = min(alone, key=lambda name: readers[convolutions[name].input[0]] > 1)
        other = node.input[1] if conv == node.input[0] else node.input[0]
        found.append(Residual(node.name, convolutions[conv].name, other))
    return found


def zero_range(low: float, high: float) -> bool:
    """Say whether a range is too narrow to become a scale: the tensor was zero on all calibration data."""
    return max(abs(low), abs(high)) < _LEAST_BOUND


def quantize(
    model: onnx.ModelProto, ranges: Mapping[str, tuple[float, float]], keep: set[str], *, residual_pairs: bool = True
) -> Quantized:
    """Return the graph with symmetric int8 Q/DQ pairs around what OPERATORS take, nodes of `keep` excepted.

    `ranges` are calibrated float32 bounds by tensor. A node that takes a tensor whose range is zero stays fp32: any
    scale for it would be invented, and a scale of zero breaks TensorRT. Node names must be unique; `residual_pairs` gives `residuals` pairs too. The model given is
    changed. Raises BackendError("bad data") where a range is missing or no node is left to quantise, "unsupported
    operator" below opset 13.
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
    if not nodes:
        idle = f"; inputs of {', '.join(sorted(constant))} were zero on all calibration data" if constant else ""
        raise BackendError(
            "bad data",
            f"int8 would quantise no node: {len(candidates)} of {', '.join(OPERATORS)} are left by precision.keep{idle}",
            "keep fewer nodes, calibrate on data that uses the model, or build another precision",
        )
    _state_kernel_shapes(model)
    betas = {node.name: attribute.f for node in candidates for attribute in node.attribute if attribute.name == "beta"}
    outputs = [value.name for value in model.graph.output]
    known = {name for node in model.graph.node for name in node.output}
    sums = [one for one in residuals(model) if one.conv in nodes and one.tensor not in zero]
    model = _with_pairs(model, ranges, exclude=sorted(keep | constant))
    _restore_betas(model, betas)
    _restore_outputs(model, outputs, known)
    _restore_exact_inputs(model, keep | constant, known)
    if residual_pairs:
        _quantize_residuals(model, sums, ranges)
    return Quantized(model, nodes, tuple(sorted(constant)))


def _with_pairs(
    model: onnx.ModelProto, ranges: Mapping[str, tuple[float, float]], exclude: list[str]
) -> onnx.ModelProto:
    from onnxruntime.quantization.quant_utils import add_infer_metadata, save_and_reload_model_with_shape_infer

    if external_bytes(model) <= APART:
        return _paired(save_and_reload_model_with_shape_infer(model), ranges, exclude)
    # Large weights stay on disk: what decides on a pair is the largest value of each channel, which stands in for them.
    values = inferred_values(model)
    apart = set_apart(model)
    standing = {tensor.name: tensor for tensor in _stand_ins(model, apart)}
    inputs = [
        onnx.ValueInfoProto.FromString(one.SerializeToString()) for one in model.graph.input if one.name not in standing
    ]
    del model.graph.input[:], model.graph.value_info[:]
    model.graph.input.extend(inputs)
    model.graph.value_info.extend(values)
    model.graph.initializer.extend(standing.values())
    add_infer_metadata(model)  # else it would infer shapes once more, from those of the stand-ins
    made = _paired(model, ranges, exclude)
    kept = [tensor for tensor in made.graph.initializer if tensor.name not in standing]
    copied = [onnx.TensorProto.FromString(tensor.SerializeToString()) for tensor in kept]
    del made.graph.initializer[:], made.metadata_props[:]
    made.metadata_props.extend(entry for entry in model.metadata_props if entry.key != "onnx.infer")
    made.graph.initializer.extend(copied)
    put_back(made, apart)
    return made


def _stand_ins(model: onnx.ModelProto, apart: Mapping[str, onnx.TensorProto]) -> Iterator[onnx.TensorProto]:
    """Yield for each large weight of OPERATORS a tensor of its name with one value a channel: the greatest absolute one."""
    done: set[str] = set()
    for node in model.graph.node:
        name = node.input[1] if node.op_type in OPERATORS else ""
        if name not in apart or name in done or apart[name].data_type != onnx.TensorProto.FLOAT:
            continue
        done.add(name)
        magnitudes = np.abs(array_of(apart[name]))
        axis = weight_axis(node, magnitudes.ndim)
        others = tuple(index for index in range(magnitudes.ndim) if index != axis)
        yield numpy_helper.from_array(magnitudes.max(axis=others, keepdims=True), name)


def weight_axis(node: onnx.NodeProto, rank: int) -> int | None:
    """Return the axis of a weight whose every index has a scale of its own; None: one scale for all."""
    if rank < 2:
        return None
    if node.op_type == "Gemm":
        turned = any(attribute.name == "transB" and attribute.i for attribute in node.attribute)
        return 0 if turned else 1
    axis = _AXES[node.op_type]
    return axis % rank


def _paired(model: onnx.ModelProto, ranges: Mapping[str, tuple[float, float]], exclude: list[str]) -> onnx.ModelProto:
    # The steps of `quantize_static` after its calibration, which takes ranges from elsewhere only since 1.24, while
    # Python 3.10 has 1.23.
    from onnxruntime.quantization import CalibrationMethod, QuantType
    from onnxruntime.quantization.calibrate import TensorData, TensorsData
    from onnxruntime.quantization.qdq_quantizer import QDQQuantizer

    data = {
        name: TensorData(lowest=np.array(low, np.float32), highest=np.array(high, np.float32))
        for name, (low, high) in sorted(ranges.items())
    }
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr), without_advice():
        output = Path(folder, "model.onnx")
        quantizer = QDQQuantizer(
            model,
            per_channel=True,
            reduce_range=False,
            weight_qType=QuantType.QInt8,
            activation_qType=QuantType.QInt8,
            tensors_range=TensorsData(CalibrationMethod.MinMax, data),
            nodes_to_quantize=[],
            nodes_to_exclude=exclude,
            op_types_to_quantize=list(OPERATORS),
            extra_options=_options(model),
        )
        quantizer.quantize_model()
        quantizer.model.save_model_to_file(output, use_external_data_format=True)  # so that size never matters here
        return onnx.load(output)


def _state_kernel_shapes(model: onnx.ModelProto) -> None:
    """Write `kernel_shape` where ONNX lets it follow from the weights.

    TensorRT 8.6 does not read a Conv without it whose weights come from a DequantizeLinear (convMultiInput: "The input
    tensor shape misaligns with the input kernel shape").
    """
    shapes = {tensor.name: list(tensor.dims) for tensor in model.graph.initializer}
    for node in model.graph.node:
        stated = any(attribute.name == "kernel_shape" for attribute in node.attribute)
        if node.op_type in ("Conv", "ConvTranspose") and node.input[1] in shapes and not stated:
            node.attribute.append(onnx.helper.make_attribute("kernel_shape", shapes[node.input[1]][2:]))


def _restore_betas(model: onnx.ModelProto, betas: Mapping[str, float]) -> None:
    """Undo what quantize_static does to Gemm: it sets beta to 1 for a quantised bias, also where the bias stays float."""
    for node in model.graph.node:
        for attribute in node.attribute:
            if node.op_type == "Gemm" and attribute.name == "beta" and node.name in betas:
                attribute.f = betas[node.name]


def _restore_outputs(model: onnx.ModelProto, outputs: Sequence[str], known: set[str]) -> None:
    """Let outputs of the graph be what was computed: where a tensor is an output too, quantize_static rounds that."""
    pairs = _pairs(model, known)
    fresh = fresh_names(model)
    for output in outputs:
        source = pairs.get(output)
        if source is None:
            continue
        rounded = fresh(f"{output}_DequantizeLinear_Output")
        for node in model.graph.node:
            for names in (node.input, node.output):
                for index, name in enumerate(names):
                    names[index] = rounded if name == output else output if name == source else name


def _restore_exact_inputs(model: onnx.ModelProto, exact: set[str], known: set[str]) -> None:
    """Let the nodes that stay fp32 read what was computed: quantize_static gives every reader of a tensor its pair."""
    pairs = _pairs(model, known)
    for node in model.graph.node:
        if node.name in exact:
            for index, name in enumerate(node.input):
                node.input[index] = pairs.get(name, name)


def _quantize_residuals(
    model: onnx.ModelProto, sums: Sequence[Residual], ranges: Mapping[str, tuple[float, float]]
) -> None:
    """Give the residuals that no other pair reached one of their own."""
    wanted = {one.add: one.tensor for one in sums}
    fresh = fresh_names(model)
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        tensor = wanted.get(node.name)
        if tensor is not None and tensor in node.input:  # else it reads the pair that another reader has
            low, high = ranges[tensor]
            bound = np.float32(max(abs(low), abs(high)))
            scale, zero = fresh(f"{tensor}_residual_scale"), fresh(f"{tensor}_residual_zero")
            levels, rounded = fresh(f"{tensor}_residual_levels"), fresh(f"{tensor}_residual")
            model.graph.initializer.append(numpy_helper.from_array(bound / np.float32(127.5), scale))
            model.graph.initializer.append(numpy_helper.from_array(np.int8(0), zero))
            pair = (("QuantizeLinear", tensor, levels), ("DequantizeLinear", levels, rounded))
            nodes += [
                onnx.helper.make_node(kind, [source, scale, zero], [made], name=fresh(f"{made}_{kind}"))
                for kind, source, made in pair
            ]
            node.input[list(node.input).index(tensor)] = rounded
        nodes.append(node)
    copied = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del model.graph.node[:]
    model.graph.node.extend(copied)


def _pairs(model: onnx.ModelProto, known: set[str]) -> dict[str, str]:
    """Return what each new Q/DQ pair takes, by what it gives; a pair whose middle was `known` is the author's own."""
    quantised = {
        node.output[0]: node.input[0]
        for node in model.graph.node
        if node.op_type == "QuantizeLinear" and node.output[0] not in known
    }
    return {
        node.output[0]: quantised[node.input[0]]
        for node in model.graph.node
        if node.op_type == "DequantizeLinear" and node.input[0] in quantised
    }


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
        "QDQOpTypePerChannelSupportToAxis": dict(_AXES),
    }


@contextlib.contextmanager
def without_advice() -> Iterator[None]:
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
