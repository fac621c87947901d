"""Inputs bound to a plan on the device, driven on a device that the host plays (tests/gpu/test_benchmark.py: a real one)."""

import numpy as np
import pytest

from tasks.engines.trt_bound import Bound
from tests.unit.tasks.test_trt_slots import Plan, batch


def bound(plan, rows, *, graph, profile=0):
    x = batch(rows)
    return x, Bound(plan.cuda, plan.pool.base(profile), {"x": x}, frozenset(), "here", graph=graph)


@pytest.mark.parametrize("graph", [False, True])
def test_runs_compute_what_a_call_computes_without_a_copy(graph):
    plan = Plan()
    x, one = bound(plan, 3, graph=graph)
    moved = []
    plan.cuda._move, move = lambda *given, **named: moved.append(given), plan.cuda._move
    for _ in range(6):
        one.run()
    one.synchronize()
    plan.cuda._move = move
    assert moved == []
    assert one.graphed is graph
    assert plan.cuda.launches == (4 if graph else 0)  # the first runs of a shape are not captured
    found = np.empty_like(x)
    one.output("y", found)
    np.testing.assert_array_equal(found, 2 * x)


def test_what_follows_a_binding_is_as_if_there_had_been_none():
    plan = Plan(((1, 64), (1, 64)))
    for rows, profile in ((2, 0), (5, 1), (64, 0)):
        _x, one = bound(plan, rows, graph=True, profile=profile)
        for _ in range(4):
            one.run()
        one.close()
        for seed in range(4):
            plan.check(rows, seed, profile)
            plan.check(3, seed, profile)


def test_a_second_binding_takes_the_place_of_the_first_and_frees_nothing_of_its_own():
    plan = Plan()
    _x, first = bound(plan, 2, graph=True)
    for _ in range(4):
        first.run()
    x, second = bound(plan, 7, graph=True)
    first.close()
    for _ in range(4):
        second.run()
    found = np.empty_like(x)
    second.output("y", found)
    np.testing.assert_array_equal(found, 2 * x)
    before = len(plan.cuda.memory)
    second.close()
    assert len(plan.cuda.memory) == before - 1


def test_an_output_whose_shape_depends_on_data_is_not_captured():
    plan = Plan(selects=True)
    _x, one = bound(plan, 3, graph=True)
    for _ in range(5):
        one.run()
    assert not one.graphed
    assert plan.cuda.captures == 0
    assert plan.runs == 5


def test_what_cannot_be_captured_runs_without():
    plan = Plan()
    plan.cuda.capturable = False
    _x, one = bound(plan, 3, graph=True)
    for _ in range(5):
        one.run()
    assert not one.graphed
    assert plan.runs >= 5


def test_each_run_has_its_own_time():
    plan = Plan()
    _x, one = bound(plan, 3, graph=False)
    assert one.device_ms(4) == [1.0] * 4
    assert plan.runs == 4
