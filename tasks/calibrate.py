"""The `calibrate` stage: the range of every tensor that int8 may quantise, found on real samples.

Two passes over the data, each holding one batch of activations: the first finds least and greatest values, the second
(entropy, percentile) fills histograms of a fixed width, and ONNX Runtime's collector picks the range from them. Its own
calibrators would keep all activations at once (4.2 GB for ResNet-50 and 32 images), widen histograms from batch to batch
(so that ranges would depend on the batch size), and through `quantize_static` search for entropy in 128 bins, where it
always finds min and max.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx

from artifacts.refs import JSON
from tasks.calibration_report import Seen, measured, worst_first
from tasks.datasets import Array, batches, without_held_out
from tasks.errors import BackendError
from tasks.graphs import hoist_constants
from tasks.onnx_files import DATA, GRAPH, brief, save_graph
from tasks.onnx_weights import load_streamed
from tasks.quantize import activations, zero_range
from tasks.stage import StageRequest, StageResult
from tasks.weight_report import weights_to_be

RANGES: Final = "ranges.json"
REPORT: Final = "calibration.json"
# As in NVIDIA's entropy calibration (GTC 2017, S7310); ONNX Runtime counts the levels of both signs together.
_BINS: Final = 2048
_LEVELS: Final = 128
Ranges = dict[str, tuple[float, float]]
Pass = Callable[[], Iterator[tuple[int, dict[str, Array]]]]


def run(request: StageRequest) -> StageResult:
    """Run "model.onnx" on "dataset.safetensors" and write "ranges.json": {tensor: [low, high]}, sorted, float32 bounds.

    With params["held_out"], samples that `tasks.datasets.held_out` names are left out. The tensors are what Conv, ConvTranspose, MatMul and Gemm take (`quantize.activations`): typing puts pairs nowhere
    else. "calibration.json" beside it says what each range costs: {"method", "samples", "tensors": [...], "weights": [...]}, the
    worst first (`tasks.calibration_report`, `tasks.weight_report`). With params["runtime"] tensorrt, TensorRT calibrates on a GPU instead
    (`tasks.engines.trt_calibrate`). Facts: tensors, samples, method, constant (tensors that were zero on all data), worst
    (of the report: tensor, clipped, snr_db). Raises BackendError("bad data")
    for NaN, infinity, and inputs that the data set lacks; by its kind where ONNX Runtime fails.
    """
    params = request.params
    if params.get("runtime") == "tensorrt":
        from tasks.engines import trt_calibrate

        return trt_calibrate.run(request)
    from safetensors.numpy import load_file

    data = load_file(str(request.inputs["dataset.safetensors"]))
    if params.get("held_out"):
        data = without_held_out(data)
    once = partial(batches, data, params["tensors"], params["batch"])
    with tempfile.TemporaryDirectory() as folder:
        observed = _Observed(request.inputs, Path(folder))
        extremes, seen = _extremes(request, observed, once)
        ranges = dict(extremes)
        if params["method"] != "minmax":
            ranges |= _clipped(request, observed, once, ranges)
    rows = worst_first(
        {name: measured(seen[name], *ranges[name], *extremes[name]) for name in sorted(ranges)}, observed.readers
    )
    ordered = {name: list(ranges[name]) for name in sorted(ranges)}
    (request.output_dir / RANGES).write_text(json.dumps(ordered, indent=1, allow_nan=False) + "\n", "utf-8")
    constant = [name for name, (low, high) in ordered.items() if zero_range(low, high)]
    facts = {
        "tensors": len(ordered),
        "samples": len(data[next(iter(params["tensors"]))]),
        "method": params["method"],
        "constant": constant,
        "worst": {name: rows[0][name] for name in ("tensor", "clipped", "snr_db")} if rows else None,
    }
    document = {"method": params["method"], "samples": facts["samples"], "tensors": rows, "weights": observed.weights}
    (request.output_dir / REPORT).write_text(json.dumps(document, indent=1, allow_nan=False) + "\n", "utf-8")
    return StageResult({RANGES: JSON, REPORT: JSON}, facts)


class _Observed:
    """The graph, with the tensors to calibrate as its only outputs."""

    def __init__(self, inputs: Mapping[str, Path], folder: Path) -> None:
        import onnxruntime

        model = load_streamed(inputs[GRAPH])
        hoist_constants(model)
        self.names = activations(model)
        self.weights = weights_to_be(model)
        self.readers = {name: [node.name for node in model.graph.node if name in node.input] for name in self.names}
        known = {value.name for value in model.graph.input}
        # What is an input of the graph needs no run to be observed.
        self._direct = [name for name in self.names if name in known]
        self._computed = [name for name in self.names if name not in known]
        del model.graph.output[:]
        model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in self._computed)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.enable_cpu_mem_arena = False  # the arena would hold on to the largest batch
        if not self._computed:
            return
        save_graph(model, folder, external=DATA in inputs)
        try:
            self._session = onnxruntime.InferenceSession(
                str(folder / GRAPH), options, providers=["CPUExecutionProvider"]
            )
        except Exception as err:  # ONNX Runtime's exceptions share no base class
            raise BackendError("crash", f"ONNX Runtime cannot load the graph to calibrate: {brief(err)}") from err

    def __call__(self, feeds: Mapping[str, Array]) -> Iterator[tuple[str, Array]]:
        yield from ((name, feeds[name]) for name in self._direct)
        if not self._computed:
            return
        taken = {value.name for value in self._session.get_inputs()}
        try:
            values = self._session.run(self._computed, {name: array for name, array in feeds.items() if name in taken})
        except Exception as err:  # as above
            shapes = ", ".join(f"{name} {list(array.shape)}" for name, array in sorted(feeds.items()))
            raise BackendError(
                "crash", f"ONNX Runtime on calibration data ({shapes}): {brief(err)}", "compare with the inputs' shapes"
            ) from err
        yield from zip(self._computed, values, strict=True)


def _extremes(request: StageRequest, observed: _Observed, once: Pass) -> tuple[Ranges, dict[str, Seen]]:
    ranges: Ranges = {}
    seen: dict[str, Seen] = {}
    for index, (_samples, batch) in enumerate(once()):
        request.report(None, f"least and greatest values, batch {index + 1}")
        for name, values in observed(batch):
            low, high = (float(values.min()), float(values.max())) if values.size else (0.0, 0.0)
            if not (math.isfinite(low) and math.isfinite(high)):
                raise BackendError(
                    "bad data",
                    f"tensor {name!r} is NaN or infinite on calibration batch {index + 1}",
                    "the fp32 model itself fails on these samples; find out which, and why",
                )
            old_low, old_high = ranges.get(name, (low, high))
            ranges[name] = (min(old_low, low), max(old_high, high))
            seen.setdefault(name, Seen()).add(values)
    return ranges, seen


def _clipped(request: StageRequest, observed: _Observed, once: Pass, extremes: Ranges) -> Ranges:
    """Find the ranges that lose least (entropy), or that leave out the outliers (percentile)."""
    from tasks.entropy import FastCollector

    method = request.params["method"]
    symmetric = method == "percentile"
    collector = FastCollector(method, symmetric, _BINS, _LEVELS, request.params["percentile"], "same")
    for name, (low, high) in extremes.items():
        bound = np.float32(max(abs(low), abs(high)))
        if not zero_range(low, high):
            collector.histogram_dict[name] = _empty_histogram(low, high, bound, symmetric=symmetric)
    with contextlib.redirect_stdout(io.StringIO()):  # the collector prints a line for every tensor
        for index, (_samples, batch) in enumerate(once()):
            request.report(None, f"histograms, batch {index + 1}")
            for name, values in observed(batch):
                # Zeros are exact at any scale; counted, what a Relu cuts off would outweigh everything else.
                counted = values if symmetric else values[values != 0]
                if name in collector.histogram_dict and counted.size:
                    collector.collect({name: counted})
        request.report(None, f"{method} of {len(collector.histogram_dict)} histograms")
        if not collector.histogram_dict:
            return {}
        found = collector.compute_collection_result()
    return {name: (float(values[0]), float(values[1])) for name, values in found.items()}


def _empty_histogram(low: float, high: float, bound: np.float32, *, symmetric: bool) -> tuple[Any, ...]:
    """Return what the collector keeps for a tensor, with edges that no batch can exceed."""
    least, greatest = np.float32(low), np.float32(high)
    counts = np.zeros(_BINS, np.int64)
    if symmetric:  # a histogram of absolute values
        return counts, np.linspace(0, bound, _BINS + 1, dtype=np.float32), least, greatest
    return counts, np.linspace(-bound, bound, _BINS + 1, dtype=np.float32), least, greatest, bound
