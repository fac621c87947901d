"""A build that is killed, at any stage and at any instant, leaves nothing half-done; the next one goes on from there."""

from __future__ import annotations

import json
import random
import shutil
import time
from pathlib import Path

import pytest

from artifacts.store import open_store
from tasks.session import open_session
from tests.integration.building import copy_digits, enginery, fewer_engines
from tests.integration.killing import check_store, started

pytestmark = pytest.mark.slow

# In the order of the pipeline, so that one store serves all: each build goes on where the one before was killed.
STAGES = ("fetch", "export", "reference", "simplify", "calibrate", "type", "verify", "compile", "publish")
KILLS = 20


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    copy_digits(tmp_path, fewer_engines)
    return tmp_path


def test_a_build_killed_in_every_stage_goes_on_and_redoes_nothing(folder: Path):
    done: dict[str, str] = {}
    for stage in STAGES:
        finished = _finished(folder)
        with started(folder) as build:
            assert build.wait_for(stage, timeout=120), f"no {stage} ran: {build.stderr}"
            assert build.kill() == []
        assert not finished & set(build.ran)
        now = check_store(folder / "store")
        assert done.items() <= now.items()
        done = now
    _completes(folder, done)


@pytest.mark.long
def test_a_build_killed_at_random_instants_goes_on_and_redoes_nothing(folder: Path):
    seed = random.randrange(1 << 32)
    chance = random.Random(seed)
    killed_early = 0
    for _ in range(KILLS):
        finished = _finished(folder)
        with started(folder) as build:
            time.sleep(chance.uniform(0.3, 3.0))
            killed_early += build.process.poll() is None
            assert build.kill() == [], seed
        assert not finished & set(build.ran), seed
        done = check_store(folder / "store")
        if "publish" in done.values():
            _forget_half(folder / "store", chance)
    assert killed_early >= KILLS // 2, seed
    _completes(folder, check_store(folder / "store"))


def _finished(folder: Path) -> set[str]:
    """Return the steps that a plan finds cached."""
    planned = open_session(folder / "digits.yaml", open_store(str(folder / "store"))).plan()
    return {step.id for step in planned.steps if step.state == "cached"}


def _completes(folder: Path, done: dict[str, str]) -> None:
    """Build to the end: what had a record is cached, the engines are there, and nothing of the dead builds is."""
    env = {"PREFECT_HOME": str(folder / "prefect")}
    result = enginery("build", "digits.yaml", "--store", "store", "--json", cwd=folder, env=env)
    assert result.returncode == 0, result.stderr
    assert "warning" not in result.stderr
    report = json.loads(result.stdout)
    assert {step["id"] for step in report["steps"] if step["key"] in done and step["state"] != "cached"} == set()
    assert {step["state"] for step in report["steps"]} == {"built", "cached"}
    assert {engine["state"] for engine in report["engines"]} == {"cached"}
    assert done.items() < check_store(folder / "store").items()
    # A name that was killed before it was locked stays for an hour, without a byte (artifacts/scratch.py).
    left = [path for path in (folder / "store" / "tmp").iterdir() if path.suffix != ".fresh" or path.stat().st_size]
    assert left == []


def _forget_half(store: Path, chance: random.Random) -> None:
    """Remove every engine and half of the records, so that there is more to build and to kill."""
    shutil.rmtree(store / "engines")
    for record in sorted((store / "cache" / "actions").glob("*/*.json")):
        if chance.random() < 0.5:
            record.unlink()
