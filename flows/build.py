"""Build one recipe: plan, run every stage that is stale as a task, plan again until nothing is left.

On a fleet, this is done for the portable stages alone; then every target is compiled on its pool.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated, Any

from prefect import flow, get_run_logger
from prefect.client.schemas.objects import State
from prefect.states import Completed, Failed

from artifacts.catalog import EngineCatalog
from recipes.pools import portable_host
from tasks.cache import run_session
from tasks.forms import HostName, Jobs, RecipePath, StoreAddress, Targets, form
from tasks.parameters import worker_session
from tasks.report import engine_report, pooled_report
from tasks.session import active_session
from tasks.shown import leave_engines
from tasks.toolchain import probe_host


@flow(name="build", flow_run_name="build {recipe}", persist_result=False, validate_parameters=True)
async def build(
    recipe: RecipePath,
    store: StoreAddress = None,
    targets: Targets = None,
    jobs: Jobs = 2,
    spread: Annotated[bool, form("Spread", "Compile each target on the work pool of its GPU.")] = False,
    on: HostName = None,
) -> dict[str, Any] | State[dict[str, Any]]:
    """Build a recipe's stale engines and publish them.

    With `on`, targets with pools are that host's to compile, and its engines are told. Returns the report that `enginery build --json` prints, with what became of the targets on pools of their own under
    `pools`; where something failed, it is the data of a failed state.
    """
    host = portable_host(probe_host()) if spread else None
    session = active_session(recipe) or worker_session(recipe, store, targets, jobs, host=host)
    document = await run_session(session, spread=spread)
    waiting = [engine for engine in session.plan().engines if engine.state == "waiting"]
    if spread and waiting:
        from tasks.fleet import compile_on_pools
        from tasks.freshness import Freshness, engines_on, known_host

        versions = session.versions_read()
        there = known_host(session.store, on) if on is not None else None
        asked = await compile_on_pools(
            waiting,
            {"recipe": recipe, "store": session.store.uri, "jobs": jobs, "versions": versions},
            Freshness(Path(recipe), session.store, versions),
            there,
        )
        if there is not None:
            planned = await asyncio.to_thread(engines_on, Path(recipe), session.store, there, versions, targets or ())
            document["engines"] = [engine_report(engine) for engine in planned]
        document["pools"] = [one.to_json() for one in asked]
        if there is None:
            catalog = EngineCatalog(session.store)
            rows = await asyncio.to_thread(pooled_report, document["engines"], document["pools"], catalog)
            document["engines"] = rows
        failed = document["status"] == 1 or any(one.state == "failed" for one in asked)
        document["status"] = 1 if failed else 3 if any(one.state == "waiting" for one in asked) else 0
    if spread:
        await leave_engines(document, session.store, get_run_logger().log)
    if document["status"] == 1:
        failures = [step["id"] for step in document["steps"] if step["state"] == "failed"]
        failures += [f"{one['target']} ({one['why']})" for one in document.get("pools", ()) if one["state"] == "failed"]
        return Failed(message=f"failed: {', '.join(failures) or 'no precision passed its gates'}", data=document)
    if spread and document["status"] == 3:
        names = [f"{one['target']}: {one['why']}" for one in document["pools"] if one["state"] == "waiting"]
        return Completed(name="Waiting", message=f"waiting: {'; '.join(names)}", data=document)
    return document
