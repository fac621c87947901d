"""The digits network in parts: what recipes/digits-parts.yaml exports besides the network's own `features`."""

from __future__ import annotations

from model import DigitsNet, build
from torch import Tensor, nn

__all__ = ["build", "classifier"]


class Classifier(nn.Module):
    """What DigitsNet does after its features, with the same parameters."""

    def __init__(self, net: DigitsNet) -> None:
        super().__init__()
        self.classify = net.classify

    def forward(self, features: Tensor) -> Tensor:
        """[N, 2 * width, H, W] float32 -> class scores [N, 10] float32."""
        return self.classify(features.mean(dim=(2, 3)))


def classifier(net: DigitsNet) -> nn.Module:
    """Return what turns the features of a network that `build` made into class scores."""
    return Classifier(net)
