"""Whose run is lost: of a run that began before a build saw it, only whose worker was not heard of for long."""

from __future__ import annotations

import asyncio
import time
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import pytest
from prefect.client.schemas.objects import FlowRun
from prefect.states import Completed, Pending, Running, Scheduled

from tasks import fleet
from tasks.server import Line


class Server:
    """One run of a worker that is heard of, or is not; the run goes through these states, a question each, and stays in the last."""

    def __init__(self, *states: Any, heard_after: float = 60.0) -> None:
        self.states = list(states)
        self.heard = time.monotonic() + heard_after
        self.run = FlowRun(flow_id=uuid4(), labels={"prefect.worker.name": "w"})
        self._next()

    def _next(self) -> FlowRun:
        state = self.states.pop(0) if len(self.states) > 1 else self.states[0]
        self.run = self.run.model_copy(update={"state": state, "state_type": state.type})
        return self.run

    async def read_flow_run(self, _run: object) -> FlowRun:
        return self._next()

    async def read_workers_for_work_pool(self, _pool: str, limit: int) -> list[Any]:
        assert limit > 0
        return [SimpleNamespace(name="w", status="ONLINE" if time.monotonic() > self.heard else "OFFLINE")]

    async def set_flow_run_state(self, _run: object, state: Any, *, force: bool) -> None:
        assert force
        self.states = [state]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(fleet, "_HEARD_SECONDS", 0.3)


def ended(server: Server) -> tuple[str | None, float]:
    began = time.monotonic()
    run = asyncio.run(fleet._ended(server, Line(pytest.fail), server.run, "pool", None))
    assert run.state is not None
    return run.state.name, time.monotonic() - began


def test_a_worker_that_is_heard_again_after_an_outage_before_the_build_keeps_its_run():
    assert ended(Server(*[Running()] * 12, Completed(), heard_after=0.05))[0] == "Completed"


def test_a_worker_that_is_not_heard_for_long_has_lost_its_run():
    state, seconds = ended(Server(Running()))
    assert (state, seconds > 0.3) == ("Crashed", True)


def test_a_run_that_this_build_saw_begin_is_lost_as_soon_as_its_worker_is():
    state, seconds = ended(Server(Scheduled(), Pending(), Running()))
    assert (state, seconds < 0.3) == ("Crashed", True)


def test_a_run_that_had_begun_before_this_build_is_waited_for_and_another_is_asked_for(monkeypatch: pytest.MonkeyPatch):
    """It may be of an older checkout. What waits still is the run of this build too: it will read the newest."""
    engine = "engines/m/t/b"

    def asked(*states: Any) -> tuple[fleet.Asked, int]:
        servers = [Server(state, Completed(message=said)) for state, said in zip(states, ("old", engine), strict=True)]
        runs = [server.run for server in servers]

        class Both(Server):
            async def read_flow_run(self, run: object) -> FlowRun:
                return await next(one for one in servers if one.run.id == run).read_flow_run(run)

        async def run(*_asked: object) -> FlowRun:
            return runs.pop(0)

        async def deployment(*_asked: object) -> str:
            return "d"

        monkeypatch.setattr(fleet, "_run", run)
        monkeypatch.setattr(fleet, "_deployment", deployment)
        monkeypatch.setattr(fleet, "get_run_logger", lambda: None)
        client = Both(Running(), heard_after=0.0)
        found = asyncio.run(fleet._compile(client, Line(pytest.fail), "tensorrt:sm90", "p", {}))
        return found, len(runs)

    found, left = asked(Running(), Scheduled())
    assert (found.state, found.engines, left) == ("built", (engine,), 0)
    found, left = asked(Scheduled(), Scheduled())
    assert (found.engines, left) == ((), 1)
