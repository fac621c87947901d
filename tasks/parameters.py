"""The parameters that flows share, with what Prefect's forms say of them, and the session that they open on a worker."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

from pydantic import Field

from artifacts.host import Host
from artifacts.store import open_store
from recipes.errors import Fault, RecipeError
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
_RETRIES = 3


def worker_session(
    recipe: str,
    store: str | None,
    targets: Sequence[str] | None,
    jobs: int,
    *,
    host: Host | None = None,
    versions: Mapping[str, str | None] | None = None,
) -> BuildSession:
    """Open a session on a worker, which tries a stage again whose store failed.

    Of `versions`, those of runtimes that compile are this host's own. Raises RecipeError, AddressError.
    """
    opened = open_store(store or os.environ.get("ENGINERY_STORE") or ".enginery")
    portable = {name: found for name, found in (versions or {}).items() if not name.startswith("tensorrt")}
    return open_session(
        Path(recipe), opened, targets=tuple(targets or ()), jobs=jobs, host=host, versions=portable, retries=_RETRIES
    )


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
