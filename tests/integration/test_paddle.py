"""The shipped PaddlePaddle recipes build for TensorRT-RTX and ONNX Runtime, at a reduced size."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import yaml

from tests.integration.building import RECIPES, build

pytest.importorskip("paddle2onnx", reason="paddle2onnx is not installed")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


def reduced(folder: Path, name: str, **arguments: object) -> Path:
    """Copy a shipped recipe with other arguments and, where it has an image size, a smaller one."""
    shutil.copytree(RECIPES / "paddle", folder / "paddle", ignore=shutil.ignore_patterns("__pycache__"))
    document = yaml.safe_load((RECIPES / name).read_text())
    document["source"]["arguments"] = arguments
    document["inputs"]["image"]["shape"] = [
        64 if size == 224 else size for size in document["inputs"]["image"]["shape"]
    ]
    document["profiles"]["default"] |= {"batch": [1, 2, 3]}
    path = folder / name
    path.write_text(yaml.safe_dump(document, sort_keys=False))
    return path


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("paddle-mobilenetv3.yaml", {"classes": 10, "scale": 0.5}),
        ("paddle-text.yaml", {"characters": 10, "width": 32, "blocks": 1, "heads": 2}),
        ("paddle-text.yaml", {"characters": 10, "width": 32, "blocks": 1, "recurrent": True}),
    ],
)
def test_a_paddle_recipe_builds_for_both_runtimes(tmp_path: Path, name: str, arguments: dict[str, object]):
    ran, planned, _session = build(reduced(tmp_path, name, **arguments), tmp_path / "store")
    assert {"export", "reference:parity", "verify:export", "publish:onnxruntime:cpu:fp32"} <= ran
    assert planned.status == 0
    assert [engine.state for engine in planned.engines] == ["cached", "cached"]
    (export,) = (step for step in planned.steps if step.id == "export")
    assert export.facts["opset"] == 17
    shape = export.facts["inputs"]["image"]["shape"]
    assert shape[0] == "batch"
    assert shape[3] == ("width" if name == "paddle-text.yaml" else 64)
