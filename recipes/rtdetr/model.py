"""RT-DETR (arXiv:2304.08069) as transformers has it, with its ResNet kind of backbone; nothing is downloaded.

The decoder's queries are the `num_queries` places of the feature maps that score best (TopK). Rounding moves places of nearly one
score past each other, and a query is what its place is: outputs of a rounded engine would then be compared in another order. So
outputs are put back in the order of places, which is that of the image: rows of places first, from the finest map to the coarsest.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import RTDetrConfig, RTDetrForObjectDetection, RTDetrResNetConfig


class Detector(nn.Module):
    """Images to scores and boxes; transformers' own output classes stay inside."""

    def __init__(self, config: RTDetrConfig) -> None:
        super().__init__()
        self.detr = RTDetrForObjectDetection(config)

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """[N, C, H, W] float32 -> scores [N, queries, labels] in 0..1, boxes [N, queries, 4] as x1, y1, x2, y2 in pixels."""
        found = self.detr(pixel_values)
        height, width = pixel_values.shape[-2:]
        queries = found.logits.shape[1]
        places = found.enc_outputs_class.max(-1).values.topk(queries, dim=1).indices.to(torch.int32)
        order = places.topk(queries, dim=1, largest=False).indices.unsqueeze(-1)
        scores = found.logits.sigmoid().gather(1, order.expand(-1, -1, found.logits.shape[-1]))
        middle, size = found.pred_boxes.gather(1, order.expand(-1, -1, 4)).split(2, dim=-1)
        boxes = torch.cat([middle - size / 2, middle + size / 2], dim=-1)
        return scores, boxes * torch.tensor([width, height, width, height], dtype=boxes.dtype)


def build(labels: int = 80) -> nn.Module:
    """Return RT-DETR-R50 (43 million parameters), whose 300 queries are chosen among 8400 places of a 640 x 640 image."""
    return drawn(RTDetrConfig(num_labels=labels, num_denoising=0, freeze_backbone_batch_norms=False), image=160)


def small(labels: int = 10, queries: int = 20) -> nn.Module:
    """Return a small one (0.2 million), whose queries are chosen among 84 places of a 64 x 64 image."""
    backbone = RTDetrResNetConfig(
        embedding_size=16,
        hidden_sizes=[16, 24, 32, 48],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_indices=[2, 3, 4],
    )
    config = RTDetrConfig(
        backbone_config=backbone,
        freeze_backbone_batch_norms=False,
        encoder_in_channels=[24, 32, 48],
        decoder_in_channels=[32, 32, 32],
        encoder_hidden_dim=32,
        encoder_ffn_dim=64,
        encoder_attention_heads=4,
        hidden_expansion=0.5,
        d_model=32,
        decoder_layers=2,
        decoder_ffn_dim=64,
        decoder_attention_heads=4,
        num_queries=queries,
        num_denoising=0,
        num_labels=labels,
    )
    return drawn(config, image=64)


def drawn(config: RTDetrConfig, image: int) -> nn.Module:
    """Return a detector whose random weights let what they see through.

    As transformers draws them (deviation 0.01, fresh batch statistics) they do not: all but 3 of 8400 places score the same, and
    which 300 of those are highest is for each implementation of TopK to say. They are drawn by He's rule instead
    (arXiv:1502.01852), and batch normalisation gets the statistics of four seeded images.
    """
    detector = Detector(config)
    norms = [part for part in detector.modules() if isinstance(part, nn.BatchNorm2d)]
    for part in detector.modules():
        if isinstance(part, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(part.weight, nonlinearity="relu" if isinstance(part, nn.Conv2d) else "linear")
    for norm in norms:
        norm.momentum = 1.0  # the next batch's statistics take the place of those that there are
    coarse = torch.rand(4, 3, image // 16, image // 16) * 4 - 2
    with torch.no_grad():
        detector.train()(nn.functional.interpolate(coarse, size=(image, image), mode="bilinear"))
    for norm in norms:
        norm.momentum = 0.1
    return detector.eval()
