"""Build one recipe from the command line: a head start in this process, Prefect beside it, progress on stderr.

Prefect's embedded server takes ten seconds to start (docs/performance.md), so the first stages begin
at once, in threads; when the flow runs it joins what is under way. Nothing of Prefect is imported
where the plan is fresh, or where it only waits for other hosts.
"""

from __future__ import annotations

import asyncio
import os
import threading
from typing import TYPE_CHECKING, Any

from enginery.output import note
from tasks.report import report
from tasks.session import BuildSession, Outcome, activate, drive

if TYPE_CHECKING:
    from recipes.plan import Plan
    from recipes.steps import Step

# Set before Prefect is imported. The first two keep it from the internet; see docs/operations.md.
PREFECT_SETTINGS = {
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "DO_NOT_TRACK": "1",
    "PREFECT_LOGGING_LEVEL": "WARNING",
    "PREFECT_LOGGING_SERVER_LEVEL": "ERROR",
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
}


def build_session(session: BuildSession, *, verbose: bool = False, quiet: bool = False) -> dict[str, Any]:
    """Build what is stale and return the report."""
    planned = session.plan()
    if not planned.ready:
        for step in planned.steps:
            if step.record is not None:
                session.ensure(step, planned)
        session.finish(planned)
        return report(session, planned)
    from enginery.progress import watch

    with watch(session, planned, verbose=verbose, quiet=quiet):
        try:
            return _build_with_prefect(session)
        except KeyboardInterrupt:
            session.cancel()
            raise


def _build_with_prefect(session: BuildSession) -> dict[str, Any]:
    """Start the stages in a thread, then Prefect, whose flow joins them."""
    recipe = str(session.loaded.path)
    head_start = threading.Thread(target=_head_start, args=(session,), name="head start", daemon=True)
    head_start.start()
    for name, value in PREFECT_SETTINGS.items():
        os.environ.setdefault(name, value)
    from flows.build import build

    with activate(recipe, session):
        try:
            document: dict[str, Any] = asyncio.run(build(recipe, store=session.store.uri))
        except Exception as err:
            # A server that cannot be had must not cost the work: the stages end, and are in the store.
            head_start.join()
            planned = session.plan()
            session.finish(planned)
            if planned.ready:
                raise
            note(f"warning: Prefect did not record this build: {err}")
            return report(session, planned)
    head_start.join()
    return document


def _head_start(session: BuildSession) -> None:
    async def run(step: Step, planned: Plan) -> Outcome:
        return await asyncio.to_thread(session.ensure, step, planned)

    asyncio.run(drive(session, run))
