"""Pages of scikit-learn's handwritten digits, dark on light, one in each cell of 32 x 32 pixels."""

from __future__ import annotations

import numpy as np
from reading import DIGIT, END
from sklearn.datasets import load_digits

SEED = 20
HELD_OUT = 450
Pages = dict[str, np.ndarray]


def held_out(count: int = 64, rows: int = 2, columns: int = 3) -> Pages:
    """Return pages of digits that training never saw, and `label`: their tokens."""
    return pages(split()[0], count, (rows, columns), np.random.default_rng(1))


def training(count: int = 64, rows: int = 2, columns: int = 3) -> Pages:
    """Return pages of digits that training saw: what int8 ranges are found on."""
    return pages(split()[1], count, (rows, columns), np.random.default_rng(2))


def pages(digits: np.ndarray, count: int, size: tuple[int, int], draw: np.random.Generator) -> Pages:
    """Return `image` float32 [N, 3, R, 32, C, 32] in -1..1 of some digits, `label` int64 [N, R C + 1] with the end's token."""
    known, (rows, columns) = load_digits(), size
    chosen = digits[draw.integers(0, len(digits), (count, rows, columns))]
    ink = (known.images / 16.0)[chosen].repeat(4, 3).repeat(4, 4)  # [N, R, C, 32, 32]
    page = 0.9 - 1.7 * ink.transpose(0, 1, 3, 2, 4)[:, None]
    page = np.clip(page + draw.normal(0.0, 0.02, page.shape), -1.0, 1.0)
    text = known.target[chosen].reshape(count, -1) + DIGIT
    return {
        "image": np.broadcast_to(page, (count, 3, rows, 32, columns, 32)).astype(np.float32),
        "label": np.concatenate([text, np.full((count, 1), END)], axis=1).astype(np.int64),
    }


def split() -> tuple[np.ndarray, np.ndarray]:
    """Return which digits are held out, and which training sees."""
    order = np.random.default_rng(SEED).permutation(len(load_digits().target))
    return order[:HELD_OUT], order[HELD_OUT:]
