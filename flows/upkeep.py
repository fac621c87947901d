"""Keep a store in order: verify what is published, promote, collect garbage; each is the command of that name."""

from __future__ import annotations

from typing import Annotated, Any

from prefect import flow

from tasks.command import run_command
from tasks.forms import Reason, StoreAddress, form


@flow(name="verify", persist_result=False, validate_parameters=True)
async def verify(
    engines: Annotated[
        list[str] | None,
        form("Engines", "Parts of engines' names; none: all.", examples=[["digits/", "swin-tiny/tensorrt"]]),
    ] = None,
    execute: Annotated[bool, form("Execute", "Execute here what was never executed.")] = False,
    store: StoreAddress = None,
) -> Any:
    """Read every byte of published engines and compare it with their manifests."""
    return await run_command("verify", *(("--execute",) if execute else ()), store=store, names=engines or ())


@flow(name="promote", flow_run_name="promote {engine} to {channel}", persist_result=False, validate_parameters=True)
async def promote(
    engine: Annotated[
        str,
        form(
            "Engine", "Its name, or any part of it that no other has.", examples=["digits/onnxruntime-1.31.1-cpu/int8"]
        ),
    ],
    channel: Annotated[
        str, form("Channel", "The channel that is to name it.", examples=["staging", "production"])
    ] = "staging",
    reason: Reason = None,
    by: Annotated[
        str | None, form("By", "Who; default: the worker's user and host.", examples=["ada@example.com"])
    ] = None,
    allow_unexecuted: Annotated[
        bool, form("Allow unexecuted", "Though it never ran on its device. Needs a reason.")
    ] = False,
    allow_slower: Annotated[
        bool, form("Allow slower", "Though it is slower than what it replaces. Needs a reason.")
    ] = False,
    store: StoreAddress = None,
) -> Any:
    """Make a channel name an engine, after its gates, its execution and its speed are looked at."""
    words = ["promote", "--channel", channel]
    words += [*(("--reason", reason) if reason else ()), *(("--by", by) if by else ())]
    words += [*(("--allow-unexecuted",) if allow_unexecuted else ()), *(("--allow-slower",) if allow_slower else ())]
    return await run_command(*words, store=store, names=[engine])


@flow(name="gc", persist_result=False, validate_parameters=True)
async def collect_garbage(
    dry_run: Annotated[bool, form("Dry run", "Only say what would go.")] = False,
    keep_days: Annotated[float, form("Keep days", "Engines that were published since then stay.", ge=0)] = 30.0,
    grace: Annotated[
        str,
        form(
            "Grace",
            "What was used since then stays: 24h, 30m.",
            pattern="^[0-9]+[smh]$",
            examples=["24h", "30m"],
        ),
    ] = "24h",
    store: StoreAddress = None,
) -> Any:
    """Remove what nothing needs any more."""
    words = ["gc", "--keep-days", str(keep_days), "--grace", grace, *(("--dry-run",) if dry_run else ())]
    return await run_command(*words, store=store)
