"""Fallbacks: which targets ask for one, what it takes, when it is published, and what ONNX Runtime is told."""

from __future__ import annotations

import pytest

from recipes.fallbacks import CACHE, asking, providers_of, targets_of
from tests.unit.recipes.simulated import GOOD, World, recipe
from tests.unit.recipes.test_parts import JUDGED, PARTED, PARTS, gated, parted, read

BAD = {**GOOD, "parity": {**GOOD["parity"], "relative_l2": 0.5}}
STEPS = {"type:fp32", "verify:fp32", "verify:fallback", "publish:fallback:onnx"}


def with_fallback(document):
    document["fallback"] = "onnx"


def test_only_targets_that_are_no_fallback_themselves_ask_by_the_recipes_word():
    assert asking(recipe(with_fallback), "onnx") == [("tensorrt-rtx", "sm89"), ("tensorrt-rtx", "sm120")]
    assert asking(recipe(), "onnx") == []
    assert asking(recipe(lambda d: d["targets"][1].update(fallback="onnx")), "onnx") == [("onnxruntime", "cpu")]

    def but_one(document):
        with_fallback(document)
        document["targets"][0]["fallback"] = "none"

    assert asking(recipe(but_one), "onnx") == []


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


SAVED = {"plan": "model.pt2", "form": "exported program", "inputs": ["image"], "outputs": ["logits"]}
OUTPUTS = {"logits": {"dtype": "float32", "shape": ["batch", 10]}}


def of_source(document):
    document["fallback"] = "source"


def world(*, versions=None, **facts):
    given = {} if versions is None else {"versions": versions}
    return World(**given, facts={"save": SAVED, "verify:source": {**GOOD, "outputs": OUTPUTS}} | facts)


def test_a_source_model_comes_of_the_source_and_is_there_where_no_exporter_reads_it():
    (export,) = [step for step in world().build(recipe(of_source))[1].steps if step.id == "export"]
    unreadable = world()
    unreadable.failures[export.action.key] = "unsupported operator"
    ran, planned = unreadable.build(recipe(of_source))
    assert "export" not in ran
    assert [engine.state for engine in planned.engines] == [*["failed"] * 6, "cached"]
    made = planned.engines[-1]
    assert made.target == "torch-2.13.0-source"
    assert made.publish.action.params["fallback"]["instead_of"] == ["tensorrt-rtx:sm89", "tensorrt-rtx:sm120"]
    assert set(made.publish.action.inputs) == {"model.pt2"}
    assert made.publish.action.params["measured"]["engine"]["metric"] == GOOD["metric"]
    assert not any(step.id.startswith(("type", "simplify")) for step in planned.steps if step.record is not None)


@pytest.mark.parametrize(("kind", "step"), [("onnx", "verify:fallback"), ("source", "verify:source")])
def test_a_fallback_is_judged_by_the_recipes_metric(kind, step):
    lost = {**GOOD, "outputs": OUTPUTS, "metric": {"name": "top1", "value": 0.9, "source": 0.99}}
    ran, planned = world(**{step: lost}).build(recipe(lambda document: document.update(fallback=kind)))
    assert f"publish:fallback:{kind}" not in ran
    assert planned.engines[-1].state == "failed"
    assert "top1 0.9 < floor 0.97" in planned.engines[-1].why
    assert planned.engines[-1].trials[0].verdict.reasons


def test_targets_may_ask_for_different_kinds_and_each_is_built_alone_by_name():
    def both(document):
        of_source(document)
        document["targets"][1]["fallback"] = "onnx"

    assert targets_of(recipe(both)) == ["onnxruntime:fallback", "torch:source"]
    planned = world().plan(recipe(both))
    assert [engine.target for engine in planned.engines[-2:]] == ["onnxruntime-1.31.1-fallback", "torch-2.13.0-source"]
    alone = world().build(recipe(both), targets=("torch:source",))[1]
    assert [engine.fallback for engine in alone.engines] == ["source"]
    assert "export" not in {step.id for step in alone.steps}


def test_it_waits_where_its_framework_is_not():
    elsewhere = world(versions={name: found for name, found in World().versions.items() if name != "torch"})
    made = elsewhere.plan(recipe(of_source)).engines[-1]
    assert (made.state, made.why) == ("waiting", "needs a host with torch; it is not installed here")


@pytest.mark.parametrize(("kind", "step"), [("onnx", "verify:{}:fallback"), ("source", "verify:{}:source")])
def test_of_a_model_in_parts_every_part_is_published_together_or_none(kind, step):
    def asked(document):
        document["fallback"] = kind

    saved = {f"save:{part}": {**SAVED, "plan": f"{part}.pt2"} for part in PARTS}
    made = World(facts={"save": SAVED, "verify": {**GOOD, "outputs": OUTPUTS}, **saved})
    order, planned = made.build(parted(asked), PARTED)
    engine = planned.engines[-1]
    assert (engine.fallback, engine.state, set(engine.parts)) == (kind, "cached", set(PARTS))
    assert [one for one in order if one.startswith("publish:fallback")] == [f"publish:fallback:{kind}"]
    file = "model.onnx" if kind == "onnx" else "model.pt2"
    assert set(engine.publish.inputs) == {f"{part}/{file}" for part in PARTS}
    assert set(engine.publish.action.params["parts"]) == set(PARTS)
    bad = World(facts={"save": SAVED, "verify": {**GOOD, "outputs": OUTPUTS}, step.format("decoder"): BAD})
    order, planned = bad.build(parted(asked), PARTED)
    assert planned.engines[-1].state == "failed"
    assert planned.engines[-1].why.startswith("decoder: the fallback fails its gates: ")
    assert not any(one.startswith("publish:fallback") for one in order)


@pytest.mark.parametrize(
    ("kind", "step"),
    [("onnx", "verify:together:onnxruntime:fallback:encoder-fp32,decoder-fp32"), ("source", "verify:together:source")],
)
def test_what_parts_do_together_is_judged_of_either_kind_in_what_serves_it(kind, step):
    def asked(document):
        document["fallback"] = kind

    facts = {
        "save": SAVED,
        "save:decoder": {**SAVED, "plan": "decoder.pt2"},
        "verify": {**GOOD, "outputs": OUTPUTS},
        "verify:together:encoder-fp16,decoder-fp16": read(0.94),
        "verify:together:encoder-fp32,decoder-fp32": read(0.94),
    }
    _order, planned = World(facts={**facts, step: read(0.95)}).build(gated(asked), JUDGED)
    stated = planned.engines[-1].publish.action.params
    assert (planned.engines[-1].state, planned.engines[-1].fallback) == ("cached", kind)
    assert stated["together"] == {"name": "exact-match", "floor": 0.9, "max_drop": None}
    assert stated["measured"]["together/engine"]["metric"]["value"] == 0.95
    ran, planned = World(facts={**facts, step: read(0.5)}).build(gated(asked), JUDGED)
    assert planned.engines[-1].why == "the fallback fails its gates: together: exact-match 0.5 < floor 0.9"
    assert f"publish:fallback:{kind}" not in ran


def test_each_saved_part_is_run_as_it_was_saved_by_its_framework():
    def asked(document):
        document["fallback"] = "source"

    facts = {"save:encoder": SAVED, "save:decoder": {**SAVED, "plan": "decoder.pt2"}}
    made = World(facts={**facts, "verify": {**GOOD, "outputs": OUTPUTS}, "verify:together:source": read(0.95)})
    _order, planned = made.build(gated(asked), JUDGED)
    (step,) = [step for step in planned.steps if step.id == "verify:together:source"]
    assert step.action.params["measured"] == {"encoder": SAVED, "decoder": {**SAVED, "plan": "decoder.pt2"}}
    assert {part["executor"] for part in step.action.params["parts"].values()} == {"torch"}
    assert {"encoder/model.pt2", "decoder/model.pt2"} <= set(step.action.inputs)
    assert not any(name.endswith("onnx") for name in step.action.inputs)
