"""What calibrated ranges cost each tensor: the share of values that they clip, and how far above its error a signal is.

Counted in the pass over the data that finds least and greatest values. A histogram whose edges are those of float32 itself (sign,
exponent and five bits of the mantissa, so 1/32 of a value wide) needs no range beforehand, and is the same for any batch size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

from tasks.datasets import Array
from tasks.fp8 import LARGEST

_SHIFT: Final = 18  # of 23 bits of the mantissa
_BINS: Final = 1 << (32 - _SHIFT)
# Where values of one bin are taken to be: evenly spread, so many of them.
_POINTS: Final = 16
_PIECE: Final = 1 << 20


@dataclass
class Seen:
    """All values of one tensor: how many, of which bin of float32, and the sum of their squares."""

    counts: Array = field(default_factory=lambda: np.zeros(_BINS, np.int64))

    def add(self, values: Array) -> None:
        """Count float values."""
        flat = np.ascontiguousarray(values, np.float32).reshape(-1)
        for start in range(0, flat.size, _PIECE):
            bins = flat[start : start + _PIECE].view(np.uint32) >> np.uint32(_SHIFT)
            self.counts += np.bincount(bins, minlength=_BINS)


def measured(seen: Seen, low: float, high: float, least: float, greatest: float) -> dict[str, Any]:
    """Return what the symmetric range of `low` and `high` means for values between `least` and `greatest`.

    {"range", "observed", "clipped": share of values beyond the range's greater bound, "snr_db": 10 log10 of the sum of squares
    over that of int8's errors, "snr_fp8_db": of e4m3's, "snr_minmax_db": of int8's if nothing were clipped}; a ratio is null
    where there is no error or no signal. Known to about 3 % of a value, since bins are that wide.
    """
    occupied = np.flatnonzero(seen.counts)
    counts = seen.counts[occupied].astype(np.float64)
    edges = np.arange(_POINTS, dtype=np.float64) + 0.5
    first = (occupied.astype(np.uint32) << np.uint32(_SHIFT)).view(np.float32).astype(np.float64)
    last = (((occupied.astype(np.uint32) + np.uint32(1)) << np.uint32(_SHIFT)) - np.uint32(1)).view(np.float32)
    points = first[:, None] + (last.astype(np.float64) - first)[:, None] * edges / _POINTS
    points = points.clip(least, greatest)  # bins at both ends are wider than what was seen
    points[first == 0] = 0.0  # the bin of zeros, and of denormals
    bound, widest = max(abs(low), abs(high)), max(abs(least), abs(greatest))
    total = float(counts.sum())
    beyond = float((counts * (np.abs(points) > bound * (1 + 1e-6)).mean(axis=1)).sum())
    power = float((counts * np.square(points).mean(axis=1)).sum())

    def ratio(rounded: Array) -> float | None:
        noise = float((counts * np.square(rounded - points).mean(axis=1)).sum())
        return round(10 * math.log10(power / noise), 2) if power > 0 and noise > 0 else None

    return {
        "range": [low, high],
        "observed": [least, greatest],
        "clipped": beyond / total if total and widest > bound else 0.0,
        "snr_db": ratio(_int8(points, bound)),
        "snr_fp8_db": ratio(_e4m3(points, bound)),
        "snr_minmax_db": ratio(_int8(points, widest)),
    }


def worst_first(tensors: Mapping[str, Mapping[str, Any]], readers: Mapping[str, list[str]]) -> list[dict[str, Any]]:
    """Return the rows of the report: the least ratio first, by name where there is none; `readers` are nodes by tensor."""
    rows = [{"tensor": name, **found, "nodes": readers.get(name, [])} for name, found in tensors.items()]
    return sorted(rows, key=lambda row: (row["snr_db"] is None, row["snr_db"] or 0.0, row["tensor"]))


def _int8(values: Array, bound: float) -> Array:
    # As ONNX Runtime's quantiser writes symmetric pairs: 255 steps over both signs.
    scale = bound / 127.5
    rounded: Array = np.rint(values / scale).clip(-128, 127) * scale if scale > 0 else np.zeros_like(values)
    return rounded


def _e4m3(values: Array, bound: float) -> Array:
    scale = bound / LARGEST
    return to_e4m3(values / scale) * scale if scale > 0 else np.zeros_like(values)


def to_e4m3(values: Array) -> Array:
    """Round float64 values to e4m3, saturating: three bits of mantissa; exponents end at -6, below which steps stay 2^-9."""
    inside = values.clip(-LARGEST, LARGEST)
    steps = np.exp2(np.floor(np.log2(np.maximum(np.abs(inside), 2.0**-6))) - 3)
    rounded: Array = np.rint(inside / steps) * steps
    return rounded
