"""The command that times a published engine on this host: bench."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from enginery.asking import (
    EngineArgument,
    InsecureOption,
    TrustOption,
    given_policy,
    open_catalog,
    require_trusted,
    the_engine,
)
from enginery.output import (
    DEFAULT_STORE,
    FAILED,
    WAITING,
    JsonOption,
    StoreOption,
    explains_errors,
    note,
    print_json,
    stop,
)


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command("bench")(bench)


@explains_errors
def bench(
    engine: EngineArgument,
    batch: Annotated[
        list[int] | None, typer.Option("--batch", "-b", min=1, help="Samples in one run. Repeatable; default: opt.")
    ] = None,
    seconds: Annotated[float, typer.Option("--seconds", min=0.05, help="Time limit of each shape, warm-up too.")] = 5.0,
    trust: TrustOption = None,
    insecure: InsecureOption = False,
    store: StoreOption = DEFAULT_STORE,
    as_json: JsonOption = False,
) -> None:
    """Time a published engine on this host: latency, throughput, memory and clocks. Nothing is written to the store.

    Exit status 3 where this host may not load it. How times are taken: docs/benchmarks.md.

    Example: enginery bench digits/onnxruntime-1.31.1-cpu/int8 --batch 1 --batch 8
    """
    from artifacts.resolve import Request, refusals
    from tasks.benchmark.published import time_engine
    from tasks.errors import TaskError
    from tasks.toolchain import probe_host

    catalog = open_catalog(store)
    found = the_engine(catalog, engine)
    require_trusted(catalog, found, given_policy(trust, insecure))
    manifest = catalog.manifest(found)
    reasons = refusals(manifest, Request.of_host(probe_host()), {})
    if reasons:
        stop(WAITING, f"{manifest.identity} may not be loaded here: {'; '.join(reasons)}")
    try:
        facts = time_engine(catalog, manifest, batches=batch, seconds=seconds, say=_quiet if as_json else note)
    except TaskError as err:
        stop(FAILED, str(err))
    if as_json:
        print_json({"engine": str(manifest.identity), **facts})
    else:
        _print(facts)


def _quiet(_text: str) -> None:
    """Say nothing."""


def _print(facts: dict[str, Any]) -> None:
    from enginery.rows import Rows, print_rows, say

    names = ("case", "p50 ms", "p90 ms", "p99 ms", "with copies", "device", "samples/s", "copies", "steady")
    rows = Rows(names)
    for case in facts["cases"]:
        latency, device, share = case["latency_ms"], case["device_ms"], case["copy_share"]
        rows.add_row(
            f"{case['name']}{' CUDA graph' if case['graph'] else ''}",
            *(f"{latency[name]:.3f}" for name in ("p50", "p90", "p99")),
            f"{case['end_to_end_ms']['p50']:.3f}",
            "-" if device is None else f"{device['p50']:.3f}",
            f"{case['throughput']:.0f}",
            "-" if share is None else f"{100 * share:.0f} %",
            "yes" if case["steady"] else "no",
        )
    print_rows(rows)
    say(f"on {facts['device']}, {facts['version']}")
    for when in ("before", "after"):
        state = ", ".join(f"{name} {value}" for name, value in facts["clocks"][when].items() if value is not None)
        say(f"{when}: {state}")
