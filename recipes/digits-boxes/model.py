"""A small detector without anchors, of the kind of CenterNet (arXiv:1904.07850): each cell of 4 x 4 pixels scores and places a box."""

from __future__ import annotations

import torch
from torch import Tensor, nn

CLASSES, CELL = 10, 4


def _block(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()
    )


class Detector(nn.Module):
    """Grey canvases to boxes and their scores, one box for each cell."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.features = nn.Sequential(
            _block(1, width // 2, 1),
            _block(width // 2, width, 2),
            _block(width, width, 2),
            _block(width, width, 2),
            _block(width, width, 1),
        )
        self.finer = _block(width, width, 1)
        self.joined = _block(width, width, 1)
        self.score = nn.Conv2d(width, CLASSES, 1)
        self.sides = nn.Conv2d(width, 4, 1)
        nn.init.constant_(self.score.bias, -4.0)  # nearly all cells hold the middle of nothing

    def maps(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits [N, 10, h, w] and the distances to a box's left, top, right and bottom [N, 4, h, w], in pixels."""
        near = self.features[:3](pixel_values)
        far = nn.functional.interpolate(self.features[3:](near), size=near.shape[-2:], mode="nearest")
        joined = self.joined(near + self.finer(far))
        return self.score(joined), nn.functional.softplus(self.sides(joined)) * CELL

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """[N, 1, H, W] float32 -> scores [N, cells, 10] in 0..1, boxes [N, cells, 4] as x1, y1, x2, y2 in pixels."""
        logits, sides = self.maps(pixel_values)
        rows = torch.arange(logits.shape[2], dtype=sides.dtype).reshape(1, 1, -1, 1) * CELL + CELL / 2
        columns = torch.arange(logits.shape[3], dtype=sides.dtype).reshape(1, 1, 1, -1) * CELL + CELL / 2
        left, top, right, bottom = sides.split(1, dim=1)
        boxes = torch.cat([columns - left, rows - top, columns + right, rows + bottom], dim=1)
        return logits.sigmoid().flatten(2).transpose(1, 2), boxes.flatten(2).transpose(1, 2)


def build(width: int = 32) -> nn.Module:
    """Return the detector; recipes/digits-boxes.yaml names this function."""
    return Detector(width)
