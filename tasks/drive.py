"""The loop of a build: run what is ready, plan again whenever a step ends, until nothing is left."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import ExitStack

from recipes.plan import Plan
from recipes.steps import Step
from tasks.session import BuildSession, Outcome

RunStep = Callable[[Step, Plan], Awaitable[Outcome]]


async def drive(session: BuildSession, run_step: RunStep, *, show_all: bool = False) -> Plan:
    """Run what is ready through `run_step`, plan again whenever a step ends, and return the last plan.

    With `show_all`, `run_step` also gets every step that is cached or has failed already, once, so that it can be
    shown as such. Of two steps with one key (an unchanged graph is verified under two names) the first in the plan
    runs, and the other finds what it made. A cancelled session's plan is returned at once: its stages end by themselves.
    While anything runs, the session holds a lease.
    """
    planned = await asyncio.to_thread(session.plan)
    if not planned.ready:
        return await _drive(session, run_step, show_all)
    with ExitStack() as stack:
        await asyncio.to_thread(stack.enter_context, session.leased())
        return await _drive(session, run_step, show_all)


async def _drive(session: BuildSession, run_step: RunStep, show_all: bool) -> Plan:
    running: dict[asyncio.Task[Outcome], Step] = {}
    shown: set[str] = set()
    while True:
        planned = await asyncio.to_thread(session.plan)
        known = [step for step in planned.steps if step.state in ("cached", "failed") and step.id not in shown]
        keys = {_key(step) for step in running.values()}
        for step in planned.ready:
            if _key(step) not in keys:
                keys.add(_key(step))
                running[asyncio.ensure_future(run_step(step, planned))] = step
                shown.add(step.id)
        for step in known if show_all else ():
            running[asyncio.ensure_future(run_step(step, planned))] = step
            shown.add(step.id)
        if not running or session.cancelled:
            return planned
        done, _pending = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            del running[task]
            task.result()


def _key(step: Step) -> str | None:
    return step.action.key if step.action is not None else None
