"""What a stage's code gets and returns; it runs in a child process and touches nothing but its folders.

A stage is a function `run(request: StageRequest) -> StageResult`, named by import string in `STAGES`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

# Which function runs a stage; the child imports only the module that it needs. `compile` and `fetch` dispatch on
# params["runtime"] and params["kind"].
STAGES: Final[Mapping[str, str]] = {
    "fetch": "tasks.fetch:run",
    "reference": "tasks.sources:run_reference",
    "export": "tasks.sources:run_export",
    "save": "tasks.sources:run_save",
    "explain": "tasks.sources.explaining:run",
    "simplify": "tasks.simplify:run",
    "calibrate": "tasks.calibrate:run",
    "outliers": "tasks.outliers:run",
    "sensitivity": "tasks.sensitivity:run",
    "check": "tasks.support.check:run",
    "type": "tasks.precision:run",
    "compile": "tasks.engines:run",
    "refit": "tasks.engines.trt_refit:run",
    "verify": "tasks.verify:run",
    "benchmark": "tasks.benchmark.stage:run",
}


@dataclass(frozen=True)
class StageRequest:
    """One stage to run.

    `inputs` maps file names ("model.onnx", "model.onnx.data", "weights.safetensors", ...) to local, checked,
    read-only files that lie side by side under those names; `params` is the action's params, as JSON values;
    `output_dir` is an empty folder for what the stage writes; `report` takes progress: a fraction in 0..1
    (or None where it is unknown) and a short text.
    """

    stage: str
    params: Mapping[str, Any]
    inputs: Mapping[str, Path]
    output_dir: Path
    report: Callable[[float | None, str], None] = lambda _fraction, _text: None


@dataclass(frozen=True)
class StageResult:
    """What a stage made: files in `output_dir` (name -> media type), and small JSON facts about them."""

    outputs: Mapping[str, str]
    facts: Mapping[str, Any] = field(default_factory=dict)
