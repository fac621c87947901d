"""What the detector itself finds on seeded images: weights are random, so that its own detections are the truth to keep."""

from __future__ import annotations

import model
import numpy as np
import torch


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
