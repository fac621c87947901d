"""Half-precision graphs: every float tensor gets its type here, so that a strongly typed compiler decides nothing.

Own code rather than `onnxruntime.transformers.float16`: that one writes nodes out of order, gives two casts one name
when two kept nodes read the same tensor, silently saturates weights that overflow, types `Shape -> float -> Shape`
arithmetic as half, and knows no bfloat16.

Which types an operator takes is read from its ONNX schema at the graph's opset. Every node computes in half, except:
nodes of `keep`; operators whose schema has no half (Range, NonMaxSuppression); operators of other domains, and
control flow; arithmetic on counted values (sizes, positions, ids: integers that became floats), because half holds
integers only up to 2048 (float16) or 256 (bfloat16); and nodes whose weights overflow.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import numpy as np
import onnx
from onnx import TensorProto, defs, helper

from tasks.errors import BackendError
from tasks.graphs import array_of, fresh_names, graphs_in, hoist_constants, tensor_types
from tasks.onnx_files import opset_of
from tasks.onnx_weights import as_half, is_external

Array = np.ndarray[Any, np.dtype[Any]]
Half = Literal["fp16", "bf16"]

ELEM_TYPES: Final[Mapping[Half, int]] = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}
_LARGEST: Final[Mapping[Half, float]] = {"fp16": 65504.0, "bf16": float.fromhex("0x1.fep127")}
_SMALLEST: Final[Mapping[Half, float]] = {"fp16": 2.0**-24, "bf16": 2.0**-133}
_NORMAL: Final[Mapping[Half, float]] = {"fp16": 2.0**-14, "bf16": 2.0**-126}
_SCHEMA_NAMES: Final[Mapping[Half, str]] = {"fp16": "tensor(float16)", "bf16": "tensor(bfloat16)"}
_FLOAT: Final = TensorProto.FLOAT
# Constants at least this large stand for infinity (attention masks: -1e9, the least float32) and may be saturated;
# smaller ones that overflow are numbers, and keep their node in fp32.
_INFINITE: Final = 1e6
# A constant larger than this is a weight (or an embedding table), not part of counting.
_SMALL_CONSTANT: Final = 4096
# Types come from an attribute, or scales must stay fp32 (QuantizeLinear of an imported quantised graph).
_FULL_OPERATORS: Final = frozenset(
    [
        "RandomNormal",
        "RandomNormalLike",
        "RandomUniform",
        "RandomUniformLike",
        "Multinomial",
        "Bernoulli",
        "EyeLike",
        "QuantizeLinear",
        "DequantizeLinear",
        "If",
        "Loop",
        "Scan",
        "SequenceMap",
        "SequenceConstruct",
        "SequenceEmpty",
        "SequenceAt",
        "SequenceInsert",
        "SequenceErase",
        "SplitToSequence",
        "ConcatFromSequence",
        "Optional",
        "OptionalGetElement",
    ]
)
_PAIRS: Final = frozenset(["QuantizeLinear", "DequantizeLinear"])
_WEIGHTED: Final = frozenset(["Conv", "ConvTranspose", "Gemm", "LSTM", "GRU", "RNN", "DeformConv"])
_INTEGERS: Final = frozenset(
    getattr(TensorProto, name) for name in ["INT8", "INT16", "INT32", "INT64", "UINT8", "UINT16", "UINT32", "UINT64"]
)


@dataclass
class Typed:
    """A typed graph, and what was decided about it: constants saturated, weights too large for the half type."""

    model: onnx.ModelProto
    casts: int = 0
    clamped: list[str] = field(default_factory=list)
    overflowing: list[str] = field(default_factory=list)
    counted: int = 0


def to_half(model: onnx.ModelProto, half: Half, keep: set[str], *, native: bool, quantized: bool = False) -> Typed:
    """Return the graph with float32 tensors typed as `half`, topologically sorted, names of inputs and outputs kept.

    `keep` names nodes that compute in fp32. Float graph inputs and outputs stay float32 with a Cast behind or before
    them, unless `native`. Node names must be unique (`graphs.name_nodes`). The model given is changed. With `quantized`
    Q/DQ pairs take and give halves too, so that no cast comes between a pair and what it belongs to; their scales become
    halves, but for those too small to be one. ONNX has that from opset 19 on.
    """
    hoist_constants(model)
    writer = _Writer(model, half, keep, native=native, quantized=quantized)
    return writer.write()


def round_to_half(values: Array, half: Half) -> Array:
    """Round float32 to half, to nearest with ties to even: float16 values, or bfloat16 bits as uint16."""
    if half == "fp16":
        with np.errstate(over="ignore"):
            return values.astype(np.float16)
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32).astype(np.uint64)
    rounded: Array = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def saturate_constants(model: onnx.ModelProto) -> None:
    """Write the constants that stand for infinity in an fp32 graph as fp16 has them: its largest number."""
    for index, tensor in enumerate(model.graph.initializer):
        if tensor.data_type == _FLOAT and _stands_for_infinity(array_of(tensor), "fp16"):
            finite = _tensor(tensor.name, _finite(array_of(tensor), "fp16"), _FLOAT, "fp16")
            model.graph.initializer[index].CopyFrom(finite)


class _Writer:
    """One conversion; nodes are written in their order, each cast just before the first node that reads it."""

    def __init__(self, model: onnx.ModelProto, half: Half, keep: set[str], *, native: bool, quantized: bool) -> None:
        self.model, self.half, self.keep, self.native = model, half, keep, native
        self.full = _FULL_OPERATORS - _PAIRS if quantized else _FULL_OPERATORS
        self.elem = ELEM_TYPES[half]
        self.types = tensor_types(model)
        self.weights = {tensor.name: tensor for tensor in model.graph.initializer if tensor.data_type == _FLOAT}
        self.fresh = fresh_names(model)
        self.result = Typed(model)
        self.current: dict[str, int] = {}  # float tensor -> the type under which it was written
        self.names: dict[tuple[str, int], str] = {}  # (original tensor, type) -> its name in the new graph
        self.nodes: list[onnx.NodeProto] = []
        self.new_weights: list[TensorProto] = []
        self.weight_names: dict[tuple[str, int, bool], str] = {}
        self.saturated = self._saturated()
        self.overflowing = {
            name
            for name, tensor in self.weights.items()
            if name not in self.saturated and _out_of_range(array_of(tensor), half).any()
        }
        if quantized:
            self.overflowing |= self._tiny_scales()
        self.counted = _counted(model, self.types, self.weights)

    def write(self) -> Typed:
        graph = self.model.graph
        constants = {tensor.name for tensor in graph.initializer}
        inputs = [value for value in graph.input if value.name not in constants]
        del graph.input[:]
        graph.input.extend(inputs)
        outputs = {value.name for value in graph.output if value.type.tensor_type.elem_type == _FLOAT}
        for value in graph.input:
            if value.type.tensor_type.elem_type == _FLOAT:
                elem = self.elem if self.native else _FLOAT
                value.type.tensor_type.elem_type = elem
                self._define(value.name, elem, value.name)
        wanted = self.elem if self.native else _FLOAT
        for name in sorted(outputs & set(self.weights)):  # a constant output has its own name in its own type
            self._weight(name, wanted, exact=False)
        for node in graph.node:
            self._node(node, outputs)
        for value in graph.output:
            if value.name in outputs:
                value.type.tensor_type.elem_type = wanted
                if self.current.get(value.name, wanted) != wanted:
                    self._cast(self.names[value.name, self.current[value.name]], value.name, wanted)
        others = [tensor for tensor in graph.initializer if tensor.data_type != _FLOAT]
        del graph.node[:], graph.initializer[:], graph.value_info[:]
        graph.node.extend(self.nodes)
        graph.initializer.extend([*others, *self.new_weights])
        return self.result

    def _node(self, source: onnx.NodeProto, outputs: set[str]) -> None:
        node = onnx.NodeProto()
        node.CopyFrom(source)
        takes, gives = self._signature(node)
        for index, name in enumerate(source.input):
            if name in self.weights or name in self.current:
                node.input[index] = self._as(name, takes[index], node)
        for graph in graphs_in(node):
            self._rename_captured(graph, node)
        for index, name in enumerate(source.output):
            if name and name not in self.types and node.domain not in ("", "ai.onnx"):
                raise BackendError(
                    "unsupported operator",
                    f"node {node.name!r} ({node.domain}::{node.op_type}): the type of its output {name!r} is unknown",
                    "build this model in fp32, or replace the operator",
                )
            if self.types.get(name) != _FLOAT:
                continue
            wanted = self.elem if self.native else _FLOAT
            # An output of the graph that still needs a cast gives its name to that cast.
            written = self.fresh(f"{name}_{self.half}") if name in outputs and gives[index] != wanted else name
            node.output[index] = written
            self._define(name, gives[index], written)
        self._set_attributes(node, self.elem if self.elem in gives else _FLOAT)
        self.nodes.append(node)

    def _signature(self, node: onnx.NodeProto) -> tuple[list[int], list[int]]:
        """Return the float type that each input is wanted in, and each output has."""
        full = [_FLOAT] * len(node.input), [_FLOAT] * len(node.output)
        if node.name in self.keep or node.op_type in self.full or node.domain not in ("", "ai.onnx"):
            return full
        if node.name in self.counted:
            self.result.counted += 1
            return full
        large = [name for name in node.input if name in self.overflowing]
        if large:
            self.result.overflowing += [name for name in large if name not in self.result.overflowing]
            return full
        try:
            schema = defs.get_schema(node.op_type, opset_of(self.model), "")
        except defs.SchemaError:
            return full  # a model-local function: inlined by the compiler, typed by nobody
        allowed = {entry.type_param_str: entry.allowed_type_strs for entry in schema.type_constraints}

        def typed(parameters: Any, index: int) -> int:
            parameter = parameters[min(index, len(parameters) - 1)]
            fits = _SCHEMA_NAMES[self.half] in allowed.get(parameter.type_str, [parameter.type_str])
            return self.elem if fits else _FLOAT

        takes = [typed(schema.inputs, index) for index in range(len(node.input))]
        gives = [typed(schema.outputs, index) for index in range(len(node.output))]
        if node.op_type == "LayerNormalization":  # mean and deviation have the stash type: fp32
            gives[1:] = [_FLOAT] * len(gives[1:])
        floats = [takes[index] for index, name in enumerate(node.input) if self.types.get(name) == _FLOAT]
        if floats and self.elem not in floats:
            return takes, [_FLOAT] * len(node.output)
        return takes, gives

    def _define(self, name: str, elem: int, written: str) -> None:
        self.current[name] = elem
        self.names[name, elem] = written

    def _as(self, name: str, elem: int, reader: onnx.NodeProto) -> str:
        """Return what the tensor is called in the given type, writing the weight or the cast if it is the first use."""
        if name in self.weights:
            return self._weight(name, elem, exact=reader.name in self.keep)
        found = self.names.get((name, elem))
        if found is not None:
            return found
        written = self.fresh(f"{name}_{'fp32' if elem == _FLOAT else self.half}")
        self._cast(self.names[name, self.current[name]], written, elem)
        self.names[name, elem] = written
        return written

    def _cast(self, source: str, target: str, elem: int) -> None:
        name = self.fresh(f"{target}_cast")
        self.nodes.append(helper.make_node("Cast", [source], [target], name=name, to=elem))
        self.result.casts += 1

    def _weight(self, name: str, elem: int, *, exact: bool) -> str:
        """Return the weight's name in the given type; `exact` asks for its values as they were, for a kept node."""
        key = (name, elem, exact and name in self.saturated)
        if key in self.weight_names:
            return self.weight_names[key]
        first = all(known != name for known, _elem, _exact in self.weight_names)
        written = name if first else self.fresh(f"{name}_{'fp32' if elem == _FLOAT else self.half}")
        if is_external(self.weights[name]) and name not in self.saturated and elem != _FLOAT:
            # Rounded when it is saved, a piece at a time.
            self.new_weights.append(as_half(self.weights[name], written, elem, self.half))
            self.weight_names[key] = written
            return written
        tensor = TensorProto()
        tensor.CopyFrom(self.weights[name])
        tensor.name = written
        if is_external(tensor) and name not in self.saturated:
            self.new_weights.append(tensor)
            self.weight_names[key] = written
            return written
        values = array_of(tensor)
        if name in self.saturated and not exact:
            values = _finite(values, self.half)
            tensor = _tensor(written, values, _FLOAT, self.half)
        if elem != _FLOAT:
            tensor = _tensor(written, _nonzero(values, self.half), elem, self.half)
        self.new_weights.append(tensor)
        self.weight_names[key] = written
        return written

    def _rename_captured(self, graph: onnx.GraphProto, owner: onnx.NodeProto) -> None:
        """Point the body of a control-flow node at the fp32 versions of the outer tensors that it reads."""
        own = {value.name for value in graph.input} | {tensor.name for tensor in graph.initializer}
        for node in graph.node:
            for index, name in enumerate(node.input):
                if name not in own and (name in self.weights or name in self.current):
                    node.input[index] = self._as(name, _FLOAT, owner)
            own.update(node.output)

    def _set_attributes(self, node: onnx.NodeProto, elem: int) -> None:
        if elem == _FLOAT or node.op_type not in ("Cast", "ConstantOfShape"):
            return
        for attribute in node.attribute:
            if attribute.name == "to" and attribute.i == _FLOAT:
                attribute.i = elem
            elif attribute.name == "value" and attribute.t.data_type == _FLOAT:
                attribute.t.CopyFrom(_tensor("", _finite(array_of(attribute.t), self.half), elem, self.half))
        if node.op_type == "ConstantOfShape" and not node.attribute:
            zero = _tensor("", np.zeros(1, np.float32), elem, self.half)
            node.attribute.append(helper.make_attribute("value", zero))

    def _tiny_scales(self) -> set[str]:
        """Find scales of Q/DQ pairs that are no normal halves: rounded, they would be far off, or zero."""
        scales = {node.input[1] for node in self.model.graph.node if node.op_type in _PAIRS} & set(self.weights)
        return {name for name in scales if np.abs(array_of(self.weights[name])).min() < _NORMAL[self.half]}

    def _saturated(self) -> set[str]:
        """Find the constants that stand for infinity: one value, too large for half, and at least 1e6."""
        found = set()
        for name, tensor in self.weights.items():
            if _stands_for_infinity(array_of(tensor), self.half):
                found.add(name)
        self.result.clamped = sorted(found)
        return found


def _stands_for_infinity(values: Array, half: Half) -> bool:
    large = values[_out_of_range(values, half)]
    return bool(large.size and np.abs(large).min() >= _INFINITE and np.unique(np.abs(large)).size == 1)


def _out_of_range(values: Array, half: Half) -> Array:
    return np.isfinite(values) & (np.abs(values) > _LARGEST[half])


def _finite(values: Array, half: Half) -> Array:
    """Saturate what is finite; an infinity stays one."""
    return np.where(np.isinf(values), values, np.clip(values, -_LARGEST[half], _LARGEST[half]))


def _nonzero(values: Array, half: Half) -> Array:
    """Keep a single tiny constant (the epsilon of a division) from becoming zero."""
    tiny = values.size == 1 and values.all() and np.abs(values).max() < _SMALLEST[half]
    return np.copysign(np.full_like(values, _SMALLEST[half]), values) if tiny else values


def _tensor(name: str, values: Array, elem: int, half: Half) -> TensorProto:
    raw = values.astype(np.float32) if elem == _FLOAT else round_to_half(values, half)
    return TensorProto(name=name, data_type=elem, dims=values.shape, raw_data=np.ascontiguousarray(raw).tobytes())


def _counted(model: onnx.ModelProto, types: Mapping[str, int], weights: Mapping[str, TensorProto]) -> set[str]:
    """Find the nodes that compute on counted values alone: floats that come from integers, and small constants.

    Counting ends where data joins, and at weights: Conv and Gemm, and anything with a constant above 4096 elements.
    """
    constant = {name for name, tensor in weights.items() if np.prod(tensor.dims) <= _SMALL_CONSTANT}
    counted: set[str] = set()
    nodes: set[str] = set()
    for node in model.graph.node:
        floats = [name for name in node.input if types.get(name) == _FLOAT or name in weights]
        gives = [name for name in node.output if types.get(name) == _FLOAT]
        from_integer = node.op_type == "Cast" and types.get(node.input[0]) in _INTEGERS
        if (from_integer and gives) or (node.op_type == "Range" and gives):
            counted.update(gives)
        elif node.op_type in _WEIGHTED or not all(name in constant or name in counted for name in floats):
            continue
        elif not any(name in counted for name in floats):
            constant.update(gives)
            continue
        else:
            counted.update(gives)
        nodes.add(node.name)
    return nodes
