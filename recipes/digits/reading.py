"""Digits through the two parts of recipes/digits-parts.yaml, as a server runs them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

Call = Callable[..., Mapping[str, np.ndarray]]


def classify(parts: Mapping[str, Call], inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return `logits` float32 [N, 10] of images `image` float32 [N, 1, 8, 8]."""
    features = parts["features"](image=inputs["image"])["features"]
    return {"logits": parts["classify"](features=features)["logits"]}
