"""What tracing keeps of one sample input: decisions that a module takes by the values of its inputs.

A tracer follows the operations of one run. Where Python reads a tensor's value (`if x.sum() > 0`, `int(x.max())`),
the graph keeps what the sample led to, and is wrong for other inputs without any error.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from types import FrameType
from typing import Any, Final

import torch
from torch.overrides import TorchFunctionMode

Place = tuple[str, int]

_READS: Final = {
    getattr(torch.Tensor, name)
    for name in ("__bool__", "__int__", "__float__", "__index__", "__contains__", "item", "tolist", "numpy")
}


class ValueReads(TorchFunctionMode):
    """Records every read of a tensor's value by Python: where (file, line) and what."""

    def __init__(self) -> None:
        super().__init__()
        self.reads: list[tuple[tuple[Place, ...], str]] = []

    def __torch_function__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run the operation, noting its result where it leaves the world of tensors."""
        result = func(*args, **(kwargs or {}))
        if func in _READS:
            self.reads.append((_places(sys._getframe(1)), repr(result)))  # noqa: SLF001 - the caller's lines are the point
        return result


def decisions_by_value(run: Callable[[int], object], probes: int, suspects: Iterable[Place]) -> list[Place]:
    """Return the places (file, line) where a module reads input values that differ between probe inputs.

    `run(i)` runs the module on probe i; all probes have one shape. `suspects` are the places of which the tracer warned:
    a module may read values only when it is not traced, and those do no harm.
    """
    recorded: list[list[tuple[tuple[Place, ...], str]]] = []
    for probe in range(probes):
        with ValueReads() as mode:
            run(probe)
        recorded.append(mode.reads)
    wanted = set(suspects)
    found: dict[Place, None] = {}
    for reads in zip(*recorded, strict=False):  # after the first difference, runs may go different ways
        if len({places for places, _value in reads}) > 1:
            break
        if len({value for _places, value in reads}) > 1:
            found.update(dict.fromkeys(place for place in reads[0][0] if place in wanted))
    return list(found)


def _places(frame: FrameType | None) -> tuple[Place, ...]:
    places: list[Place] = []
    while frame is not None and len(places) < 50:
        places.append((frame.f_code.co_filename, frame.f_lineno))
        frame = frame.f_back
    return tuple(places)
