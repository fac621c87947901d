"""How long something takes: back to back, one at a time, and with copies from and to the host. Needs nothing but Python."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any


def windows(run: Callable[[], None], wait: Callable[[], None], *, seconds: float = 2.0) -> dict[str, float]:
    """Time runs back to back, in 15 windows, and runs with a wait after each; milliseconds, and how many ran.

    `seconds` bounds both together. A window holds 3 to 200 runs.
    """
    for _ in range(5):
        run()
    wait()
    started = time.perf_counter()
    for _ in range(3):
        run()
    wait()
    each = max((time.perf_counter() - started) / 3, 1e-5)
    calls = int(min(max(seconds * 0.7 / 15 / each, 3), 200))
    spans = []
    for _ in range(15):
        started = time.perf_counter()
        for _ in range(calls):
            run()
        wait()
        spans.append((time.perf_counter() - started) / calls * 1000)
    single = []
    for _ in range(int(min(max(seconds * 0.3 / each, 10), 500))):
        started = time.perf_counter()
        run()
        wait()
        single.append((time.perf_counter() - started) * 1000)
    return {
        "device_ms": round(statistics.median(spans), 4),
        "device_min_ms": round(min(spans), 4),
        "call_ms": round(statistics.median(single), 4),
        "runs": calls * 15 + len(single),
    }


def end_to_end(run: Callable[[], Any], count: int) -> float:
    """Return the median of calls from numpy to numpy, in milliseconds."""
    for _ in range(3):
        run()
    spans = []
    for _ in range(count):
        started = time.perf_counter()
        run()
        spans.append((time.perf_counter() - started) * 1000)
    return round(statistics.median(spans), 4)
