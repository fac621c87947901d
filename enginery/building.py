"""Build one recipe from the command line: a head start in this process, Prefect beside it, progress on stderr.

Prefect's embedded server takes ten seconds to start (docs/performance.md), so the first stages begin
at once, in threads; when the flow runs it joins what is under way. Nothing of Prefect is imported, and
no server started, where the plan is fresh, or where it only waits for other hosts.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from artifacts.errors import ArtifactError
from enginery.output import note
from tasks.report import report
from tasks.session import BuildSession, Outcome, activate

if TYPE_CHECKING:
    from types import FrameType

    from prefect.client.schemas.objects import State

    from recipes.plan import Plan
    from recipes.steps import Step

# Set before Prefect is imported, unless the user has set them. The first two keep it from the internet
# (docs/operations.md); what a stage says is told by this command, so that Prefect need not say it again.
PREFECT_SETTINGS = {
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "DO_NOT_TRACK": "1",
    "PREFECT_LOGGING_LEVEL": "CRITICAL",
    "PREFECT_LOGGING_SERVER_LEVEL": "CRITICAL",
    "PREFECT_SERVER_EPHEMERAL_ENABLED": "true",
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
}
# What runs say goes to the server all the same, where it is shown beside them (keys of Prefect's logging.yml).
LOGGED = {
    "PREFECT_LOGGING_LOGGERS_PREFECT_FLOW_RUNS_LEVEL": "INFO",
    "PREFECT_LOGGING_LOGGERS_PREFECT_TASK_RUNS_LEVEL": "INFO",
    "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",
}
_SETTLE_SECONDS = 10.0


def build_session(
    session: BuildSession,
    *,
    show: Callable[[dict[str, Any]], None],
    verbose: bool = False,
    quiet: bool = False,
    planned: Plan | None = None,
    fresh: Callable[[BuildSession, Plan], None] = lambda _session, _plan: None,
) -> dict[str, Any]:
    """Build what is stale, `show` the report as soon as it is known, and return it.

    `planned` is a plan of a moment ago, if there is one; `fresh` is told of a plan in which nothing had to run.
    """
    planned = planned if planned is not None and planned.fresh else session.plan()
    if not planned.ready:
        for step in planned.steps:
            if step.record is not None:
                session.ensure(step, planned)
        session.finish(planned)
        document = report(session, planned)
        show(document)
        fresh(session, planned)
        return document
    from enginery.progress import watch

    with _interruptible(session), watch(session, planned, verbose=verbose, quiet=quiet):
        document, settle = _build_with_prefect(session)
    show(document)
    try:
        settle()
    except Exception as err:  # noqa: BLE001  of many kinds, and the work is done and shown
        note(f"warning: it is not known whether Prefect recorded all of this build: {err}")
    return document


def _build_with_prefect(session: BuildSession) -> tuple[dict[str, Any], Callable[[], None]]:
    """Start the stages in a thread, then Prefect, whose flow joins them.

    Returns the report, and what has to be waited for before this process (and the embedded server with it) may end.
    """
    import asyncio

    recipe = str(session.loaded.path)
    head_start = threading.Thread(target=_head_start, args=(session,), name="head start", daemon=True)
    head_start.start()
    settings = PREFECT_SETTINGS if "PREFECT_LOGGING_LEVEL" in os.environ else {**PREFECT_SETTINGS, **LOGGED}
    for name, value in settings.items():
        os.environ.setdefault(name, value)
    with activate(recipe, session):
        try:
            state, document = asyncio.run(_run_flow(recipe, session))
        except Exception as err:  # Prefect's faults are of many kinds, and none may cost the work
            head_start.join()
            planned = session.plan()
            if planned.ready:
                raise
            session.finish(planned)
            note(f"warning: Prefect did not record this build: {err}")
            return report(session, planned), lambda: None
        finally:
            head_start.join()
    shown = sum(step["state"] in ("built", "cached", "failed") for step in document["steps"])
    return document, lambda: _settle(state, shown)


@contextmanager
def _interruptible(session: BuildSession) -> Iterator[None]:
    """Stop the stages at once when the user interrupts: Prefect, while it starts, lets Ctrl-C wait for seconds."""
    if threading.current_thread() is not threading.main_thread():  # which alone gets signals
        yield
        return
    before = signal.getsignal(signal.SIGINT)

    def interrupt(number: int, frame: FrameType | None) -> None:
        session.cancel()
        signal.default_int_handler(number, frame)

    signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


async def _run_flow(recipe: str, session: BuildSession) -> tuple[State[Any], dict[str, Any]]:
    from enginery.prefect_server import embedded_server

    server = embedded_server()
    from flows.build import build  # imports Prefect, while its server starts

    if server is not None:
        server.wait()
    targets = list(session.selection.targets)
    state: State[Any] = await build(
        recipe, store=session.store.uri, targets=targets, jobs=session.jobs, return_state=True
    )
    document: Any = await state.aresult(raise_on_failure=False)
    if isinstance(document, BaseException):
        raise document
    return state, document


def _settle(state: State[Any], steps: int) -> None:
    """Wait until the server has recorded that many task runs: it gets them as events, some seconds behind the flow."""
    from prefect import get_client
    from prefect.client.schemas.filters import FlowRunFilter

    flow_run = state.state_details.flow_run_id
    if flow_run is None:
        return
    where = FlowRunFilter.model_validate({"id": {"any_": [str(flow_run)]}})
    deadline = time.monotonic() + _SETTLE_SECONDS
    with get_client(sync_client=True) as client:
        while time.monotonic() < deadline:
            runs = client.read_task_runs(flow_run_filter=where, limit=200)
            if sum(run.state is not None and run.state.is_final() for run in runs) >= min(steps, 200):
                return
            time.sleep(0.2)


def _head_start(session: BuildSession) -> None:
    import asyncio

    from tasks.drive import drive

    async def run(step: Step, planned: Plan) -> Outcome:
        return await asyncio.to_thread(session.ensure, step, planned)

    # What stops a build (the store cannot be reached) stops the flow too, which says so.
    with suppress(ArtifactError):
        asyncio.run(drive(session, run))
