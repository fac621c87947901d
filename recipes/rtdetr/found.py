"""A gate for a detector that chooses places: a rounded engine has to find again what the detector itself finds.

Elementwise parity cannot tell. Of two places of nearly one score another may be the last that TopK takes, and then a whole query is
another one (bench/rtdetr_choice.py measures it). Weights are random, so the detector's own detections are the truth to keep.
"""

from __future__ import annotations

from collections.abc import Mapping

import model
import numpy as np
import torch

# A detection is found again by a box of the same class that overlaps it so much (IoU), and is so nearly as sure.
OVERLAP, UNSURE = 0.75, 0.05


def detections(maker: str, arguments: dict[str, int], size: int, count: int, best: int) -> dict[str, np.ndarray]:
    """Return `pixel_values` [count, 3, size, size] and `label` [count, best, 6]: x1, y1, x2, y2, class, score of the surest.

    The images are seeded, between -2 and 2 as the recipe's inputs; the weights are those of `source.seed: 0`.
    """
    torch.manual_seed(0)
    detector = getattr(model, maker)(**arguments)
    images = torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(1)) * 4 - 2
    labels = []
    with torch.no_grad():
        for image in images:
            scores, boxes = (found[0] for found in detector(image[None]))
            surest = scores.reshape(-1).topk(best)
            query, kind = surest.indices // scores.shape[1], surest.indices % scores.shape[1]
            labels.append(torch.cat([boxes[query], kind[:, None].to(boxes.dtype), surest.values[:, None]], dim=1))
    return {"pixel_values": images.numpy(), "label": torch.stack(labels).numpy()}


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
