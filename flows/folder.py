"""Build a folder of recipes: those in which something is stale, each as a run of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from prefect import flow
from prefect.deployments import arun_deployment

from tasks.forms import Jobs, StoreAddress, form
from tasks.parameters import recipes_in


@flow(name="build", flow_run_name="build {folder}", persist_result=False, validate_parameters=True)
async def build_folder(
    folder: Annotated[str, form("Folder", "A folder of the checkout, with recipes.", examples=["recipes"])] = "recipes",
    store: StoreAddress = None,
    jobs: Jobs = 2,
    queue: Annotated[
        str, form("Queue", "The work queue that the builds wait in.", examples=["default", "nightly"])
    ] = "nightly",
) -> list[dict[str, Any]]:
    """Ask for a build of every recipe of a folder, and return which run each is; they go on after this flow has ended."""
    asked = []
    for path in recipes_in(Path(folder)):
        run = await arun_deployment(
            "build/recipe",
            parameters={"recipe": str(path), "store": store, "jobs": jobs},
            timeout=0,
            as_subflow=False,
            work_queue_name=queue,
        )
        asked.append({"recipe": str(path), "flow_run": str(run.id)})
    return asked
