"""Sessions on a folder store with an ONNX source whose fetch step is real; nothing else is run."""

from __future__ import annotations

import asyncio
import threading

import pytest

from artifacts.cache import blob_path
from artifacts.errors import StoreError, UnavailableError
from artifacts.folder import FolderStore
from artifacts.keys import Action
from artifacts.refs import digest_bytes
from recipes.steps import Step
from tasks.drive import drive
from tasks.latest import latest_path
from tasks.patience import delays, patiently
from tasks.session import open_session

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


class Away(FolderStore):
    """A folder that refuses its next writes below cache/ with what is given."""

    faults: tuple[StoreError, ...] = ()

    def put_file(self, path, source, ref):
        if self.faults:
            fault, *rest = self.faults
            self.faults = tuple(rest)
            raise fault
        return super().put_file(path, source, ref)


@pytest.fixture
def away(tmp_path, session):
    return open_session(session.loaded.path, Away(tmp_path / "away"), retries=2)


def test_a_store_that_does_not_answer_interrupts_a_step_and_a_refusal_fails_it(away):
    planned = away.plan()
    step = step_of(planned, "fetch:model")
    away.store.faults = (UnavailableError("not now"), UnavailableError("not now"))
    assert [away.ensure(step, planned).state for _ in range(2)] == ["interrupted", "interrupted"]
    assert step_of(away.plan(), "fetch:model").ready  # nothing has failed yet
    assert away.outcomes == {}
    assert away.ensure(step, planned).state == "built"
    assert away.store.faults == ()


@pytest.mark.parametrize("faults", [(StoreError("access denied"),), (UnavailableError("not now"),) * 3])
def test_what_no_other_try_mends_fails(away, faults):
    planned = away.plan()
    away.store.faults = faults
    states = [away.ensure(step_of(planned, "fetch:model"), planned).state for _ in faults]
    assert states == ["interrupted"] * (len(faults) - 1) + ["failed"]
    assert away.outcomes["fetch:model"].message == str(faults[0])
    assert step_of(away.plan(), "fetch:model").state == "failed"


def test_patience_ends_with_the_last_try_or_when_it_is_told():
    waits, said = [], []

    def call():
        raise UnavailableError("not now")

    def wait(seconds):
        waits.append(seconds)
        return len(waits) == 4

    with pytest.raises(UnavailableError):
        patiently(call, 3, warn=said.append, wait=wait)
    assert waits == delays(3) == [2.0, 8.0, 32.0]
    assert said[0] == "not now; tried again in 2 s"
    with pytest.raises(UnavailableError):
        patiently(call, 3, wait=wait)
    assert waits == [2.0, 8.0, 32.0, 2.0]


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
