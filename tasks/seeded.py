"""Seeded inputs: the same arrays wherever a stage of one recipe needs inputs at a shape."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np

from tasks.errors import BackendError

Array = np.ndarray[Any, np.dtype[Any]]


# What exporters see is drawn with this one: parity is measured with 0, so that what is true of the sample alone shows there.
SAMPLE_SEED: Final = 3


def seeded_inputs(
    tensors: Mapping[str, Mapping[str, Any]], shapes: Mapping[str, Sequence[int]], seed: int, index: int
) -> dict[str, Array]:
    """Return one array for each input, drawn from `Generator(PCG64([seed, index]))`.

    `tensors` is `{input: {"dtype", "low", "high"}}`, `shapes` the extents of this case, `index` its position among the
    cases. Floats are uniform in [low, high] (default -1..1), integers and bool uniform over low..high inclusive
    (default 0..1). Inputs are drawn in the order of their names, since JSON objects may lose theirs on the way.
    Raises BackendError("bad data") where low exceeds high or does not fit the type.
    """
    generator = np.random.Generator(np.random.PCG64([seed, index]))
    return {name: _draw(generator, name, tensors[name], tuple(shapes[name])) for name in sorted(tensors)}


def _draw(generator: np.random.Generator, name: str, tensor: Mapping[str, Any], shape: tuple[int, ...]) -> Array:
    dtype = np.dtype(tensor["dtype"])
    floating = np.issubdtype(dtype, np.floating)
    low, high = tensor.get("low"), tensor.get("high")
    low = (-1.0 if floating else 0.0) if low is None else float(low)
    high = 1.0 if high is None else float(high)
    if low > high:
        raise _bad_range(name, f"low {low:g} is above high {high:g}")
    if floating:
        if high > float(np.finfo(dtype).max) or low < float(np.finfo(dtype).min):
            raise _bad_range(name, f"{low:g}..{high:g} does not fit {dtype}")
        return np.asarray(generator.uniform(low, high, shape)).astype(dtype)
    first, last = math.ceil(low), math.floor(high)
    bounds = (0, 1) if dtype == np.bool_ else (np.iinfo(dtype).min, np.iinfo(dtype).max)
    if first > last or first < bounds[0] or last > bounds[1]:
        raise _bad_range(name, f"{low:g}..{high:g} holds no {dtype} value, or values outside of that type")
    return np.asarray(generator.integers(first, last, shape, dtype=np.int64, endpoint=True)).astype(dtype)


def _bad_range(name: str, what: str) -> BackendError:
    return BackendError("bad data", f"input {name!r}: {what}", f"correct inputs.{name}.low and .high in the recipe")
