"""Build a folder of recipes: those in which something is stale, each as a run of its own."""

from __future__ import annotations

import asyncio
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Final

from prefect import flow, get_run_logger
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import (
    DeploymentFilter,
    DeploymentFilterName,
    FlowFilter,
    FlowFilterName,
    FlowRunFilter,
)
from prefect.client.schemas.objects import FlowRun
from prefect.deployments import arun_deployment
from prefect.runtime import flow_run as this_run

from recipes.errors import RecipeError
from recipes.pools import portable_host
from tasks.fleet import is_stale
from tasks.forms import Jobs, StoreAddress, form
from tasks.freshness import Freshness, portable_plans
from tasks.parameters import RETRIES, recipes_in, worker_session, worker_store
from tasks.patience import patiently
from tasks.server import Line
from tasks.toolchain import probe_host

_PAGE: Final = 200


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

    The builds go on after this flow has ended. A recipe that cannot be planned is asked for too: its run tells why. Where a build
    of it waits for a worker already (of a person, or of a night before), that one is returned: its checkout will be newer.
    """
    log = get_run_logger().warning
    asked, line = [], Line(log)
    waiting = await line.ask(partial(_waiting, store))
    paths = recipes_in(Path(folder))
    known = await asyncio.to_thread(patiently, lambda: portable_plans(paths, worker_store(store)), RETRIES, warn=log)
    for path in paths:
        if not (await is_stale(*known[path]) if path in known else await _has_work(str(path), store, jobs)):
            asked.append({"recipe": str(path), "flow_run": None})
            continue
        if str(path) in waiting:
            asked.append({"recipe": str(path), "flow_run": waiting[str(path)]})
            continue
        # Whoever does not hear the answer asks for the same run again; a retry of this one asks for others.
        once = f"{this_run.get_id()} {this_run.get_run_count()} {path}" if this_run.get_id() else None
        asking = partial(
            arun_deployment,
            "build/recipe",
            parameters={"recipe": str(path), "store": store, "jobs": jobs},
            flow_run_name=f"build {path}",
            timeout=0,
            as_subflow=False,
            work_queue_name=queue,
            idempotency_key=once,
        )
        run = await line.ask(asking)
        asked.append({"recipe": str(path), "flow_run": str(run.id)})
    return asked


async def _waiting(store: str | None) -> dict[str, str]:
    """Return by recipe the whole builds for a store that are asked for, and that no worker has taken yet."""
    where = {
        "flow_filter": FlowFilter(name=FlowFilterName(any_=["build"])),
        "deployment_filter": DeploymentFilter(name=DeploymentFilterName(any_=["recipe"])),
        "flow_run_filter": FlowRunFilter.model_validate(
            {
                "state": {"name": {"any_": ["Scheduled", "Late"]}},
                "expected_start_time": {"before_": datetime.now(timezone.utc).isoformat()},
            }
        ),
    }
    runs: list[FlowRun] = []
    async with get_client() as client:
        while page := await client.read_flow_runs(**where, limit=_PAGE, offset=len(runs)):  # type: ignore[arg-type]
            runs += page
    return {
        str(run.parameters["recipe"]): str(run.id)
        for run in runs
        if run.parameters.get("store") == store
        and run.parameters.get("targets") is None
        and run.parameters.get("on") is None
        and run.parameters.get("spread")
    }


async def _has_work(recipe: str, store: str | None, jobs: int) -> bool:
    try:
        session = worker_session(recipe, store, None, jobs, host=portable_host(probe_host()))
        planned = await asyncio.to_thread(session.plan)
        return await is_stale(planned, Freshness(Path(recipe), session.store, session.versions_read()))
    except RecipeError as err:
        get_run_logger().warning("%s", err)
        return True
