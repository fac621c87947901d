"""A small convolutional network for handwritten digits of any height and width."""

from __future__ import annotations

from layers import ConvBlock
from torch import Tensor, nn

CLASSES = 10


class DigitsNet(nn.Module):
    """Three convolutions, global average pooling and a linear layer: about 29 thousand parameters at width 32."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.features = nn.Sequential(
            ConvBlock(1, width),
            ConvBlock(width, width),
            ConvBlock(width, 2 * width, stride=2),
        )
        self.dropout = nn.Dropout(dropout)
        self.classify = nn.Linear(2 * width, CLASSES)

    def forward(self, image: Tensor) -> Tensor:
        """[N, 1, H, W] float32 in 0..1 -> class scores [N, 10] float32."""
        return self.classify(self.dropout(self.features(image).mean(dim=(2, 3))))


def build(width: int = 32, dropout: float = 0.2) -> nn.Module:
    """Return the network; recipes/digits.yaml names this function."""
    return DigitsNet(width, dropout)
