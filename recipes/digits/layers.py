"""Building blocks of the digits network."""

from __future__ import annotations

from torch import Tensor, nn


class ConvBlock(nn.Module):
    """3x3 convolution, batch normalisation and ReLU; padding keeps height and width, `stride` divides them (rounded up)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """[N, in, H, W] float32 -> [N, out, ceil(H / stride), ceil(W / stride)] float32."""
        return self.norm(self.conv(x)).relu()
