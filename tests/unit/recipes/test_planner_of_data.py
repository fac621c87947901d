"""What is planned of data sets: when they are read, what int8 is judged by, and which layers it leaves high."""

from __future__ import annotations

from tests.unit.recipes.simulated import World, recipe


def test_without_a_metric_int8_alone_is_compared_on_calibration_samples_that_calibration_leaves_out():
    _ran, planned = World().build(recipe(lambda d: d.pop("acceptance")))
    steps = {step.id: step for step in planned.steps}
    assert set(steps["reference:held-out"].action.inputs) >= {"dataset.safetensors"}
    with_spared = {step.id for step in planned.steps if "held-out.safetensors" in step.inputs}
    assert with_spared == {"verify:int8", "verify:onnxruntime:cpu:int8"}
    assert steps["calibrate"].action.params["held_out"] is True
    _ran, planned = World().build(recipe())
    assert "held_out" not in next(step for step in planned.steps if step.id == "calibrate").action.params
    assert "reference:held-out" not in {step.id for step in planned.steps}


def test_no_source_runs_before_the_data_was_read_and_checked():
    world = World()
    first = {step.id for step in world.plan(recipe()).ready}
    assert {"fetch:calibration", "fetch:labelled", "fetch:code"} <= first
    assert not {step for step in first if step.startswith(("export", "reference"))}
    (bad,) = [step for step in world.plan(recipe()).steps if step.id == "fetch:calibration"]
    world.failures[bad.action.key] = "bad data: 'image' holds 3 NaN"
    ran, planned = world.build(recipe())
    assert all(step.startswith("fetch") for step in ran)
    assert {engine.state for engine in planned.engines} == {"failed"}
    assert planned.status == 1


def test_data_that_nothing_selected_reads_keeps_no_source_waiting():
    world = World()
    change = recipe(lambda d: d["targets"][1].update(precision=["fp32"]))
    planned = world.plan(change, targets=("onnxruntime",))
    assert "fetch:calibration" not in {step.id for step in planned.steps}


def test_layers_are_chosen_where_the_recipe_asks_for_it_by_its_own_gates_and_for_int8_alone():
    def auto(document):
        document["precision"]["keep"] = "auto"

    def stricter(document):
        auto(document)
        document["acceptance"]["metric"]["max_drop"] = 0.005

    def plan(change):
        return {step.id: step for step in World().build(recipe(change))[1].steps}

    plain, asked, strict = (plan(change) for change in (lambda _d: None, auto, stricter))
    assert "sensitivity:int8" not in plain
    step = asked["sensitivity:int8"].action
    assert set(step.inputs) == {
        "model.onnx", "ranges.json", "reference.safetensors", "dataset.safetensors", "outputs.safetensors",
    }  # fmt: skip
    assert step.params["gate"]["max_drop"] == 0.01
    assert "keep.json" in asked["type:int8"].inputs
    assert asked["type:int8"].action.params["keep"] == []
    assert asked["type:fp16"].action.key == plain["type:fp16"].action.key
    assert asked["calibrate"].action.key == plain["calibrate"].action.key
    assert strict["sensitivity:int8"].action.key != step.key
    published = next(step for step in asked.values() if step.id == "publish:onnxruntime:cpu:int8")
    assert {"sensitivity.json", "calibration.json"} <= set(published.inputs)
