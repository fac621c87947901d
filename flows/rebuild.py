"""Rebuild through the work pools what a change of a host made stale; the automation of this deployment starts it."""

from __future__ import annotations

from typing import Annotated, Any

from prefect import flow

from flows.build import build
from tasks.forms import Jobs, RolloutName, StoreAddress, form
from tasks.parameters import worker_store
from tasks.rebuilding import built_or_raise, rebuild_due


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

    async def run(recipe: str, targets: list[str]) -> dict[str, Any]:
        parameters: dict[str, Any] = {"store": opened.uri, "targets": targets, "jobs": jobs, "spread": True, "on": host}
        state: Any = await build(recipe, **parameters, return_state=True)
        return built_or_raise(await state.aresult(raise_on_failure=False))

    return await rebuild_due(opened, rollout, host, run)
