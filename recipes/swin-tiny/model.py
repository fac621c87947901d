"""Swin-Tiny for images: the architecture at its real size, with seeded random weights (nothing is downloaded)."""

from __future__ import annotations

from collections.abc import Sequence

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


def build(
    labels: int = 1000, image: int = 224, width: int = 96, depths: Sequence[int] = (2, 2, 6, 2), window: int = 7
) -> nn.Module:
    """Return Swin-T (28 million parameters: depths 2-2-6-2, 96 channels, windows of 7); arXiv:2103.14030, section 3.3.

    Other arguments make a smaller one of its kind: heads have 32 channels each, as in all of the paper's.
    """
    config = SwinConfig(
        image_size=image,
        patch_size=4,
        embed_dim=width,
        depths=list(depths),
        num_heads=[width * 2**stage // 32 for stage in range(len(depths))],
        window_size=window,
        num_labels=labels,
    )
    return Classifier(config)
