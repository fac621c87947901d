"""Photographs for calibration: crops of the two that scikit-learn brings along, prepared as ImageNet's classifiers take them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def crops(count: int = 64, size: int = 224, seed: int = 0) -> Iterator[dict[str, np.ndarray]]:
    """Yield `pixel_values` [3, size, size] float32: seeded crops of a quarter to all of a photograph's height, half of them mirrored."""
    draw = np.random.default_rng(seed)
    photographs = load_sample_images().images
    for index in range(count):
        photograph = photographs[index % len(photographs)]
        height, width = photograph.shape[:2]
        side = int(draw.integers(height // 4, height + 1))
        top, left = int(draw.integers(height - side + 1)), int(draw.integers(width - side + 1))
        crop = Image.fromarray(photograph[top : top + side, left : left + side]).resize((size, size))
        pixels = np.asarray(crop, np.float32) / 255
        pixels = pixels[:, ::-1] if draw.integers(2) else pixels
        yield {"pixel_values": np.ascontiguousarray(((pixels - MEAN) / STD).transpose(2, 0, 1), np.float32)}
