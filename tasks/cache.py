"""Where Prefect's task states meet action records: the only such place.

A Prefect state named `Cached` always means that the step's record and blobs were in the store and
matched; a step that ran in this build ends `Completed`, one that failed ends `Failed`. Prefect's own
result cache is off, since the action record is the result.
"""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict, deque
from collections.abc import Awaitable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Final, cast

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.states import Completed, Failed

from recipes.plan import Plan
from recipes.steps import Step
from tasks.drive import drive
from tasks.patience import delays
from tasks.progress import Progress
from tasks.remembered import leave_plan
from tasks.report import report
from tasks.server import wait_for_server
from tasks.session import BuildSession, Outcome
from tasks.shown import ProgressShown, leave_engines, leave_stages, level_of

if TYPE_CHECKING:
    from logging import Logger, LoggerAdapter

    from prefect.client.schemas.objects import State

_LOOK_SECONDS: Final = 1.0
_JITTER: Final = 0.3  # of the waits before new tries, so that a fleet does not come back all at once


async def run_session(session: BuildSession, *, spread: bool = False) -> dict[str, Any]:
    """Run what is stale of a session as tasks and return its report; whatever ends this flow ends the stages too.

    Where nothing is stale in the end, the plan is left: of a recipe that is `spread` over pools, that of its portable stages,
    which the next build of its folder asks for. What such a build has of its engines is the caller's to leave, when its pools
    have ended.
    """
    try:
        planned = await drive(session, StageTasks(session), show_all=True)
    except BaseException:  # also Prefect's cancellation, which comes as a signal
        session.cancel()
        raise
    session.finish(planned)
    document = report(session, planned)
    if session.retries:  # on a worker, where nobody waits at the prompt
        await wait_for_server(get_run_logger().warning)
    await leave_stages(document, get_run_logger().log)
    if not spread:
        await leave_engines(document, session.store, get_run_logger().log)
    if planned.fresh and not session.cancelled:
        await asyncio.to_thread(leave_plan, session)
    return document


class StageTasks:
    """Runs the steps of one session as Prefect tasks, each named after its stage and subject."""

    def __init__(self, session: BuildSession) -> None:
        """Take the session that runs the steps."""
        self._session = session
        # Steps wait for one another's slots in these threads; the session bounds how many really run.
        self._threads = ThreadPoolExecutor(max_workers=32, thread_name_prefix="stage")
        self._said: dict[str, deque[Progress]] = defaultdict(deque)
        session.follow(lambda progress: self._said[progress.step_id].append(progress))

    async def __call__(self, step: Step, planned: Plan) -> Outcome:
        """Run one step as a Prefect task run and return what became of it."""
        outcomes: list[Outcome] = []

        def interrupted(*_run: object) -> bool:
            return bool(outcomes) and outcomes[-1].state == "interrupted"

        @task(
            name=step.stage,
            task_run_name=step.id,
            cache_policy=NO_CACHE,
            persist_result=False,
            retries=self._session.retries,
            retry_delay_seconds=delays(self._session.retries),
            retry_jitter_factor=_JITTER,
            retry_condition_fn=interrupted,
        )
        async def stage(key: str, why: list[str]) -> Any:
            """Run a stage, or find that it is cached."""
            logger = get_run_logger()
            logger.info("%s %s: %s", step.id, key[:12], "; ".join(why) or "cached")
            loop = asyncio.get_running_loop()
            outcome = await self.follow(
                step, loop.run_in_executor(self._threads, self._session.ensure, step, planned), logger
            )
            outcomes.append(outcome)
            if outcome.state in ("failed", "interrupted"):
                logger.error("%s: %s", step.id, outcome.message)
                return Failed(message=outcome.message)
            if outcome.state == "cached":
                return Completed(name="Cached", message=f"record and blobs of {key[:12]} are in the store")
            return Completed(message=f"built in {outcome.seconds:.1f} s")

        # Prefect types this call as its state; of an async task it is an awaitable of it.
        run = stage(step.action.key if step.action is not None else "", list(step.why), return_state=True)
        state = await cast("Awaitable[State[Any]]", run)
        if not outcomes:  # not a failed stage, which is an outcome: say what it was, and not that nothing came
            await state.aresult(raise_on_failure=True)
            raise RuntimeError(f"{step.id}: Prefect ended its task run as {state.name}: {state.message}")
        return outcomes[-1]

    async def follow(
        self, step: Step, running: asyncio.Future[Outcome], logger: Logger | LoggerAdapter[Logger]
    ) -> Outcome:
        """Pass on what a step says until it has ended, and return what became of it; its bar ends only where that is well."""
        shown = ProgressShown(step.id, time.monotonic())
        done = False
        while not done:
            await asyncio.wait({running}, timeout=_LOOK_SECONDS)
            done = running.done()
            well = done and running.exception() is None and running.result().state in ("built", "cached")
            await self._show(step, shown, logger, done=well)
        return running.result()

    async def _show(
        self, step: Step, shown: ProgressShown, logger: Logger | LoggerAdapter[Logger], *, done: bool
    ) -> None:
        """Pass on what a step has said: lines to its run's log, by level, and how far it is to its bar."""
        said = self._said[step.id]
        while said:
            progress = said.popleft()
            if progress.kind == "log":
                logger.log(level_of(progress.text), "%s", progress.text)
            elif progress.kind == "progress":
                shown.latest = progress
        try:
            await shown.move(done=done)
        except Exception as err:  # noqa: BLE001  of many kinds, and none may cost the stage
            logger.warning("Prefect did not take the progress: %s", err)
