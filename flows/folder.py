"""Build a folder of recipes: those in which something is stale, each as a run of its own."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated, Any

from prefect import flow, get_run_logger
from prefect.deployments import arun_deployment

from recipes.errors import RecipeError
from recipes.pools import portable_host
from tasks.fleet import is_stale
from tasks.forms import Jobs, StoreAddress, form
from tasks.freshness import Freshness
from tasks.parameters import recipes_in, worker_session
from tasks.toolchain import probe_host


@flow(name="build", flow_run_name="build {folder}", persist_result=False, validate_parameters=True)
async def build_folder(
    folder: Annotated[str, form("Folder", "A folder of the checkout, with recipes.", examples=["recipes"])] = "recipes",
    store: StoreAddress = None,
    jobs: Jobs = 2,
    queue: Annotated[
        str, form("Queue", "The work queue that the builds wait in.", examples=["default", "nightly"])
    ] = "nightly",
) -> list[dict[str, Any]]:
    """Ask for a build of every recipe of a folder in which something is stale, and return which run each is.

    The builds go on after this flow has ended. A recipe that cannot be planned is asked for too: its run tells why.
    """
    asked = []
    for path in recipes_in(Path(folder)):
        if not await _has_work(str(path), store, jobs):
            asked.append({"recipe": str(path), "flow_run": None})
            continue
        run = await arun_deployment(
            "build/recipe",
            parameters={"recipe": str(path), "store": store, "jobs": jobs},
            timeout=0,
            as_subflow=False,
            work_queue_name=queue,
        )
        asked.append({"recipe": str(path), "flow_run": str(run.id)})
    return asked


async def _has_work(recipe: str, store: str | None, jobs: int) -> bool:
    try:
        session = worker_session(recipe, store, None, jobs, host=portable_host(probe_host()))
        planned = await asyncio.to_thread(session.plan)
        return await is_stale(planned, Freshness(Path(recipe), session.store, session.versions_read()))
    except RecipeError as err:
        get_run_logger().warning("%s", err)
        return True
