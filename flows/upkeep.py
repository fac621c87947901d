"""Keep a store in order: verify what is published, promote, collect garbage; each is the command of that name."""

from __future__ import annotations

from typing import Annotated, Any

from prefect import flow
from pydantic import Field

from tasks.command import run_command
from tasks.parameters import StoreAddress


@flow(name="verify", persist_result=False, validate_parameters=True)
async def verify(
    engines: Annotated[list[str] | None, Field(description="Parts of engines' names; none: all.")] = None,
    execute: Annotated[bool, Field(description="Execute here what was never executed.")] = False,
    store: StoreAddress = None,
) -> Any:
    """Read every byte of published engines and compare it with their manifests."""
    return await run_command("verify", *(engines or ()), *(("--execute",) if execute else ()), store=store)


@flow(name="promote", flow_run_name="promote {engine} to {channel}", persist_result=False, validate_parameters=True)
async def promote(
    engine: Annotated[str, Field(description="Its name, or any part of it that no other has.")],
    channel: Annotated[str, Field(description="The channel: staging, production...")] = "staging",
    reason: Annotated[str | None, Field(description="Why; kept in the history.")] = None,
    by: Annotated[str | None, Field(description="Who; default: the worker's user and host.")] = None,
    allow_unexecuted: Annotated[bool, Field(description="Though it never ran on its device. Needs a reason.")] = False,
    allow_slower: Annotated[
        bool, Field(description="Though it is slower than what it replaces. Needs a reason.")
    ] = False,
    store: StoreAddress = None,
) -> Any:
    """Make a channel name an engine, after its gates, its execution and its speed are looked at."""
    words = ["promote", engine, "--channel", channel]
    words += [*(("--reason", reason) if reason else ()), *(("--by", by) if by else ())]
    words += [*(("--allow-unexecuted",) if allow_unexecuted else ()), *(("--allow-slower",) if allow_slower else ())]
    return await run_command(*words, store=store)


@flow(name="gc", persist_result=False, validate_parameters=True)
async def collect_garbage(
    dry_run: Annotated[bool, Field(description="Only say what would go.")] = False,
    keep_days: Annotated[float, Field(ge=0, description="Engines that were published since then stay.")] = 30.0,
    grace: Annotated[str, Field(description="What was used since then stays: 24h, 30m.")] = "24h",
    store: StoreAddress = None,
) -> Any:
    """Remove what nothing needs any more."""
    words = ["gc", "--keep-days", str(keep_days), "--grace", grace, *(("--dry-run",) if dry_run else ())]
    return await run_command(*words, store=store)
