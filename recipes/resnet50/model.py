"""ResNet-50 for images: the architecture of transformers with seeded random weights (nothing is downloaded)."""

from __future__ import annotations

from torch import Tensor, nn
from transformers import ResNetConfig, ResNetForImageClassification


class Classifier(nn.Module):
    """Images to class scores; transformers' own output classes stay inside."""

    def __init__(self, config: ResNetConfig) -> None:
        super().__init__()
        self.resnet = ResNetForImageClassification(config)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """[N, 3, H, W] float32 -> class scores [N, labels] float32."""
        return self.resnet(pixel_values).logits


def build(labels: int = 1000, width: int = 64, depths: tuple[int, ...] = (3, 4, 6, 3)) -> nn.Module:
    """Return ResNet-50 (arXiv:1512.03385, table 1), or a narrower and shallower one of its kind."""
    config = ResNetConfig(
        embedding_size=width,
        hidden_sizes=[width * 4 * 2**stage for stage in range(len(depths))],
        depths=list(depths),
        layer_type="bottleneck",
        num_labels=labels,
    )
    return Classifier(config)
