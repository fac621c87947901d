"""From a PyTorch model to engines in one build on a GPU host: every stage, and PyTorch timed beside each engine."""

from __future__ import annotations

import json
import sys

import pytest

from artifacts.catalog import EngineCatalog
from artifacts.folder import FolderStore
from tests.integration.building import build, copy_digits

pytestmark = pytest.mark.gpu

COMPARED = ("torch", "torch-fp16", "torch-compile", "onnxruntime")


@pytest.mark.timeout(580)
def test_every_precision_is_gated_on_the_device_and_timed_beside_pytorch(device, tmp_path):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed beside TensorRT")
    pytest.importorskip("onnxsim", reason="onnxsim is not installed")
    if not torch.cuda.is_available():
        pytest.skip("PyTorch sees no GPU")

    def for_this_gpu(document):
        document["export"] = {"opset": 17, "exporter": "torchscript", "simplifier": "onnxsim"}
        document["precision"]["build"] = ["int8", "fp16", "tf32", "fp32"]
        document["precision"]["fallback"] = {}
        document["targets"] = [{"runtime": "tensorrt", "gpus": [device["compute_capability"]]}]
        document["benchmark"] = {"batches": [1, 64], "compare": list(COMPARED), "seconds": 0.5}
        document["build"] = {"optimization_level": 2, "timeout": "5m"}

    recipe = copy_digits(tmp_path, for_this_gpu)
    ran, planned, _session = build(recipe, tmp_path / "store")
    assert planned.status == 0
    assert {"export", "simplify"} <= {step.partition(":")[0] for step in ran}
    (simplified,) = [step for step in planned.steps if step.stage == "simplify"]
    assert set(simplified.record.facts["rewritten"]) == {"drop-moves", "plain-softmax"}
    catalog = EngineCatalog(FolderStore(tmp_path / "store"))
    manifests = {engine.precision.given: engine for engine in catalog.manifests()}
    assert set(manifests) == {"int8", "fp16", "tf32", "fp32"}
    for precision, engine in manifests.items():
        found = engine.verification.engine
        assert (found.executed, engine.verification.passed) == (True, True)
        assert {case.name.partition("/")[0] for case in found.cases} == {"online", "bulk"}
        assert found.metric.value >= engine.verification.gates.metric.floor
        timed = engine.benchmark
        assert {case.graph for case in timed.cases} == {False, True}
        assert {row.name: row.error for row in timed.compared} == dict.fromkeys(COMPARED)
        for row in timed.compared:
            assert row.ratios
            assert all(ratio > 0 for ratio in row.ratios.values())
            assert row.name == "onnxruntime" or row.device == timed.device
        said = {
            "precision": precision,
            "relative_l2": found.parity.relative_l2,
            "top1": found.metric.value,
            "p50_ms": {f"{case.name}{' graph' if case.graph else ''}": case.latency_ms.p50 for case in timed.cases},
            "ratios": {row.name: row.ratios for row in timed.compared},
        }
        sys.stdout.write(json.dumps(said) + "\n")
    assert build(recipe, tmp_path / "store")[0] == set()
