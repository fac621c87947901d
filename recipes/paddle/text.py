"""A text recogniser of the CRNN and SVTR kind: convolutions, mixing along the line, scores for CTC (nothing is downloaded).

Convolutions bring a line image of height 32 to one row, one column for each 4 pixels of width; a bidirectional LSTM
(CRNN, arXiv:1507.05717) or self-attention blocks (SVTR, arXiv:2205.00159) mix the columns; a linear layer scores them.
"""

from __future__ import annotations

import paddle
from paddle import nn


def _block(inputs: int, outputs: int, stride: tuple[int, int]) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2D(inputs, outputs, 3, stride=stride, padding=1, bias_attr=False), nn.BatchNorm2D(outputs), nn.ReLU()
    )


class Mixing(nn.Layer):
    """One global mixing block of SVTR: self-attention over the columns, then a perceptron, each with its residual."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.perceptron = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, columns: paddle.Tensor) -> paddle.Tensor:
        """[N, T, width] -> the same."""
        width = columns.shape[-1]
        qkv = self.qkv(self.before(columns)).reshape([0, -1, 3, self.heads, width // self.heads])
        query, key, value = qkv.transpose([2, 0, 3, 1, 4]).unbind(0)
        scores = nn.functional.softmax(query @ key.transpose([0, 1, 3, 2]) * (width // self.heads) ** -0.5)
        mixed = (scores @ value).transpose([0, 2, 1, 3]).reshape([0, -1, width])
        columns = columns + self.project(mixed)
        return columns + self.perceptron(self.between(columns))


class Recogniser(nn.Layer):
    """Line images to scores of characters by column; class 0 is the blank of CTC."""

    def __init__(self, characters: int, width: int, blocks: int, heads: int, *, recurrent: bool) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            _block(3, width // 4, (2, 2)),
            _block(width // 4, width // 2, (2, 2)),
            _block(width // 2, width, (2, 1)),
            _block(width, width, (2, 1)),
            _block(width, width, (2, 1)),
        )
        self.lstm = nn.LSTM(width, width // 2, num_layers=blocks, direction="bidirect") if recurrent else None
        self.blocks = nn.Sequential(*(Mixing(width, heads) for _ in range(0 if recurrent else blocks)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, characters + 1)

    def forward(self, image: paddle.Tensor) -> paddle.Tensor:
        """[N, 3, 32, W] float32 -> [N, W / 4, characters + 1] float32, before the softmax of CTC."""
        columns = self.stem(image).squeeze(2).transpose([0, 2, 1])
        columns = self.blocks(columns) if self.lstm is None else self.lstm(columns)[0]
        return self.head(self.norm(columns))


def build(
    characters: int = 96, width: int = 192, blocks: int = 4, heads: int = 6, *, recurrent: bool = False
) -> nn.Layer:
    """Return a recogniser in evaluation mode: SVTR's mixing, or CRNN's recurrence."""
    layer = Recogniser(characters, width, blocks, heads, recurrent=recurrent)
    layer.eval()
    return layer
