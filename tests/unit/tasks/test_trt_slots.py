"""Contexts, buffers and graphs, driven on a device that the host plays (tests/gpu/test_runner.py: on a real one)."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.engines import trt_pool
from tasks.engines.trt_pool import SlotPool
from tasks.engines.trt_slots import STAGED_BYTES
from tasks.errors import BackendError, CallError
from tests.unit.tasks.host_device import HostPlan

WIDTH = 4


def batch(rows, seed=0):
    return np.random.default_rng([rows, seed]).normal(size=(rows, WIDTH)).astype(np.float32)


class Plan(HostPlan):
    def __init__(self, *args, graphs=True, one_shape=False, aged=trt_pool.AGED, **options):
        super().__init__(*args, **options)
        self.pool = SlotPool(self.loaded, graphs=graphs, one_shape=one_shape, aged=aged)

    def __call__(self, x, out=None, profile=0):
        slot, graph = self.pool.slot(profile, (x.shape,))
        return slot.run({"x": x}, out or {}, "here", graph=graph)["y"]

    def check(self, rows, seed=0, profile=0):
        x = batch(rows, seed)
        np.testing.assert_array_equal(self(x, profile=profile), 2 * x)


@pytest.mark.parametrize("shares", [True, False])
def test_a_shape_that_comes_back_is_replayed(shares):
    plan = Plan(shares=shares)
    for seed in range(6):
        plan.check(2, seed)
    before = plan.runs, plan.cuda.launches
    for seed in range(20):
        plan.check(2, seed)
    assert (plan.runs, plan.cuda.launches) == (before[0], before[1] + 20)


def test_a_plan_of_one_shape_has_one_context():
    plan = Plan(one_shape=True)
    for seed in range(6):
        plan.check(2, seed)
    assert (len(plan.contexts), plan.cuda.launches) == (1, 4)


def test_without_graphs_nothing_is_captured():
    plan = Plan(graphs=False)
    for seed in range(6):
        plan.check(2, seed)
    assert (len(plan.contexts), plan.cuda.launches, plan.runs) == (1, 0, 6)


@given(
    st.lists(st.tuples(st.sampled_from([1, 2, 3, 64]), st.sampled_from([0, 1]), st.integers(0, 6)), max_size=40),
    st.booleans(),
    st.booleans(),
)
def test_any_order_of_shapes_profiles_and_places_gives_what_the_plan_computes(calls, shares, graphs):
    plan = Plan(((1, 64), (1, 64)), shares=shares, graphs=graphs)
    kept = {rows: plan.device_array(batch(rows)) for rows in (1, 2, 3, 64)}
    for seed, (rows, profile, kind) in enumerate(calls):
        x = batch(rows, 0 if kind in (1, 2) else seed)
        feed = x
        if kind == 1:
            feed = kept[rows]
        elif kind == 2:
            feed = plan.device_array(x, offset=4)
        elif kind == 3:
            feed = plan.device_array(x)
        out = {}
        if kind == 4:
            out = {"y": np.empty_like(x)}
        elif kind in (5, 6):
            out = {"y": plan.device_array(np.zeros_like(x), offset=4 if kind == 6 else 0)}
        found = plan(feed, out, profile)
        np.testing.assert_array_equal(plan.read(found) if kind in (5, 6) else found, 2 * x)
        if out:
            assert found is out["y"]


def test_another_shape_drops_the_graph_where_contexts_cannot_share_a_profile():
    plan = Plan(shares=False)
    for rows in (2, 2, 2, 2, 2, 2, 3, 2, 2, 2, 2):
        plan.check(rows, seed=rows)
    assert len(plan.contexts) == 1
    assert len(plan.cuda.graphs) == 1


@pytest.mark.parametrize("shares", [True, False])
def test_profiles_may_be_used_in_any_order(shares):
    plan = Plan(((1, 8), (1, 64), (1, 64)), shares=shares)
    for profile in (2, 1, 2, 0, 1):
        plan.check(5, profile, profile)
    assert sorted(context.profile for context in plan.contexts) == [0, 1, 2]


def test_a_profile_that_is_refused_is_a_failure_with_tensorrts_words():
    plan = Plan(((1, 64), (1, 64)))
    plan.refuses = "Cuda Runtime (out of memory)"
    with pytest.raises(BackendError, match=r"profile 1 cannot be used:\n    Cuda Runtime \(out of memory\)") as caught:
        plan(batch(2), profile=1)
    assert caught.value.kind == "out of memory"
    plan.refuses = ""
    plan.check(2, profile=1)


def test_a_device_that_failed_is_told_before_a_profile_is_set_on_it():
    plan = Plan(((1, 64), (1, 64)), shares=False)
    plan.cuda.fault = "cuStreamSynchronize: CUDA_ERROR_ILLEGAL_ADDRESS"
    with pytest.raises(BackendError, match="ILLEGAL_ADDRESS"):
        plan(batch(2))
    assert not plan.contexts


def test_shapes_that_alternate_keep_their_graphs_where_contexts_can_share_a_profile():
    plan = Plan()
    for _ in range(6):
        plan.check(2)
        plan.check(3)
    assert len(plan.cuda.graphs) == 2
    runs = plan.runs
    plan.check(2)
    plan.check(3)
    assert plan.runs == runs


def test_so_many_shapes_get_a_slot_and_those_that_rest_give_way():
    plan = Plan(aged=30)
    for rows in range(1, 13):
        for _ in range(6):
            plan.check(rows)
    assert len(plan.cuda.graphs) == trt_pool.OWN_SLOTS
    memory = len(plan.cuda.memory)
    for rows in range(20, 30):
        for _ in range(6):
            plan.check(rows)
    assert len(plan.cuda.graphs) == trt_pool.OWN_SLOTS
    assert len(plan.cuda.memory) == memory


def test_what_cannot_be_captured_is_run_without_a_graph():
    plan = Plan(one_shape=True)
    plan.cuda.capturable = False
    for seed in range(6):
        plan.check(2, seed)
    assert (plan.cuda.launches, plan.cuda.captures) == (0, 1)
    assert plan.log.errors == []
    assert [words for words in plan.log.warnings if "no CUDA graph" in words and "not permitted" in words]


def test_large_tensors_are_not_staged():
    plan = Plan(((1, 1 << 20),))
    rows = STAGED_BYTES // (4 * WIDTH)
    plan.check(rows)
    assert plan.cuda.locked
    other = Plan(((1, 1 << 20),))
    for seed in range(6):
        other.check(rows + 1, seed)
    assert not other.cuda.locked
    assert other.cuda.launches


def test_outputs_whose_shape_depends_on_data_are_never_captured():
    plan = Plan(selects=True)
    for seed, rows in enumerate([2, 2, 2, 2, 2, 2, 40, 1, 40]):
        x = batch(rows, seed)
        np.testing.assert_array_equal(plan(x), (2 * x)[x > 0])
    assert plan.cuda.launches == 0
    with pytest.raises(CallError, match="the shape of the output y depends on the data"):
        plan(batch(2), {"y": np.empty(3, np.float32)})
    plan(batch(2))


def test_an_output_of_another_shape_is_refused_and_the_plan_goes_on():
    plan = Plan()
    for out in (np.empty((3, WIDTH), np.float32), plan.device_array(batch(3))):
        with pytest.raises(CallError, match=r"the output y is \[2, 4\] at these inputs, `out` has \[3, 4\] for it"):
            plan(batch(2), {"y": out})
    plan.check(2)


def test_a_run_that_fails_is_classified_and_does_not_end_the_plan():
    plan = Plan()
    plan.check(2)
    for words, kind in (("Cuda Runtime (out of memory)", "out of memory"), ("an illegal memory access", "crash")):
        plan.fails = words
        with pytest.raises(BackendError, match="here: TensorRT does not run the plan") as caught:
            plan(batch(2))
        assert caught.value.kind == kind
    plan.fails = ""
    plan.check(2)


def test_a_shape_that_the_context_refuses_is_a_bad_profile():
    with pytest.raises(BackendError, match="out of the profile") as caught:
        Plan()(batch(65))
    assert caught.value.kind == "bad profile"


def test_closed_slots_give_their_memory_back():
    plan = Plan(one_shape=True)
    for seed in range(6):
        plan.check(2, seed)
    slot, _graph = plan.pool.slot(0, ((2, WIDTH),))
    slot.close()
    assert len(plan.cuda.memory) == 1  # the scratch memory of all contexts
    assert not plan.cuda.locked
    assert not plan.cuda.graphs


def test_a_closed_plan_keeps_the_scratch_memory_alone_and_no_context():
    plan = Plan(((1, 64), (1, 64)))
    for profile in (0, 1):
        for rows in (2, 3):
            for seed in range(6):
                plan.check(rows, seed, profile)
    assert (len(plan.contexts), len(plan.cuda.graphs)) == (6, 4)
    plan.pool.close()
    assert (len(plan.contexts), len(plan.cuda.graphs), len(plan.cuda.memory)) == (0, 0, 1)
    assert not plan.cuda.locked
