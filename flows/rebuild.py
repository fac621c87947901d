"""Rebuild through the work pools what a change of a host made stale; the automation of this deployment starts it."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated, Any

from prefect import flow

from flows.build import build
from recipes.pools import portable_host
from tasks.forms import Jobs, RolloutName, StoreAddress, form
from tasks.freshness import engines_on, known_host
from tasks.parameters import worker_session, worker_store
from tasks.rebuilding import built_or_raise, rebuild_due
from tasks.report import engine_report
from tasks.toolchain import probe_host


@flow(name="rebuild", flow_run_name="rebuild {rollout} on {host}", persist_result=False, validate_parameters=True)
async def rebuild_on_pools(
    rollout: RolloutName,
    host: Annotated[str, form("Host", "The host that changed; its workers compile.", examples=["gpu-node-17"])],
    store: StoreAddress = None,
    jobs: Jobs = 2,
) -> dict[str, Any]:
    """Make portable stages here, have the host compile what a rollout asks of it, and note which engines passed their gates.

    Where the host's workers do not answer this fails, and the host's next looks ask again.
    """
    opened = worker_store(store)

    def made(recipe: str, targets: list[str]) -> dict[str, Any] | None:
        """Return the report of engines that another host has made, which need no run of a pool."""
        session = worker_session(recipe, opened.uri, targets, jobs, host=portable_host(probe_host()))
        there, versions = known_host(opened, host), session.versions_read()
        engines = engines_on(Path(recipe), opened, there, versions, targets)
        if not engines or any(engine.state != "cached" or engine.publish is None for engine in engines):
            return None
        return {"recipe": session.recipe_name, "status": 0, "engines": [engine_report(engine) for engine in engines]}

    async def run(recipe: str, targets: list[str]) -> dict[str, Any]:
        if (document := await asyncio.to_thread(made, recipe, targets)) is not None:
            return document
        parameters: dict[str, Any] = {"store": opened.uri, "targets": targets, "jobs": jobs, "spread": True, "on": host}
        state: Any = await build(recipe, **parameters, return_state=True)
        return built_or_raise(await state.aresult(raise_on_failure=False))

    return await rebuild_due(opened, rollout, host, run)
