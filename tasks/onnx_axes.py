"""Inputs and dynamic axes of an ONNX graph beside what the recipe says of them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tasks.onnx_files import dims_of, dtype_name, graph_inputs, graphs_of


@dataclass(frozen=True, slots=True)
class FixedAxis:
    """An axis that the recipe calls dynamic and the graph holds at `extent`."""

    input: str
    position: int
    axis: str
    extent: int


@dataclass
class Agreement:
    """How a graph's inputs agree with the recipe's `tensors`.

    `faults` are sentences; `fixed` the axes that should be dynamic; `names` maps the graph's symbols to the recipe's
    axis (a name) or extent (a number).
    """

    faults: list[str] = field(default_factory=list)
    fixed: list[FixedAxis] = field(default_factory=list)
    names: dict[str, int | str] = field(default_factory=dict)


def compare_inputs(model: Any, tensors: Mapping[str, Mapping[str, Any]]) -> Agreement:
    """Compare input names, types, ranks, extents and dynamic axes with the recipe's; nothing is changed."""
    agreement = Agreement()
    values = {value.name: value for value in graph_inputs(model)}
    for name in tensors:
        if name not in values:
            agreement.faults.append(f"the graph has no input {name!r} (it has: {', '.join(values) or 'none'})")
    for name, value in values.items():
        if name not in tensors:
            agreement.faults.append(f"the graph has an input {name!r} that the recipe does not name")
            continue
        wanted: Sequence[int | str] = tensors[name]["shape"]
        dtype = dtype_name(value.type.tensor_type.elem_type)
        if dtype != tensors[name]["dtype"]:
            agreement.faults.append(f"input {name!r} is {dtype}, the recipe says {tensors[name]['dtype']}")
        # An input without a shape field may have any rank.
        if value.type.tensor_type.HasField("shape") and len(dims_of(value)) != len(wanted):
            agreement.faults.append(
                f"input {name!r} has shape {_spell(dims_of(value))}, the recipe says {_spell(wanted)}"
            )
            continue
        for position, (found, axis) in enumerate(zip(dims_of(value), wanted, strict=False)):
            _compare_axis(agreement, FixedAxis(name, position, str(axis), 0), found, axis)
    return agreement


def rename_axes(model: Any, tensors: Mapping[str, Mapping[str, Any]], names: Mapping[str, int | str]) -> None:
    """Give the inputs the recipe's shapes and carry its axis names through every shape of the graph, in place."""
    for graph in graphs_of(model):
        for value in [*graph.input, *graph.output, *graph.value_info]:
            if value.type.HasField("tensor_type"):
                for dim in value.type.tensor_type.shape.dim:
                    if dim.HasField("dim_param"):
                        _rename(dim, names)
    for value in graph_inputs(model):
        shape = value.type.tensor_type.shape
        shape.ClearField("dim")
        for extent in tensors[value.name]["shape"]:
            shape.dim.add(**({"dim_value": extent} if isinstance(extent, int) else {"dim_param": extent}))


def _compare_axis(agreement: Agreement, at: FixedAxis, found: int | str, wanted: int | str) -> None:
    where = f"input {at.input!r} axis {at.position}"
    if isinstance(found, int):
        if isinstance(wanted, str):
            agreement.fixed.append(FixedAxis(at.input, at.position, wanted, found))
        elif found != wanted:
            agreement.faults.append(f"{where} is {found}, the recipe says {wanted}")
        return
    if found == "?":
        return
    known = agreement.names.setdefault(found, wanted)
    if known != wanted:
        agreement.faults.append(
            f"{where}: the graph uses one size, {found!r}, for what the recipe calls {known!r} and {wanted!r}; "
            "they must be equal: give both the same axis name or extent"
        )


def _rename(dim: Any, names: Mapping[str, int | str]) -> None:
    text = dim.dim_param
    if text in names:
        new = names[text]
        if isinstance(new, int):
            dim.dim_value = new
        else:
            dim.dim_param = new
        return
    # An expression such as (s53//2): one pass, so that exchanged names do not meet.
    words = set(re.findall(r"[A-Za-z_][\w.]*", text))
    if any(isinstance(names.get(word), int) for word in words):
        dim.Clear()  # shape inference finds it again
    else:
        dim.dim_param = re.sub(r"[A-Za-z_][\w.]*", lambda match: str(names.get(match[0], match[0])), text)


def _spell(shape: Sequence[int | str]) -> str:
    return f"[{', '.join(map(str, shape))}]"
