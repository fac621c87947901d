"""The figures of a benchmark that a table has room for."""

from __future__ import annotations

from collections.abc import Mapping
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
