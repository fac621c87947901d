"""Build one recipe: plan, run every stage that is stale as a task, plan again until nothing is left.

On a fleet, this is done for the portable stages alone; then every target is compiled on its pool.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from prefect import flow, get_run_logger
from prefect.client.schemas.objects import State
from prefect.states import Completed, Failed

from artifacts.catalog import EngineCatalog, EngineId
from artifacts.manifest import Manifest
from artifacts.store import Store
from recipes.pools import portable_host
from tasks.cache import run_session
from tasks.forms import HostName, Jobs, RecipePath, StoreAddress, Targets, form
from tasks.parameters import RETRIES, worker_session
from tasks.patience import patiently
from tasks.report import engine_report, lacking, pooled_report
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
            read = _reader(session.store)
            document["engines"] = await asyncio.to_thread(pooled_report, document["engines"], document["pools"], read)
        states = [*(one.state for one in asked), *(engine["state"] for engine in document["engines"])]
        failed = document["status"] == 1 or "failed" in states
        document["status"] = 1 if failed else 3 if any(one.state == "waiting" for one in asked) else 0
    if spread:
        await leave_engines(document, session.store, get_run_logger().log)
    if document["status"] == 1:
        failures = [step["id"] for step in document["steps"] if step["state"] == "failed"]
        pools = document.get("pools", ())
        failures += [f"{one['target']} ({one['why']})" for one in pools if one["state"] == "failed"]
        failures += lacking(document["engines"], pools)
        return Failed(message=f"failed: {', '.join(failures) or 'no precision passed its gates'}", data=document)
    if spread and document["status"] == 3:
        names = [f"{one['target']}: {one['why']}" for one in document["pools"] if one["state"] == "waiting"]
        return Completed(name="Waiting", message=f"waiting: {'; '.join(names)}", data=document)
    return document


def _reader(store: Store) -> Callable[[EngineId], Manifest]:
    """Return what reads manifests, and again where the store does not answer: nobody is to lose a build's report by that."""
    catalog, warn = EngineCatalog(store), get_run_logger().warning
    return lambda engine: patiently(partial(catalog.effective, engine), RETRIES, warn=warn)
