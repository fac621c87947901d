"""The loop of a build: run what is ready, plan again whenever a step ends, until nothing is left."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from recipes.plan import Plan
from recipes.steps import Step
from tasks.session import BuildSession, Outcome

RunStep = Callable[[Step, Plan], Awaitable[Outcome]]


async def drive(session: BuildSession, run_step: RunStep, *, show_cached: bool = False) -> Plan:
    """Run what is ready through `run_step`, plan again whenever a step ends, and return the last plan.

    With `show_cached`, `run_step` also gets every step that is cached, once, so that it can be shown as such.
    """
    running: dict[asyncio.Task[Outcome], str] = {}
    shown: set[str] = set()
    while True:
        planned = await asyncio.to_thread(session.plan)
        cached = [step for step in planned.steps if step.record is not None and step.id not in shown]
        for step in (*planned.ready, *(cached if show_cached else ())):
            if step.id not in running.values():
                running[asyncio.ensure_future(run_step(step, planned))] = step.id
                shown.add(step.id)
        if not running:
            return planned
        done, _pending = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            del running[task]
            task.result()
