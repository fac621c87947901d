"""Serve a host's own deployments: `watch/<host>` on a schedule, and `rebuild/<host>`, which an automation runs."""

from __future__ import annotations

import asyncio
import math
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from prefect.client.schemas.objects import ConcurrencyLimitConfig, ConcurrencyLimitStrategy
from prefect.events import DeploymentEventTrigger
from prefect.logging import get_logger
from prefect.runner import Runner
from prefect.types.entrypoint import EntrypointType

from flows.watch import rebuild, watch
from tasks.server import asked, wait_for_server

if TYPE_CHECKING:
    from typing_extensions import Self

_POLL_SECONDS: Final = 5.0


def serve_host(host: str, recipes: list[str], store: str, every: float, *, pools: bool = False) -> None:
    """Deploy both for this host and run what is asked of it, until interrupted. Times are seconds.

    With `pools` rebuilds are asked of the fleet's deployment `rebuild/pools`, and this host serves its looks alone.
    """
    asyncio.run(_serve(host, recipes, store, every, pools=pools))


class _Enduring(Runner):
    """A runner that waits for a server which is away, for ever.

    Prefect's own gives up after three questions in a row that were not answered (3.8), and ends with it what runs.
    """

    async def __aenter__(self) -> Self:
        entered = await super().__aenter__()
        client: Any = self._client
        due = client.get_scheduled_flow_runs_for_deployments

        async def get_scheduled_flow_runs_for_deployments(**question: Any) -> Any:
            return await asked(partial(due, **question), warn=get_logger("runner").warning, away=math.inf)

        client.get_scheduled_flow_runs_for_deployments = get_scheduled_flow_runs_for_deployments
        return entered


async def _serve(host: str, recipes: list[str], store: str, every: float, *, pools: bool) -> None:
    await wait_for_server(get_logger("runner").warning)
    runner = _Enduring(name=f"host {host}", query_seconds=_POLL_SECONDS, limit=None)
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
