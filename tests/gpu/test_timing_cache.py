"""Timing caches on the device: lent to the next build, merged by TensorRT, refused aloud."""

import json
import sys

import pytest

from artifacts.store import open_store
from tasks.timing import TIMING_CACHE
from tests.gpu.compiling import LIMITS, Compiler
from tests.gpu.recipes import write_recipe
from tests.integration.building import build
from tests.unit.tasks.small_graphs import cnn

pytestmark = pytest.mark.gpu


def compiled(planned):
    (step,) = [step for step in planned.steps if step.stage == "compile"]
    facts = step.record.facts["timing_cache"]
    assert TIMING_CACHE not in step.record.outputs
    sys.stdout.write(json.dumps({**facts, "seconds": step.record.facts["seconds"]}) + "\n")
    return facts


@pytest.mark.timeout(400)
def test_what_one_build_measured_is_lent_to_the_next(device, tmp_path):
    store = tmp_path / "store"
    first = compiled(build(write_recipe(tmp_path, device["compute_capability"]), store)[1])
    assert (first["given"], first["used"]) == (False, False)
    other = write_recipe(tmp_path, device["compute_capability"], "other", seed=1)
    second = compiled(build(other, store)[1])
    if not first["reloads"]:
        assert first["kept"].startswith("no: it cannot be loaded again")
        assert second["given"] is False
        pytest.skip(f"this TensorRT does not load what it wrote: {first['reload_refused']}")
    assert first["kept"] == "the first"
    assert second["given"] is True
    assert second["used"] is ("refused" not in second)
    assert open_store(str(store)).info(second["place"]) is not None
    if not second["used"]:
        pytest.skip(f"this TensorRT does not use in another process what it wrote: {second['refused']}")
    assert second["kept"] in ("nothing new", "with what was lent")


@pytest.mark.timeout(400)
def test_two_caches_are_merged_or_refused_aloud(device, tmp_path):
    """In a process of its own, as a build does it: the result holds both, or TensorRT says why not."""
    from tasks.process import run_stage

    compiler = Compiler(device["compute_capability"], tmp_path / "compiler")
    caches = []
    for level in (1, 2):
        _result, output = compiler(cnn(level), optimization_level=level)
        caches.append(output / TIMING_CACHE)
    output = tmp_path / "merged"
    output.mkdir()
    inputs = {"base.cache": caches[0], "more.cache": caches[1]}
    result = run_stage("compile", {}, inputs, output, limits=LIMITS, entry="tasks.engines.trt_timing:merge")
    sys.stdout.write(f"{[cache.stat().st_size for cache in caches]} {result.facts}\n")
    if result.facts["refused"] is None:
        assert (output / TIMING_CACHE).stat().st_size >= max(cache.stat().st_size for cache in caches)
    else:
        assert list(output.iterdir()) == []
        assert result.facts["refused"]


def test_what_is_no_timing_cache_is_refused(device, tmp_path):
    compiler = Compiler(device["compute_capability"], tmp_path / "compiler")
    result, _output = compiler(cnn(), cache=b"no timing cache")
    facts = result.facts["timing_cache"]
    assert (facts["given"], facts["used"]) == (True, False)
    assert facts["refused"]
