"""Build one recipe: plan, run every stage that is stale as a task, plan again until nothing is left."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prefect import flow
from prefect.client.schemas.objects import State
from prefect.states import Failed

from artifacts.store import open_store
from tasks.cache import StageTasks
from tasks.drive import drive
from tasks.report import report
from tasks.session import active_session, open_session


@flow(name="build", flow_run_name="build {recipe}", persist_result=False, validate_parameters=True)
async def build(
    recipe: str, store: str = ".enginery", targets: list[str] | None = None, jobs: int = 2
) -> dict[str, Any] | State[dict[str, Any]]:
    """Build a recipe's stale engines and publish them.

    `recipe` is a path; `store` a folder or s3:// address; `targets` limits to `RUNTIME` or `RUNTIME:GPU`; `jobs`
    bounds how many stages run at once. Returns the report that `enginery build --json` prints; where something failed,
    it is the data of a failed state.
    """
    session = active_session(recipe) or open_session(
        Path(recipe), open_store(store), targets=tuple(targets or ()), jobs=jobs
    )
    planned = await drive(session, StageTasks(session), show_all=True)
    session.finish(planned)
    document = report(session, planned)
    if document["status"] == 1:
        failed = [step["id"] for step in document["steps"] if step["state"] == "failed"]
        return Failed(message=f"failed: {', '.join(failed) or 'no precision passed its gates'}", data=document)
    return document
