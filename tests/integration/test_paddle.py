"""The shipped PaddlePaddle recipes build for TensorRT-RTX and ONNX Runtime, at a reduced size."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
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
        pytest.param(
            "paddle-text.yaml",
            {"characters": 10, "width": 32, "blocks": 1, "recurrent": True},
            marks=pytest.mark.long,
        ),
    ],
)
def test_a_paddle_recipe_builds_for_both_runtimes(tmp_path: Path, name: str, arguments: dict[str, object]):
    ran, planned, _session = build(reduced(tmp_path, name, **arguments), tmp_path / "store")
    assert {"export", "reference:parity", "verify:export", "publish:onnxruntime:cpu:fp32"} <= ran
    assert planned.status == 0
    assert [(engine.given, engine.state) for engine in planned.engines] == [("fp16", "cached"), ("fp32", "cached")]
    (export,) = (step for step in planned.steps if step.id == "export")
    assert export.facts["opset"] == 17
    shape = export.facts["inputs"]["image"]["shape"]
    assert shape[0] == "batch"
    assert shape[3] == ("width" if name == "paddle-text.yaml" else 64)


SAVING = """
import paddle
from paddle import nn

net = nn.Sequential(nn.Conv2D(3, 4, 3, padding=1), nn.BatchNorm2D(4), nn.ReLU(), nn.AdaptiveAvgPool2D(1), nn.Flatten(), nn.Linear(4, 5))
paddle.seed(0)
net.eval()
paddle.jit.save(net, "net", input_spec=[paddle.static.InputSpec([None, 3, None, None], "float32", name="picture")])
"""


@pytest.mark.long
@pytest.mark.parametrize(("file", "pir"), [("net.json", "1"), ("net.pdmodel", "0")])
def test_a_saved_graph_of_either_form_goes_through_a_recipe_to_published_engines(tmp_path: Path, file: str, pir: str):
    (tmp_path / "saving.py").write_text(SAVING)
    flags = {**os.environ, "FLAGS_enable_pir_api": pir}
    subprocess.run([sys.executable, "saving.py"], cwd=tmp_path, env=flags, check=True, capture_output=True)
    recipe = {
        "enginery": 1,
        "name": "saved",
        "source": {"framework": "paddle", "graph": {"file": file}},
        "export": {"opset": 17, "simplifier": "onnxsim"},
        "inputs": {"image": {"shape": ["batch", 3, "height", "width"]}},
        "outputs": ["scores"],
        "profiles": {"default": {"batch": [1, 2, 3], "height": [8, 8, 16], "width": [8, 16, 16]}},
        "targets": [
            {"runtime": "tensorrt-rtx", "gpus": ["sm89"], "precision": ["fp16"]},
            {"runtime": "onnxruntime", "gpus": ["cpu"], "precision": ["fp32"]},
        ],
    }
    (tmp_path / "saved.yaml").write_text(yaml.safe_dump(recipe))
    _ran, planned, _session = build(tmp_path / "saved.yaml", tmp_path / "store")
    assert planned.status == 0
    assert [(engine.given, engine.state) for engine in planned.engines] == [("fp16", "cached"), ("fp32", "cached")]
    manifests = [json.loads(path.read_bytes()) for path in (tmp_path / "store").glob("engines/**/manifest.json")]
    assert len(manifests) == 2
    for manifest in manifests:
        assert list(manifest["inputs"]) == ["image"]  # `picture` in the file
        assert manifest["inputs"]["image"]["shape"] == ["batch", 3, "height", "width"]
        assert manifest["verification"]["graph"]["parity"]["relative_l2"] < 0.005
