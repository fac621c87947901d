"""Timing caches on the device: lent to the next build, merged by TensorRT; what is none is refused aloud."""

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
    assert (first["reloads"], first["kept"]) == (True, "the first")
    assert (second["given"], second["used"]) == (True, True)
    assert second["kept"] in ("nothing new", "with what was lent")
    assert open_store(str(store)).info(second["place"]) is not None


@pytest.mark.timeout(400)
def test_two_caches_are_merged(device, tmp_path):
    """In a process of its own, as a build does it; TensorRT takes the result."""
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
    assert result.facts["refused"] is None
    merged = output / TIMING_CACHE
    assert merged.stat().st_size > max(cache.stat().st_size for cache in caches)
    again, _output = compiler(cnn(2), optimization_level=2, cache=merged.read_bytes())
    assert again.facts["timing_cache"]["used"] is True


def test_what_is_no_timing_cache_is_refused(device, tmp_path):
    compiler = Compiler(device["compute_capability"], tmp_path / "compiler")
    result, _output = compiler(cnn(), cache=b"no timing cache")
    facts = result.facts["timing_cache"]
    assert (facts["given"], facts["used"]) == (True, False)
    assert facts["refused"]
