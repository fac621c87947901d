"""Refit instead of rebuild, as it is planned: when it may be, what it is made of, and what takes its place."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest

from artifacts.records import ActionRecord
from artifacts.refits import Base, refit_identity
from artifacts.refs import ArtifactRef
from recipes.files import LocalFile
from recipes.plan import Plan
from recipes.planner import plan
from recipes.schema import Recipe
from recipes.steps import Step
from tests.unit.recipes.simulated import FILES, GOOD, HOST, World, digest, recipe
from tests.unit.recipes.test_planner import H200

HERE = replace(HOST, runtimes={"tensorrt": "10.9.0.34"}, gpus=(H200,), driver="570.86.15")
FP16 = "tensorrt:sm90:fp16"
MAKERS = ("compile", "refit")


def retrained(number: int):
    return replace(FILES, weights=LocalFile("weights.safetensors", digest(f"weights {number}"), 10, "w"))


def wish(refit: str = "weights", **options: object) -> Recipe:
    return recipe(
        lambda d: d.update(
            targets=[{"runtime": "tensorrt", "gpus": ["sm90"]}],
            precision={"build": ["fp16"]},
            build={"refit": refit, **options},
        )
    )


@dataclass
class Fleet(World):
    """A simulated build whose typed graphs have one structure, and which lists what may be refitted, as a session does."""

    listed: dict[str, list[Base]] = field(default_factory=dict)
    structure: str = digest("structure")

    def __post_init__(self) -> None:
        self.host = HERE
        self.bases = lambda identity: self.listed.get(identity, ())

    def run(self, step: Step) -> ActionRecord:
        record = super().run(step)
        if step.stage == "type":
            return replace(record, facts={"structure": self.structure})
        if step.stage == "compile":
            identity = refit_identity(record.preimage, self.structure)
            self.listed.setdefault(identity, []).insert(0, Base(record.key, f"digits/{record.key[:4]}"))
            outputs = {
                **record.outputs,
                "refit.safetensors": ArtifactRef(digest(record.key), 10, "x/y"),
                "layers.json": ArtifactRef(digest("layers"), 10, "x/y"),
            }
            return replace(record, outputs=outputs, facts={"refit": {"structure": self.structure}})
        return record

    def made(self, wanted: Recipe, files=FILES) -> tuple[list[str], Plan]:
        """Build; return which steps made plans, and the last plan."""
        ran, planned = self.build(wanted, files)
        assert planned.fresh
        assert planned.status == 0
        assert self.build(wanted, files)[0] == []  # whatever was done, it is done once
        return [step for step in ran if step.startswith(MAKERS)], planned

    def ready_to_make(self, wanted: Recipe, files) -> Step:
        """Run what comes before the one step that makes a plan, and return that."""
        while True:
            ready = self.plan(wanted, files).ready
            makers = [step for step in ready if step.stage in MAKERS]
            if makers:
                assert len(makers) == 1
                return makers[0]
            for step in ready:
                self.records[step.stage, step.action.key] = self.run(step)


@pytest.fixture
def fleet() -> Fleet:
    """A store that holds one engine which can be refitted."""
    world = Fleet()
    assert world.made(wish())[0] == [f"compile:{FP16}"]
    return world


def step_of(planned: Plan, name: str) -> Step:
    return next(step for step in planned.steps if step.id == name)


def test_new_weights_alone_are_put_into_the_plan_that_is_there(fleet: Fleet):
    (base,) = next(iter(fleet.listed.values()))
    compiled = fleet.records["compile", base.key]
    ran, planned = fleet.made(wish(), retrained(1))
    assert ran == [f"refit:{FP16}"]
    (engine,) = planned.engines
    refit = engine.compile
    assert refit.action.params == compiled.preimage["params"]
    assert refit.action.toolchain == compiled.preimage["toolchain"]
    assert refit.action.inputs == {
        "model.onnx": step_of(planned, "type:fp16").record.outputs["model.onnx"].digest,
        "model.plan": compiled.outputs["model.plan"].digest,
        "refit.safetensors": compiled.outputs["refit.safetensors"].digest,
        "layers.json": digest("layers"),
    }
    assert engine.refitted_from == base
    assert engine.publish.action.params["refitted_from"] == base.key
    # Gated as a compiled engine is: executed on the device, and published as it was found there.
    assert engine.engine_verify.inputs["model.plan"] == refit.record.outputs["model.plan"]
    assert engine.publish.inputs["model.plan"] == refit.record.outputs["model.plan"]


def test_the_plan_says_what_the_engine_is_refitted_from(fleet: Fleet):
    (base,) = next(iter(fleet.listed.values()))
    refit = fleet.ready_to_make(wish(), retrained(1))
    assert (refit.id, refit.why[0]) == (f"refit:{FP16}", f"refit: only weights changed since {base.engine}")


def test_every_retraining_is_refitted_from_what_was_compiled_once(fleet: Fleet):
    for number in range(3):
        assert fleet.made(wish(), retrained(number))[0] == [f"refit:{FP16}"]
    assert fleet.made(wish())[0] == []  # the first weights again: what was compiled for them is there


OTHERS = {
    "structure": lambda fleet: setattr(fleet, "structure", digest("another")),
    "runtime": lambda fleet: setattr(fleet, "host", replace(HERE, runtimes={"tensorrt": "10.13.3.9"})),
    "driver branch": lambda fleet: setattr(fleet, "host", replace(HERE, driver="580.10.00")),
    "device": lambda fleet: setattr(fleet, "host", replace(HERE, gpus=(replace(H200, sm_count=114),))),
    "no list": lambda fleet: fleet.listed.clear(),
    "the base's record or a blob of it is gone": lambda fleet: [
        fleet.records.pop(("compile", base.key)) for bases in fleet.listed.values() for base in bases
    ],
}


@pytest.mark.parametrize("what", OTHERS)
def test_more_than_weights_changed_so_it_is_compiled(fleet: Fleet, what: str):
    OTHERS[what](fleet)
    assert fleet.made(wish(), retrained(1))[0] == [f"compile:{FP16}"]


@pytest.mark.parametrize("option", [{"workspace": "2GiB"}, {"optimization_level": 5}])
def test_other_options_compile(fleet: Fleet, option: dict):
    assert fleet.made(wish(**option), retrained(1))[0] == [f"compile:{FP16}"]


def test_a_list_that_names_another_compilation_is_not_believed(fleet: Fleet):
    fleet.made(wish(workspace="2GiB"))
    first, second = fleet.listed
    fleet.listed[first], fleet.listed[second] = fleet.listed[second], fleet.listed[first]
    assert fleet.made(wish(), retrained(1))[0] == [f"compile:{FP16}"]


def test_a_base_that_left_nothing_to_refit_it_with_is_passed_over(fleet: Fleet):
    (base,) = next(iter(fleet.listed.values()))
    record = fleet.records["compile", base.key]
    fleet.records["compile", base.key] = replace(record, outputs={"model.plan": record.outputs["model.plan"]})
    assert fleet.made(wish(), retrained(1))[0] == [f"compile:{FP16}"]


def test_without_the_option_nothing_is_refitted_and_no_key_knows_of_it():
    world = Fleet()
    ran, planned = world.made(wish("none"))
    assert ran == [f"compile:{FP16}"]
    assert "structure" not in step_of(planned, "type:fp16").action.params
    assert "refit" not in planned.engines[0].compile.action.params
    assert world.made(wish("none"), retrained(1))[0] == [f"compile:{FP16}"]


def test_a_refit_that_fails_gives_way_to_a_compilation_that_says_so(fleet: Fleet):
    (base,) = next(iter(fleet.listed.values()))
    assert fleet.made(wish(), retrained(3))[0] == [f"refit:{FP16}"]
    refit = fleet.ready_to_make(wish(), retrained(1))
    fleet.failures[refit.action.key] = "rejected setting: the weight w changed\n  next: compile"
    planned = fleet.plan(wish(), retrained(1))
    assert not [step for step in planned.steps if step.stage == "refit"]
    why = step_of(planned, f"compile:{FP16}").why
    assert why[0] == f"compiled: the refit of {base.engine} failed: rejected setting: the weight w changed"
    assert fleet.made(wish(), retrained(1))[0] == [f"compile:{FP16}"]
    # What was compiled instead is the newest, so the next weights are put into it; what was refitted before holds.
    assert fleet.made(wish(), retrained(2))[1].engines[0].refitted_from != base
    assert fleet.made(wish(), retrained(3))[0] == []


def test_a_refitted_engine_that_does_not_pass_gives_way_to_a_compiled_one(fleet: Fleet):
    bad = {**GOOD, "parity": {**GOOD["parity"], "relative_l2": 0.5}}
    ran: list[str] = []
    while (planned := fleet.plan(wish(), retrained(1))).ready:
        for step in planned.ready:
            record = fleet.run(step)
            if step.id == f"verify:{FP16}" and planned.engines[0].compile.stage == "refit":
                record = replace(record, facts=bad)
            fleet.records[step.stage, step.action.key] = record
            ran.append(step.id)
            if step.stage == "compile":
                assert step.why[0].startswith("compiled: what was refitted does not pass: ")
    assert [step for step in ran if step.startswith(MAKERS)] == [f"refit:{FP16}", f"compile:{FP16}"]
    (engine,) = planned.engines
    assert (engine.given, engine.compile.stage, engine.refitted_from) == ("fp16", "compile", None)
    assert planned.fresh


def test_a_stripped_plan_is_filled_before_it_is_executed_and_published():
    world = Fleet()
    ran, planned = world.made(wish("stripped"))
    assert ran == [f"compile:{FP16}", f"refit:{FP16}"]
    (engine,) = planned.engines
    compiled = step_of(planned, f"compile:{FP16}")
    assert engine.compile.inputs["model.plan"] == compiled.record.outputs["model.plan"]
    assert engine.publish.inputs["model.plan"] == engine.compile.record.outputs["model.plan"]
    assert engine.refitted_from.key == compiled.action.key
    assert world.made(wish("stripped"), retrained(1))[0] == [f"refit:{FP16}"]


def test_a_plan_without_a_store_of_hints_compiles(fleet: Fleet):
    planned = plan(
        wish(),
        retrained(1),
        HERE,
        version=fleet.versions.get,
        lookup=lambda stage, key: fleet.records.get((stage, key)),
    )
    assert not [step for step in planned.steps if step.stage == "refit"]
