"""Watch a host, and rebuild what a change of it made stale: `watch` asks by an event, its automation runs `rebuild`.

Both run on the host that they are about: `enginery watch --serve` deploys them there, with schedule and automation.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from prefect import flow, get_run_logger
from prefect.events import emit_event

from artifacts.rollouts import CANARY_ENGINES
from flows.build import build
from recipes.loader import load
from tasks.drift import look, missing_versions, request
from tasks.forms import Canary, Jobs, Pools, Recipes, RolloutName, StoreAddress
from tasks.gpu_slots import GpuSlots
from tasks.parameters import RETRIES, worker_store
from tasks.rebuilding import rebuild_due
from tasks.report import report
from tasks.session import BuildSession, activate, open_session
from tasks.toolchain import probe_host


@flow(name="watch", persist_result=False, validate_parameters=True)
async def watch(
    recipes: Recipes = ("recipes",), store: StoreAddress = None, pools: Pools = False, canary: Canary = CANARY_ENGINES
) -> dict[str, Any]:
    """Record this host and what changed; emit `enginery.host.drifted`, and `enginery.rebuild.due` for what is to be rebuilt.

    `recipes` are recipes or folders of them, as paths. With `pools` what is due is asked of `rebuild/pools`, else of this
    host's own deployment. Returns what was found.
    """
    opened, log = worker_store(store), get_run_logger()
    paths = [Path(one) for one in recipes]
    found = await asyncio.to_thread(look, opened, paths, warn=log.warning, pools=pools, enough=canary)
    host = found.record.host.name
    resource = {"prefect.resource.id": f"enginery.host.{host}", "prefect.resource.name": host}
    document = found.to_json()
    if found.drifts:
        log.warning(
            "%s changed: %s; %d engines are stale", host, ", ".join(document["changes"]), len(document["stale"])
        )
        emit_event(event="enginery.host.drifted", resource=resource, payload=document)
    for rollout, rebuilds in found.due.items():
        await asyncio.to_thread(request, opened, rollout, host, rebuilds)
        payload = {"rollout": rollout, "host": host, "engines": document["due"][rollout]}
        asked = {**resource, "prefect.resource.id": f"enginery.fleet.{host}"} if pools else resource
        emit_event(event="enginery.rebuild.due", resource=asked, payload=payload)
    return document


@flow(name="rebuild", flow_run_name="rebuild {rollout}", persist_result=False, validate_parameters=True)
async def rebuild(rollout: RolloutName, store: StoreAddress = None, jobs: Jobs = 2) -> dict[str, Any]:
    """Rebuild on this host what a rollout asks of it, and note in the store which engines passed their gates."""
    opened, log = worker_store(store), get_run_logger()

    def session(recipe: str, targets: list[str]) -> BuildSession:
        absent = missing_versions(opened, load(Path(recipe)).recipe.name)
        return open_session(
            Path(recipe),
            opened,
            targets=tuple(targets),
            jobs=jobs,
            warn=log.warning,
            versions=absent,
            retries=RETRIES,
            slot=GpuSlots(log.warning),
        )

    async def run(recipe: str, targets: list[str]) -> dict[str, Any]:
        opening = await asyncio.to_thread(session, recipe, targets)
        planned = await asyncio.to_thread(opening.plan)
        if planned.fresh and all(engine.state == "cached" for engine in planned.engines):  # by another host
            return report(opening, planned)
        with activate(recipe, opening):
            state: Any = await build(recipe, store=opened.uri, targets=targets, jobs=jobs, return_state=True)
        document: Any = await state.aresult(raise_on_failure=False)
        if isinstance(document, BaseException):
            raise document
        found: dict[str, Any] = document
        return found

    return await rebuild_due(opened, rollout, probe_host().name, run)
