"""The parts of a model run together, one after the other, by the recipe's own code: of its source, or of an engine."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Final

import numpy as np

from artifacts.refs import JSON
from tasks.code import load_callable
from tasks.errors import BackendError, ModelCodeError
from tasks.metrics import Array
from tasks.references import Run, write_reference
from tasks.stage import StageRequest, StageResult
from tasks.verify import REPORT, labelled, subject_of

Part = Callable[..., dict[str, Array]]

# Kinds of failures that what the parts give can be the cause of; others are this host's.
_OF_PARTS: Final = ("wrong result", "bad data", "crash")


class Together:
    """What runs all parts on one batch; `outputs` has the names of what it returns, once it ran."""

    emulated: str | None = None

    def __init__(self, request: StageRequest, load: Callable[[StageRequest], Run]) -> None:
        """Load the code, then each part by `load`, which gets the part's own files and parameters."""
        self._entry: str = request.params["run"]
        self._run = load_callable(request.inputs["run/code.tar"], self._entry)
        self.outputs: list[str] = []
        self._where = ""
        parts: Mapping[str, Mapping[str, Any]] = request.params["parts"]
        self._parts: dict[str, Part] = {}
        # Those of one model after each other, since a bundle of code that is loaded hides the one before.
        for name in sorted(parts, key=lambda name: str(parts[name].get("folder", name))):
            request.report(None, f"loading {name}")
            self._parts[name] = self._part(name, load(_request_of(request, name)))

    def __call__(self, arrays: Mapping[str, Array], where: str) -> dict[str, Array]:
        """Run the parts on a batch; `where` names it in errors. Raises ModelCodeError for the recipe's code."""
        self._where = where
        returned = self._run(dict(self._parts), dict(arrays))
        if not isinstance(returned, Mapping) or not returned:
            raise ModelCodeError(
                f"{self._entry} returned {type(returned).__name__}; expected arrays by output name, such as "
                '{"tokens": array}'
            )
        found = {str(name): np.asarray(value) for name, value in returned.items()}
        strange = [f"{name} ({value.dtype})" for name, value in found.items() if value.dtype.kind not in "biuf"]
        if strange:
            raise ModelCodeError(f"{self._entry} returned what is no array of numbers: {', '.join(strange)}")
        self.outputs = list(found)
        return found

    def _part(self, name: str, run: Run) -> Part:
        def call(**arrays: Array) -> dict[str, Array]:
            return run({key: np.ascontiguousarray(value) for key, value in arrays.items()}, f"{name}, {self._where}")

        return call


def reference(request: StageRequest, load: Callable[[StageRequest], Run]) -> StageResult:
    """Run the source's parts on the data set "dataset.safetensors", and write what they make of it together."""
    together = Together(request, load)
    as_dataset = replace(request, params={**request.params, "kind": "dataset"})
    return write_reference(as_dataset, together)


def verify(request: StageRequest) -> StageResult:
    """Run the graphs or engines of all parts on the data set, and measure the recipe's metric on what they make of it.

    Facts: executed, metric {"name", "value", "source", "samples"}, `same`: the share of samples whose every output equals
    the source's, `distances`: how far each output is from the source's, and non_finite. Where the recipe's code, which the
    source went through, fails on what these parts give, or makes something of another shape: executed (false) and reason.
    """
    together = Together(request, _loaded)
    try:
        metric, found = labelled(request, together)
    except (ModelCodeError, BackendError) as err:
        # A precision may be so bad that nothing is detected, or never an end: it does not pass, and another may.
        if isinstance(err, BackendError) and err.kind not in _OF_PARTS:
            raise
        return StageResult({}, {"executed": False, "reason": str(err)})
    distances = {
        name: {"relative_l2": _number(one.relative_l2), "max_abs": _number(one.max_abs)} for name, one in found.items()
    }
    facts = {
        "executed": True,
        "metric": metric,
        "same": metric.pop("same"),
        "distances": distances,
        "non_finite": sum(one.non_finite for one in found.values()),
    }
    text = json.dumps(facts, indent=1, sort_keys=True, allow_nan=False)
    (request.output_dir / REPORT).write_text(f"{text}\n", "utf-8")
    return StageResult({REPORT: JSON}, facts)


def _loaded(request: StageRequest) -> Run:
    subject = subject_of(request)
    if subject is None:
        raise BackendError(
            "no device", f"no executor {request.params['executor']!r} here", "build where the engine runs"
        )
    return subject


def _request_of(request: StageRequest, part: str) -> StageRequest:
    """Return a request as a stage of this part alone would get it."""
    params = dict(request.params["parts"][part])
    folder = f"{params.get('folder', part)}/"
    if part in request.params.get("measured", {}):  # how the part was saved
        params["measured"] = {"saved": request.params["measured"][part]}
    files = {name.removeprefix(folder): path for name, path in request.inputs.items() if name.startswith(folder)}
    return replace(request, params={"kind": "together", **params}, inputs=files)


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
