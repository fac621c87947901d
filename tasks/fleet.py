"""What a build asks of a Prefect server: which pools have workers, and compilations on them, until they have ended.

A compilation is a run of the deployment `compile/<pool>`, which is the deployment `compile/target` for that pool. A
run that nobody can take yet stays scheduled, and is found again by later builds instead of being asked for twice; one that
had begun already, maybe with an older checkout, is waited for, and another is asked for when it has ended.
A worker that is not heard of any more (Prefect: three of its heartbeats) has lost its run: that is marked crashed, which frees
its place in the pool, and another is asked for. Should the lost one live after all, the store's locks keep both apart.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial
from typing import Any, Final
from uuid import UUID

from prefect import get_run_logger
from prefect.client.orchestration import PrefectClient, get_client
from prefect.client.schemas.filters import FlowRunFilter
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.deployments import arun_deployment
from prefect.exceptions import ObjectNotFound
from prefect.runtime import flow_run as this_run
from prefect.states import Crashed

from artifacts.host import Host
from recipes.plan import EnginePlan, Plan
from recipes.pools import choose_pool, host_queue, pools_of
from tasks.freshness import Freshness
from tasks.server import Line

TEMPLATE: Final = "compile/target"
POLL_SECONDS: Final = 2.0
_TRIES: Final = 3
_HEARD_SECONDS: Final = 180.0  # in which every worker has found a server again that is back
_UNFINISHED: Final = ("SCHEDULED", "PENDING", "RUNNING", "PAUSED")
_PAGE: Final = 200
_POLLED_SECONDS: Final = 60.0  # workers ask every 10 s or so


@dataclass(frozen=True)
class Asked:
    """What became of one target that was asked of a pool. `state`: built, failed or waiting; cached: it was not asked.

    `engines` are the paths of those that are published, in the store.
    """

    target: str
    pool: str | None
    state: str
    why: str
    run: str | None = None
    engines: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON values."""
        told = {"target": self.target, "pool": self.pool, "state": self.state, "why": self.why, "flow_run": self.run}
        return {**told, "engines": list(self.engines)}


async def compile_on_pools(
    engines: Sequence[EnginePlan], parameters: Mapping[str, Any], freshness: Freshness, host: Host | None = None
) -> list[Asked]:
    """Have every stale target of these engines compiled on its pool, all at once, and return what became of each.

    `parameters` are those of the flow `compile` besides `target`. Of targets that are fresh nothing is asked; those without
    a live worker are asked for and not waited for. With `host` all of it is that host's to do, and nobody else's.
    """
    line = Line(get_run_logger().warning)
    async with get_client() as client:
        pools = await line.ask(partial(_pools_of, client, engines, host))
        asking = {**parameters, "host": host.name} if host is not None else parameters
        asked, wanted = [], []
        for (runtime, gpu), pool in pools.items():
            target = f"{runtime}:{gpu}"
            fresh = host is None and pool is not None
            there = await asyncio.to_thread(freshness.published, runtime, gpu, str(pool)) if fresh else ()
            if there:
                why = "fresh for every host of the pool that was seen lately"
                asked.append(Asked(target, pool, "cached", why, engines=there))
            else:
                wanted.append(_compile(client, line, target, pool, asking))
        return [*asked, *await asyncio.gather(*wanted)]


async def is_stale(planned: Plan, freshness: Freshness) -> bool:
    """Tell whether a build of this recipe, planned for the portable pool, has anything to do there or on another pool."""
    waiting = [engine for engine in planned.engines if engine.state == "waiting"]
    if planned.ready or not waiting:
        return bool(planned.ready)
    async with get_client() as client:
        pools = await Line(get_run_logger().warning).ask(partial(_pools_of, client, waiting))
    for (runtime, gpu), pool in pools.items():
        if pool is None or not await asyncio.to_thread(freshness.published, runtime, gpu, pool):
            return True
    return False


async def _pools_of(
    client: PrefectClient, engines: Sequence[EnginePlan], host: Host | None = None
) -> dict[tuple[str, str], str | None]:
    """Return the pool of every target of these engines, of those that a host works for; None: there is none."""
    versions: dict[tuple[str, str], str] = {}
    for engine in engines:
        versions.setdefault((engine.runtime, engine.gpu), engine.runtime_version)
    pools = [pool.name for pool in await client.read_work_pools(limit=_PAGE)]
    pools = [pool for pool in pools if host is None or pool in pools_of(host)]
    live = [pool for pool in pools if await _workers(client, pool)]
    return {
        (runtime, gpu): choose_pool(runtime, version, gpu, pools, live) for (runtime, gpu), version in versions.items()
    }


async def _compile(
    client: PrefectClient, line: Line, target: str, pool: str | None, parameters: Mapping[str, Any]
) -> Asked:
    if pool is None:
        return Asked(target, None, "waiting", "no work pool for it: start a worker (docs/fleet.md)")
    deployment = await line.ask(partial(_deployment, client, pool))
    log = get_run_logger()
    queue = host_queue(parameters["host"]) if "host" in parameters else None
    ask = partial(_run, client, deployment, target, pool, parameters, queue)
    for attempt in range(_TRIES):
        run = await line.ask(ask)
        if _begun(run) and not attempt:
            # Another build asked for it, maybe with an older checkout: what is asked for after it finds all cached, or builds it.
            await _ended(client, line, run, pool, queue)
            run = await line.ask(ask)
        run = await _ended(client, line, run, pool, queue)
        state = run.state
        if state is not None and state.is_scheduled():
            log.warning("%s waits for a worker of the pool %s", target, pool)
            told = f"no live worker of the pool takes {queue or 'it'}; it runs when one comes"
            return Asked(target, pool, "waiting", told, str(run.id))
        if state is not None and state.is_completed():
            waits = state.name == "Waiting"
            if waits:
                return Asked(target, pool, "waiting", state.message or "", str(run.id))
            paths = [path for path in (state.message or "").split(", ") if path.startswith("engines/")]
            return Asked(target, pool, "built", "", str(run.id), tuple(paths))
        if state is None or not state.is_crashed():
            what = (state.message or str(state.name)) if state is not None else "no state"
            return Asked(target, pool, "failed", what, str(run.id))
        log.warning("%s on %s: lost (%s); asked for again", target, pool, state.message)
        await asyncio.sleep(POLL_SECONDS * 2**attempt)
    return Asked(target, pool, "failed", f"lost {_TRIES} times: its workers died", str(run.id))


async def _run(
    client: PrefectClient, deployment: UUID, target: str, pool: str, parameters: Mapping[str, Any], queue: str | None
) -> FlowRun:
    """Return the unfinished run for this recipe, target and store, or ask for one; who did not hear the answer finds it so."""
    wanted = {**parameters, "target": target}
    where = FlowRunFilter.model_validate(
        {"deployment_id": {"any_": [str(deployment)]}, "state": {"type": {"any_": list(_UNFINISHED)}}}
    )
    for run in await client.read_flow_runs(flow_run_filter=where, limit=_PAGE):
        if all(run.parameters.get(name) == wanted[name] for name in wanted):
            return run
    return await arun_deployment(
        deployment,
        client=client,
        parameters=wanted,
        flow_run_name=f"compile {parameters['recipe']} {target}",
        timeout=0,
        tags=[f"pool:{pool}", f"target:{target}"],
        work_queue_name=queue or await _queue(client),
    )


async def _ended(client: PrefectClient, line: Line, run: FlowRun, pool: str, queue: str | None) -> FlowRun:
    """Wait until a run has ended, its worker is lost, or none is there to take it; while the server was away, none could be heard.

    Of a run that had begun before this build saw it, nobody here knows whether the server was away: its worker has time to be heard.
    """
    since = time.monotonic() if _begun(run) else float("-inf")
    while True:
        run = await line.ask(partial(client.read_flow_run, run.id))
        if run.state is not None and run.state.is_final():
            return run
        begun = _begun(run)
        away = partial(_is_lost, client, run, pool) if begun else partial(_nobody_listens, client, pool, queue)
        heard = not begun or time.monotonic() - since > _HEARD_SECONDS
        if await line.ask(away) and heard and line.steady(_HEARD_SECONDS):
            if not begun:
                return run
            crashed: Any = Crashed(
                message=f"the worker {run.labels.get('prefect.worker.name')} is not heard of any more"
            )
            await line.ask(partial(client.set_flow_run_state, run.id, crashed, force=True))
        else:
            await asyncio.sleep(POLL_SECONDS)


async def _is_lost(client: PrefectClient, run: FlowRun, pool: str) -> bool:
    worker = run.labels.get("prefect.worker.name")
    return worker is not None and worker not in await _workers(client, pool)


def _begun(run: FlowRun) -> bool:
    return run.state_type in (StateType.PENDING, StateType.RUNNING)


async def _nobody_listens(client: PrefectClient, pool: str, queue: str | None) -> bool:
    """Tell whether no live worker of a pool takes runs, of one queue where that is named."""
    if not await _workers(client, pool):
        return True
    if queue is None:
        return False
    try:
        polled = (await client.read_work_queue_by_name(queue, work_pool_name=pool)).last_polled
    except ObjectNotFound:
        return True
    return polled is None or (datetime.now(timezone.utc) - polled).total_seconds() > _POLLED_SECONDS


async def _workers(client: PrefectClient, pool: str) -> set[str]:
    """Return the names of a pool's live workers."""
    workers = await client.read_workers_for_work_pool(pool, limit=_PAGE)
    return {worker.name for worker in workers if worker.status == "ONLINE"}


async def _queue(client: PrefectClient) -> str | None:
    """Return the work queue of this run, for what it asks for: a person's build goes before a nightly one everywhere."""
    mine = this_run.get_id()
    return (await client.read_flow_run(UUID(mine))).work_queue_name if mine else None


async def _deployment(client: PrefectClient, pool: str) -> UUID:
    """Make `compile/target` a deployment of this pool (or renew it), and return it."""
    template = await client.read_deployment_by_name(TEMPLATE)
    return await client.create_deployment(
        template.flow_id,
        pool,
        version=template.version,
        parameters=template.parameters,
        description=f"{TEMPLATE} on the work pool {pool}; made and renewed by builds",
        work_pool_name=pool,
        tags=template.tags,
        path=template.path,
        entrypoint=template.entrypoint,
        parameter_openapi_schema=template.parameter_openapi_schema,
        pull_steps=template.pull_steps,
        enforce_parameter_schema=template.enforce_parameter_schema,
        job_variables=template.job_variables,
    )
