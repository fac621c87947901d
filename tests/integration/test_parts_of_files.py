"""Parts that come from files and models of their own: a detector and a recogniser, judged together by the digits that they read."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import yaml

from artifacts.catalog import EngineCatalog
from artifacts.store import open_store
from enginery.client import load, pull
from tests.integration.building import RECIPES, build
from tests.unit.tasks.small_graphs import graph, node

ROWS, COLUMNS = 16, 24
READING = """
import numpy as np

def read(parts, inputs):
    page = inputs["page"]
    ink = parts["detector"](page=page)["ink"][:, 0]
    places = ink.reshape(len(page), -1).argmax(1)
    rows, columns = np.divmod(places, ink.shape[2])
    found = np.stack([one[:, y : y + 8, x : x + 8] for one, y, x in zip(page, rows, columns)])
    return {"logits": parts["recogniser"](image=found)["logits"]}
"""
PADDLE = """
import paddle
from paddle import nn

class Both(nn.Layer):
    def __init__(self):
        super().__init__()
        self.detector = nn.Conv2D(1, 1, 8, bias_attr=False, weight_attr=nn.initializer.Constant(1.0))
        self.body = nn.Sequential(nn.Conv2D(1, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2D(1), nn.Flatten(), nn.Linear(8, 10))

def build():
    both = Both()
    both.eval()
    return both

def recogniser(both):
    return both.body
"""


def written(folder: Path, sources: dict[str, dict[str, Any]], bounds: dict[str, float], **more: Any) -> Path:
    """Write a recipe of both parts with pages of one held-out digit each, and return its path."""
    held = np.load(RECIPES / "digits" / "heldout.npz")
    draw = np.random.default_rng(4)
    page = np.zeros((64, 1, ROWS, COLUMNS), np.float32)
    for one, digit in zip(page, held["image"], strict=False):
        top, left = draw.integers(0, ROWS - 7), draw.integers(0, COLUMNS - 7)
        one[:, top : top + 8, left : left + 8] = digit
    np.savez(folder / "pages.npz", page=page, label=held["label"][:64])
    (folder / "reading.py").write_text(READING)
    together = {
        "run": "reading.py:read",
        "inputs": {"page": {"shape": ["batch", 1, ROWS, COLUMNS]}},
        "name": "top1",
        "data": {"data": "pages.npz"},
    }
    recipe = {
        "enginery": 1,
        "name": "reader",
        "export": {"opset": 17, "simplifier": "none"},
        "profiles": {"default": {"batch": [1, 2, 32], "height": [16, 16, 32], "width": [16, 24, 32]}},
        "parts": {
            "detector": {
                "inputs": {"page": {"shape": ["batch", 1, "height", "width"], "low": 0.0}},
                "outputs": ["ink"],
                **sources["detector"],
            },
            "recogniser": {
                "inputs": {"image": {"shape": ["batch", 1, 8, 8], "low": 0.0}},
                "outputs": ["logits"],
                **sources["recogniser"],
            },
        },
        "acceptance": {"together": together | bounds},
        "precision": {"build": ["fp16"], "fallback": {"fp16": ["fp32"]}},
        "targets": [
            {"runtime": "tensorrt-rtx", "gpus": ["sm89"]},
            {"runtime": "onnxruntime", "gpus": ["cpu"], "precision": ["fp32"]},
        ],
        **more,
    }
    (folder / "reader.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    return folder / "reader.yaml"


def detector() -> onnx.ModelProto:
    """Return a graph whose output is how much ink there is in each square of eight pixels."""
    shapes = {
        "inputs": {"page": (1, ["batch", 1, "height", "width"])},
        "outputs": {"ink": (1, ["batch", 1, None, None])},
    }
    return graph([node("Conv", ["page", "w"], ["ink"])], {"w": np.ones((1, 1, 8, 8), np.float32)}, **shapes, opset=17)


def manifests(store: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_bytes()) for path in sorted(store.glob("engines/**/manifest.json"))]


@pytest.mark.slow
def test_a_detector_and_a_recogniser_of_two_files_are_built_and_read_together(tmp_path: Path):
    weights = {"save_as_external_data": True, "location": "its weights.bin", "size_threshold": 0}
    onnx.save(detector(), tmp_path / "detector.onnx", **weights)
    shutil.copy(RECIPES / "digits" / "digits.onnx", tmp_path / "digits.onnx")
    files = {"detector": "detector.onnx", "recogniser": "digits.onnx"}
    sources = {name: {"source": {"framework": "onnx", "model": {"file": file}}} for name, file in files.items()}
    bounds = {"floor": 0.9, "max_drop": 0.02}
    path = written(tmp_path, sources, bounds, export={"simplifier": "none"}, fallback="source")
    ran, planned, _session = build(path, tmp_path / "store")
    assert planned.status == 0
    assert {"fetch:detector:model", "fetch:recogniser:model", "reference:together", "verify:together:source"} <= ran
    found = manifests(tmp_path / "store")
    assert len(found) == 3
    for manifest in found:
        assert set(manifest["parts"]) == set(files)
        of_detector = {"detector/model.onnx", "detector/its weights.bin"}
        assert set(manifest["provenance"]["source"]) == {*of_detector, "recogniser/model.onnx"}
        assert manifest["verification"]["gates"]["metric"]["name"] == "top1"
        judged = manifest["verification"]["engine" if manifest.get("fallback") else "graph"]
        assert judged["metric"]["value"] > 0.9
        assert "reference:together" in {step["id"] for step in manifest["provenance"]["steps"]}
    (spare,) = (manifest for manifest in found if manifest.get("fallback"))
    assert {part: saved["form"] for part, saved in spare["fallback"]["saved"].items()} == dict.fromkeys(files, "ONNX")
    author = hashlib.sha256((tmp_path / "digits.onnx").read_bytes()).hexdigest()
    assert spare["files"]["recogniser/model.onnx"]["digest"] == author
    store = open_store(str(tmp_path / "store"))
    pages = np.load(tmp_path / "pages.npz")
    served = [one for one in EngineCatalog(store).engines() if one.target.startswith("onnxruntime")]
    assert len(served) == 2
    for number, name in enumerate(served):
        with load(pull(store, name, tmp_path / f"pulled{number}")) as engine:
            ink = engine["detector"](page=pages["page"][:2])["ink"]
        assert np.allclose(ink.max(axis=(1, 2, 3)), pages["page"][:2].sum(axis=(1, 2, 3)), rtol=1e-5)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")
def test_parts_of_a_saved_paddle_graph_of_paddle_layers_and_of_onnx_are_built_and_read_together(tmp_path: Path):
    pytest.importorskip("paddle2onnx", reason="paddle2onnx is not installed")
    (tmp_path / "layers.py").write_text(PADDLE)
    saving = (
        "import paddle, layers; from paddle.static import InputSpec\n"
        "paddle.jit.save(layers.build().detector, 'detector', input_spec=[InputSpec([None, 1, None, None], 'float32', 'page')])"
    )
    flags = {**os.environ, "FLAGS_enable_pir_api": "1"}
    subprocess.run([sys.executable, "-c", saving], cwd=tmp_path, env=flags, check=True, capture_output=True)
    layers = {"framework": "paddle", "model": "layers.py:build"}
    saved = {"source": {"framework": "paddle", "graph": {"file": "detector.json"}}}
    onnx.save(detector(), tmp_path / "detector.onnx")
    written_file = {"source": {"framework": "onnx", "model": {"file": "detector.onnx"}}}
    for number, of_detector in enumerate((saved, written_file, {})):
        sources = {"detector": of_detector, "recogniser": {"module": "recogniser"}}
        path = written(tmp_path, sources, {"max_drop": 0.05}, source=layers)
        _ran, planned, _session = build(path, tmp_path / f"store{number}")
        assert planned.status == 0, [engine.why for engine in planned.engines]
        for manifest in manifests(tmp_path / f"store{number}"):
            assert set(manifest["parts"]) == {"detector", "recogniser"}
            measured = manifest["verification"]["graph"]["metric"]
            assert abs(measured["value"] - measured["source"]) <= 0.05
