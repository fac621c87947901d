"""An export that is right for its sample alone is not shipped: the build names the node and the axis."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from tests.integration.building import build

pytestmark = pytest.mark.slow

MODEL = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)

    def forward(self, image):
        y = self.conv(image)
        if image.shape[2] > 9:
            y = torch.relu(y)
        return y.mean((2, 3))

def build():
    return Net()
"""
RECIPE = {
    "enginery": 1,
    "name": "lying",
    "source": {"framework": "torch", "model": "model.py:build"},
    "export": {"exporter": "torchscript", "simplifier": "none"},
    "inputs": {"image": {"shape": ["batch", 1, "height", 8]}},
    "outputs": ["logits"],
    "profiles": {"online": {"batch": [1, 2, 4], "height": [8, 8, 16]}},
    "targets": [{"runtime": "onnxruntime"}],
}


def test_a_branch_that_tracing_froze_is_named_with_its_axis_and_nothing_is_published(tmp_path: Path):
    (tmp_path / "model.py").write_text(MODEL)
    (tmp_path / "lying.yaml").write_text(yaml.safe_dump(RECIPE))
    ran, planned, _session = build(tmp_path / "lying.yaml", tmp_path / "store")
    assert "explain:export" in ran
    assert not [step for step in ran if step.startswith("publish")]
    (engine,) = planned.engines
    assert engine.state == "failed"
    first, *lines = engine.why.splitlines()
    assert first.startswith("the exported graph fails: relative_l2 ")
    assert lines[0] == "what the exporter took from its sample input:"
    assert lines[1].startswith(
        "  axis 'height' (height 16 instead of 8): ReduceMean '/ReduceMean': from here on the graphs differ"
    )
    assert len(lines) == 3
