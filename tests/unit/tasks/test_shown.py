"""What a build leaves in Prefect's UI, as far as no server is needed: words, levels, and when a bar moves."""

from __future__ import annotations

import asyncio
import logging
import threading
from pathlib import Path

import pytest

from artifacts.store import open_store
from tasks.cache import StageTasks
from tasks.progress import Progress
from tasks.session import Outcome, open_session
from tasks.shown import ProgressShown, artifact_key, engines_markdown, level_of, stage_rows
from tests.simulated_builds import write_recipe


@pytest.mark.parametrize(
    ("line", "level"),
    [
        ("[VERBOSE] tactics", logging.DEBUG),
        ("[info] Detected 1 inputs", logging.INFO),
        ("[WARNING] Using default stream", logging.WARNING),
        ("[error] IBuilder::buildSerializedNetwork", logging.ERROR),
        ("[INTERNAL_ERROR] assertion failed", logging.ERROR),
        ("/lib/x.py:3: UserWarning: slow", logging.WARNING),
        ("Traceback (most recent call last):", logging.ERROR),
        ("ValueError: no such width", logging.ERROR),
        ("an error is unlikely", logging.INFO),
    ],
)
def test_lines_of_a_stage_have_the_level_that_they_state(line: str, level: int):
    assert level_of(line) == level


def test_keys_are_such_as_prefect_takes():
    assert (
        artifact_key("manifest", "My_Model", "tensorrt-rtx-1.7.1-sm89 fp16")
        == "manifest-my-model-tensorrt-rtx-1-7-1-sm89-fp16"
    )


def test_what_ran_comes_first():
    steps = [
        {"stage": "fetch", "subject": "a", "state": "cached", "seconds": 0.0, "why": []},
        {"stage": "export", "subject": "", "state": "built", "seconds": 2.5, "why": ["miss: a", "b"]},
    ]
    assert [(row["stage"], row["seconds"], row["why"]) for row in stage_rows(steps)] == [
        ("export", 2.5, "miss: a; b"),
        ("fetch", None, ""),
    ]


def test_figures_stand_beside_nothing_where_there_was_no_build_before():
    engine = {
        "target": "tensorrt-10.0-sm89", "runtime": "tensorrt", "gpu": "sm89", "precision": {"asked": "int8", "given": "fp16"},
        "state": "cached", "why": "", "size": 7, "parity": 0.00021, "benchmark": {"p50_ms": 1.5}, "path": "engines/m|x",
    }  # fmt: skip
    text = engines_markdown({"recipe": "m", "store": "s3://b", "engines": [engine]}, {})
    assert "| tensorrt-10.0-sm89 | fp16 (asked int8) | cached | 7 | 2.1e-04 | 1.500 | `engines/m\\|x` |" in text


def test_who_follows_a_session_late_hears_what_was_said_before_once_and_in_order(tmp_path: Path):
    session = open_session(write_recipe(tmp_path, "m"), open_store(str(tmp_path / "store")))
    heard: list[str] = []
    told: list[str] = []
    session.on_progress(lambda progress: told.append(progress.text))
    session._tell(Progress("a", "log", text="one"))
    thread = threading.Thread(target=session.follow, args=(lambda progress: heard.append(progress.text),))
    thread.start()
    thread.join()
    session._tell(Progress("a", "log", text="two"))
    assert heard == told == ["one", "two"]


def test_a_bar_ends_where_its_stage_failed_and_at_its_end_where_it_is_well(monkeypatch: pytest.MonkeyPatch):
    moved: list[float] = []

    async def create(percent: float, *_words: str) -> int:
        moved.append(percent)
        return 1

    async def update(_bar: int, percent: float, _text: str) -> None:
        moved.append(percent)

    monkeypatch.setattr("tasks.shown.acreate_progress_artifact", create)
    monkeypatch.setattr("tasks.shown.aupdate_progress_artifact", update)
    monkeypatch.setenv("ENGINERY_BAR_SECONDS", "0")

    def shown(*ends: bool) -> list[float]:
        moved.clear()
        bar = ProgressShown("compile", 0.0)
        for done in (False, *ends):
            bar.latest = Progress("compile", "progress", 0.4, "kernels")
            asyncio.run(bar.move(done=done))
        return list(moved)

    assert shown() == [40.0]
    assert shown(True) == [40.0, 100.0]
    assert shown(False) == [40.0]
    quiet = ProgressShown("fetch", 0.0)  # which says nothing of how far it is
    moved.clear()
    asyncio.run(quiet.move(done=True))
    assert moved == []


def test_a_bar_stays_where_its_stage_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    moved: list[float] = []

    async def move(*words: object) -> int:
        moved.extend(word for word in words if isinstance(word, float))
        return 1

    monkeypatch.setattr("tasks.shown.acreate_progress_artifact", move)
    monkeypatch.setattr("tasks.shown.aupdate_progress_artifact", move)
    monkeypatch.setenv("ENGINERY_BAR_SECONDS", "0")
    session = open_session(write_recipe(tmp_path, "m"), open_store(str(tmp_path / "store")))
    step, stages = session.plan().steps[0], StageTasks(session)

    async def ending(outcome: Outcome | OSError) -> None:
        def stage() -> Outcome:
            session._tell(Progress(step.id, "progress", 0.4, "kernels"))
            if isinstance(outcome, OSError):
                raise outcome
            return outcome

        running = asyncio.get_running_loop().run_in_executor(None, stage)
        await stages.follow(step, running, logging.getLogger("stage"))

    asyncio.run(ending(Outcome(step, "failed", 1.0, "no kernel")))
    assert moved == [40.0]
    with pytest.raises(OSError, match="disk"):
        asyncio.run(ending(OSError("disk")))
    assert moved == [40.0, 40.0]
    asyncio.run(ending(Outcome(step, "built", 1.0)))
    assert moved == [40.0, 40.0, 100.0]


def test_a_variable_that_is_no_number_costs_no_stage(monkeypatch: pytest.MonkeyPatch):
    for value, seconds in (("5s", 5.0), ("", 5.0), ("0.5", 0.5)):
        monkeypatch.setenv("ENGINERY_BAR_SECONDS", value)
        assert ProgressShown("compile", 0.0).long == seconds
