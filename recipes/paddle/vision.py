"""Classifiers of paddle.vision, with seeded random weights (nothing is downloaded)."""

from __future__ import annotations

import paddle
from paddle.vision import models


def resnet50(classes: int = 1000) -> paddle.nn.Layer:
    """Return ResNet-50 (arXiv:1512.03385), in evaluation mode: [N, 3, H, W] float32 -> class scores [N, classes]."""
    layer = models.resnet50(pretrained=False, num_classes=classes)
    layer.eval()
    return layer


def resnet18(classes: int = 10) -> paddle.nn.Layer:
    """Return ResNet-18: the smaller one of the same family, for quick builds."""
    layer = models.resnet18(pretrained=False, num_classes=classes)
    layer.eval()
    return layer


def mobilenet_v3(classes: int = 1000, scale: float = 1.0) -> paddle.nn.Layer:
    """Return MobileNetV3-Small (arXiv:1905.02244), in evaluation mode: [N, 3, H, W] float32 -> scores [N, classes]."""
    return settled(models.mobilenet_v3_small(pretrained=False, num_classes=classes, scale=scale))


def settled(layer: paddle.nn.Layer) -> paddle.nn.Layer:
    """Give every batch normalisation the statistics of one seeded batch of noise, and return the layer in evaluation mode.

    Fresh ones say mean 0 and variance 1, which random weights do not give: MobileNetV3-Small then shrinks what passes through it
    to 5e-7, where halves (least 6e-8) have no digits left, as no trained network does.
    """
    layer.eval()
    norms = [part for part in layer.sublayers() if isinstance(part, paddle.nn.BatchNorm2D)]
    momenta = [part._momentum for part in norms]  # noqa: SLF001  the layer has no public name for it
    for part in norms:
        part._momentum = 0.0  # noqa: SLF001  statistics become the batch's
        part.train()
    with paddle.no_grad():
        layer(paddle.uniform([4, 3, 96, 96], min=-2.0, max=2.0))
    for part, momentum in zip(norms, momenta, strict=True):
        part._momentum = momentum  # noqa: SLF001
        part.eval()
    return layer
