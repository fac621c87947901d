"""A TensorRT plan as a candidate: timed with or without a CUDA graph, and layer by layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from tasks.benchmark.measure import Array
from tasks.engines.profiles import choose_profile
from tasks.engines.trt_bound import Bound
from tasks.engines.trt_run import PlanRunner

# A shape is captured as a graph in its third run; a few more settle the caches.
_RUNS_BEFORE: Final = 5
_WHERE: Final = "benchmark"


class PlanCandidate:
    """A loaded plan at one shape. With `graph` (the runner's `graphs` too) runs are replayed, where the plan admits it."""

    device_clock = True

    def __init__(self, runner: PlanRunner, *, graph: bool) -> None:
        self._runner, self._graph = runner, graph
        self._bound: Bound | None = None
        self._feeds: dict[str, Array] = {}
        self._profile = 0
        self.graphed = False

    def prepare(self, arrays: Mapping[str, Array]) -> None:
        """Bind the inputs on the device, and run until a graph was captured; `graphed` says whether one was."""
        self._feeds = self._runner.typed(arrays, _WHERE)
        shapes = {name: feed.shape for name, feed in self._feeds.items()}
        self._profile = choose_profile(self._runner.profiles, shapes, _WHERE).index
        if self._bound is not None:
            self._bound.close()
        self._bound = self._runner.bind(arrays, _WHERE, graph=self._graph)
        for _ in range(_RUNS_BEFORE):
            self._bound.run()
        self._bound.synchronize()
        self.graphed = self._bound.graphed

    def run(self) -> None:
        """Start one run."""
        self._one.run()

    def synchronize(self) -> None:
        """Wait for the runs."""
        self._one.synchronize()

    def request(self) -> None:
        """Call the plan as a server does; what was bound is of no use after this."""
        self._runner.run(self._feeds, self._profile, {}, _WHERE)

    def device_ms(self, runs: int) -> list[float]:
        """Time single runs by CUDA events."""
        return self._one.device_ms(runs)

    @property
    def _one(self) -> Bound:
        if self._bound is None:
            raise ValueError("nothing was prepared")
        return self._bound


def layer_profile(runner: PlanRunner, arrays: Mapping[str, Array], runs: int) -> list[dict[str, Any]]:
    """Return [{"name", "ms", "share"}] of the plan's layers, in order; the runner is of no use for timing after this."""
    bound = runner.bind(arrays, _WHERE)
    times = bound.layer_ms(runs)
    bound.close()
    total = sum(times.values()) or 1.0
    return [{"name": name, "ms": round(ms, 6), "share": round(ms / total, 5)} for name, ms in times.items()]
