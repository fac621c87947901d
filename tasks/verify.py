"""The `verify` stage: how far a graph is from its source, and what the recipe's own metric says of it.

Measures only; `recipes.gates` judges. Graphs run in ONNX Runtime on the CPU. Half-precision graphs run emulated
(`tasks.emulate`): the provider would compute them in float32 and hide their overflow; so does the graph of a TF32 engine,
which is the fp32 one, where `params["tf32"]` says so. Nothing is optimised: already
ONNX Runtime's basic level turns the biases of Q/DQ graphs into int32, which no pair of the graph says.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np

from artifacts.refs import JSON
from tasks.code import load_callable
from tasks.datasets import batches
from tasks.errors import BackendError, ModelCodeError
from tasks.metrics import Array, Distance, built_in, distance, finite
from tasks.onnx_files import DATA, GRAPH, brief, load_graph, save_graph
from tasks.references import CASE_KEY, HELD_OUT, described_outputs
from tasks.stage import StageRequest, StageResult

REPORT: Final = "report.json"
_FAR: Final = 0.01
_EMULATED: Final = "fp32 kernels, every result rounded to the half type"
_TF32: Final = "fp32 kernels, factors of Conv, MatMul and Gemm rounded to TF32"


def run(request: StageRequest) -> StageResult:
    """Compare "model.onnx" with "reference.safetensors"; measure the metric on "dataset.safetensors" if there is one.

    Writes "report.json": {"cases": [{"name", "outputs": {output: measures}}], "data", "metric"}. Facts: executed, parity
    (worst of all cases and outputs), cases, metric, `data` (as parity, of the outputs on the metric's data: real inputs
    overflow and clip where seeded ones do not, and the reverse; null without a metric, but where "held-out.safetensors" has
    calibration samples that calibration did not see: `data_of` says so then), and `emulated` where halves were.
    A measure that is NaN or infinite is null.
    With params["plugins"], a graph with operators that ONNX Runtime lacks is not executed: facts executed, reason, plugin.
    Raises BackendError: "wrong result" where outputs or shapes differ from the reference's, "bad data" for files that do
    not fit, and by its kind where ONNX Runtime fails.
    """
    params = request.params
    if params["subject"] == "together":
        from tasks.together import verify

        return verify(request)
    try:
        graph = subject_of(request)
    except BackendError as err:
        if err.kind != "unsupported operator" or not params.get("plugins"):
            raise
        reason = f"it needs plugins, which ONNX Runtime has not: {err.message}"
        return StageResult({}, {"executed": False, "reason": reason, "plugin": True})
    if graph is None:
        return StageResult({}, {"executed": False, "reason": f"no executor {params['executor']!r} here"})
    cases = _parity(request, graph, "reference.safetensors")
    metric, on_data = labelled(request, graph) if params["metric"] is not None else (None, {})
    if HELD_OUT in request.inputs:
        spared = _parity(request, graph, HELD_OUT)
        on_data = {f"{case}/{name}": found for case, outputs in spared.items() for name, found in outputs.items()}
    request.report(1.0, "verified")
    data = {**_measures(_worst(list(on_data.values()))), "worst": _farthest(on_data)} if on_data else None
    facts = {"executed": True, **_facts(cases), "data": data, "metric": metric, "emulated": graph.emulated}
    if HELD_OUT in request.inputs:
        facts["data_of"] = "held-out calibration data"
    if "saved" in params.get("measured", {}):  # whose outputs no exporter has described
        facts["outputs"] = described_outputs(request.inputs["reference.safetensors"], params["tensors"])
    told = _told(request, facts["parity"])
    if told:
        facts["told"] = told
    report = {
        "cases": [
            {"name": name, "outputs": {output: _measures(found) for output, found in outputs.items()}}
            for name, outputs in cases.items()
        ],
        "data": {output: _measures(found) for output, found in on_data.items()},
        "metric": metric,
        "emulated": graph.emulated,
    }
    text = json.dumps(report, indent=1, sort_keys=True, allow_nan=False)
    (request.output_dir / REPORT).write_text(text + "\n", "utf-8")
    return StageResult({REPORT: JSON}, facts)


def _told(request: StageRequest, parity: Mapping[str, Any]) -> list[str]:
    """Return what is wrong with the source itself, where a graph is so far from it that its types cannot be why."""
    from safetensors import safe_open

    from tasks.support.nodes import DRAWING, located

    if parity["relative_l2"] is not None and parity["relative_l2"] <= _FAR:
        return []
    told = []
    if parity["non_finite"]:
        with safe_open(str(request.inputs["reference.safetensors"]), framework="numpy") as reference:
            found = [case for key in sorted(reference.keys()) if (case := CASE_KEY.fullmatch(key)) and case[2] == "out"]
            bad = [f"{one[3]} at {one[1]}" for one in found if not np.isfinite(reference.get_tensor(one[0])).all()]
        told += [f"the source's own outputs have them too ({', '.join(bad)})"] if bad else []
    if GRAPH in request.inputs:
        nodes = [
            f"{node.op_type} {node.name!r}, {place}"
            for _index, node, place in located(load_graph(request.inputs[GRAPH], weights=False))
            if node.op_type in DRAWING
        ]
        told += [f"it draws random numbers ({'; '.join(nodes)}): let it take them as an input"] if nodes else []
    return told


class Subject(Protocol):
    """What is judged: it runs on arrays, and names its outputs in order."""

    outputs: list[str]
    emulated: str | None

    def __call__(self, arrays: Mapping[str, Array], where: str) -> dict[str, Array]:
        """Run once; `where` names the run in errors."""


def subject_of(request: StageRequest) -> Subject | None:
    """Load what is judged; None where nothing here runs it."""
    if request.params["executor"] in ("tensorrt", "tensorrt-rtx"):
        from tasks.engines.trt_run import runner_for

        return runner_for(request)
    if request.params["executor"] == "onnxruntime":
        tf32, subject = bool(request.params.get("tf32")), request.params["subject"]
        return Executable(request.inputs, engine=subject != "graph", tf32=tf32, optimised=subject == "fallback")
    if request.params["executor"] in ("torch", "paddle"):
        return Served(request)
    return None


class Served:
    """A source model that was saved, run by its framework on the CPU, from its files alone."""

    emulated: str | None = None

    def __init__(self, request: StageRequest) -> None:
        from tasks.engines.saved_run import Saved, open_saved

        saved, types = request.params["measured"]["saved"], request.params["tensors"]
        self.outputs: list[str] = list(saved["outputs"])
        self._types = {name: types[name]["dtype"] for name in saved["inputs"]}
        asked = Saved(
            request.inputs[saved["plan"]],
            saved["form"],
            self._types,
            dict.fromkeys(self.outputs, ""),
            profiles=(),
            cpu=True,  # no build holds a GPU for it
        )
        self._runner = open_saved(request.params["executor"], asked)

    def __call__(self, arrays: Mapping[str, Array], where: str) -> dict[str, Array]:
        """Run once; `where` names the run in errors."""
        feeds = {name: np.ascontiguousarray(arrays[name], dtype) for name, dtype in self._types.items()}
        return self._runner.run(feeds, 0, {}, where)


class Executable:
    """A graph ready to run in ONNX Runtime on the CPU; `emulated` says how, where halves or TF32 are emulated."""

    def __init__(
        self, inputs: Mapping[str, Path], *, engine: bool, tf32: bool = False, optimised: bool = False
    ) -> None:
        """Load "model.onnx". An engine runs as it is; a typed graph runs as its types say, in TF32 where asked.

        `optimised` lets ONNX Runtime do to it what it does where a graph is served.
        """
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        # An engine was optimised when it was compiled; a graph must neither lose Q/DQ pairs or casts nor gain any.
        if not optimised:
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        self.emulated: str | None = None
        with tempfile.TemporaryDirectory() as folder:
            path = inputs[GRAPH] if engine else self._honest(inputs, Path(folder), tf32=tf32)
            try:
                self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
            except Exception as err:  # ONNX Runtime's exceptions share no base class
                raise _failure(err, "loading the graph") from err
        self.inputs = {value.name: value.type for value in self._session.get_inputs()}
        self.outputs = [value.name for value in self._session.get_outputs()]

    def __call__(self, arrays: Mapping[str, Array], where: str) -> dict[str, Array]:
        """Run once; float inputs are cast to the type that the graph takes. `where` names the run in errors."""
        feeds = {name: _as_type(arrays[name], kind) for name, kind in self.inputs.items() if name in arrays}
        try:
            values = self._session.run(None, feeds)
        except Exception as err:  # as above
            raise _failure(err, where) from err
        return dict(zip(self.outputs, values, strict=True))

    def _honest(self, inputs: Mapping[str, Path], folder: Path, *, tf32: bool) -> Path:
        from tasks.emulate import as_tf32, emulated, is_half

        model = load_graph(inputs[GRAPH])
        if tf32:
            self.emulated, model = _TF32, as_tf32(model)
        elif is_half(model):
            self.emulated, model = _EMULATED, emulated(model)
        else:
            return inputs[GRAPH]
        save_graph(model, folder, external=DATA in inputs)
        return folder / GRAPH


def _parity(request: StageRequest, graph: Subject, file: str) -> dict[str, dict[str, Distance]]:
    from safetensors import safe_open

    cases: dict[str, dict[str, Distance]] = {}
    with safe_open(str(request.inputs[file]), framework="numpy") as reference:
        parts: dict[str, dict[str, dict[str, str]]] = {}
        for key in sorted(reference.keys()):
            found_key = CASE_KEY.fullmatch(key)
            if found_key is not None:
                case, kind, name = found_key.groups()
                parts.setdefault(case, {"in": {}, "out": {}})[kind][name] = key
        for index, (case, part) in enumerate(parts.items()):
            request.report(index / len(parts), f"running {case}")
            found = graph({name: reference.get_tensor(key) for name, key in part["in"].items()}, f"case {case}")
            _require_names(part["out"], found, case)
            cases[case] = {
                name: _distance(reference.get_tensor(key), found[name], f"{case}: {name}")
                for name, key in part["out"].items()
            }
    if not cases:
        raise BackendError("bad data", f"{file} holds no case", "build the reference again")
    return cases


def _require_names(expected: Mapping[str, str], found: Mapping[str, Array], case: str) -> None:
    if set(expected) != set(found):
        raise BackendError(
            "wrong result",
            f"{case}: the graph gives {', '.join(sorted(found))}, its source {', '.join(sorted(expected))}",
            "name every output, in order, under `outputs` in the recipe",
        )


def _distance(reference: Array, found: Array, where: str) -> Distance:
    if reference.shape != found.shape:
        raise BackendError(
            "wrong result",
            f"{where} has shape {list(found.shape)}, the source gave {list(reference.shape)}",
            "a dynamic axis was fixed or confused on the way; look at the shapes with the simplifier off",
        )
    if np.issubdtype(reference.dtype, np.floating) != np.issubdtype(found.dtype, np.floating):
        raise BackendError("wrong result", f"{where} is {found.dtype}, the source gave {reference.dtype}")
    return distance(reference, found)


def labelled(request: StageRequest, graph: Subject) -> tuple[dict[str, Any], dict[str, Distance]]:
    """Return the metric, and how far each output on the labelled data is from the source's."""
    from safetensors.numpy import load_file

    spec = request.params["metric"]
    data = load_file(str(request.inputs["dataset.safetensors"]))
    source = load_file(str(request.inputs["outputs.safetensors"]))
    if spec["label"] not in data:
        raise BackendError(
            "bad data", f"the data set has no labels {spec['label']!r} (it has: {', '.join(sorted(data))})"
        )
    labels = data[spec["label"]]
    found = _outputs(request, graph, data)
    judged = spec["output"] or graph.outputs[0]
    if judged not in found or judged not in source:
        raise BackendError(
            "bad data",
            f"the metric judges output {judged!r}, which is not among {', '.join(graph.outputs)}",
            "correct acceptance.metric.output in the recipe",
        )
    if spec["name"] == "callable":
        own = load_callable(request.inputs["code.tar"], spec["entry"])
        values = [_number(own(dict(outputs), labels), spec["entry"]) for outputs in (found, source)]
    else:
        measure = built_in(spec["name"])
        values = [
            measure(outputs if spec["name"] == "map" else {judged: outputs[judged]}, labels)
            for outputs in (found, source)
        ]
    metric = {
        "name": spec["name"],
        "value": finite(values[0]),
        "source": finite(values[1]),
        "samples": len(labels),
    }
    _require_names(dict.fromkeys(source, ""), found, "on the labelled data")
    distances = {name: _distance(source[name], found[name], f"labelled data: {name}") for name in sorted(source)}
    if request.params["subject"] == "together":
        same = [(source[name] == found[name]).reshape(len(labels), -1).all(axis=1) for name in source]
        metric["same"] = float(np.mean(np.logical_and.reduce(same)))
    return metric, distances


def _outputs(request: StageRequest, graph: Subject, data: Mapping[str, Array]) -> dict[str, Array]:
    params, parts = request.params, dict[str, list[Array]]()
    start = 0
    for samples, inputs in batches(data, params["tensors"], params["batch"]):
        request.report(None, f"metric on sample {start}")
        where = f"samples {start} to {start + samples - 1} of the data set"
        for name, values in graph(inputs, where).items():
            rows = len(next(iter(inputs.values())))
            if values.shape[:1] != (rows,):
                raise BackendError(
                    "wrong result",
                    f"{where}: output {name!r} has shape {list(values.shape)}, its first axis is not the samples",
                    "a metric needs outputs with one row for each sample",
                )
            parts.setdefault(name, []).append(values[:samples])
        start += samples
    try:
        return {name: np.concatenate(values) for name, values in parts.items()}
    except ValueError as err:
        raise BackendError("bad data", f"outputs differ in shape from batch to batch: {err}") from err


def _number(value: Any, entry: str) -> float:
    try:
        return float(value)
    except (TypeError, ValueError) as err:
        raise ModelCodeError(f"{entry}: expected a number, got {type(value).__name__}") from err


def _as_type(values: Array, kind: str) -> Array:
    if kind == "tensor(float16)" and values.dtype == np.float32:
        return values.astype(np.float16)
    return values.astype(np.float32) if kind == "tensor(float)" and values.dtype == np.float16 else values


def _measures(found: Distance) -> dict[str, float | int | None]:
    return {
        "relative_l2": finite(found.relative_l2),
        "max_abs": finite(found.max_abs),
        "cosine": finite(found.cosine),
        "non_finite": found.non_finite,
    }


def _worst(distances: list[Distance]) -> Distance:
    """Return the greatest distance, least cosine and all non-finite values; what is NaN stays NaN."""
    cosines = [found.cosine for found in distances]
    return Distance(
        max(found.relative_l2 for found in distances),
        max(found.max_abs for found in distances),
        math.nan if any(map(math.isnan, cosines)) else min(cosines),
        sum(found.non_finite for found in distances),
    )


def _facts(cases: Mapping[str, Mapping[str, Distance]]) -> dict[str, Any]:
    every = {f"{case}/{name}": found for case, outputs in cases.items() for name, found in outputs.items()}
    rows = []
    for case, outputs in cases.items():
        measures = _measures(_worst(list(outputs.values())))
        rows.append({"name": case, **{key: measures[key] for key in ("relative_l2", "max_abs", "cosine")}})
    return {"parity": {**_measures(_worst(list(every.values()))), "worst": _farthest(every)}, "cases": rows}


def _farthest(distances: Mapping[str, Distance]) -> str:
    return max(distances, key=lambda name: distances[name].relative_l2)


def _failure(error: Exception, where: str) -> BackendError:
    words = brief(error)
    if "NOT_IMPLEMENTED" in words or "not a registered" in words or "No Op registered" in words:
        return BackendError(
            "unsupported operator", f"{where}: ONNX Runtime: {words}", "build for a runtime that has this operator"
        )
    if "bad_alloc" in words or "Failed to allocate memory" in words:
        return BackendError(
            "out of memory", f"{where}: ONNX Runtime: {words}", "use smaller profiles, or raise build.memory"
        )
    return BackendError("crash", f"{where}: ONNX Runtime: {words}", "run the graph at this shape by hand to see why")
