"""The figures of a benchmark that a table has room for."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any


def timing_summary(facts: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Return the figures that tables show, of the first case: its name, p50 in ms, throughput, and ratios by name.

    They are those of the better way to run it, with or without a CUDA graph. `facts` are a benchmark's.
    """
    if facts is None or not facts["cases"]:
        return None
    first = facts["cases"][0]["name"]
    ways = [case for case in facts["cases"] if case["name"] == first]
    best = min(ways, key=lambda case: case["latency_ms"]["p50"])
    return {
        "case": first,
        "p50_ms": best["latency_ms"]["p50"],
        "throughput": max(case["throughput"] for case in ways),
        "graph": best["graph"],
        "ratios": {
            other["name"]: other["ratios"][first] for other in facts["compared"] if first in other.get("ratios", {})
        },
    }


def best_ms(cases: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the least p50 latency of each case, in milliseconds, over the ways in which it was run."""
    found: dict[str, float] = {}
    for case in cases:
        p50 = float(case["latency_ms"]["p50"])
        found[case["name"]] = min(p50, found.get(case["name"], p50))
    return found


def mean_ms(best: Mapping[str, float]) -> float:
    """Return the geometric mean of the cases' times, in which no case counts more because it takes longer."""
    return round(math.exp(sum(math.log(max(ms, 1e-9)) for ms in best.values()) / len(best)), 6)
