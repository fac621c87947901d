"""Serve a host's own deployments: `watch/<host>` on a schedule, and `rebuild/<host>`, which an automation runs."""

from __future__ import annotations

import asyncio
from typing import Any, Final

from prefect.client.schemas.objects import ConcurrencyLimitConfig, ConcurrencyLimitStrategy
from prefect.events import DeploymentEventTrigger
from prefect.runner import Runner
from prefect.types.entrypoint import EntrypointType

from flows.watch import rebuild, watch

_POLL_SECONDS: Final = 5.0


def serve_host(host: str, recipes: list[str], store: str, every: float, *, pools: bool = False) -> None:
    """Deploy both for this host and run what is asked of it, until interrupted. Times are seconds.

    With `pools` rebuilds are asked of the fleet's deployment `rebuild/pools`, and this host serves its looks alone.
    """
    asyncio.run(_serve(host, recipes, store, every, pools=pools))


async def _serve(host: str, recipes: list[str], store: str, every: float, *, pools: bool) -> None:
    runner = Runner(name=f"host {host}", query_seconds=_POLL_SECONDS, limit=None)
    # Looks that were missed, and those that come while one is under way, have nothing to add.
    alone = ConcurrencyLimitConfig(limit=1, collision_strategy=ConcurrencyLimitStrategy.CANCEL_NEW)
    shared: dict[str, Any] = {"entrypoint_type": EntrypointType.MODULE_PATH, "tags": [f"host:{host}"]}
    looking = await watch.ato_deployment(
        host,
        interval=every,
        parameters={"recipes": recipes, "store": store, "pools": pools},
        concurrency_limit=alone,
        description="Records what this host is, and which engines a change made stale.",
        **shared,
    )
    due = DeploymentEventTrigger(
        expect={"enginery.rebuild.due"},
        match={"prefect.resource.id": f"enginery.host.{host}"},
        name=f"rebuild what is due on {host}",
        parameters={"rollout": "{{ event.payload.rollout }}", "store": store},
    )
    building = await rebuild.ato_deployment(
        host,
        parameters={"store": store},
        triggers=[due],
        description="Rebuilds here what a rollout asks of this host.",
        **shared,
    )
    for deployment in (looking,) if pools else (looking, building):
        await runner.aadd_deployment(deployment)
    await runner.start()
