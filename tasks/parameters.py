"""What flows do with their parameters on a worker: open a session, find recipes."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from prefect import get_run_logger

from artifacts.errors import AddressError
from artifacts.host import Host
from artifacts.store import Store, open_store
from recipes.errors import Fault, RecipeError
from tasks.gpu_slots import GpuSlots
from tasks.patience import patiently
from tasks.session import BuildSession, open_session

RETRIES: Final = 4  # after 2, 8, 32 and 128 s


def worker_session(
    recipe: str,
    store: str | None,
    targets: Sequence[str] | None,
    jobs: int,
    *,
    host: Host | None = None,
    versions: Mapping[str, str | None] | None = None,
) -> BuildSession:
    """Open a session on a worker, which tries again what fails because the store does not answer.

    Of `versions`, those of runtimes that compile are this host's own. Raises RecipeError, AddressError.
    """
    portable = {name: found for name, found in (versions or {}).items() if not name.startswith("tensorrt")}
    warn = get_run_logger().warning

    def opened() -> BuildSession:
        return open_session(
            Path(recipe),
            worker_store(store),
            targets=tuple(targets or ()),
            jobs=jobs,
            warn=warn,
            host=host,
            versions=portable,
            retries=RETRIES,
            slot=GpuSlots(warn),
        )

    return patiently(opened, RETRIES, warn=warn)


def worker_store(store: str | None) -> Store:
    """Open the store that a run is given, else that of its worker (`ENGINERY_STORE`), else a folder. Raises AddressError.

    An address that is set and empty is refused: so is what a work pool has whose Prefect variable is missing.
    """
    address = store if store is not None else os.environ.get("ENGINERY_STORE", ".enginery")
    if not address:
        raise AddressError("ENGINERY_STORE is empty (prefect variable set enginery_store s3://bucket/prefix)")
    return open_store(address)


def recipes_in(folder: Path) -> list[Path]:
    """Return the recipes of a folder: every *.yaml with a top-level `enginery:`. Raises RecipeError where there is none."""
    found = [
        path
        for path in sorted(folder.glob("*.yaml"))
        if any(line.startswith("enginery:") for line in path.read_text(errors="replace").splitlines())
    ]
    if not found:
        raise RecipeError([Fault(str(folder), 0, "", "no recipe in this folder (a *.yaml with 'enginery: 1')")])
    return found
