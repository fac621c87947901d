"""What `enginery run` does with a loaded engine: arrays in, times and summaries out."""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from enginery.output import WRONG, stop

if TYPE_CHECKING:
    import numpy as np

    from tasks.runner import Runner

    Array = np.ndarray[Any, np.dtype[Any]]


def read_inputs(path: Path, runner: Runner, rows: int | None) -> tuple[dict[str, Array], list[str]]:
    """Return the engine's inputs from an .npz file, and the names of arrays that are none; nothing is unpickled.

    Ends the command with status 2 for what is no such file, or lacks an input.
    """
    from tasks.datasets import read_npz
    from tasks.errors import BackendError

    if not path.is_file():
        stop(WRONG, f"{path}: there is no such file")
    try:
        arrays = read_npz(path, None)
    except BackendError as err:
        stop(WRONG, f"{path}: {err.message}; {err.advice}")
    missing = [name for name in runner.inputs if name not in arrays]
    if missing:
        takes = ", ".join(f"{name} {spec.dtype} {list(spec.shape or ())}" for name, spec in runner.inputs.items())
        has = ", ".join(arrays) or "nothing"
        stop(WRONG, f"{path}: no array {', '.join(missing)} (it has: {has}; the engine takes: {takes})")
    return {name: arrays[name][:rows] if arrays[name].ndim else arrays[name] for name in runner.inputs}, sorted(
        set(arrays) - set(runner.inputs)
    )


def timed_calls(
    runner: Runner, inputs: dict[str, Array], profile: str | None, repeat: int
) -> tuple[dict[str, Array], list[float]]:
    """Call an engine so often; return the last outputs and the seconds that each call took."""
    seconds = []
    for _ in range(repeat):
        begin = time.perf_counter()
        found = runner(inputs, profile=profile)
        seconds.append(time.perf_counter() - begin)
    return found, seconds


def outcome(
    runner: Runner, inputs: dict[str, Array], profile: str | None, found: dict[str, Array], seconds: list[float]
) -> dict[str, Any]:
    """Describe what was run and what came out, as JSON."""
    shapes = {name: array.shape for name, array in inputs.items()}
    later = seconds[1:] or seconds
    return {
        "engine": str(runner.manifest.identity),
        "device": runner.device,
        "profile": runner.profile_for(shapes, profile).name,
        "inputs": {name: {"dtype": array.dtype.name, "shape": list(array.shape)} for name, array in inputs.items()},
        "outputs": {name: _summary(array) for name, array in found.items()},
        "milliseconds": {
            "first": round(seconds[0] * 1e3, 4),
            "median": round(statistics.median(later) * 1e3, 4),
            "least": round(min(later) * 1e3, 4),
            "calls": len(seconds),
        },
        "warnings": list(runner.warnings),
    }


def print_outcome(document: dict[str, Any]) -> None:
    """Print what came out as a table, and the times."""
    from enginery.rows import Rows, print_rows, say

    table = Rows(("output", "type", "shape", "least", "mean", "largest", "NaN or Inf"))
    for name, summary in document["outputs"].items():
        figures = ["-" if summary[key] is None else f"{summary[key]:.6g}" for key in ("least", "mean", "largest")]
        table.add_row(
            name, summary["dtype"], "x".join(map(str, summary["shape"])), *figures, str(summary["non_finite"])
        )
    print_rows(table)
    spent, profile = document["milliseconds"], document["profile"]
    times = f"{spent['first']:.3f} ms"
    if spent["calls"] > 1:
        times = f"median {spent['median']:.3f} ms of {spent['calls'] - 1} calls (least {spent['least']:.3f}, first {spent['first']:.3f})"
    say(f"{document['engine']} on {document['device']}, profile {profile}: {times}")


def save(found: dict[str, Array], path: Path) -> None:
    """Write outputs as .npz, whole or not at all. Ends the command where the folder cannot be written."""
    import numpy as np

    temporary = path.with_name(f".{path.name}.part.npz")
    try:
        np.savez(temporary, allow_pickle=False, **found)
        temporary.replace(path)
    except OSError as err:
        temporary.unlink(missing_ok=True)
        stop(WRONG, f"{path}: {err.strerror or err}; give another file for --output")


def _summary(array: Array) -> dict[str, Any]:
    import numpy as np

    finite = array[np.isfinite(array)] if array.dtype.kind == "f" else array
    kept = finite.astype(np.float64)
    return {
        "dtype": array.dtype.name,
        "shape": list(array.shape),
        "least": float(kept.min()) if kept.size else None,
        "mean": float(kept.mean()) if kept.size else None,
        "largest": float(kept.max()) if kept.size else None,
        "non_finite": int(array.size - finite.size),
    }
