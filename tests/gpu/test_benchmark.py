"""Engines timed on a GPU: both ways, by both clocks, with the state of the device and the time of each layer."""

import json
import shutil
import sys

import numpy as np
import pytest
import yaml

from artifacts.catalog import EngineCatalog
from artifacts.folder import FolderStore
from tests.gpu.compiling import PROFILES, Compiler
from tests.integration.building import RECIPES, build
from tests.unit.tasks.bundles import tensor
from tests.unit.tasks.small_graphs import cnn, images

pytestmark = pytest.mark.gpu

CASES = [
    {"name": "online/1", "profile": "online", "batch": 1, "shapes": {"x": [1, 1, 8, 8]}},
    {"name": "bulk/64", "profile": "bulk", "batch": 64, "shapes": {"x": [64, 1, 8, 8]}},
]


@pytest.fixture(scope="module")
def plan(device, tmp_path_factory):
    compiled = Compiler(device["compute_capability"], tmp_path_factory.mktemp("plan"))
    _result, output = compiled(cnn(), profiles=PROFILES)
    return output / "model.plan"


@pytest.fixture
def runner(plan):
    from tasks.engines.trt_run import PlanRunner

    made = PlanRunner(plan, None)
    yield made
    made.close()


@pytest.fixture(scope="module")
def timed(device, plan, tmp_path_factory):
    """One run of the whole stage in its own processes, as a build does."""
    from tasks.process import Limits, run_stage

    params = {
        "executor": "tensorrt",
        "gpu": device["compute_capability"],
        "version_compatible": False,
        "cases": CASES,
        "tensors": {"x": tensor(["batch", 1, "height", "width"])},
        "input_seed": 2,
        "seconds": 0.5,
        "compare": [],
    }
    output = tmp_path_factory.mktemp("timed") / "out"
    output.mkdir()
    result = run_stage(
        "benchmark", params, {"model.plan": plan}, output, limits=Limits(timeout_s=200, memory_bytes=64 << 30)
    )
    return result, output


def test_every_case_is_timed_with_and_without_a_graph_by_both_clocks(timed, device):
    facts = timed[0].facts
    assert [(case["name"], case["graph"]) for case in facts["cases"]] == [
        ("online/1", False), ("online/1", True), ("bulk/64", False), ("bulk/64", True),
    ]  # fmt: skip
    assert facts["device"] == device["name"]
    for case in facts["cases"]:
        assert case["device_ms"]["p50"] > 0
        assert 0 < case["latency_ms"]["p50"] <= case["latency_ms"]["p99"]
        assert 0 <= case["copy_share"] < 1
        assert case["throughput"] > 0


def test_the_state_of_the_device_is_read_around_it(timed):
    pytest.importorskip("pynvml", reason="nvidia-ml-py is not installed")
    for when in ("before", "after"):
        state = timed[0].facts["clocks"][when]
        assert state["sm_mhz"] > 0
        assert state["memory_mhz"] > 0
        assert state["power_state"].startswith("P")
        assert isinstance(state["slowed_by"], list)
    assert all(case["gpu_memory_bytes"] > 0 for case in timed[0].facts["cases"])


def test_each_layer_has_a_time_and_the_shares_are_whole(timed):
    profile = json.loads((timed[1] / "profile.json").read_text())
    assert [case["name"] for case in profile["cases"]] == ["online/1", "bulk/64"]
    for case in profile["cases"]:
        assert case["layers"]
        assert sum(layer["share"] for layer in case["layers"]) == pytest.approx(1.0, abs=0.01)


@pytest.mark.parametrize("graph", [False, True])
def test_what_is_timed_computes_what_a_call_computes(runner, graph):
    x = images(2, seed=3)
    expected = runner({"x": x})["y"]
    bound = runner.bind({"x": x}, graph=graph)
    for _ in range(5):
        bound.run()
    found = np.empty_like(expected)
    bound.output("y", found)
    np.testing.assert_array_equal(found, expected)
    assert bound.graphed is graph
    assert all(ms > 0 for ms in bound.device_ms(3))
    bound.close()
    np.testing.assert_array_equal(runner({"x": x})["y"], expected)
    other = images(4, seed=4)  # another shape on the same profile, after a graph was captured
    np.testing.assert_allclose(runner({"x": other})["y"][:1], runner({"x": other[:1]})["y"], rtol=1e-3, atol=1e-5)


@pytest.mark.timeout(900)
def test_auto_publishes_the_fastest_with_the_table_of_all(device, tmp_path):
    shutil.copytree(RECIPES / "digits", tmp_path / "digits", ignore=shutil.ignore_patterns("__pycache__"))
    document = yaml.safe_load((RECIPES / "digits-auto.yaml").read_text())
    document["targets"] = [{"runtime": "tensorrt", "gpus": [device["compute_capability"]]}]
    document["precision"] |= {"candidates": ["int8-fp16", "fp16", "fp32"], "optimization_levels": [0, 1]}
    document["benchmark"] = {"batches": [1], "compare": ["onnxruntime"], "seconds": 0.5}
    path = tmp_path / "digits-auto.yaml"
    path.write_text(yaml.safe_dump(document))
    _ran, planned, _session = build(path, tmp_path / "store")
    assert planned.status == 0
    (manifest,) = EngineCatalog(FolderStore(tmp_path / "store")).manifests()
    rows = manifest.precision.candidates
    sys.stdout.write(f"CANDIDATES {json.dumps([row.model_dump() for row in rows])}\n")
    assert [row.name for row in rows] == [
        f"{precision}-o{level}" for level in (0, 1) for precision in ("int8-fp16", "fp16", "fp32")
    ]
    passed = [row for row in rows if row.passed]
    assert passed
    assert all(row.p50_ms > 0 and row.graph is not None for row in passed)
    (chosen,) = [row for row in rows if row.chosen]
    assert chosen.p50_ms <= 1.02 * min(row.p50_ms for row in passed)
    assert manifest.precision.given == chosen.precision
    assert {"model.plan", "layers.json", "profile.json"} <= set(manifest.files)
    assert {case.graph for case in manifest.benchmark.cases} == {False, True}
    assert manifest.benchmark.compared[0].error is None
    assert build(path, tmp_path / "store")[0] == set()
