"""The model behind docs/scale.md: nothing is lost, done twice or done at once, and it agrees with what can be computed."""

from __future__ import annotations

import itertools
import json
from collections import defaultdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.simulate_fleet import (
    ASSUMED,
    RESULTS,
    ROOT,
    SCENARIOS,
    Engine,
    Run,
    Scenario,
    engines_of,
    measured,
    simulate,
    summary,
)

STILL = {**ASSUMED, "start_seconds": 0.0, "upgrade_seconds": 0.0}
AT_ONCE = Scenario("at once", timing_caches=False, waves=False, slots=1)


def engines(seconds: list[float], kind: str = "A") -> list[Engine]:
    return [Engine(number, kind, str(number), one, one / 4, 0.0) for number, one in enumerate(seconds)]


def check(run: Run, wanted: list[Engine]) -> None:
    """Every engine is built once, by a GPU of its kind that is ready; no GPU does two things at once."""
    assert sorted(one.engine for one in run.intervals) == [one.number for one in wanted]
    kinds = {one.number: one.kind for one in wanted}
    work = defaultdict(list)
    for one in run.intervals:
        assert one.gpu in run.gpus[kinds[one.engine]]
        assert one.begin >= run.ready[one.gpu]
        work[one.gpu].append((one.begin, one.end))
    for spans in work.values():
        spans.sort()
        assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(spans))


@pytest.mark.parametrize("scenario", [one for one in SCENARIOS if not one.bad_driver], ids=lambda one: one.name)
def test_every_engine_is_built_once_and_no_gpu_does_two_things(scenario: Scenario):
    fewer = {**ASSUMED, "recipes": 60, "gpus": {"T4": 3, "A10": 2, "L4": 3, "A100": 2, "H100": 3, "H200": 2}}
    wanted = engines_of(fewer, measured())
    assert len(wanted) == 480
    check(simulate(wanted, fewer["gpus"], scenario, fewer), wanted)


@given(st.lists(st.integers(1, 500), min_size=1, max_size=30))
@settings(max_examples=30, deadline=None)
def test_one_gpu_takes_the_sum(seconds: list[int]):
    run = simulate(engines(seconds), {"A": 1}, AT_ONCE, STILL)
    assert run.makespan == sum(seconds)
    assert run.busy_share("A") == pytest.approx(1.0)
    # A flow run's start is paid each time, or, where another computes meanwhile, only where it takes longer.
    assumed = {**STILL, "start_seconds": 7.0}
    assert simulate(engines(seconds), {"A": 1}, AT_ONCE, assumed).makespan == sum(seconds) + 7 * len(seconds)
    if min(seconds) >= 7:
        two = Scenario("two", timing_caches=False, waves=False, slots=2)
        assert simulate(engines(seconds), {"A": 1}, two, assumed).makespan == sum(seconds) + 7


@given(st.lists(st.integers(1, 500), min_size=1, max_size=40), st.integers(1, 8))
@settings(max_examples=50, deadline=None)
def test_several_gpus_keep_grahams_bounds(seconds: list[int], count: int):
    """Graham 1966: a list schedule ends no later than sum / n + (1 - 1 / n) * longest; none ends before sum / n or the longest."""
    run = simulate(engines(seconds), {"A": count}, AT_ONCE, STILL)
    check(run, engines(seconds))
    total, longest = sum(seconds), max(seconds)
    assert max(total / count, longest) <= run.makespan <= total / count + (1 - 1 / count) * longest
    assert run.busy_share("A") == pytest.approx(total / (count * run.makespan))


def test_a_timing_cache_serves_a_family_after_its_first_engine_and_no_other_kind():
    same = [Engine(0, "A", "f", 100, 10, 1), Engine(1, "A", "f", 100, 10, 1), Engine(2, "B", "f", 100, 10, 1)]
    run = simulate(same, {"A": 1, "B": 1}, Scenario("warm", waves=False, slots=1), STILL)
    assert {one.engine: one.end - one.begin for one in run.intervals} == {0: 101, 1: 11, 2: 101}


def test_with_waves_one_host_of_a_kind_builds_until_enough_have_passed():
    assumed = {**STILL, "upgrade_seconds": 50.0}
    run = simulate(
        engines([10] * 12), {"A": 3}, Scenario("waves", timing_caches=False, slots=1, canary_engines=4), assumed
    )
    check(run, engines([10] * 12))
    assert run.ready == {"A-0": 50, "A-1": 140, "A-2": 140}  # 50 + 4 * 10, and their own upgrade
    alone = [one for one in run.intervals if one.begin < 140]
    assert {one.gpu for one in alone} == {"A-0"}
    # Fewer engines than have to pass: the others follow all the same.
    assert set(simulate(engines([1.0]), {"A": 2}, Scenario("few"), assumed).ready) == {"A-0", "A-1"}


def test_a_bad_driver_costs_less_with_waves():
    built = {}
    for waves in (True, False):
        scenario = Scenario("bad", waves=waves, slots=1, bad_driver=True, canary_engines=4)
        run = simulate(engines([10] * 100), {"A": 10}, scenario, STILL)
        built[waves] = len(run.intervals)
        assert set(run.ready) == ({"A-0"} if waves else set(run.gpus["A"]))
    assert built == {True: 4, False: 13}  # three GPUs that ended before the fourth have begun again


def test_the_committed_result_is_what_the_script_finds_and_what_the_page_says():
    document = json.loads((RESULTS / "simulate_fleet.json").read_text())
    assert document["assumed"] == ASSUMED
    assert document["measured"] == measured()  # of bench/results, as they are
    wanted = engines_of(ASSUMED, measured())
    first = summary(simulate(wanted, ASSUMED["gpus"], SCENARIOS[0], ASSUMED), wanted)
    assert {name: document["scenarios"][0][name] for name in first} == json.loads(json.dumps(first))
    page = (ROOT / "docs" / "scale.md").read_text()
    for row in document["scenarios"]:
        spoilt, times = row["scenario"]["bad_driver"], row["minutes_to_fresh"]
        figures = ("-", "-") if spoilt else (f"{times['half']:.0f}", f"{times['all']:.0f}")
        share = "-" if spoilt else f"{row['busy_share']:.1%}"
        cells = (row["scenario"]["name"], *figures, f"{row['gpu_hours']:.0f}", share, str(row["built"]))
        assert f"| {' | '.join(cells)} |" in page, cells
