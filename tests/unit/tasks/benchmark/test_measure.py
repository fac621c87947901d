"""The rule by which times are taken, on a clock that only the candidate moves."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.benchmark.measure import Rule, is_steady, measure, sample, summary, warm_up

RULE = Rule(seconds=5.0)


class Simulated:
    """Something that takes as long as it is told, on a clock of its own; runs are asynchronous where a device has them."""

    def __init__(self, seconds: Callable[[int], float], copies: float = 0.0, *, device: bool = False) -> None:
        self.now, self.busy_until, self.runs = 0.0, 0.0, 0
        self.seconds, self.copies, self.device_clock = seconds, copies, device
        self.prepared = 0

    def clock(self) -> float:
        return self.now

    def prepare(self, arrays: object) -> None:
        self.prepared += 1

    def run(self) -> None:
        self.runs += 1
        self.now += 1e-5  # what starting costs the host
        self.busy_until = max(self.now, self.busy_until) + self.seconds(self.runs)
        if not self.device_clock:
            self.synchronize()

    def synchronize(self) -> None:
        self.now = max(self.now, self.busy_until)

    def request(self) -> None:
        self.run()
        self.synchronize()
        self.now += 2 * self.copies

    def device_ms(self, runs: int) -> list[float]:
        return [1000 * self.seconds(0)] * runs


def measured(candidate: Simulated, rule: Rule = RULE, batch: int = 4) -> dict:
    return measure(candidate, {"x": np.zeros(1)}, batch, rule, candidate.clock)


def test_a_device_is_timed_with_and_without_copies_and_by_its_own_clock():
    candidate = Simulated(lambda _run: 0.010, copies=0.0025, device=True)
    found = measured(candidate)
    assert candidate.prepared == 1
    assert found["steady"]
    assert found["latency_ms"]["p50"] == pytest.approx(10.01)
    assert found["end_to_end_ms"]["p50"] == pytest.approx(15.01)
    assert found["device_ms"]["p50"] == pytest.approx(10.0)
    assert found["copy_share"] == pytest.approx(5 / 15.01, abs=1e-4)
    assert found["throughput"] == pytest.approx(4 / 0.010, rel=0.01)  # the device is never idle
    assert candidate.now <= 6.0


def test_a_cpu_copies_nothing_and_has_one_clock():
    found = measured(Simulated(lambda _run: 0.010))
    assert found["end_to_end_ms"] == found["latency_ms"]
    assert found["device_ms"] is None
    assert found["copy_share"] is None
    assert found["throughput"] == pytest.approx(4 / 0.01001)


def test_what_warms_up_is_not_counted():
    candidate = Simulated(lambda run: 0.010 + 0.25 * 0.7**run)  # the first run takes 18 times as long
    found = measured(candidate)
    assert found["steady"]
    assert found["warm_up_runs"] >= RULE.windows * RULE.window_runs
    assert found["latency_ms"]["p99"] < 1000 * 0.02


def test_what_never_settles_is_timed_all_the_same_and_says_so():
    steps = itertools.cycle([0.01] * 10 + [0.02] * 10)
    candidate = Simulated(lambda _run: next(steps))
    found = measured(candidate)
    assert not found["steady"]
    assert 10 <= found["latency_ms"]["p50"] <= found["latency_ms"]["p90"] == pytest.approx(20.01)
    assert candidate.now < RULE.seconds + 1


def test_a_slow_model_is_cut_off_by_the_limit_and_sampled_a_few_times():
    candidate = Simulated(lambda _run: 2.0)
    found = measured(candidate)
    assert found["warm_up_runs"] == 1
    assert found["latency_ms"]["runs"] == RULE.least_samples
    assert candidate.runs <= 10


def test_a_fast_model_is_sampled_no_more_than_it_needs():
    found = measured(Simulated(lambda _run: 1e-5))
    assert found["latency_ms"]["runs"] == RULE.most_samples


def test_sampling_ends_when_its_time_comes():
    candidate = Simulated(lambda _run: 0.1 - 1e-5)
    assert len(sample(candidate.run, RULE, candidate.clock, until=2.0)) == pytest.approx(20, abs=1)


@given(st.floats(1e-6, 10.0), st.floats(1.0, 3.0))
def test_steady_means_within_the_tolerance_of_the_least(base, factor):
    medians = [base * factor, *[base] * (RULE.windows - 1)]
    assert is_steady(medians, RULE) == (base * factor - base <= RULE.tolerance * base)
    assert is_steady([base * 100, *medians[1:], base], RULE)  # only the last windows count
    assert not is_steady([base] * (RULE.windows - 1), RULE)


@given(st.lists(st.floats(1e-5, 0.5), min_size=1, max_size=20))
def test_warming_up_always_ends(times):
    turns = itertools.cycle(times)
    candidate = Simulated(lambda _run: next(turns))
    _steady, runs = warm_up(candidate.run, RULE, candidate.clock, until=2.0)
    assert runs == candidate.runs
    assert candidate.now <= 2.0 + 0.6


@given(st.lists(st.floats(0.0, 1e6), min_size=1, max_size=200))
def test_percentiles_are_ordered_and_lie_within_what_was_found(values):
    found = summary(values)
    assert min(values) - 1e-5 <= found["p50"] <= found["p90"] <= found["p99"] <= max(values) + 1e-5
    assert found["runs"] == len(values)
