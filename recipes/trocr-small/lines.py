"""Lines of one to four of scikit-learn's handwritten digits, dark on light, 32 x 32 pixels each, from the left."""

from __future__ import annotations

from functools import cache

import numpy as np
from reading import DIGIT, END, LONGEST
from sklearn.datasets import load_digits

SEED = 20
HELD_OUT = 450
Lines = dict[str, np.ndarray]


def held_out(count: int = 64) -> Lines:
    """Return lines of digits that training never saw, and `label`: their tokens."""
    return lines(split()[0], count, np.random.default_rng(1))


def training(count: int = 64) -> Lines:
    """Return lines of digits that training saw: what int8 ranges are found on."""
    return lines(split()[1], count, np.random.default_rng(2))


def lines(digits: np.ndarray, count: int, draw: np.random.Generator) -> Lines:
    """Return `pixel_values` float32 [N, 3, 32, 128] in -1..1 of some digits, `label` int64 [N, 5]: tokens, the end, then -1."""
    images, known = _digits()
    chosen = digits[draw.integers(0, len(digits), (count, LONGEST))]
    longer = np.arange(LONGEST) < draw.integers(1, LONGEST + 1, (count, 1))
    ink = np.where(longer[:, :, None, None], images[chosen], 0.0).repeat(4, 2).repeat(4, 3)
    line = 0.9 - 1.7 * ink.transpose(0, 2, 1, 3).reshape(count, 1, 32, 32 * LONGEST)
    line = np.clip(line + draw.normal(0.0, 0.02, line.shape), -1.0, 1.0)
    text = np.concatenate([np.where(longer, known[chosen] + DIGIT, -1), np.full((count, 1), -1)], axis=1)
    text[np.arange(count), longer.sum(axis=1)] = END
    return {
        "pixel_values": np.broadcast_to(line, (count, 3, 32, 32 * LONGEST)).astype(np.float32),
        "label": text.astype(np.int64),
    }


def split() -> tuple[np.ndarray, np.ndarray]:
    """Return which digits are held out, and which training sees."""
    order = np.random.default_rng(SEED).permutation(len(_digits()[1]))
    return order[:HELD_OUT], order[HELD_OUT:]


@cache
def _digits() -> tuple[np.ndarray, np.ndarray]:
    """Return images [1797, 8, 8] in 0..1, and which digit each is."""
    known = load_digits()
    return known.images / 16.0, known.target
