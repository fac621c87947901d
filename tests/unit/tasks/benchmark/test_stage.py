"""The stage with real candidates on the CPU: ONNX Runtime, PyTorch, and another interpreter for the source."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import save_file

from artifacts.catalog import EngineCatalog
from artifacts.folder import FolderStore
from artifacts.timings import best_ms
from tasks.benchmark.published import time_engine
from tasks.benchmark.stage import SOURCE_PYTHON
from tasks.errors import BackendError
from tasks.process import Limits, run_stage
from tests.engines import make_engine
from tests.unit.tasks.bundles import code_tar, fresh, tensor
from tests.unit.tasks.small_graphs import graph, node

LIMITS = Limits(timeout_s=120, memory_bytes=8 << 30)
TENSORS = {"x": tensor(["batch", 4])}
CODE = """
import torch

def build(width):
    return torch.nn.Linear(4, width)
"""
SOURCE = {"framework": "torch", "entry": "model:build", "arguments": {"width": 4}, "seed": 0, "tensors": TENSORS}


def cases(*batches):
    return [{"name": f"p/{size}", "profile": "p", "batch": size, "shapes": {"x": [size, 4]}} for size in batches]


@pytest.fixture
def files(tmp_path):
    weights = {"w": np.ones((4, 4), np.float32)}
    model = graph([node("MatMul", ["x", "w"], ["y"], "m")], weights)
    onnx.save(model, tmp_path / "model.onnx")
    save_file({"weight": torch.ones(4, 4), "bias": torch.zeros(4)}, tmp_path / "weights.safetensors")
    code_tar(tmp_path, {"model.py": CODE})
    return tmp_path


def benchmark(files: Path, *compare: str, batches=(1,), gpu="cpu"):
    params = {
        "executor": "onnxruntime",
        "gpu": gpu,
        "cases": cases(*batches),
        "tensors": TENSORS,
        "input_seed": 2,
        "seconds": 0.1,
        "compare": list(compare),
        "source": SOURCE,
    }
    inputs = {
        "model.onnx": files / "model.onnx",
        "graph/model.onnx": files / "model.onnx",
        "source/code.tar": files / "code.tar",
        "source/weights.safetensors": files / "weights.safetensors",
    }
    output = fresh(files)
    return run_stage("benchmark", params, inputs, output, limits=LIMITS), output


def test_the_engine_is_timed_beside_what_it_is_compared_with_and_the_ratios_are_of_those_times(files):
    result, output = benchmark(files, "onnxruntime", "torch", "torch-fp16", batches=(1, 16))
    facts = result.facts
    assert [(case["name"], case["batch"], case["graph"]) for case in facts["cases"]] == [
        ("p/1", 1, False),
        ("p/16", 16, False),
    ]
    for case in facts["cases"]:
        latency = case["latency_ms"]
        assert 0 < latency["p50"] <= latency["p90"] <= latency["p99"]
        assert case["throughput"] > 0
    assert facts["clocks"]["before"]["load_1min"] >= 0
    assert facts["rule"]["seconds"] == 0.1
    ort, eager, half = facts["compared"]
    assert (ort["name"], ort["provider"], ort["error"]) == ("onnxruntime", "CPUExecutionProvider", None)
    assert (eager["name"], eager["dtype"], eager["version"]) == ("torch", "float32", torch.__version__)
    for other in (ort, eager):
        expected = {name: ms / best_ms(facts["cases"])[name] for name, ms in best_ms(other["cases"]).items()}
        assert other["ratios"] == pytest.approx(expected, abs=1e-3)
        assert set(other["ratios"]) == {"p/1", "p/16"}
    assert "for GPUs" in half["error"]
    assert half["ratios"] == {}
    assert json.loads((output / "benchmark.json").read_text()) == facts
    assert set(result.outputs) == {"benchmark.json"}


def test_a_source_that_fails_costs_its_row_alone(files):
    code_tar(files, {"model.py": "def build(width):\n    raise RuntimeError('no such width')\n"})
    result, _output = benchmark(files, "torch")
    assert result.facts["cases"]
    assert "no such width" in result.facts["compared"][0]["error"]


def test_an_engine_that_fails_fails_the_stage(files):
    (files / "model.onnx").write_bytes(b"no graph")
    with pytest.raises(BackendError, match="does not load"):
        benchmark(files)


def test_the_source_may_have_an_interpreter_of_its_own(files, monkeypatch):
    """It gets our modules by PYTHONPATH, and none of the packages beside them: those are this interpreter's."""
    script = files / "python"
    script.write_text(f'#!/bin/sh\necho "$PYTHONPATH" > {files}/path\nls "$PYTHONPATH" > {files}/modules\n'
                      f'exec {sys.executable} "$@"\n')  # fmt: skip
    script.chmod(0o755)
    monkeypatch.setenv(SOURCE_PYTHON, str(script))
    result, _output = benchmark(files, "torch", "onnxruntime")
    assert [other["error"] for other in result.facts["compared"]] == [None, None]
    assert (files / "modules").read_text().split() == ["artifacts", "recipes", "tasks"]
    assert "site-packages" not in (files / "path").read_text()


def test_the_best_of_the_ways_counts():
    rows = [("a", 3.0), ("a", 2.0), ("b", 5.0)]
    assert best_ms([{"name": name, "latency_ms": {"p50": p50}} for name, p50 in rows]) == {"a": 2.0, "b": 5.0}


def test_a_published_engine_whose_recipe_cannot_be_read_says_so(tmp_path):
    store = FolderStore(tmp_path / "store")
    manifest = make_engine(store, tmp_path, recipe="old", target="onnxruntime-1-cpu", build="fp32-0000000000000000")
    recipe = manifest.provenance.model_copy(update={"recipe_text": "enginery: 1\nname: old\nfuture: true\n"})
    with pytest.raises(BackendError, match="none that this release reads"):
        time_engine(EngineCatalog(store), manifest.model_copy(update={"provenance": recipe}), batches=None, seconds=0.1)
