"""The shipped recipes build. (recipes/digits.yaml: test_readme; swin-tiny takes 90 s: bench/shipped.py.)"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

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
