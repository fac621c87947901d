"""The shipped recipes build, large ones at a reduced size (recipes/digits.yaml: test_readme), and at their own in long tests."""

from __future__ import annotations

import importlib
import shutil
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from artifacts.manifest import Manifest
from tasks.detection import mean_average_precision
from tests.integration.building import RECIPES, build

pytestmark = pytest.mark.slow


def test_the_recipe_from_an_onnx_file_builds(tmp_path: Path):
    ran, planned, _session = build(RECIPES / "digits-onnx.yaml", tmp_path / "store")
    assert {"export", "simplify", "compile:tensorrt-rtx:sm89:fp16", "publish:onnxruntime:cpu:fp32"} <= ran
    assert planned.status == 0
    assert [engine.state for engine in planned.engines] == ["cached", "cached"]
    (export,) = (step for step in planned.steps if step.id == "export")
    assert export.facts["opset"] == 18  # from 13
    assert export.facts["inputs"]["image"]["shape"][0] == "batch"  # from `n`


@pytest.mark.skipif(
    find_spec("tensorrt") is not None, reason="TensorRT is installed, so this host may not have to wait"
)
def test_the_recipe_for_gpus_does_all_that_needs_none_and_waits(tmp_path: Path):
    ran, planned, _session = build(RECIPES / "digits-gpu.yaml", tmp_path / "store")
    assert {"export", "simplify", "calibrate", "type:int8", "type:fp16", "verify:int8", "verify:fp16"} <= ran
    assert not [step for step in planned.steps if step.stage in ("compile", "publish")]
    assert {engine.state for engine in planned.engines} == {"waiting"}
    assert planned.status == 3
    again, _planned, _session = build(RECIPES / "digits-gpu.yaml", tmp_path / "store")
    assert again == set()


def resnet(document: dict[str, Any]) -> None:
    document["source"]["arguments"] = {"labels": 10, "width": 8, "depths": [1, 1, 1, 1]}
    document["inputs"]["pixel_values"]["shape"] = ["batch", 3, 64, 64]
    document["export"] |= {"exporter": "torchscript"}  # a third of the other exporter's time
    document["targets"] = [one | {"precision": ["fp16"]} for one in document["targets"]]  # one typed graph for both


def swin(document: dict[str, Any]) -> None:
    document["source"]["arguments"] = {"labels": 10, "image": 64, "width": 32, "depths": [1, 1], "window": 4}
    document["inputs"]["pixel_values"]["shape"] = ["batch", 3, 64, 64]
    document["precision"]["calibration"] |= {"arguments": {"count": 16, "size": 64}, "samples": 16}
    document["export"] |= {"exporter": "torchscript"}  # a third of the other exporter's time


def unchanged(_document: dict[str, Any]) -> None:
    """Stays as it is."""


def reduced(folder: Path, name: str, code: str, change: Callable[[dict[str, Any]], None]) -> Path:
    shutil.copytree(RECIPES / code, folder / code, ignore=shutil.ignore_patterns("__pycache__"))
    document = yaml.safe_load((RECIPES / name).read_text())
    change(document)
    (folder / name).write_text(yaml.safe_dump(document, sort_keys=False))
    return folder / name


@pytest.mark.parametrize(
    ("name", "code", "change", "given"),
    [
        pytest.param("resnet50.yaml", "resnet50", resnet, ["fp16", "fp16"], id="resnet"),
        pytest.param("rtdetr-small.yaml", "rtdetr", unchanged, ["fp16", "fp32"], id="rtdetr"),
        pytest.param("swin-tiny-int8.yaml", "swin-tiny", swin, ["int8-fp16", "int8"], id="swin"),
        pytest.param(
            "digits-boxes.yaml",
            "digits-boxes",
            unchanged,
            ["int8", "fp16", "int8", "fp32"],
            marks=pytest.mark.long,
            id="boxes",
        ),
        pytest.param(
            "resnet50.yaml", "resnet50", unchanged, ["fp16", "fp32"], marks=pytest.mark.long, id="whole resnet"
        ),
        pytest.param("rtdetr.yaml", "rtdetr", unchanged, ["fp16", "fp32"], marks=pytest.mark.long, id="whole rtdetr"),
        pytest.param(
            "swin-tiny-int8.yaml",
            "swin-tiny",
            unchanged,
            ["int8-fp16", "int8"],
            marks=pytest.mark.long,
            id="whole swin",
        ),
    ],
)
def test_a_large_recipe_builds(
    tmp_path: Path, name: str, code: str, change: Callable[[dict[str, Any]], None], given: list[str]
):
    pytest.importorskip("transformers")
    _ran, planned, _session = build(reduced(tmp_path, name, code, change), tmp_path / "store")
    assert planned.status == 0
    assert [engine.state for engine in planned.engines] == ["cached"] * len(given)
    assert [engine.given for engine in planned.engines] == given
    manifests = [
        Manifest.from_bytes(path.read_bytes()) for path in (tmp_path / "store").glob("engines/**/manifest.json")
    ]
    assert len(manifests) == len(given)
    for manifest in manifests:
        assert manifest.verification.passed
        if code in ("digits-boxes", "rtdetr"):
            assert manifest.verification.graph.metric is not None
            assert manifest.verification.graph.metric.name == "map"
            assert manifest.verification.graph.metric.value > 0.8
            assert manifest.verification.graph.metric.source > (0.99 if code == "rtdetr" else 0.8)


def test_the_gate_of_rtdetr_tells_its_own_detections_from_others(monkeypatch: pytest.MonkeyPatch):
    torch = pytest.importorskip("torch")
    monkeypatch.syspath_prepend(str(RECIPES / "rtdetr"))
    arguments = {"labels": 10, "queries": 20}
    for name in ("model", "found"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    found = importlib.import_module("found")
    own = found.detections(maker="small", arguments=arguments, size=64, count=8, best=10)
    torch.manual_seed(0)
    detector = sys.modules["model"].small(**arguments)
    with torch.no_grad():
        scores, boxes = (value.numpy() for value in detector(torch.from_numpy(own["pixel_values"])))
    for name in ("model", "found"):
        monkeypatch.delitem(sys.modules, name)

    def judged(scores: np.ndarray, boxes: np.ndarray) -> float:
        return mean_average_precision({"scores": scores, "boxes": boxes}, own["label"])

    assert (own["label"][..., 4] >= 0).sum() == 80
    assert judged(scores, boxes) > 0.999
    assert judged(scores, boxes * 1.02) < 0.4
    assert judged(np.roll(scores, 1, axis=0), np.roll(boxes, 1, axis=0)) < 0.01
    assert judged(scores.mean(axis=1, keepdims=True).repeat(20, axis=1), boxes) < 0.5
