"""The parameters that flows share, with what Prefect's forms say of them, and the session that they open on a worker."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

from prefect import get_run_logger
from pydantic import Field

from artifacts.host import Host
from artifacts.store import open_store
from recipes.errors import Fault, RecipeError
from tasks.patience import patiently
from tasks.session import BuildSession, open_session

RecipePath = Annotated[str, Field(description="The recipe's path in the checkout.", examples=["recipes/digits.yaml"])]
StoreAddress = Annotated[
    str | None, Field(description="A folder or s3://bucket/prefix; default: ENGINERY_STORE of the worker.")
]
Targets = Annotated[list[str] | None, Field(description="Only these: RUNTIME or RUNTIME:GPU; none: all.")]
Jobs = Annotated[int, Field(ge=1, le=64, description="How many stages run at once on a host.")]
Versions = Annotated[
    dict[str, str | None] | None, Field(description="Versions of the packages that made the portable stages.")
]
_RETRIES = 4  # after 2, 8, 32 and 128 s


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
    address = store or os.environ.get("ENGINERY_STORE") or ".enginery"
    portable = {name: found for name, found in (versions or {}).items() if not name.startswith("tensorrt")}
    warn = get_run_logger().warning

    def opened() -> BuildSession:
        return open_session(
            Path(recipe),
            open_store(address),
            targets=tuple(targets or ()),
            jobs=jobs,
            warn=warn,
            host=host,
            versions=portable,
            retries=_RETRIES,
        )

    return patiently(opened, _RETRIES, warn=warn)


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
