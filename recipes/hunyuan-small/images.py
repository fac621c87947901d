"""Images that int8 ranges are found on: dark strokes in rows on a light page, seeded."""

from __future__ import annotations

import numpy as np


def pages(count: int = 8) -> dict[str, np.ndarray]:
    """Return `image` float32 [count, 3, 8, 32, 8, 32] in -1..1, which is pages of 256 x 256."""
    chance = np.random.default_rng(3)
    found = np.full((count, 3, 256, 256), 0.9, np.float32)
    for page in found:
        for top in range(12, 240, 20):
            for left in range(8, 8 + int(chance.integers(80, 230)), 9):
                height, width = chance.integers(3, 13), chance.integers(2, 8)
                page[:, top : top + height, left : left + width] = chance.uniform(-1.0, -0.4)
    found += chance.normal(0.0, 0.02, found.shape).astype(np.float32)
    return {"image": np.clip(found, -1.0, 1.0).reshape(count, 3, 8, 32, 8, 32)}
