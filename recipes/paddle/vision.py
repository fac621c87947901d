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
    layer = models.mobilenet_v3_small(pretrained=False, num_classes=classes, scale=scale)
    layer.eval()
    return layer
