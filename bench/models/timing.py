"""An engine on the device: graph replays back to back, one at a time, with copies from and to the host, and its layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from bench.models.clock import end_to_end, windows
from tasks.engines.trt_run import PlanRunner


class Engine:
    """A plan with its inputs on the device."""

    def __init__(self, plan: Path, feeds: dict[str, np.ndarray]) -> None:
        self.runner = PlanRunner(plan, None, graphs=True)
        self.feeds = feeds

    def times(self) -> dict[str, Any]:
        """Time replays of a CUDA graph, runs without one, and calls from numpy to numpy."""
        bound = self.runner.bind(self.feeds, graph=True)
        graph: dict[str, Any] = windows(bound.run, bound.synchronize)
        graph["graphed"] = bound.graphed
        events = sorted(bound.device_ms(50))
        bound.close()
        bound = self.runner.bind(self.feeds)
        plain = windows(bound.run, bound.synchronize, seconds=0.5)
        bound.close()
        return {
            **graph,
            "by_events_ms": round(events[25], 4),
            "without_graph_ms": plain["device_ms"],
            "without_graph_call_ms": plain["call_ms"],
            "end_to_end_ms": end_to_end(lambda: self.runner(self.feeds), 50),
        }

    def layers(self) -> list[dict[str, Any]]:
        """Return TensorRT's own time of every layer, in microseconds, longest first; nothing can be timed after."""
        bound = self.runner.bind(self.feeds)
        rows = sorted(bound.layer_ms(10).items(), key=lambda row: -row[1])
        return [{"name": name[:160], "us": round(ms * 1000, 2)} for name, ms in rows]
