"""Fallbacks: which targets ask for one, what it takes, when it is published, and what ONNX Runtime is told."""

from __future__ import annotations

import pytest

from recipes.fallbacks import CACHE, asking, providers_of
from tests.unit.recipes.simulated import GOOD, World, recipe

BAD = {**GOOD, "parity": {**GOOD["parity"], "relative_l2": 0.5}}
STEPS = {"type:fp32", "verify:fp32", "verify:fallback", "publish:fallback:onnx"}


def with_fallback(document):
    document["fallback"] = "onnx"


def test_only_targets_that_are_no_fallback_themselves_ask_by_the_recipes_word():
    assert asking(recipe(with_fallback)) == [("tensorrt-rtx", "sm89"), ("tensorrt-rtx", "sm120")]
    assert asking(recipe()) == []
    assert asking(recipe(lambda d: d["targets"][1].update(fallback="onnx"))) == [("onnxruntime", "cpu")]

    def but_one(document):
        with_fallback(document)
        document["targets"][0]["fallback"] = "none"

    assert asking(recipe(but_one)) == []


def test_a_fallback_adds_its_steps_and_changes_no_key():
    plain, asked = World().plan(recipe()), World().plan(recipe(with_fallback))
    before = {step.id for step in plain.steps}
    assert {step.id for step in asked.steps} - before == STEPS - before
    world = World()
    world.build(recipe())
    ran, planned = world.build(recipe(with_fallback))
    assert set(ran) <= STEPS
    assert {"verify:fallback", "publish:fallback:onnx"} <= set(ran)
    assert planned.engines[-1].target == "onnxruntime-1.31.1-fallback"
    published = planned.engines[-1].publish.action.params["fallback"]
    assert published["instead_of"] == ["tensorrt-rtx:sm89", "tensorrt-rtx:sm120"]
    assert published["gpus"] == ["cpu", "sm89", "sm120"]


def test_it_is_published_where_an_engine_fails_and_not_where_it_fails_itself():
    unread = {"target": "x", "state": "no", "words": "", "advice": "", "nodes": []}
    _ran, planned = World(facts={"check": unread}).build(recipe(with_fallback))
    assert [engine.state for engine in planned.engines] == [*["failed"] * 4, "cached", "cached", "cached"]
    ran, planned = World(facts={"verify:fallback": BAD}).build(recipe(with_fallback))
    assert "publish:fallback:onnx" not in ran
    assert planned.engines[-1].state == "failed"
    assert planned.engines[-1].why.startswith("the fallback fails its gates: ")
    assert planned.status == 1


@pytest.mark.parametrize(
    ("targets", "there"),
    [(("tensorrt-rtx:sm89",), True), (("onnxruntime:cpu",), False), (("onnxruntime:fallback",), True)],
)
def test_it_is_built_with_the_targets_that_ask_for_it(targets, there):
    planned = World().plan(recipe(with_fallback), targets=targets)
    assert any(engine.fallback for engine in planned.engines) is there


def test_tensorrt_gets_one_profile_over_all_and_a_folder_for_its_engines():
    def profile(least, best, most):
        fixed = {"min": [1, 4], "opt": [1, 4], "max": [1, 4]}
        return {"inputs": {"x": {"min": [least, 3], "opt": [best, 3], "max": [most, 3]}, "y": fixed}}

    first, second, third = providers_of([profile(4, 8, 16), profile(1, 1, 2)])
    assert first == {
        "name": "TensorrtExecutionProvider",
        "options": {
            "trt_engine_cache_enable": "1",
            "trt_engine_cache_path": CACHE,
            "trt_timing_cache_enable": "1",
            "trt_timing_cache_path": CACHE,
            "trt_profile_min_shapes": "x:1x3",
            "trt_profile_opt_shapes": "x:8x3",
            "trt_profile_max_shapes": "x:16x3",
        },
    }
    assert [second["name"], third["name"]] == ["CUDAExecutionProvider", "CPUExecutionProvider"]
