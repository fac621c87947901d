"""Compile, verify, benchmark and publish one target of a recipe: the same build, restricted to it."""

from __future__ import annotations

from typing import Any

from prefect import flow
from prefect.client.schemas.objects import State
from prefect.states import Completed, Failed

from tasks.cache import run_session
from tasks.forms import HostName, Jobs, RecipePath, StoreAddress, Target, Versions
from tasks.parameters import worker_session
from tasks.toolchain import probe_host


@flow(name="compile", flow_run_name="compile {recipe} {target}", persist_result=False, validate_parameters=True)
async def compile(  # noqa: A001 - the stage's name
    recipe: RecipePath,
    target: Target,
    store: StoreAddress = None,
    jobs: Jobs = 2,
    versions: Versions = None,
    host: HostName = None,
) -> State[dict[str, Any]]:
    """Build what is stale of one target. Portable stages are found in the store, made with the packages of `versions`.

    Ends as Waiting where this host cannot compile the target or is not the one that was asked, as Failed where something failed.
    """
    here = probe_host().name
    if host not in (None, here):
        told = f"asked of {host} and taken by {here}: start its workers with --work-queue (docs/fleet.md)"
        return Completed(name="Waiting", message=told, data={"recipe": recipe, "status": 3, "engines": []})
    session = worker_session(recipe, store, [target], jobs, versions=versions)
    document = await run_session(session)
    engines = document["engines"]
    if document["status"] == 1:
        failures = [
            f"{step['id']}: {'; '.join(step['why'])}" for step in document["steps"] if step["state"] == "failed"
        ]
        failures += [f"{one['target']}: {one['why']}" for one in engines if one["state"] == "failed"]
        return Failed(message=f"failed: {'; '.join(failures)}", data=document)
    waiting = [one for one in engines if one["state"] == "waiting"]
    if waiting:
        return Completed(name="Waiting", message="; ".join(one["why"] for one in waiting), data=document)
    return Completed(message=", ".join(str(one["path"]) for one in engines), data=document)
