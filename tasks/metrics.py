"""Measures of how far one set of outputs is from another, and of how well outputs answer labels."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from tasks.detection import mean_average_precision
from tasks.errors import BackendError

Array = np.ndarray[Any, np.dtype[Any]]
Metric = Callable[[Mapping[str, Array], Array], float]
# Outputs are compared in pieces of this many elements, so that float64 copies stay small.
_PIECE: Final = 1 << 22


@dataclass(frozen=True)
class Distance:
    """How far y is from the reference x.

    relative_l2 = |y - x| / |x| (Euclidean, over all elements), max_abs = max |y - x|, cosine = <x, y> / (|x| |y|), all in
    float64. For integers and bool, which admit no nearness, relative_l2 is the share of elements that differ and cosine
    one minus it. `non_finite` counts positions where x or y is NaN or infinite; then the measures are infinite or NaN.
    """

    relative_l2: float
    max_abs: float
    cosine: float
    non_finite: int


def distance(reference: Array, found: Array) -> Distance:
    """Compare two arrays of one shape. Equal arrays (empty ones too) are at 0, 0, 1. Raises ValueError if shapes differ."""
    if reference.shape != found.shape:
        raise ValueError(f"shapes differ: {reference.shape} and {found.shape}")
    if not np.issubdtype(reference.dtype, np.floating):
        return _mismatch(reference, found)
    x, y = reference.reshape(-1), found.reshape(-1)
    peaks = _largest(x), _largest(y)
    if not all(map(math.isfinite, peaks)):  # each by itself: max() of a number and NaN is either
        bad = int((~(np.isfinite(x) & np.isfinite(y))).sum())
        return Distance(math.inf, math.inf, math.nan, bad)
    unit = max(peaks) or 1.0  # squares of very large or small numbers leave float64 otherwise
    difference = reference_norm = found_norm = product = greatest = 0.0
    for start in range(0, x.size, _PIECE):
        a = x[start : start + _PIECE].astype(np.float64)
        b = y[start : start + _PIECE].astype(np.float64)
        greatest = max(greatest, float(np.max(np.abs(b - a))))
        a, b = a / unit, b / unit
        difference += float(np.sum(np.square(b - a)))
        reference_norm += float(np.sum(np.square(a)))
        found_norm += float(np.sum(np.square(b)))
        product += float(np.sum(a * b))
    if difference == 0.0:
        return Distance(0.0, 0.0, 1.0, 0)
    relative = math.sqrt(difference) / math.sqrt(reference_norm) if reference_norm else math.inf
    norms = math.sqrt(reference_norm) * math.sqrt(found_norm)
    cosine = max(-1.0, min(1.0, product / norms)) if norms else 0.0
    return Distance(relative, greatest, cosine, 0)


def built_in(name: str) -> Metric:
    """Return the metric "top1", "exact-match" or "cer", which judge one output, or "map", which judges all."""
    known: dict[str, Metric] = {
        "top1": top1,
        "exact-match": exact_match,
        "cer": character_error_rate,
        "map": mean_average_precision,
    }
    return known[name]


def top1(outputs: Mapping[str, Array], labels: Array) -> float:
    """Share of positions whose largest score (over the last axis) is at the label. Raises BackendError("bad data")."""
    scores = _only(outputs)
    answers = scores.argmax(-1) if scores.ndim else scores
    return float(np.mean(answers == _labels(labels, answers.shape, "top1")))


def exact_match(outputs: Mapping[str, Array], labels: Array) -> float:
    """Share of samples whose every element equals the label's; scores (one more axis) count by their largest."""
    found = _only(outputs)
    if np.issubdtype(found.dtype, np.floating) and found.ndim > labels.ndim:
        found = found.argmax(-1)
    expected = _labels(labels, found.shape, "exact-match")
    return float(np.mean((found == expected).reshape(len(found), -1).all(axis=1)))


def character_error_rate(outputs: Mapping[str, Array], labels: Array) -> float:
    """Edits (Levenshtein) that turn what was read into the labels, over the number of the labels' characters.

    Labels are [samples, length] integers, negative ones filling up. Outputs are integers likewise, or scores [samples,
    steps, classes], read greedily as CTC does: the largest of each step, repeats merged, class 0 (blank) dropped. 0 is
    right, and more than 1 possible. Raises BackendError("bad data") for other shapes, and for labels without a character.
    """
    from rapidfuzz.distance import Levenshtein

    found = _only(outputs)
    scores = np.issubdtype(found.dtype, np.floating)
    if found.ndim != (3 if scores else 2) or labels.ndim != 2 or len(found) != len(labels):
        raise BackendError(
            "bad data",
            f"cer: labels have shape {list(labels.shape)}, the outputs {list(found.shape)} ({found.dtype})",
            "give [samples, length] labels, and outputs that are integers likewise or scores [samples, steps, classes]",
        )
    read = [_greedy(row) if scores else row[row >= 0].tolist() for row in found]
    expected = [row[row >= 0].tolist() for row in labels]
    characters = sum(map(len, expected))
    if not characters:
        raise BackendError("bad data", "cer: no label has a character", "negative labels fill up; use others")
    return sum(Levenshtein.distance(a, b) for a, b in zip(read, expected, strict=True)) / characters


def finite(value: float) -> float | None:
    """Return the number for JSON: None where it is NaN or infinite."""
    return value if math.isfinite(value) else None


def _mismatch(reference: Array, found: Array) -> Distance:
    if not reference.size:
        return Distance(0.0, 0.0, 1.0, 0)
    share = float(np.mean(reference != found))
    # float64 rounds differences above 2^53, which only matters to how large a large difference is said to be.
    greatest = float(np.max(np.abs(found.astype(np.float64) - reference.astype(np.float64))))
    return Distance(share, greatest, 1.0 - share, 0)


def _largest(values: Array) -> float:
    return float(np.max(np.abs(values))) if values.size else 0.0


def _greedy(scores: Array) -> list[int]:
    best = scores.argmax(-1)
    changed = np.concatenate([[True], best[1:] != best[:-1]]) if len(best) else np.zeros(0, bool)
    read: list[int] = best[changed & (best != 0)].tolist()
    return read


def _only(outputs: Mapping[str, Array]) -> Array:
    (values,) = outputs.values()
    return values


def _labels(labels: Array, shape: tuple[int, ...], metric: str) -> Array:
    if labels.shape == (*shape, 1):
        labels = labels[..., 0]
    if labels.shape != shape:
        raise BackendError(
            "bad data",
            f"{metric}: labels have shape {list(labels.shape)}, the answers {list(shape)}",
            "name the output with acceptance.metric.output, or write a callable metric",
        )
    return labels
