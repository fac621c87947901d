"""`precision: auto`: which candidates a target has, and which of those that were measured is the fastest that passes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from artifacts.timings import best_ms, mean_ms
from recipes.schema import EXACTNESS, PRECISIONS, QUANTIZED, Precision, Recipe, Target

# fp8 and int8-dynamic are tried where `candidates` names them.
# The order in which candidates are tried: first what is fastest on most GPUs, so that a budget is spent on that; ONNX
# Runtime's CPU kernels are mostly for fp32 and int8.
_ORDER: Final[Mapping[str, tuple[Precision, ...]]] = {
    "tensorrt": ("int8-fp16", "fp16", "bf16", "int8", "tf32", "fp32"),
    "tensorrt-rtx": ("int8-fp16", "fp16", "bf16", "int8", "tf32", "fp32"),
    "onnxruntime": ("int8", "fp32", "fp16"),
}
# Times that differ by less than this part are taken for equal: it is what a steady measurement may vary by.
TOLERANCE: Final = 0.02


@dataclass(frozen=True)
class Candidate:
    """One way to build an engine, and what became of it.

    `passed` is None where it was not tried, and then `reasons` says why; `ms` is the geometric mean, over the cases, of the
    p50 latency (None: not measured), `graph` whether it is faster as a CUDA graph; `key` names the measurement.
    """

    precision: Precision
    level: int | None = None
    passed: bool | None = None
    reasons: tuple[str, ...] = ()
    ms: float | None = None
    graph: bool | None = None
    key: str | None = None

    @property
    def name(self) -> str:
        """The precision, and the optimisation level where several are tried: fp16-o5."""
        return self.precision if self.level is None else f"{self.precision}-o{self.level}"

    def to_json(self, chosen: Candidate | None) -> dict[str, Any]:
        """Return what manifests and reports say of it."""
        return {
            "name": self.name,
            "precision": self.precision,
            "optimization_level": self.level,
            "passed": self.passed,
            "reasons": list(self.reasons),
            "p50_ms": round(self.ms, 6) if self.ms is not None else None,
            "graph": self.graph,
            "chosen": chosen is not None and self.name == chosen.name,
        }


def candidates_of(recipe: Recipe, target: Target) -> tuple[Precision, ...]:
    """Return the precisions that `auto` tries for a target, in order: the recipe's, else all that its runtime has.

    int8 is among the latter only where there is calibration data. What a version or GPU lacks is refused when it is tried.
    """
    stated = recipe.precision.candidates
    calibrated = recipe.precision.calibration is not None
    listed = stated or [one for one in _ORDER[target.runtime] if calibrated or one not in QUANTIZED]
    return tuple(one for one in listed if one in PRECISIONS[target.runtime])


def measured(facts: Mapping[str, Any]) -> tuple[float, bool]:
    """Return how long a run takes (see `Candidate.ms`), and whether that is with a CUDA graph at the first case."""
    first = facts["cases"][0]["name"]
    ways = [case for case in facts["cases"] if case["name"] == first]
    return mean_ms(best_ms(facts["cases"])), bool(min(ways, key=lambda case: case["latency_ms"]["p50"])["graph"])


def fastest(candidates: Sequence[Candidate]) -> Candidate | None:
    """Return the fastest that passed; of those within TOLERANCE of it the most exact, then the first in order.

    Where none could be measured, the first that passed.
    """
    passed = [candidate for candidate in candidates if candidate.passed]
    timed = [(candidate.ms, candidate) for candidate in passed if candidate.ms is not None]
    if not timed:
        return passed[0] if passed else None
    least = min(ms for ms, _candidate in timed)
    close = [candidate for ms, candidate in timed if ms <= least * (1 + TOLERANCE)]
    return max(close, key=lambda candidate: EXACTNESS[candidate.precision])
