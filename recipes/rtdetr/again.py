"""A gate for a detector that chooses places: a rounded engine has to find again what the detector itself finds.

Elementwise parity cannot tell. Of two places of nearly one score another may be the last that TopK takes, and then a whole query is
another one (bench/rtdetr_choice.py measures it).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

# A detection is found again by a box of the same class that overlaps it so much (IoU), and is so nearly as sure.
OVERLAP, UNSURE = 0.75, 0.05


def found_again(outputs: Mapping[str, np.ndarray], labels: np.ndarray) -> float:
    """Return the share of `labels` that `scores` [N, queries, classes] and `boxes` [N, queries, 4] hold too: 1 is all of them."""
    again = 0
    for scores, boxes, rows in zip(outputs["scores"], outputs["boxes"], labels, strict=True):
        for row in rows:
            as_sure = np.abs(scores[:, int(row[4])] - row[5]) <= UNSURE
            again += bool((as_sure & (_overlaps(boxes, row[:4]) >= OVERLAP)).any())
    return again / labels[..., 0].size


def _overlaps(boxes: np.ndarray, box: np.ndarray) -> np.ndarray:
    sides = np.minimum(boxes[:, 2:], box[2:]) - np.maximum(boxes[:, :2], box[:2])
    common = sides.clip(0).prod(axis=1)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1) + (box[2:] - box[:2]).prod()
    return common / (areas - common)
