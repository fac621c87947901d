"""What a source says: its outputs at seeded inputs (parity) or on a data set, as safetensors."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np

from artifacts.refs import SAFETENSORS
from tasks.datasets import MOST_HELD_OUT, batches, held_out
from tasks.errors import BackendError
from tasks.seeded import Array, seeded_inputs
from tasks.stage import StageRequest, StageResult

REFERENCE: Final = "reference.safetensors"
OUTPUTS: Final = "outputs.safetensors"
HELD_OUT: Final = "held-out.safetensors"

# "<case>/in/<input>": a case is "profile/corner", and names of tensors may hold slashes too.
CASE_KEY: Final = re.compile(r"(.+?)/(in|out)/(.+)", re.DOTALL)

# Runs the source: arrays by input name, and words that name the shapes for messages -> arrays by output name.
Run = Callable[[Mapping[str, Array], str], dict[str, Array]]


def write_reference(request: StageRequest, run: Run) -> StageResult:
    """Run a source as `params["kind"]` asks ("parity", "dataset" or "held-out") and write what it returned.

    parity: "<case>/in/<input>" and "<case>/out/<output>" for every case. dataset: every output over all samples, first
    axis samples, run in batches. held-out: as parity, a case for each batch of the calibration samples that calibration leaves
    out (`tasks.datasets.held_out`), or of all of them where it leaves none out. Raises BackendError("bad data") where the data set does not fit the inputs.
    """
    if request.params["kind"] == "dataset":
        return _dataset(request, run)
    return _held_out(request, run) if request.params["kind"] == "held-out" else _parity(request, run)


def save_arrays(arrays: Mapping[str, Array], path: Path) -> None:
    """Write arrays as safetensors; the same arrays give the same bytes."""
    from safetensors.numpy import save_file

    # safetensors writes the memory of an array as it lies; ascontiguousarray would give a scalar one axis.
    save_file({name: np.array(array, order="C") for name, array in arrays.items()}, str(path))


def described_outputs(path: Path, tensors: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Describe the outputs in a parity reference as a manifest does: {"dtype", "shape"}, from their extents in all cases.

    What is the same in all cases is a number; what is as large as one of the inputs' dynamic axes, in all of them, has its
    name, of one at the same position where there is one; anything else is OUTPUT.POSITION.
    """
    from safetensors import safe_open

    axes: dict[tuple[str, int], dict[str, int]] = {}
    outputs: dict[str, tuple[str, list[tuple[int, ...]]]] = {}
    with safe_open(str(path), framework="numpy") as reference:
        keys = [found for key in sorted(reference.keys()) if (found := CASE_KEY.fullmatch(key)) is not None]
        for found in keys:
            case, kind, name = found.groups()
            array = reference.get_tensor(found.string)
            if kind == "out":
                outputs.setdefault(name, (str(array.dtype), []))[1].append(array.shape)
                continue
            for at, axis in enumerate(tensors[name]["shape"]):
                if isinstance(axis, str):
                    axes.setdefault((axis, at), {})[case] = array.shape[at]  # inputs may share it
    described = {}
    for name, (dtype, shapes) in outputs.items():
        extents = enumerate(zip(*shapes, strict=True))
        described[name] = {"dtype": dtype, "shape": [_axis(name, at, sizes, axes) for at, sizes in extents]}
    return described


def _axis(name: str, at: int, sizes: tuple[int, ...], axes: Mapping[tuple[str, int], Mapping[str, int]]) -> int | str:
    if len(set(sizes)) == 1:
        return sizes[0]
    alike = sorted((position != at, axis) for (axis, position), found in axes.items() if tuple(found.values()) == sizes)
    return alike[0][1] if alike else f"{name}.{at}"


def _parity(request: StageRequest, run: Run) -> StageResult:
    params = request.params
    arrays: dict[str, Array] = {}
    outputs: dict[str, Array] = {}
    for index, case in enumerate(params["cases"]):
        request.report(index / len(params["cases"]), f"source at {case['name']}")
        inputs = seeded_inputs(params["tensors"], case["shapes"], params["input_seed"], index)
        shapes = ", ".join(f"{name} {list(array.shape)}" for name, array in sorted(inputs.items()))
        outputs = run(inputs, f"case {case['name']} ({shapes})")
        arrays |= {f"{case['name']}/in/{name}": array for name, array in inputs.items()}
        arrays |= {f"{case['name']}/out/{name}": array for name, array in outputs.items()}
    save_arrays(arrays, request.output_dir / REFERENCE)
    non_finite = sum(_non_finite(array) for name, array in arrays.items() if "/out/" in name)
    facts = {"outputs": _describe(outputs), "non_finite": non_finite, "cases": len(params["cases"])}
    return StageResult({REFERENCE: SAFETENSORS}, facts)


def _held_out(request: StageRequest, run: Run) -> StageResult:
    from safetensors.numpy import load_file

    params = request.params
    data = load_file(str(request.inputs["dataset.safetensors"]))
    rows = held_out(min((len(data[name]) for name in params["tensors"] if name in data), default=0))
    chosen = {name: array[rows] if rows.size else array[:MOST_HELD_OUT] for name, array in data.items()}
    arrays: dict[str, Array] = {}
    done = 0
    for samples, inputs in batches(chosen, params["tensors"], int(params["batch"])):
        request.report(None, f"source on held-out sample {done}")
        case = f"held-out/{done}"
        arrays |= {f"{case}/in/{name}": array for name, array in inputs.items()}
        arrays |= {f"{case}/out/{name}": array for name, array in run(inputs, f"held-out sample {done}").items()}
        done += samples
    save_arrays(arrays, request.output_dir / HELD_OUT)
    non_finite = sum(_non_finite(array) for name, array in arrays.items() if "/out/" in name)
    return StageResult(
        {HELD_OUT: SAFETENSORS}, {"non_finite": non_finite, "samples": done, "calibrated_on": not rows.size}
    )


def _dataset(request: StageRequest, run: Run) -> StageResult:
    from safetensors.numpy import load_file

    tensors: Mapping[str, Mapping[str, Any]] = request.params["tensors"]
    data = load_file(str(request.inputs["dataset.safetensors"]))
    parts: dict[str, list[Array]] = {}
    done, total = 0, min((len(data[name]) for name in tensors if name in data), default=0)
    for samples, inputs in batches(data, tensors, int(request.params["batch"])):
        request.report(done / total, f"source on sample {done} of {total}")
        rows = len(next(iter(inputs.values())))
        outputs = run(inputs, f"samples {done} to {done + samples - 1} of the data set")
        for name, array in outputs.items():
            first = parts.setdefault(name, [array[:0]])[0]
            if array.shape[:1] != (rows,) or array.shape[1:] != first.shape[1:]:
                raise BackendError(
                    "bad data",
                    f"output {name!r} has shape {list(array.shape)} for {rows} samples: it needs one row for each sample, "
                    "all of one shape",
                    "give the metric's data, and a model whose outputs have one row for each sample",
                )
            parts[name].append(array[:samples])
        done += samples
    arrays = {name: np.concatenate(rows) for name, rows in parts.items()}
    save_arrays(arrays, request.output_dir / OUTPUTS)
    non_finite = sum(_non_finite(array) for array in arrays.values())
    return StageResult(
        {OUTPUTS: SAFETENSORS}, {"outputs": _describe(arrays), "non_finite": non_finite, "samples": done}
    )


def _describe(arrays: Mapping[str, Array]) -> dict[str, dict[str, Any]]:
    return {name: {"dtype": str(array.dtype), "rank": array.ndim} for name, array in arrays.items()}


def _non_finite(array: Array) -> int:
    return int((~np.isfinite(array)).sum()) if np.issubdtype(array.dtype, np.floating) else 0
