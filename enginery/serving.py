"""Serve a host's own deployments: `watch/<host>` on a schedule, and `rebuild/<host>`, which an automation runs."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable
from contextlib import suppress
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any, Final
from uuid import UUID

from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.objects import FlowRun
from prefect.events import DeploymentEventTrigger
from prefect.exceptions import ObjectNotFound
from prefect.logging import get_logger
from prefect.runner import Runner
from prefect.states import Cancelled
from prefect.types.entrypoint import EntrypointType

from artifacts.rollouts import CANARY_ENGINES
from flows.watch import rebuild, watch
from tasks.server import asked, wait_for_server

if TYPE_CHECKING:
    from typing_extensions import Self

_POLL_SECONDS: Final = 5.0


def serve_host(
    host: str, recipes: list[str], store: str, every: float, *, pools: bool = False, canary: int = CANARY_ENGINES
) -> None:
    """Deploy both for this host and run what is asked of it, until interrupted. Times are seconds.

    With `pools` rebuilds are asked of the fleet's deployment `rebuild/pools`, and this host serves its looks alone.
    """
    asyncio.run(_serve(host, recipes, store, every, pools=pools, canary=canary))


class _HostRunner(Runner):
    """A runner that waits for a server which is away, for ever, and of the looks that are due begins the newest, one at a time.

    Prefect's own gives up after three questions in a row that were not answered (3.8), and ends with it what runs; and a limit
    of one run on the deployment stays taken where a server is restarted during a look: then none would ever begin again.
    """

    looks: UUID | None = None  # the deployment whose runs are looks
    _begun: UUID | None = None

    async def __aenter__(self) -> Self:
        entered = await super().__aenter__()
        client: Any = self._client
        due: Callable[..., Awaitable[list[FlowRun]]] = client.get_scheduled_flow_runs_for_deployments

        async def get_scheduled_flow_runs_for_deployments(**question: Any) -> list[FlowRun]:
            async def ask() -> list[FlowRun]:
                return await self._without_missed(client, await due(**question))

            return await asked(ask, warn=get_logger("runner").warning, away=math.inf)

        client.get_scheduled_flow_runs_for_deployments = get_scheduled_flow_runs_for_deployments
        return entered

    async def _without_missed(self, client: PrefectClient, runs: list[FlowRun]) -> list[FlowRun]:
        """Leave out all looks but one that may begin, and cancel those whose time has passed: they have nothing to add."""
        now = datetime.now(timezone.utc)
        looks = [run for run in runs if run.deployment_id == self.looks and run.next_scheduled_start_time is not None]
        looks.sort(key=lambda run: run.next_scheduled_start_time or now)
        passed = [run for run in looks if (run.next_scheduled_start_time or now) <= now]
        chosen = None if self._one_is_under_way() else passed.pop() if passed else looks[0] if looks else None
        for run in passed:
            missed: Any = Cancelled(name="Skipped", message="another look was under way, or a later one is due")
            with suppress(ObjectNotFound):  # deleted meanwhile, or not in the database that was restored
                await client.set_flow_run_state(run.id, missed)
        if chosen is not None:
            self._begun = chosen.id
        return [run for run in runs if run.deployment_id != self.looks or run is chosen]

    def _one_is_under_way(self) -> bool:
        """Tell whether the process of the look that was begun last is there, whatever the server heard of it.

        The runner's poller keeps the id of a run until its process has exited (Prefect 3.8), and has no public name for that.
        """
        return self._begun in self._scheduled_run_poller._submitting_flow_run_ids  # noqa: SLF001


async def _serve(host: str, recipes: list[str], store: str, every: float, *, pools: bool, canary: int) -> None:
    await wait_for_server(get_logger("runner").warning)
    runner = _HostRunner(name=f"host {host}", query_seconds=_POLL_SECONDS, limit=None)
    shared: dict[str, Any] = {"entrypoint_type": EntrypointType.MODULE_PATH, "tags": [f"host:{host}"]}
    looking = await watch.ato_deployment(
        host,
        interval=every,
        parameters={"recipes": recipes, "store": store, "pools": pools, "canary": canary},
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
    runner.looks = await runner.aadd_deployment(looking)
    if not pools:
        await runner.aadd_deployment(building)
    await runner.start()
