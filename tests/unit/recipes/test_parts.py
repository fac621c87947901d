"""Recipes of several graphs: what a part is as a recipe of its own, what is wrong with one, and what each change runs again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from recipes.errors import RecipeError
from recipes.files import LocalFile, RecipeFiles
from recipes.loader import load
from recipes.parts import part_recipe
from recipes.rules import check
from tests.unit.recipes.simulated import FILES, GOOD, World, digest, recipe

ROOT = Path(__file__).resolve().parents[3]
PARTS = {
    "encoder": {
        "inputs": {"image": {"shape": ["batch", 3, 32, 32]}},
        "outputs": ["states"],
    },
    "decoder": {
        "module": "decoder",
        "inputs": {"states": {"shape": ["batch", 17, 64]}, "past": {"shape": ["batch", "past", 64]}},
        "outputs": ["logits", "new_past"],
    },
}
OWN = replace(FILES, calibration=None, labelled=None)
PARTED = replace(OWN, parts={"encoder": OWN, "decoder": OWN})


def parted(change=lambda _document: None):
    def apply(document):
        for key in ("inputs", "outputs"):
            del document[key]
        document["parts"] = {name: dict(part) for name, part in PARTS.items()}
        document["profiles"] = {"default": {"batch": [1, 1, 4], "past": [1, 8, 31]}}
        document["precision"] = {"build": ["fp16"], "fallback": {"fp16": ["fp32"]}}
        document["acceptance"] = {}
        document["targets"] = [{"runtime": "tensorrt-rtx", "gpus": ["sm89"]}, {"runtime": "onnxruntime"}]
        change(document)

    return recipe(apply)


@pytest.fixture
def built() -> World:
    world = World()
    world.build(parted(), PARTED)
    return world


def ran(world: World, change) -> set[str]:
    return set(world.build(parted(change), PARTED)[0])


def test_parts_share_the_fetched_files_and_are_published_in_one_step_for_each_target():
    order, planned = World().build(parted(), PARTED)
    assert planned.fresh
    assert sorted(step for step in order if step.startswith(("fetch", "publish"))) == [
        "fetch:code", "fetch:weights", "publish:onnxruntime:cpu:fp16", "publish:tensorrt-rtx:sm89:fp16",
    ]  # fmt: skip
    for stage in ("export", "simplify", "type:{}:fp16", "verify:{}:fp16", "compile:{}:tensorrt-rtx:sm89:fp16"):
        for part in PARTS:
            step = stage.format(part) if "{}" in stage else f"{stage}:{part}"
            assert step in order
            assert order.index(step) < order.index("publish:tensorrt-rtx:sm89:fp16")
    published = planned.engines[0].publish
    assert set(published.inputs) == {"encoder/model.plan", "decoder/model.plan"}


def test_another_profile_of_one_part_runs_that_part_alone(built):
    def longer(document):
        document["profiles"]["default"]["past"] = [1, 8, 63]

    assert ran(built, longer) == {
        "simplify:decoder", "reference:decoder:parity", "outliers:decoder", "verify:decoder:export",
        "verify:decoder:simplify", "verify:decoder:fp16", "compile:decoder:tensorrt-rtx:sm89:fp16",
        "verify:decoder:onnxruntime:cpu:fp16", "publish:tensorrt-rtx:sm89:fp16", "publish:onnxruntime:cpu:fp16",
    }  # fmt: skip


def test_a_precision_of_one_part_leaves_the_other_alone(built):
    def exact(document):
        document["parts"]["decoder"]["precision"] = {"build": {"fp16": "fp32"}}

    again = ran(built, exact)
    assert "type:decoder:fp32" in again
    assert not any("encoder" in step for step in again)


def test_a_part_that_fails_its_gate_gives_way_and_the_others_do_not():
    bad = {**GOOD, "parity": {**GOOD["parity"], "relative_l2": 0.5}}
    world = World(facts={"verify:decoder:fp16": bad})
    _order, planned = world.build(parted(), PARTED)
    engine = planned.engines[0]
    assert {name: part.given for name, part in engine.parts.items()} == {"encoder": "fp16", "decoder": "fp32"}
    assert engine.given == "fp16"
    assert engine.state == "cached"


def test_where_one_part_has_no_precision_that_passes_nothing_is_published():
    bad = {**GOOD, "parity": {**GOOD["parity"], "relative_l2": 0.5}}
    world = World(facts={"verify:decoder:fp16": bad, "verify:decoder:fp32": bad})
    order, planned = world.build(parted(), PARTED)
    assert [engine.state for engine in planned.engines] == ["failed", "failed"]
    assert "decoder: no precision passed its gates" in planned.engines[0].why
    assert not any(step.startswith("publish") for step in order)
    assert planned.status == 1


def test_a_failed_step_of_one_part_publishes_nothing():
    world = World()
    step = next(step for step in world.plan(parted(), PARTED).steps if step.id == "fetch:code")
    world.failures = {step.action.key: "no"}
    order, planned = world.build(parted(), PARTED)
    assert planned.status == 1
    assert not any(step.startswith("publish") for step in order)


TOGETHER = {
    "run": "model.py:read",
    "inputs": {"image": {"shape": ["batch", 3, 32, 32]}},
    "name": "exact-match",
    "data": {"data": "heldout.npz"},
    "floor": 0.9,
}
BUILT = ("fp16", "bf16", "fp32")
JUDGED = replace(PARTED, labelled=FILES.labelled, run=FILES.code)


def gated(change=lambda _document: None):
    def apply(document):
        document["precision"] = {"build": ["fp16"], "fallback": {"fp16": ["bf16", "fp32"]}}
        document["targets"] = [{"runtime": "tensorrt-rtx", "gpus": ["sm89"]}]
        document["acceptance"] = {"together": dict(TOGETHER)}
        change(document)

    return parted(apply)


def read(value: float) -> dict:
    return {"executed": True, "metric": {"name": "exact-match", "value": value, "source": 0.95}, "non_finite": 0}


def test_parts_that_pass_together_are_published_with_what_was_measured():
    world = World(facts={"verify:together:encoder-fp16,decoder-fp16": read(0.94)})
    order, planned = world.build(gated(), JUDGED)
    (engine,) = planned.engines
    assert engine.state == "cached"
    assert order.index("reference:together") < order.index("verify:together:encoder-fp16,decoder-fp16")
    stated = engine.publish.action.params
    assert stated["together"] == {"name": "exact-match", "floor": 0.9, "max_drop": None}
    assert stated["measured"]["together/graph"]["metric"]["value"] == 0.94
    assert world.build(gated(), JUDGED)[0] == []


def test_where_parts_fail_together_the_farthest_from_its_source_gives_way_step_by_step():
    far = {**GOOD, "parity": {**GOOD["parity"], "relative_l2": 5e-3}}
    world = World(
        facts={
            "verify:decoder:fp16": far,
            "verify:together:encoder-fp16,decoder-fp16": read(0.1),
            "verify:together:encoder-fp16,decoder-bf16": read(0.2),
            "verify:together:encoder-bf16,decoder-bf16": read(0.3),
            "verify:together:encoder-fp16,decoder-fp32": read(0.9),
        }
    )

    def two_steps(document):
        document["parts"]["encoder"]["precision"] = {"fallback": {"fp16": []}}

    _order, planned = world.build(gated(two_steps), JUDGED)
    (engine,) = planned.engines
    assert {name: part.given for name, part in engine.parts.items()} == {"encoder": "fp16", "decoder": "fp32"}
    assert engine.state == "cached"
    tried = engine.publish.action.params["parts"]["decoder"]["tried"]
    assert tried == [
        {"precision": "fp16", "reasons": ["together: exact-match 0.1 < floor 0.9"]},
        {"precision": "bf16", "reasons": ["together: exact-match 0.2 < floor 0.9"]},
    ]


FAR = {**GOOD, "parity": {**GOOD["parity"], "relative_l2": 5e-3}}


def test_nothing_is_compiled_of_a_combination_whose_graphs_fail_together():
    facts = {
        "verify:decoder:fp16": FAR,
        "verify:together:encoder-fp16,decoder-fp16": read(0.1),
        "verify:together:encoder-fp16,decoder-bf16": read(0.94),
    }
    order, planned = World(facts=facts).build(gated(), JUDGED)
    assert planned.status == 0
    compiled = [step for step in order if step.startswith("compile")]
    assert sorted(compiled) == ["compile:decoder:tensorrt-rtx:sm89:bf16", "compile:encoder:tensorrt-rtx:sm89:fp16"]
    assert order.index("verify:together:encoder-fp16,decoder-bf16") < min(map(order.index, compiled))


def test_what_is_compiled_waits_for_the_verdict_on_the_graphs_and_no_key_knows_of_it():
    world = World(facts={"verify:together:encoder-fp16,decoder-fp16": read(0.94)})
    first = world.plan(gated(), JUDGED)
    (step,) = [step for step in first.steps if step.id == "compile:encoder:tensorrt-rtx:sm89:fp16"]
    assert "verify:together:encoder-fp16,decoder-fp16" in step.after
    (judged,) = [one for one in world.build(gated(), JUDGED)[1].steps if one.id == step.id]

    def ungated(document):
        document["acceptance"] = {}

    (plain,) = [one for one in World().build(gated(ungated), PARTED)[1].steps if one.id == step.id]
    assert judged.action.key == plain.action.key


def test_the_combination_that_a_refused_compilation_leaves_is_judged_before_it_is_compiled():
    """The compiler has no kernel for the decoder's types, and with those that come next the parts fail together."""
    facts = {
        "verify:together:encoder-fp16,decoder-fp16": read(0.94),
        "verify:together:encoder-fp16,decoder-bf16": read(0.1),
        "verify:together:encoder-bf16,decoder-bf16": read(0.1),
        "verify:together:encoder-bf16,decoder-fp32": read(0.94),
        "verify:together:encoder-fp16,decoder-fp32": read(0.94),
        "verify:decoder:bf16": FAR,
    }
    passing = World(facts=facts).build(gated(), JUDGED)[1]
    (refused,) = [step for step in passing.steps if step.id == "compile:decoder:tensorrt-rtx:sm89:fp16"]
    world = World(facts=facts, failures={refused.action.key: "no kernel: for half"})
    order, planned = world.build(gated(), JUDGED)
    (engine,) = planned.engines
    assert engine.state == "cached"
    assert planned.status == 0
    assert {name: part.given for name, part in engine.parts.items()} == {"encoder": "fp16", "decoder": "fp32"}
    assert "compile:decoder:tensorrt-rtx:sm89:bf16" not in order
    assert engine.publish.action.params["parts"]["decoder"]["tried"] == [
        {"precision": "fp16", "reasons": ["no kernel: for half"]},
        {"precision": "bf16", "reasons": ["together: exact-match 0.1 < floor 0.9"]},
    ]


def test_parts_that_wait_for_another_host_have_their_graphs_judged_here():
    """So that a host with the GPU, which may lack the source's framework, compiles only what passes."""
    world = World(facts={"verify:together:encoder-fp16,decoder-fp16": read(0.94)})
    world.host = replace(world.host, runtimes={"onnxruntime": "1.31.1"})
    order, planned = world.build(gated(), JUDGED)
    assert planned.engines[0].state == "waiting"
    assert "verify:together:encoder-fp16,decoder-fp16" in order


def test_a_compilation_of_a_part_that_gives_way_may_fail():
    """Graphs pass together, and engines do not, while one of them cannot be timed: what gives way takes that with it."""
    graphs = {
        "verify:decoder:onnxruntime:cpu:fp16": FAR,
        "verify:together:encoder-fp16,decoder-fp16": read(0.94),
        "verify:together:encoder-fp16,decoder-fp32": read(0.94),
        "verify:together:onnxruntime:cpu:encoder-fp16,decoder-fp32": read(0.94),
    }
    engines = "verify:together:onnxruntime:cpu:encoder-fp16,decoder-fp16"

    def timed(document):
        document["precision"]["fallback"] = {"fp16": ["fp32"]}
        document["targets"] = [{"runtime": "onnxruntime"}]
        document["benchmark"] = {}

    def status(part):
        passing = World(facts={**graphs, engines: read(0.94)}).build(gated(timed), JUDGED)[1]
        (step,) = [step for step in passing.steps if step.id == f"benchmark:{part}:onnxruntime:cpu:fp16"]
        world = World(facts={**graphs, engines: read(0.1)}, failures={step.action.key: "crash: it ended"})
        return world.build(gated(timed), JUDGED)[1].status

    assert status("decoder") == 0
    assert status("encoder") == 1  # which is part of what passes


def test_engines_of_a_combination_whose_graphs_fail_are_not_run_together():
    graphs, engines = (
        "verify:together:encoder-fp16,decoder-{}",
        "verify:together:onnxruntime:cpu:encoder-fp16,decoder-{}",
    )
    facts = {"verify:decoder:fp16": FAR, "verify:decoder:onnxruntime:cpu:fp16": FAR, graphs.format("fp16"): read(0.1)}
    facts |= {graphs.format("fp32"): read(0.94), engines.format("fp32"): read(0.94)}

    def executed(document):
        document["precision"]["fallback"] = {"fp16": ["fp32"]}
        document["targets"] = [{"runtime": "onnxruntime"}]

    _order, planned = World(facts=facts).build(gated(executed), JUDGED)
    assert planned.status == 0
    together = {step.id for step in planned.steps if step.id.startswith("verify:together:")}
    assert together == {graphs.format("fp16"), graphs.format("fp32"), engines.format("fp32")}
    (step,) = [step for step in planned.steps if step.id == engines.format("fp32")]
    assert not {"device", "driver"} & set(step.action.toolchain)  # of a GPU, which has no part in it


def test_where_no_part_is_left_to_give_way_nothing_is_published():
    every = [f"verify:together:encoder-{one},decoder-{other}" for one in BUILT for other in BUILT]
    world = World(facts=dict.fromkeys(every, read(0.5)))
    order, planned = world.build(gated(), JUDGED)
    assert planned.engines[0].state == "failed"
    assert "exact-match 0.5 < floor 0.9" in planned.engines[0].why
    assert planned.status == 1
    assert not any(step.startswith("publish") for step in order)


def test_a_bound_of_the_whole_measures_nothing_again():
    world = World(facts={"verify:together:encoder-fp16,decoder-fp16": read(0.94)})
    world.build(gated(), JUDGED)

    def looser(document):
        document["acceptance"]["together"]["floor"] = 0.5

    assert world.build(gated(looser), JUDGED)[0] == ["publish:tensorrt-rtx:sm89:fp16"]


def files_of_their_own(document):
    del document["source"]
    document["export"] = {}
    for name, part in document["parts"].items():
        part.pop("module", None)
        part["source"] = {"framework": "onnx", "model": {"file": f"{name}.onnx"}}


def test_parts_may_have_files_of_their_own_and_another_file_runs_its_part_alone():
    def files(name, content):
        return RecipeFiles(model=(LocalFile("model.onnx", digest(content), 10, f"{name}.onnx"),))

    world, own = World(), {"encoder": files("encoder", "one"), "decoder": files("decoder", "two")}
    made = parted(files_of_their_own)
    assert check(made) == []
    order, planned = world.build(made, RecipeFiles(parts=own))
    assert planned.engines[0].state == "cached"
    assert {step for step in order if step.startswith("fetch")} == {"fetch:encoder:model", "fetch:decoder:model"}
    again, _planned = world.build(made, RecipeFiles(parts={**own, "decoder": files("decoder", "three")}))
    assert "export:decoder" in again
    assert not any("encoder" in step for step in again)


def test_profiles_are_narrowed_to_the_axes_of_a_part():
    assert part_recipe(parted(), "encoder").profiles == {"default": {"batch": [1, 1, 4]}}
    assert check(parted()) == []


@pytest.mark.parametrize(
    ("change", "at", "words"),
    [
        (
            lambda d: d.update(source={"framework": "onnx", "model": {"file": "model.onnx"}}, export={}),
            ("parts", "encoder"),
            "give 'encoder' a file of its own",
        ),
        (
            lambda d: d["acceptance"].update(together={**TOGETHER, "floor": None}),
            ("acceptance", "together"),
            "anything would pass",
        ),
        (
            lambda d: d["acceptance"].update(together={**TOGETHER, "name": "exactly"}),
            ("acceptance", "together", "name"),
            "unknown metric",
        ),
        (
            lambda d: d["acceptance"].update(together={**TOGETHER, "inputs": {"image": {"shape": [], "low": 2.0}}}),
            ("acceptance", "together", "inputs", "image", "low"),
            "must be less than high",
        ),
        (
            lambda d: d["parts"]["encoder"].update(acceptance={"together": TOGETHER}),
            ("parts", "encoder", "acceptance", "together"),
            "is for all parts",
        ),
        (lambda d: d["parts"].pop("encoder"), ("parts",), "one part is no reason"),
        (lambda d: d.update(outputs=["logits"]), ("outputs",), "belongs to a part"),
        (lambda d: d["precision"].update(build="auto"), ("precision", "build"), "auto chooses for models of one graph"),
        (lambda d: d["parts"].update(signatures=PARTS["encoder"]), ("parts", "signatures"), "choose another"),
        (lambda d: d["parts"].update(run=PARTS["encoder"]), ("parts", "run"), "choose another"),
        (lambda d: d["parts"].update(shared=PARTS["encoder"]), ("parts", "shared"), "choose another"),
        (
            lambda d: d["parts"]["decoder"].update(profiles={"default": {"batch": [1, 1, 4]}}),
            ("parts", "decoder", "profiles", "default"),
            "[min, opt, max] of past missing",
        ),
        (lambda d: d["profiles"]["default"].update(width=[1, 2, 3]), ("profiles", "default", "width"), "no part has"),
        (
            lambda d: d["parts"]["decoder"].update(precision={"build": {"int8": "fp16"}}),
            ("parts", "decoder", "precision", "build", "int8"),
            "never applies",
        ),
        (
            lambda d: d["precision"].update(build=["int8"], fallback={}),
            ("precision", "build"),
            "int8 needs precision.calibration",
        ),
    ],
)
def test_what_is_wrong_is_told_where_it_is_stated(change, at, words):
    assert any(where == at and words in what for where, what in check(parted(change)))


def test_a_size_that_is_none_is_told_at_its_place_in_the_part(tmp_path):
    """Both sides of that union complain, with tags that are no part of the file."""
    document = yaml.safe_load((ROOT / "recipes" / "digits-parts.yaml").read_text())
    part, values = next(iter(document["parts"].items()))
    name, tensor = next(iter(values["inputs"].items()))
    tensor["shape"][0] = "batch 4"
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(document))
    with pytest.raises(RecipeError) as caught:
        load(tmp_path / "recipe.yaml")
    (fault,) = caught.value.faults
    assert fault.path == f"parts.{part}.inputs.{name}.shape[0]"
    assert "expected a size" in fault.what
