"""Of the looks that are due a host begins one at a time, by what its runner knows, and whatever was deleted meanwhile."""

from __future__ import annotations

import asyncio
import inspect
from datetime import datetime, timedelta, timezone
from uuid import UUID, uuid4

import httpx
import pytest
from prefect.client.schemas.objects import FlowRun
from prefect.exceptions import ObjectNotFound
from prefect.runner._scheduled_run_poller import ScheduledRunPoller

from enginery.serving import _HostRunner

LOOKS = uuid4()


class Server:
    """Where runs are cancelled, and some are gone."""

    def __init__(self, *gone: UUID) -> None:
        self.gone = gone
        self.cancelled: list[UUID] = []

    async def set_flow_run_state(self, run: UUID, _state: object) -> None:
        if run in self.gone:
            raise ObjectNotFound(httpx.HTTPError("404"))
        self.cancelled.append(run)


def look(minutes: float, deployment: UUID = LOOKS) -> FlowRun:
    due = datetime.now(timezone.utc) + timedelta(minutes=minutes)
    return FlowRun(flow_id=uuid4(), deployment_id=deployment, next_scheduled_start_time=due)


@pytest.fixture
def runner() -> _HostRunner:
    runner = _HostRunner(name="host")
    runner.looks = LOOKS
    runner._scheduled_run_poller = ScheduledRunPoller(**dict.fromkeys(inspect.signature(ScheduledRunPoller).parameters))
    return runner


def test_no_look_begins_before_the_process_of_the_one_before_has_ended(runner: _HostRunner):
    server, other = Server(), look(-9, uuid4())
    passed = [look(-3), look(-2), look(-1)]
    assert asyncio.run(runner._without_missed(server, [other, *passed])) == [other, passed[-1]]
    assert server.cancelled == [run.id for run in passed[:-1]]
    runner._scheduled_run_poller._submitting_flow_run_ids.add(passed[-1].id)  # as the poller does when it is given it
    late = look(-0.5)
    assert asyncio.run(runner._without_missed(server, [late, look(1)])) == []
    assert server.cancelled[-1] == late.id
    runner._scheduled_run_poller._submitting_flow_run_ids.clear()
    coming = look(1)
    assert asyncio.run(runner._without_missed(server, [coming])) == [coming]


def test_a_missed_look_that_was_deleted_ends_nothing(runner: _HostRunner):
    missed, also, newest = look(-3), look(-2), look(-1)
    server = Server(missed.id)
    assert asyncio.run(runner._without_missed(server, [missed, also, newest])) == [newest]
    assert server.cancelled == [also.id]
