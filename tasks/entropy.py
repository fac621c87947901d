"""ONNX Runtime's histogram collector with its search for the range of least entropy in array operations.

The original sums bins in Python loops: 0.75 s for one tensor. The result here is the same, bit for bit.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from onnxruntime.quantization.calibrate import HistogramCollector, entropy
from onnxruntime.quantization.quant_utils import smooth_distribution


class FastCollector(HistogramCollector):  # type: ignore[misc]  # onnxruntime ships no types
    """A HistogramCollector; only how fast it finds the entropy threshold differs."""

    def get_entropy_threshold(self, histogram: Any, num_quantized_bins: int) -> tuple[Any, Any]:
        """Return the (low, high) whose histogram, quantised to so many levels, diverges least from the original.

        `histogram` is (counts, edges, least, greatest, bound). Kullback-Leibler divergence, as in NVIDIA's "8-bit
        Inference with TensorRT" (GTC 2017, S7310).
        """
        counts, edges, least, greatest = histogram[:4]
        middle, levels = counts.size // 2, num_quantized_bins
        before = np.concatenate([[0], np.cumsum(counts)])
        widths = range(levels // 2, middle + 1)
        divergences = np.empty(len(widths))
        bounds = []
        for position, width in enumerate(widths):
            start, stop = middle - width, min(middle + width + 1, counts.size)
            bounds.append((edges[start], edges[stop]))
            inside = counts[start:stop]
            clipped = inside.copy()
            clipped[0] += before[start]
            clipped[-1] += before[-1] - before[stop]
            merged = inside.size // levels
            first = np.arange(levels) * merged
            totals = np.add.reduceat(inside[: levels * merged], first)
            totals[-1] += inside[levels * merged :].sum()
            occupied = np.add.reduceat((clipped[: levels * merged] != 0).astype(np.int64), first)
            spread = np.zeros(inside.size, np.int64)  # whole counts, as the original keeps them
            shares = np.divide(totals, occupied, out=np.zeros(levels), where=occupied != 0).astype(np.int64)
            spread[: levels * merged] = np.repeat(shares, merged)
            reference, candidate = smooth_distribution(clipped), smooth_distribution(spread)
            diverges = np.inf if reference is None or candidate is None else entropy(reference, candidate)
            divergences[position] = np.array(diverges, dtype=edges.dtype)
        low, high = bounds[int(np.argmin(divergences))]
        return max(low, least), min(high, greatest)
