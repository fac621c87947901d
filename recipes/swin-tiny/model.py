"""Swin-Tiny for images: the architecture at its real size, with seeded random weights (nothing is downloaded)."""

from __future__ import annotations

from torch import Tensor, nn
from transformers import SwinConfig, SwinForImageClassification


class Classifier(nn.Module):
    """Images to class scores; transformers' own output classes stay inside."""

    def __init__(self, config: SwinConfig) -> None:
        super().__init__()
        self.swin = SwinForImageClassification(config)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """[N, 3, 224, 224] float32 -> class scores [N, labels] float32."""
        return self.swin(pixel_values).logits


def build(labels: int = 1000) -> nn.Module:
    """Return Swin-T (28 million parameters: depths 2-2-6-2, 96 channels, windows of 7); arXiv:2103.14030, section 3.3."""
    config = SwinConfig(
        image_size=224,
        patch_size=4,
        embed_dim=96,
        depths=[2, 2, 6, 2],
        num_heads=[3, 6, 12, 24],
        window_size=7,
        num_labels=labels,
    )
    return Classifier(config)
