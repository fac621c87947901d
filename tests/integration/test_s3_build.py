"""A whole build into S3, and everything that a fleet does with it from there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from artifacts.publications import read_publication
from artifacts.refs import digest_file
from artifacts.store import open_store
from tasks.remembered import PlanMemory, leave_plan
from tasks.report import plan_report
from tests.integration.building import build, copy_digits, enginery, fewer_engines

pytestmark = pytest.mark.slow


def test_a_build_into_s3_is_cached_listed_resolved_and_pulled(tmp_path: Path, s3_store_uri: str):
    recipe = copy_digits(tmp_path, fewer_engines)
    ran, planned, session = build(recipe, s3_store_uri)
    assert {"fetch:weights", "export", "compile:tensorrt-rtx:sm89:int8", "publish:onnxruntime:cpu:fp32"} <= ran
    assert planned.fresh
    assert planned.status == 0
    leave_plan(session)  # as flows do: the next machine need not read every record
    checkout = PlanMemory(open_store(s3_store_uri), folder=None)
    (known,) = checkout.recall([copy_digits(tmp_path / "checkout", fewer_engines)]).values()
    assert (known.report, known.is_latest) == (plan_report(session.anew().plan()), True)

    def ask(*arguments: str) -> Any:
        result = enginery(*arguments, "--store", s3_store_uri, "--json", cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        return json.loads(result.stdout)

    assert {step["state"] for step in ask("plan", "digits.yaml")["steps"]} == {"cached"}
    again = ask("build", "digits.yaml")
    assert {step["state"] for step in again["steps"]} == {"cached"}
    assert again["store"] == s3_store_uri
    assert not (tmp_path / ".enginery").exists()

    listed = {engine["engine"]: engine for engine in ask("list")}
    assert {f"engines/{name}" for name in listed} == {engine["path"] for engine in again["engines"]}
    store = open_store(s3_store_uri)
    (publication,) = store.list("publications/digits/")  # one for the whole build
    assert read_publication(store.read(publication.path)).engines.keys() == listed.keys()
    on_gpu = ["--gpu", "sm89", "--runtime", f"tensorrt-rtx=={_version(again, 'tensorrt-rtx')}"]
    best = ask("resolve", "digits", *on_gpu, "--shape", "image=64x1x8x8")["best"]["engine"]
    assert listed[best]["gpus"] == ["sm89"]

    ask("pull", "digits", *on_gpu, "--to", "engines")
    pulled = tmp_path / "engines" / best
    manifest = json.loads((pulled / "manifest.json").read_bytes())
    compiled = next(step for step in planned.steps if step.id == "compile:tensorrt-rtx:sm89:int8")
    (ref,) = compiled.record.outputs.values()
    assert digest_file(pulled / "model.plan") == ref.digest == manifest["files"]["model.plan"]["digest"]
    assert open_store(s3_store_uri).read(f"engines/{best}/manifest.json") == (pulled / "manifest.json").read_bytes()


def test_what_one_machine_built_another_finds_in_s3(tmp_path: Path, s3_store_uri: str):
    """The same recipe in another folder: keys name no paths, so nothing runs; what is lost is made again."""
    ran, _planned, _session = build(copy_digits(tmp_path / "one", fewer_engines), s3_store_uri)
    other = copy_digits(tmp_path / "elsewhere" / "two", fewer_engines)
    assert ran
    assert build(other, s3_store_uri)[0] == set()

    store = open_store(s3_store_uri)
    lost = next(info.path for info in store.list("engines/") if info.path.endswith("/model.plan"))
    store.delete(lost)
    ran, planned, _session = build(other, s3_store_uri)
    assert ran == {"publish:tensorrt-rtx:sm89:int8"}
    assert planned.fresh
    assert store.info(lost) is not None


def _version(report: dict[str, Any], runtime: str) -> str:
    return next(engine["runtime_version"] for engine in report["engines"] if engine["runtime"] == runtime)
