"""Builds that refit: every step and the store are real, and what needs a GPU is a stand-in or fails as it does here.

On a GPU, with TensorRT itself: tests/gpu/test_refit.py.
"""

from __future__ import annotations

import asyncio
import importlib.util
from functools import cached_property
from pathlib import Path

import onnx
import pytest

from artifacts.host import Gpu, Host
from artifacts.manifest import Manifest
from artifacts.refs import ENGINE_PLAN, SAFETENSORS, ArtifactRef, digest_file
from artifacts.store import open_store
from recipes.files import gather
from recipes.loader import load
from recipes.plan import Plan
from recipes.steps import Step
from tasks.drive import drive
from tasks.process import Limits
from tasks.run import StepRunner
from tasks.session import BuildSession, Outcome
from tasks.structure import structure_digest
from tests.gpu.recipes import write_recipe
from tests.unit.recipes.simulated import GOOD

ENGINE = "tensorrt:sm90:fp32"
HOST = Host(
    "gpu-host",
    "linux",
    "x86_64",
    driver="580.159.04",
    gpus=(Gpu("NVIDIA H200", "GPU-1", "sm90", 150 << 30, 132),),
    runtimes={"tensorrt": "8.6.0"},
)


class Runner(StepRunner):
    """Runs every stage that needs no GPU."""

    def _run_stage(self, step, files, folder):
        if step.stage in ("compile", "refit"):
            output = folder / "outputs"
            output.mkdir()
            (output / "model.plan").write_bytes(f"{step.stage} {step.action.key}".encode())
            outputs, facts = {"model.plan": ENGINE_PLAN}, {}
            if step.stage == "compile":
                (output / "refit.safetensors").write_bytes(step.action.key.encode())
                outputs["refit.safetensors"] = SAFETENSORS
                facts = {"refit": {"structure": structure_digest(onnx.load(files["model.onnx"]))}}
            else:
                assert files["model.plan"].read_bytes().startswith(b"compile ")
            refs = {}
            for name, media_type in outputs.items():
                path = output / name
                refs[name] = ArtifactRef(digest_file(path), path.stat().st_size, media_type)
                self.cache.put_blob(path, refs[name])
            return refs, facts
        if step.action.params.get("executor") == "tensorrt":
            return {}, GOOD
        return super()._run_stage(step, files, folder)


class Session(BuildSession):
    """A session on a host with a GPU, as far as it knows."""

    @cached_property
    def _runner(self) -> StepRunner:
        return Runner(self.store, self._cache, Limits(120, 8 << 30), producer={"host": HOST.name, "os": HOST.os})


def run(session: BuildSession) -> Plan:
    async def one(step: Step, planned: Plan) -> Outcome:
        return await asyncio.to_thread(session.ensure, step, planned)

    planned = asyncio.run(drive(session, one))
    session.finish(planned)
    return planned


def build(kind: type[BuildSession], recipe: Path, store: Path) -> tuple[BuildSession, Plan]:
    loaded = load(recipe)
    session = kind(loaded, gather(loaded), open_store(str(store)), HOST)
    return session, run(session)


def manifest(session: BuildSession, path: str) -> Manifest:
    return Manifest.from_bytes(session.store.read(f"{path}/manifest.json"))


def made(session: BuildSession) -> dict[str, str]:
    return {name: outcome.state for name, outcome in session.outcomes.items() if name.startswith(("compile", "refit"))}


def test_new_weights_are_put_into_the_engine_that_was_published(tmp_path):
    store = tmp_path / "store"
    first, planned = build(Session, write_recipe(tmp_path, "sm90", refit="weights"), store)
    assert (made(first), planned.status) == ({f"compile:{ENGINE}": "built"}, 0)
    (engine,) = planned.engines
    base = engine.publish.facts["path"].removeprefix("engines/")

    recipe = write_recipe(tmp_path, "sm90", seed=1, refit="weights")
    second, planned = build(Session, recipe, store)
    assert (made(second), planned.status) == ({f"refit:{ENGINE}": "built"}, 0)
    assert second.outcomes[f"refit:{ENGINE}"].step.why[0] == f"refit: only weights changed since {base}"
    published = planned.engines[0].publish.facts["path"]
    origin = manifest(second, published).provenance.refitted_from
    assert origin.engine == base
    assert origin.compilation == engine.compile.action.key
    assert origin.plan == engine.compile.record.outputs["model.plan"].digest

    again, planned = build(Session, recipe, store)
    assert planned.fresh
    assert made(again) == {}

    # Where the plan that is refitted is lost, there is nothing to refit, and what was published stays as it is.
    (store / "cache" / "blobs" / "sha256" / origin.plan[:2] / origin.plan).unlink()
    third, planned = build(Session, write_recipe(tmp_path, "sm90", seed=2, refit="weights"), store)
    assert (made(third), planned.status) == ({f"compile:{ENGINE}": "built"}, 0)
    assert manifest(third, planned.engines[0].publish.facts["path"]).provenance.refitted_from is None


@pytest.mark.skipif(
    importlib.util.find_spec("tensorrt") is not None, reason="TensorRT is installed: tests/gpu has it run"
)
def test_a_refit_that_cannot_be_done_is_told_and_the_engine_is_compiled(tmp_path):
    store = tmp_path / "store"
    build(Session, write_recipe(tmp_path, "sm90", refit="weights"), store)
    session, planned = build(BuildSession, write_recipe(tmp_path, "sm90", seed=1, refit="weights"), store)
    assert made(session) == {f"refit:{ENGINE}": "failed", f"compile:{ENGINE}": "failed"}
    why = session.outcomes[f"compile:{ENGINE}"].step.why
    assert why[0].startswith("compiled: the refit of small/")
    assert "missing package" in session.outcomes[f"refit:{ENGINE}"].message
    assert planned.status == 1
    assert not [step for step in planned.steps if step.stage == "refit"]
