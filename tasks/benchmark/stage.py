"""The `benchmark` stage itself: one process for each candidate, one after another, and the ratios between them.

What is compared may be missing or fail, which its row then says; the engine may not.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from artifacts.refs import JSON
from artifacts.timings import best_ms
from tasks.errors import TaskError
from tasks.process import Limits, run_stage
from tasks.stage import StageRequest, StageResult

RESULT: Final = "benchmark.json"
# Another Python that has the source framework, where the one that has TensorRT cannot: TensorRT 8.6 has no wheels for
# Python 3.12, which newer PyTorch builds may be the only ones for.
SOURCE_PYTHON: Final = "ENGINERY_SOURCE_PYTHON"
# Beside the time that measuring takes: imports, loading, and compiling a module (torch.compile takes minutes).
_START_SECONDS: Final = 120.0
_COMPILE_SECONDS: Final = 900.0
_WAYS: Final = 2  # with and without a CUDA graph
_SLACK: Final = 2.0
_NO_LIMIT: Final = 1 << 62  # this process and what it starts are measured together by its parent


def run(request: StageRequest) -> StageResult:
    """Time the engine, then each of params["compare"], every one in a process of its own; write "benchmark.json".

    params: as `workers.engine`, and compare, source (where torch is compared). Facts: the engine's as `workers._Report.facts`
    has them, and compared: [{"name", "version", "device", "cases", "error", "ratios"}]; `ratios` maps cases to how many times
    the engine's p50 latency (the better of with and without a CUDA graph) goes into the candidate's.
    """
    params = request.params
    own = {name: path for name, path in request.inputs.items() if "/" not in name}
    result = _worker(request, "engine", own, "engine", _START_SECONDS, {})
    found = dict(result.facts)
    outputs = dict(result.outputs)
    for name in outputs:
        (_folder(request, "engine") / name).rename(request.output_dir / name)
    device = {"name": found["device"], "uuid": found.pop("uuid")}
    found["compared"] = [_compared(request, name, best_ms(found["cases"]), device) for name in params["compare"]]
    text = json.dumps(found, indent=1, sort_keys=True, allow_nan=False)
    (request.output_dir / RESULT).write_text(text + "\n", "utf-8")
    return StageResult({RESULT: JSON, **outputs}, found)


def _compared(
    request: StageRequest, name: str, engine_ms: Mapping[str, float], device: Mapping[str, Any]
) -> dict[str, Any]:
    folder, entry = ("graph", "onnxruntime") if name == "onnxruntime" else ("source", "torch")
    inputs = {key.partition("/")[2]: path for key, path in request.inputs.items() if key.startswith(f"{folder}/")}
    python = os.environ.get(SOURCE_PYTHON) if entry == "torch" else None
    start = _COMPILE_SECONDS if name == "torch-compile" else _START_SECONDS
    try:
        facts = dict(_worker(request, entry, inputs, name, start, {"device": dict(device)}, python=python).facts)
    except TaskError as err:
        return {"name": name, "error": str(err), "cases": [], "ratios": {}}
    del facts["uuid"]
    ratios = {case: round(ms / engine_ms[case], 3) for case, ms in best_ms(facts["cases"]).items()}
    return {"name": name, "error": None, **facts, "ratios": ratios}


def _worker(
    request: StageRequest,
    entry: str,
    inputs: Mapping[str, Path],
    name: str,
    start: float,
    more: Mapping[str, Any],
    *,
    python: str | None = None,
) -> StageResult:
    folder = _folder(request, name)
    folder.mkdir()
    cases = len(request.params["cases"])
    return run_stage(
        "benchmark",
        {**request.params, "candidate": name, **more},
        inputs,
        folder,
        limits=Limits(start + _SLACK * _WAYS * cases * (request.params["seconds"] + 5.0), _NO_LIMIT),
        on_progress=lambda fraction, text: request.report(fraction, f"{name}: {text}"),
        on_log=lambda line: print(line, flush=True),  # noqa: T201  a stage's output is its log
        entry=f"tasks.benchmark.workers:{entry}",
        python=python,
    )


def _folder(request: StageRequest, name: str) -> Path:
    return request.output_dir / f"{name}.run"
