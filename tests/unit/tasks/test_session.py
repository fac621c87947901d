"""Sessions on a folder store with an ONNX source whose fetch step is real; nothing else is run."""

from __future__ import annotations

import asyncio
import threading

import pytest

from artifacts.cache import blob_path
from artifacts.folder import FolderStore
from artifacts.keys import Action
from artifacts.refs import digest_bytes
from recipes.steps import Step
from tasks.drive import drive
from tasks.session import latest_path, open_session

RECIPE = """
enginery: 1
name: small
source: {framework: onnx, model: {file: model.onnx}}
inputs: {x: {shape: [1, 4]}}
targets: [{runtime: onnxruntime}]
"""
GRAPH = b"not a graph, which is all that fetching asks for"


@pytest.fixture
def session(tmp_path):
    (tmp_path / "model.onnx").write_bytes(GRAPH)
    (tmp_path / "small.yaml").write_text(RECIPE)
    return open_session(tmp_path / "small.yaml", FolderStore(tmp_path / "store"))


def step_of(planned, name):
    return next(step for step in planned.steps if step.id == name)


def test_what_this_session_made_and_lost_is_made_again(session):
    """The blob of a step that ran here goes: the step that needs it fails once, and then its maker runs again."""
    planned = session.plan()
    assert session.ensure(step_of(planned, "fetch:model"), planned).state == "built"
    planned = session.plan()
    session.store.delete(blob_path(digest_bytes(GRAPH)))
    lacking = session.ensure(step_of(planned, "export"), planned)
    assert lacking.state == "failed"
    assert "nothing at" in lacking.message

    planned = session.plan()
    assert [step.id for step in planned.ready] == ["fetch:model"]
    session.ensure(step_of(planned, "fetch:model"), planned)
    assert session.store.info(blob_path(digest_bytes(GRAPH))) is not None
    assert step_of(session.plan(), "export").ready


def test_a_cancelled_session_starts_nothing_and_ends(session):
    planned = session.plan()
    session.cancel()
    outcome = session.ensure(step_of(planned, "fetch:model"), planned)
    assert outcome.state == "failed"
    assert "cancelled" in outcome.message
    assert list(session.store.list("cache/")) == []

    async def run(step, _planned):
        pytest.fail(f"{step.id} was started")

    asyncio.run(drive(session, run))


@pytest.mark.parametrize(
    "damage",
    [b"{", b"[1]", b'{"export": 3}', b'{"export": {"params": [1]}}', b'{"export": {"params": {"opset": NaN}}}'],
)
def test_damaged_explanations_explain_nothing_and_harm_nothing(session, damage):
    session.store.write(latest_path("small"), damage)
    assert step_of(session.plan(), "export").why == ("miss: never built",)


def test_a_benchmark_waits_until_it_is_alone_and_other_stages_do_not(session):
    def begun(stage, waits):
        step = Step(stage, stage, "run", action=Action(stage, 1, {}, {}, {}))
        with session._slots.taken(1):  # some other stage runs
            thread = threading.Thread(target=session.ensure, args=(step, session.plan()))
            thread.start()
            while thread.is_alive() and not session._slots.waiting:
                pass
            assert session._slots.waiting == waits
        thread.join(10)
        assert not thread.is_alive()

    session.cancel()  # so that nothing is run when its turn comes
    begun("benchmark", 1)
    begun("verify", 0)
