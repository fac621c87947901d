"""An engine is timed while it is built, its manifest and tables say how fast it is, and `bench` times it again."""

from __future__ import annotations

import json
import shutil

import pytest
import yaml

from artifacts.catalog import EngineCatalog
from artifacts.folder import FolderStore
from tasks.report import report
from tests.integration.building import RECIPES, build, enginery


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("benchmark")
    shutil.copytree(RECIPES / "digits", folder / "digits", ignore=shutil.ignore_patterns("__pycache__"))
    document = yaml.safe_load((RECIPES / "digits-onnx.yaml").read_text())
    document["targets"] = [{"runtime": "onnxruntime"}]
    document["precision"] = {"build": ["fp32"]}
    document["export"]["simplifier"] = "none"
    document["benchmark"] = {"batches": [1, 32], "compare": ["onnxruntime"], "seconds": 0.1}
    path = folder / "digits-onnx.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


@pytest.mark.slow
def test_auto_publishes_the_fastest_that_passes_by_real_times(recipe, tmp_path):
    document = yaml.safe_load(recipe.read_text())
    calibration = {"data": "digits/calibration.npz", "samples": 32, "method": "minmax"}
    document["precision"] = {"build": "auto", "calibration": calibration}
    document["benchmark"] = {"batches": [1], "seconds": 0.1}
    path = recipe.with_name("auto.yaml")
    path.write_text(yaml.safe_dump(document))
    ran, planned, session = build(path, tmp_path / "store")
    assert planned.status == 0
    (manifest,) = EngineCatalog(FolderStore(tmp_path / "store")).manifests()
    rows = manifest.precision.candidates
    assert [row.name for row in rows] == ["int8", "fp32", "fp16"]
    assert all(row.passed and row.p50_ms > 0 and row.graph is False for row in rows)
    (chosen,) = [row for row in rows if row.chosen]
    assert chosen.p50_ms <= 1.02 * min(row.p50_ms for row in rows)
    assert (manifest.precision.asked, manifest.precision.given) == ("auto", chosen.name)
    assert manifest.precision.wish == ("auto",)
    assert manifest.benchmark.cases[0].latency_ms.p50 == pytest.approx(chosen.p50_ms)
    assert manifest.identity.build.startswith(f"{chosen.name}-")
    (engine,) = report(session, planned)["engines"]
    assert [row["name"] for row in engine["candidates"] if row["chosen"]] == [chosen.name]
    assert {step.partition(":")[0] for step in ran} >= {"benchmark", "publish"}
    assert build(path, tmp_path / "store")[0] == set()
    shown = enginery("show", "cpu", "--store", str(tmp_path / "store"), cwd=tmp_path).stdout
    assert f"{chosen.name}  p50 {chosen.p50_ms:.3f} ms, CUDA graph no; chosen" in shown


@pytest.fixture(scope="module")
def built(recipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("store")
    ran, planned, _session = build(recipe, folder / "store")
    assert "benchmark:onnxruntime:cpu:fp32" in ran
    assert planned.fresh
    return folder / "store"


def test_the_manifest_has_the_figures_and_the_ratios(built):
    (manifest,) = EngineCatalog(FolderStore(built)).manifests()
    timed = manifest.benchmark
    assert [(case.name, case.profile, case.batch) for case in timed.cases] == [
        ("default/1", "default", 1),
        ("default/32", "default", 32),
    ]
    assert all(case.latency_ms.p50 > 0 and case.throughput > 0 for case in timed.cases)
    assert timed.rule.seconds == 0.1
    assert timed.clocks.before.load_1min is not None
    (other,) = timed.compared
    assert (other.name, other.error, set(other.ratios)) == ("onnxruntime", None, {"default/1", "default/32"})
    step = next(step for step in manifest.provenance.steps if step.id == "benchmark:onnxruntime:cpu:fp32")
    assert step.key == timed.key


def test_a_second_build_times_nothing(recipe, built):
    ran, planned, _session = build(recipe, built)
    assert ran == set()
    assert planned.fresh


def test_tables_show_p50_and_what_the_engine_is_faster_than(built, tmp_path):
    (manifest,) = EngineCatalog(FolderStore(built)).manifests()
    p50 = f"{manifest.benchmark.cases[0].latency_ms.p50:.3f} (default/1)"
    listed = enginery("list", "--store", str(built), cwd=tmp_path)
    assert listed.returncode == 0, listed.stderr
    assert "p50 ms" in listed.stdout
    assert p50 in listed.stdout
    assert f"onnxruntime {manifest.benchmark.compared[0].ratios['default/1']:.2f}x" in listed.stdout
    shown = enginery("show", "fp32", "--store", str(built), cwd=tmp_path)
    assert "default/32: p50" in shown.stdout
    (engine,) = json.loads(enginery("list", "--json", "--store", str(built), cwd=tmp_path).stdout)
    assert engine["benchmark"]["p50_ms"] == manifest.benchmark.cases[0].latency_ms.p50


def test_bench_times_a_published_engine_at_the_batches_asked_for(built, tmp_path):
    done = enginery(
        "bench", "fp32", "-b", "4", "--seconds", "0.1", "--json", "--store", str(built), cwd=tmp_path
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert [case["name"] for case in facts["cases"]] == ["default/4"]
    assert facts["cases"][0]["latency_ms"]["p50"] > 0
    text = enginery("bench", "fp32", "-b", "4", "--seconds", "0.1", "--store", str(built), cwd=tmp_path)
    assert "default/4" in text.stdout
    refused = enginery("bench", "fp32", "-b", "500", "--store", str(built), cwd=tmp_path)
    assert refused.returncode == 1
    assert "no profile admits them" in refused.stderr
