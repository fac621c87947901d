"""The `outliers` stage: which tensors leave the range of float16 on the reference's inputs, and on calibration data where there is any.

The fp32 graph runs with the largest absolute value of every float tensor as its only outputs, so that no activation is kept.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

import onnx
from onnx import TensorProto, helper

from artifacts.refs import JSON
from tasks.datasets import Array, batches
from tasks.errors import BackendError
from tasks.graphs import fresh_names, hoist_constants, tensor_types
from tasks.halves import saturate_constants
from tasks.onnx_files import DATA, GRAPH, brief, load_graph, save_graph
from tasks.stage import StageRequest, StageResult

OUTLIERS: Final = "outliers.json"
# From here on a number rounds to infinity in float16 (IEEE 754: half of the last step above 65504).
OVERFLOW: Final = 65520.0


def run(request: StageRequest) -> StageResult:
    """Run "model.onnx" on "reference.safetensors" (and "dataset.safetensors") and write "outliers.json": {tensor: peak}.

    A peak is the largest absolute value, null where that is not finite in float32 either. Facts: outliers (their names),
    tensors (how many were watched). Constants that stand for infinity count as `halves` writes them. With
    params["plugins"] a graph that ONNX Runtime cannot load has no known outliers, and facts say `reason`.
    """
    from safetensors.numpy import load_file

    try:
        peaks, watched = _Watched(request.inputs), dict[str, float]()
    except BackendError as err:
        if not request.params.get("plugins"):
            raise
        return _written(request, {}, {"tensors": 0, "reason": err.message})
    runs = list(_cases(load_file(str(request.inputs["reference.safetensors"]))))
    if "dataset.safetensors" in request.inputs:
        data = load_file(str(request.inputs["dataset.safetensors"]))
        runs += [inputs for _count, inputs in batches(data, request.params["tensors"], request.params["batch"])]
    for index, inputs in enumerate(runs):
        request.report(index / len(runs), f"largest values, run {index + 1} of {len(runs)}")
        for name, peak in peaks(inputs):
            watched[name] = max(peak, watched.get(name, 0.0)) if not math.isnan(peak) else math.inf
    found = {name: peak for name, peak in sorted(watched.items()) if peak >= OVERFLOW}
    return _written(request, found, {"tensors": len(peaks.names)})


def nodes_of(model: onnx.ModelProto, outliers: Mapping[str, float | None]) -> set[str]:
    """Return the names of the nodes that give or take a tensor that overflows: those have to compute in fp32."""
    return {
        node.name for node in model.graph.node if any(name in outliers for name in (*node.input, *node.output) if name)
    }


class _Watched:
    """The graph, with the peak of every float32 tensor as its only outputs."""

    def __init__(self, inputs: Mapping[str, Path]) -> None:
        import onnxruntime

        model = load_graph(inputs[GRAPH])
        hoist_constants(model)
        saturate_constants(model)
        types, fresh = tensor_types(model), fresh_names(model)
        made = [name for node in model.graph.node for name in node.output if types.get(name) == TensorProto.FLOAT]
        constant = {tensor.name for tensor in model.graph.initializer}
        self.names = [
            value.name
            for value in model.graph.input
            if value.name not in constant and types.get(value.name) == TensorProto.FLOAT
        ] + made
        zero, flat = fresh("peak_zero"), fresh("peak_flat")
        model.graph.initializer.append(helper.make_tensor(zero, TensorProto.FLOAT, [1], [0.0]))
        model.graph.initializer.append(helper.make_tensor(flat, TensorProto.INT64, [1], [-1]))
        self._outputs = []
        for name in self.names:
            absolute, row, filled, peak = (fresh(f"{name}_{part}") for part in ("absolute", "row", "filled", "peak"))
            model.graph.node.extend(
                [
                    helper.make_node("Abs", [name], [absolute], name=absolute),
                    helper.make_node("Reshape", [absolute, flat], [row], name=row),
                    # An empty tensor (a cache of no tokens yet) has no largest value.
                    helper.make_node("Concat", [row, zero], [filled], name=filled, axis=0),
                    helper.make_node("ReduceMax", [filled], [peak], name=peak, keepdims=0),
                ]
            )
            self._outputs.append(peak)
        del model.graph.output[:]
        model.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, []) for name in self._outputs)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        # A fusion may drop a tensor that it computes past, and so its peak.
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        with tempfile.TemporaryDirectory() as folder:
            save_graph(model, Path(folder), external=DATA in inputs)
            try:
                self._session = onnxruntime.InferenceSession(
                    str(Path(folder, GRAPH)), options, providers=["CPUExecutionProvider"]
                )
            except Exception as err:  # ONNX Runtime's exceptions share no base class
                raise BackendError("crash", f"ONNX Runtime cannot load the graph to watch: {brief(err)}") from err

    def __call__(self, feeds: Mapping[str, Array]) -> Iterator[tuple[str, float]]:
        taken = {value.name for value in self._session.get_inputs()}
        try:
            values = self._session.run(self._outputs, {name: feeds[name] for name in taken if name in feeds})
        except Exception as err:  # as above
            shapes = ", ".join(f"{name} {list(array.shape)}" for name, array in sorted(feeds.items()))
            raise BackendError("crash", f"ONNX Runtime at {shapes}: {brief(err)}") from err
        yield from ((name, float(value)) for name, value in zip(self.names, values, strict=True))


def _cases(reference: Mapping[str, Array]) -> Iterator[dict[str, Array]]:
    cases: dict[str, dict[str, Array]] = {}
    for key in sorted(reference):
        case, kind, name = key.replace("/in/", "\0in\0", 1).replace("/out/", "\0out\0", 1).split("\0", 2)
        if kind == "in":
            cases.setdefault(case, {})[name] = reference[key]
    yield from cases.values()


def _written(request: StageRequest, found: Mapping[str, float], facts: Mapping[str, object]) -> StageResult:
    peaks = {name: peak if math.isfinite(peak) else None for name, peak in found.items()}
    (request.output_dir / OUTLIERS).write_text(json.dumps(peaks, indent=1, allow_nan=False) + "\n", "utf-8")
    return StageResult({OUTLIERS: JSON}, {"outliers": list(peaks), **facts})
