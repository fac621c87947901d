"""How a time is taken: warm up until it is steady by a stated rule, then sample. The rule is part of every result.

Three things are timed, and never mixed: `latency` (wall time of one run, inputs and outputs where the candidate computes),
`end_to_end` (wall time with the copies from and to the host), and `device` (what the device's own clock says of one run).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Final, Protocol

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]
Clock = Callable[[], float]

# Parts of the time limit: what warm-up may take, and until when the latency alone is sampled.
_WARM_UP_UNTIL: Final = 0.4
_LATENCY_UNTIL: Final = 0.7
_DEVICE_RUNS: Final = 200
_REQUESTS_BEFORE: Final = 5
_THROUGHPUT_SECONDS: Final = 0.3


@dataclass(frozen=True)
class Rule:
    """When a time counts. Times in seconds.

    Runs are gathered in windows of `window_seconds` and at least `window_runs`; it is steady when the medians of the last
    `windows` of them lie within `tolerance` of each other (as a part of the least). `seconds` is the limit of one case,
    of which warm-up may take 0.4; what is not steady by then is sampled all the same, and says so.
    """

    seconds: float = 5.0
    window_seconds: float = 0.1
    window_runs: int = 5
    windows: int = 5
    tolerance: float = 0.02
    most_samples: int = 2000
    least_samples: int = 5

    def to_json(self) -> dict[str, Any]:
        """Return the rule as JSON values."""
        return asdict(self)


class Candidate(Protocol):
    """Something that runs one model at one shape; `device_clock` says whether it is timed by a device's own clock."""

    device_clock: bool

    def prepare(self, arrays: Mapping[str, Array]) -> None:
        """Take the inputs of one case, to where it computes, and run often enough that nothing is left to set up."""

    def run(self) -> None:
        """Start one run on the inputs that are there; it may return before the run is done."""

    def synchronize(self) -> None:
        """Wait until every run that was started is done."""

    def request(self) -> None:
        """Serve one request as a server would: inputs from the host, outputs back to it, all done on return.

        Called only after everything else that is timed at a case, and where there is a device's clock.
        """

    def device_ms(self, runs: int) -> list[float]:
        """Return what the device's clock says of each of `runs` runs, in milliseconds."""


@dataclass(frozen=True)
class Samples:
    """Times of single runs, in seconds, after a warm-up of `warm_up_runs`; `steady` says how that ended."""

    steady: bool
    warm_up_runs: int
    seconds: list[float] = field(default_factory=list)


def is_steady(medians: Sequence[float], rule: Rule) -> bool:
    """Tell whether the last windows agree: (greatest - least) <= tolerance * least, over `rule.windows` medians."""
    last = medians[-rule.windows :]
    return len(last) == rule.windows and max(last) - min(last) <= rule.tolerance * min(last)


def warm_up(run: Callable[[], object], rule: Rule, clock: Clock, until: float) -> tuple[bool, int]:
    """Run until it is steady, or `clock` reaches `until`; return whether it is steady, and how many runs it took."""
    medians: list[float] = []
    runs = 0
    while True:
        window: list[float] = []
        begin = clock()
        while len(window) < rule.window_runs or clock() - begin < rule.window_seconds:
            window.append(_timed(run, clock))
            # A slow model's window is cut short rather than the limit passed by far.
            if window and clock() >= until:
                break
        runs += len(window)
        medians.append(statistics.median(window))
        if is_steady(medians, rule):
            return True, runs
        if clock() >= until:
            return False, runs


def sample(run: Callable[[], object], rule: Rule, clock: Clock, until: float) -> list[float]:
    """Time single runs, in seconds: `least_samples` at least, then until there are `most_samples` or `until` comes."""
    found: list[float] = []
    while len(found) < rule.least_samples or (len(found) < rule.most_samples and clock() < until):
        found.append(_timed(run, clock))
    return found


def measure(
    candidate: Candidate, arrays: Mapping[str, Array], batch: int, rule: Rule, clock: Clock = time.perf_counter
) -> dict[str, Any]:
    """Time a candidate at one case and return its figures, as JSON.

    steady, warm_up_runs; latency_ms, end_to_end_ms and device_ms (None without a device's clock): {p50, p90, p99, mean,
    runs}; throughput in samples a second, runs started one behind another, `batch` samples each; copy_share: the part of
    end_to_end's median that the copies between host and device take (None where there is no device).
    """
    candidate.prepare(arrays)
    begin = clock()

    def run_once() -> None:
        candidate.run()
        candidate.synchronize()

    steady, warm_up_runs = warm_up(run_once, rule, clock, begin + _WARM_UP_UNTIL * rule.seconds)
    latency = sample(run_once, rule, clock, max(begin + _LATENCY_UNTIL * rule.seconds, clock()))
    plain = statistics.median(latency)
    throughput = batch * _runs_a_second(candidate, clock, plain)
    device, with_copies = None, latency
    if candidate.device_clock:
        device = candidate.device_ms(min(_DEVICE_RUNS, len(latency)))
        for _ in range(_REQUESTS_BEFORE):
            candidate.request()
        with_copies = sample(candidate.request, rule, clock, begin + rule.seconds)
    whole = statistics.median(with_copies)
    return {
        "steady": steady,
        "warm_up_runs": warm_up_runs,
        "latency_ms": summary([1000 * value for value in latency]),
        "end_to_end_ms": summary([1000 * value for value in with_copies]),
        "device_ms": summary(device) if device is not None else None,
        "throughput": round(throughput, 3),
        "copy_share": round(max(0.0, 1.0 - plain / whole), 4) if device is not None else None,
    }


def summary(values: Sequence[float]) -> dict[str, Any]:
    """Return {p50, p90, p99, mean, runs}; percentiles are interpolated linearly between samples (numpy's default)."""
    p50, p90, p99 = (float(found) for found in np.percentile(values, (50, 90, 99)))
    rounded = {name: round(value, 6) for name, value in (("p50", p50), ("p90", p90), ("p99", p99))}
    return {**rounded, "mean": round(statistics.fmean(values), 6), "runs": len(values)}


def _runs_a_second(candidate: Candidate, clock: Clock, seconds_each: float) -> float:
    """Start runs without waiting for each, and count what is done in about the time that is spent on this."""
    runs = min(max(3, int(_THROUGHPUT_SECONDS / max(seconds_each, 1e-6))), 10_000)
    candidate.synchronize()
    begin = clock()
    for _ in range(runs):
        candidate.run()
    candidate.synchronize()
    return runs / max(clock() - begin, 1e-9)


def _timed(run: Callable[[], object], clock: Clock) -> float:
    begin = clock()
    run()
    return clock() - begin
