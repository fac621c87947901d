"""The `fetch` stage for data sets: samples read, chosen, checked against the inputs, and kept as safetensors.

Other kinds of fetch (code, files) only move bytes, and are the runner's own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Final

import numpy as np

from artifacts.refs import SAFETENSORS
from tasks.code import load_callable, recipe_code
from tasks.datasets import LEAST_SAMPLES, Array, choose, from_callable, read_array_folder, read_image_folder, read_npz
from tasks.errors import BackendError
from tasks.references import save_arrays
from tasks.stage import StageRequest, StageResult

DATASET: Final = "dataset.safetensors"
# Neighbours along the last axis of real signals (pictures, sound, features in order) correlate; noise does not.
_NOISE: Final = 0.02
_NOISE_ELEMENTS: Final = 10_000
_PIECE: Final = 1 << 24


def run(request: StageRequest) -> StageResult:
    """Read the data set that `params` describe and write "dataset.safetensors": arrays by input (and label) name.

    The first axis is samples. Facts: samples, arrays {name: dtype, shape, min, max, mean, std}, warnings. Raises
    BackendError("bad data") where the data does not fit the inputs, ModelCodeError where the recipe's callable fails.
    """
    params = request.params
    if params["kind"] != "dataset":
        raise BackendError("bad data", f"fetch of {params['kind']!r} is not a stage with code", "report this")
    request.report(None, "reading the data set")
    warnings: list[str] = []
    arrays = {
        name: _fitted(name, array, params, warnings) for name, array in _read(request, _rows(params, warnings)).items()
    }
    lengths = {name: len(array) for name, array in arrays.items()}
    if len(set(lengths.values())) != 1:
        listed = ", ".join(f"{name} {length}" for name, length in lengths.items())
        raise BackendError("bad data", f"the arrays have different numbers of samples: {listed}", "make them equal")
    facts = {name: _described(array) for name, array in arrays.items()}
    for name, array in arrays.items():
        if name != params["label"]:
            warnings += _suspicions(name, array, facts[name])
    save_arrays(arrays, request.output_dir / DATASET)
    samples = next(iter(lengths.values()))
    return StageResult({DATASET: SAFETENSORS}, {"samples": samples, "arrays": facts, "warnings": warnings})


def _rows(params: Mapping[str, Any], warnings: list[str]) -> Callable[[int], Array]:
    def rows(count: int) -> Array:
        chosen = choose(count, params["samples"], params["order"], params["seed"])
        if len(chosen) < LEAST_SAMPLES:
            warnings.append(f"only {len(chosen)} samples: too few to stand for the data")
        return chosen

    return rows


def _read(request: StageRequest, rows: Callable[[int], Array]) -> dict[str, Array]:
    params = request.params
    fields = {name: params["fields"].get(name, name) for name in params["names"]}
    ranks = {name: len(tensor["shape"]) for name, tensor in params["tensors"].items()}
    if params["format"] == "arrays":
        return read_array_folder(request.inputs["data"], fields, ranks, rows)
    if params["format"] == "images":
        return _images(request, rows)
    if params["format"] == "npz":
        arrays = read_npz(request.inputs["data.npz"], fields)
    else:
        build = load_callable(request.inputs["code.tar"], params["entry"])
        # An endless generator is read as far as it is needed; a shuffled choice needs all of it.
        limit = params["samples"] if params["order"] == "sequential" else None
        with recipe_code(f"reading samples of {params['entry']}"):
            arrays = from_callable(build(**params["arguments"]), fields, limit)
    scalars = [name for name, array in arrays.items() if array.ndim == 0]
    if scalars:
        raise BackendError("bad data", f"{scalars[0]!r} is a single number, expected one row for each sample")
    counts = {name: len(array) for name, array in arrays.items()}
    if len(set(counts.values())) > 1:
        return arrays  # reported by the caller, with all lengths
    chosen = rows(next(iter(counts.values())))
    return {name: array[chosen] for name, array in arrays.items()}


def _images(request: StageRequest, rows: Callable[[int], Array]) -> dict[str, Array]:
    params = request.params
    spec = params["images"]
    inputs = list(params["tensors"])
    if spec is None:
        raise BackendError("bad data", "a folder of images needs `images` in the recipe", "state at least its size")
    if len(inputs) != 1 or spec["input"] not in (None, inputs[0]):
        raise BackendError(
            "bad data",
            f"a folder of images fills one input, the model has {', '.join(inputs)}",
            "save all inputs of each sample as .npz, or write a callable",
        )
    try:
        return read_image_folder(request.inputs["data"], spec, params["label"], inputs[0], rows)
    except ImportError as err:
        raise BackendError(
            "missing package", f"reading images needs Pillow: {err}", "pip install 'enginery[images]'"
        ) from err


def _fitted(name: str, array: Array, params: Mapping[str, Any], warnings: list[str]) -> Array:
    """Check one array against its input (labels: only that they are finite), casting what may be cast."""
    bad = partial(BackendError, "bad data")
    tensor = params["tensors"].get(name)
    if tensor is not None:
        wanted = np.dtype(tensor["dtype"])
        shape = tensor["shape"]
        if array.ndim != len(shape):
            raise bad(
                f"{name!r} has {array.ndim} axes {list(array.shape)}, the input has {len(shape)}: {shape}",
                "the first axis is samples; add or remove axes",
            )
        for axis, extent in enumerate(shape[1:], start=1):
            if isinstance(extent, int) and array.shape[axis] != extent:
                raise bad(f"{name!r} has shape {list(array.shape)}, axis {axis} must be {extent}", "correct the data")
        if array.dtype != wanted:
            array = _cast(name, array, wanted, warnings)
    if np.issubdtype(array.dtype, np.floating):
        broken = int((~np.isfinite(array)).sum())
        if broken:
            raise bad(f"{name!r} holds {broken} NaN or infinite values", "clean the data")
    return array


def _cast(name: str, array: Array, wanted: np.dtype[Any], warnings: list[str]) -> Array:
    found = array.dtype
    for kind in (np.floating, np.integer):
        if np.issubdtype(found, kind) and np.issubdtype(wanted, kind):
            with np.errstate(over="ignore"):  # an overflow is refused by the finiteness check
                cast = array.astype(wanted)
            if kind is np.integer and not np.array_equal(cast, array):
                raise BackendError("bad data", f"{name!r} ({found}) holds values that do not fit {wanted}", "clean it")
            warnings.append(f"{name}: cast from {found} to {wanted}")
            return cast
    raise BackendError(
        "bad data",
        f"{name!r} is {found}, the input is {wanted}",
        "convert the data as the model expects it (scale pixels, map labels), or correct the input's dtype",
    )


def _described(array: Array) -> dict[str, Any]:
    flat = array.reshape(-1)
    total = squares = 0.0
    for start in range(0, flat.size, _PIECE):
        total += float(flat[start : start + _PIECE].astype(np.float64).sum())
    mean = total / flat.size if flat.size else 0.0
    for start in range(0, flat.size, _PIECE):
        squares += float(np.square(flat[start : start + _PIECE].astype(np.float64) - mean).sum())
    low, high = (float(flat.min()), float(flat.max())) if flat.size else (0.0, 0.0)
    std = math.sqrt(squares / flat.size) if flat.size else 0.0
    return {"dtype": str(array.dtype), "shape": list(array.shape), "min": low, "max": high, "mean": mean, "std": std}


def _suspicions(name: str, array: Array, facts: Mapping[str, Any]) -> list[str]:
    if facts["min"] == facts["max"]:
        return [f"{name}: every value is {facts['min']:g} (standard deviation 0)"]
    if not np.issubdtype(array.dtype, np.floating) or array.ndim < 3 or array.size < _NOISE_ELEMENTS:
        return []
    rows = array.reshape(-1, array.shape[-1])[: 1 << 18].astype(np.float64)
    if rows.shape[1] < 2:
        return []
    left, right = rows[:, :-1] - facts["mean"], rows[:, 1:] - facts["mean"]
    scale = math.sqrt(float(np.square(left).sum()) * float(np.square(right).sum()))
    correlation = float((left * right).sum()) / scale if scale else 1.0
    if abs(correlation) >= _NOISE:
        return []
    return [
        f"{name}: looks like random noise, not data (neighbours along the last axis correlate by {correlation:+.3f})"
    ]
