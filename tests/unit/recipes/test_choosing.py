"""`precision: auto`: what is tried, in which order, what is left out and why, and which one is published."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from artifacts.host import Gpu
from recipes.choosing import TOLERANCE, Candidate, candidates_of, fastest, measured
from recipes.schema import EXACTNESS, PRECISIONS
from tests.unit.recipes.simulated import GOOD, HOST, World, recipe

H200 = replace(HOST, gpus=(Gpu("NVIDIA H200", "GPU-1", "sm90", 1),), runtimes={"tensorrt": "8.6.0"})
BAD = GOOD | {"parity": GOOD["parity"] | {"relative_l2": 0.9, "cosine": 0.1}}


def timing(plain, graph=None):
    rows = [{"name": "online/1", "graph": False, "latency_ms": {"p50": plain}}]
    rows += [{"name": "online/1", "graph": True, "latency_ms": {"p50": graph}}] if graph is not None else []
    return {"cases": rows, "compared": []}


def auto(runtime="onnxruntime", gpu="cpu", benchmark=None, **precision):
    def change(document):
        document["targets"] = [{"runtime": runtime, "gpus": [gpu]}]
        calibration = document["precision"]["calibration"]
        document["precision"] = {"build": "auto", "calibration": calibration, **precision}
        if benchmark is not None:
            document["benchmark"] = benchmark

    return recipe(change)


def world(host=HOST, **milliseconds):
    target = "onnxruntime:cpu" if host is HOST else "tensorrt:sm90"
    facts = {f"benchmark:{target}:{name.replace('_', '-')}": timing(ms) for name, ms in milliseconds.items()}
    return World(host=host, facts=facts | {f"{name}:compared": found for name, found in facts.items()})


def outcome(planned):
    (engine,) = planned.engines
    return {one.name: (one.passed, one.ms) for one in engine.candidates}, engine


def test_the_fastest_is_published_and_every_candidate_is_told_of():
    ran, planned = world(int8=3.0, fp32=2.0, fp16=1.0).build(auto())
    candidates, engine = outcome(planned)
    assert candidates == {"int8": (True, 3.0), "fp32": (True, 2.0), "fp16": (True, 1.0)}
    assert (engine.asked, engine.given, engine.state) == ("auto", "fp16", "cached")
    assert engine.benchmark.id == "benchmark:onnxruntime:cpu:fp16"
    assert [step for step in ran if step.startswith("publish")] == ["publish:onnxruntime:cpu:auto"]
    assert engine.publish.action.params["given"] == "fp16"
    assert [row["name"] for row in engine.publish.action.params["candidates"]] == ["int8", "fp32", "fp16"]
    assert planned.fresh
    assert planned.status == 0


def test_one_candidate_is_made_at_a_time():
    ran, _planned = world(int8=3.0, fp32=2.0, fp16=1.0).build(auto())
    order = [step for step in ran if step.startswith(("compile", "benchmark"))]
    assert order == [
        f"{stage}:onnxruntime:cpu:{precision}"
        for precision in ("int8", "fp32", "fp16")
        for stage in ("compile", "benchmark")
    ]


def test_a_faster_one_that_fails_its_gates_is_not_chosen():
    simulated = world(int8=0.1, fp32=2.0, fp16=1.0)
    simulated.facts |= {"verify:onnxruntime:cpu:int8": BAD, "verify:fp16": BAD}
    ran, planned = simulated.build(auto())
    candidates, engine = outcome(planned)
    assert candidates == {"int8": (False, None), "fp32": (True, 2.0), "fp16": (False, None)}
    assert engine.given == "fp32"
    assert "compile:onnxruntime:cpu:fp16" not in ran
    assert [trial.precision for trial in engine.trials] == ["int8", "fp16"]
    assert "relative_l2" in engine.candidates[0].reasons[0]


def test_one_that_does_not_compile_costs_itself_alone():
    simulated = world(int8=0.1, fp32=2.0, fp16=1.0)
    made = auto()
    while True:
        planned = simulated.plan(made)
        if not planned.ready:
            break
        for step in planned.ready:
            if step.id == "compile:onnxruntime:cpu:int8":
                simulated.failures[step.action.key] = "no kernel: said the compiler\nand more"
            else:
                simulated.records[step.stage, step.action.key] = simulated.run(step)
    candidates, engine = outcome(planned)
    assert candidates["int8"] == (False, None)
    assert engine.candidates[0].reasons == ("compile:onnxruntime:cpu:int8: no kernel: said the compiler",)
    assert (engine.given, engine.state, planned.status) == ("fp16", "cached", 0)


def test_where_none_passes_the_build_fails_and_says_all():
    simulated = world()
    simulated.facts["verify"] = BAD
    simulated.facts |= {"verify:export": GOOD, "verify:simplify": GOOD}
    _ran, planned = simulated.build(auto())
    _candidates, engine = outcome(planned)
    assert engine.state == "failed"
    assert planned.status == 1
    for name in ("int8", "fp32", "fp16"):
        assert f"{name}: relative_l2" in engine.why


def test_a_spent_budget_leaves_the_rest_for_another_build():
    simulated = world(int8=3.0, fp32=2.0, fp16=1.0)
    made = auto(budget="10s")
    ran = []
    while True:
        planned = simulated.plan(made)
        if not planned.ready:
            break
        for step in planned.ready:
            simulated.records[step.stage, step.action.key] = simulated.run(step)
            simulated.spent[step.action.key] = 11.0 if step.id == "compile:onnxruntime:cpu:int8" else 0.1
            ran.append(step.id)
    candidates, engine = outcome(planned)
    assert candidates == {"int8": (True, 3.0), "fp32": (None, None), "fp16": (None, None)}
    assert engine.given == "int8"  # what had begun was finished
    assert engine.candidates[1].reasons == ("not tried: the budget of 10s is spent",)
    assert not any("fp16" in step for step in ran)
    assert planned.fresh
    first = engine.publish.action.key

    simulated.spent = {}  # another build
    assert not simulated.plan(made).fresh
    ran, planned = simulated.build(made)
    candidates, engine = outcome(planned)
    assert candidates == {"int8": (True, 3.0), "fp32": (True, 2.0), "fp16": (True, 1.0)}
    assert engine.given == "fp16"
    assert engine.publish.action.key != first
    assert not any("int8" in step for step in ran)


def test_what_has_begun_when_the_budget_ends_is_finished():
    simulated = world(int8=3.0, fp32=2.0, fp16=1.0)
    made = auto(budget="10s")
    while True:
        planned = simulated.plan(made)
        if not planned.ready:
            break
        for step in planned.ready:
            simulated.records[step.stage, step.action.key] = simulated.run(step)
            simulated.spent[step.action.key] = 11.0 if step.id == "compile:onnxruntime:cpu:fp32" else 0.1
    assert outcome(planned)[0] == {"int8": (True, 3.0), "fp32": (True, 2.0), "fp16": (None, None)}


def test_the_budget_never_ends_the_search_before_one_has_passed():
    simulated = world(int8=3.0, fp32=2.0, fp16=1.0)
    simulated.facts["verify:onnxruntime:cpu:int8"] = BAD
    made = auto(budget="1s")
    while True:
        planned = simulated.plan(made)
        if not planned.ready:
            break
        for step in planned.ready:
            simulated.records[step.stage, step.action.key] = simulated.run(step)
            simulated.spent[step.action.key] = 5.0
    candidates, engine = outcome(planned)
    assert candidates == {"int8": (False, None), "fp32": (True, 2.0), "fp16": (None, None)}
    assert engine.given == "fp32"


def test_a_second_build_runs_nothing_and_another_set_of_candidates_only_what_is_new():
    simulated = world(int8=3.0, fp32=2.0, fp16=1.0)
    simulated.build(auto(candidates=["int8", "fp32"]))
    assert simulated.build(auto(candidates=["int8", "fp32"]))[0] == []
    ran, planned = simulated.build(auto(candidates=["int8", "fp32", "fp16"]))
    assert {step for step in ran if "onnxruntime" in step} == {
        f"{stage}:onnxruntime:cpu:fp16" for stage in ("compile", "verify", "benchmark")
    } | {"publish:onnxruntime:cpu:auto"}
    assert outcome(planned)[1].given == "fp16"


def test_only_the_chosen_one_is_compared_with_others():
    ran, planned = world(int8=3.0, fp32=2.0, fp16=1.0).build(auto(benchmark={"compare": ["torch"]}))
    timed = [step for step in ran if step.startswith("benchmark")]
    assert timed == [f"benchmark:onnxruntime:cpu:{name}" for name in ("int8", "fp32", "fp16", "fp16:compared")]
    assert outcome(planned)[1].benchmark.id == "benchmark:onnxruntime:cpu:fp16:compared"


def test_levels_of_the_compiler_are_tried_for_each_precision():
    simulated = world(H200, fp16_o3=2.0, fp16_o5=1.5, fp32_o3=4.0, fp32_o5=3.0)
    made = auto("tensorrt", "sm90", candidates=["fp16", "fp32"], optimization_levels=[3, 5])
    ran, planned = simulated.build(made)
    candidates, engine = outcome(planned)
    assert candidates == {
        "fp16-o3": (True, 2.0), "fp32-o3": (True, 4.0), "fp16-o5": (True, 1.5), "fp32-o5": (True, 3.0),
    }  # fmt: skip
    assert (engine.given, engine.compile.action.params["optimization_level"]) == ("fp16", 5)
    assert {step for step in ran if step.startswith("compile")} == {
        f"compile:tensorrt:sm90:{name}" for name in candidates
    }


def test_what_a_version_lacks_is_a_reason_and_no_fault():
    simulated = world(H200, int8_fp16=1.0, fp16=2.0, int8=3.0, tf32=4.0, fp32=5.0)
    _ran, planned = simulated.build(auto("tensorrt", "sm90"))
    candidates, engine = outcome(planned)
    assert list(candidates) == ["int8-fp16", "fp16", "bf16", "int8", "tf32", "fp32"]
    assert candidates["bf16"] == (False, None)
    assert "begins with TensorRT 10" in engine.candidates[2].reasons[0]
    assert engine.given == "int8-fp16"


def test_where_nothing_can_be_executed_the_first_that_passes_counts():
    simulated = World()
    simulated.facts["verify:int8-fp16"] = BAD
    ran, planned = simulated.build(auto("tensorrt-rtx", "sm89"))
    candidates, engine = outcome(planned)
    assert engine.given == "fp16"
    assert candidates["int8-fp16"] == (False, None)
    assert candidates["fp16"] == (True, None)
    assert {candidates[name] for name in ("bf16", "int8", "tf32", "fp32")} == {(None, None)}
    assert "nothing is measured here" in engine.candidates[2].reasons[0]
    assert not any("benchmark" in step for step in ran)


def test_it_waits_for_a_host_that_can_compile():
    planned = World().plan(auto("tensorrt", "sm90"))
    (engine,) = planned.engines
    assert engine.state == "waiting"
    assert "sm90" in engine.why


def test_int8_is_a_candidate_only_where_there_is_calibration_data():
    made = recipe(lambda d: d.update(precision={"build": "auto"}, targets=[{"runtime": "onnxruntime"}]))
    assert candidates_of(made, made.targets[0]) == ("fp32", "fp16")
    assert candidates_of(auto(), auto().targets[0]) == ("int8", "fp32", "fp16")
    assert candidates_of(auto(candidates=["bf16", "fp32"]), auto().targets[0]) == ("fp32",)


def test_the_better_way_counts_and_cases_weigh_alike():
    facts = {"cases": [*timing(4.0, 1.0)["cases"], {"name": "bulk/8", "graph": False, "latency_ms": {"p50": 100.0}}]}
    ms, graph = measured(facts)
    assert ms == pytest.approx(10.0)  # the geometric mean of 1 and 100
    assert graph is True


_CANDIDATES = st.builds(
    Candidate,
    precision=st.sampled_from(PRECISIONS["tensorrt"]),
    level=st.none() | st.integers(0, 5),
    passed=st.sampled_from([True, False, None]),
    ms=st.none() | st.floats(1e-3, 1e3),
)


@given(st.lists(_CANDIDATES, max_size=8))
def test_what_is_chosen_passed_is_among_the_fastest_and_of_those_the_most_exact(candidates):
    best = fastest(candidates)
    passed = [one for one in candidates if one.passed]
    if not passed:
        assert best is None
        return
    assert best in passed
    timed = [one for one in passed if one.ms is not None]
    if not timed:
        assert best is passed[0]
        return
    least = min(one.ms for one in timed)
    assert best.ms <= least * (1 + TOLERANCE)
    close = [one for one in timed if one.ms <= least * (1 + TOLERANCE)]
    assert EXACTNESS[best.precision] == max(EXACTNESS[one.precision] for one in close)


@pytest.mark.parametrize(("fp32", "best"), [(1.019, "fp32"), (1.021, "fp16")])
def test_of_those_that_are_as_fast_the_most_exact_is_taken(fp32, best):
    one, other = Candidate("fp16", passed=True, ms=1.0), Candidate("fp32", passed=True, ms=fp32)
    assert fastest([one, other]).precision == fastest([other, one]).precision == best
    assert fastest([one, replace(other, precision="bf16")]).precision == "fp16"  # as exact: the first counts
