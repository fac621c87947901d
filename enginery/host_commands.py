"""Commands on this machine and this installation: host, doctor, schema."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from enginery.output import (
    DEFAULT_STORE,
    DONE,
    FAILED,
    JsonOption,
    StoreOption,
    console,
    explains_errors,
    note,
    print_json,
)

if TYPE_CHECKING:
    from artifacts.host import Gpu, Host

_DRIVER_FILE = Path("/proc/driver/nvidia/version")


class Document(str, Enum):
    """Documents that have a JSON Schema."""

    RECIPE = "recipe"
    MANIFEST = "manifest"


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    app.command("host")(host)
    app.command("doctor")(doctor)
    app.command("schema")(schema)


@explains_errors
def host(
    record: Annotated[
        bool, typer.Option("--record", help="Keep the fingerprint in the store, for resolve --host NAME elsewhere.")
    ] = False,
    store: StoreOption = DEFAULT_STORE,
    as_json: JsonOption = False,
) -> None:
    """Show this machine's fingerprint: GPUs, driver, and the full version of every runtime.

    Example: enginery host --record --store s3://models/engines
    """
    from enginery.catalog_tables import pairs_table
    from enginery.tables import size_text
    from tasks.toolchain import probe_host

    found = probe_host()
    if as_json:
        print_json(found.to_json())
    else:
        rows = [("host", found.name), ("system", f"{found.os} {found.arch}")]
        driver = f"{found.driver} (branch {found.driver_branch}, CUDA {found.cuda})"
        rows.append(("driver", driver if found.driver is not None else "none"))
        for gpu in found.gpus:
            rows.append(("GPU", f"{gpu.compute_capability}  {gpu.name}  {size_text(gpu.memory_bytes)}  {gpu.uuid}"))
            rows.append(("", device_text(gpu)))
        rows += [("GPU", "none")] if not found.gpus else []
        rows += [("runtime", f"{runtime} {version}") for runtime, version in found.runtimes.items()]
        console().print(pairs_table(rows))
    if unseen := unseen_driver(found):
        note(f"warning: {unseen}")
    if record:
        from artifacts.catalog import EngineCatalog
        from artifacts.store import open_store

        opened = open_store(store)
        note(f"recorded in {opened.uri}: {EngineCatalog(opened).record_host(found)}")


@explains_errors
def doctor(as_json: JsonOption = False) -> None:
    """Say what is installed and what is missing, what each is for, and the command that gets it.

    Ends with status 1 only where Enginery's own core cannot work; what an extra would add is no fault.

    Example: enginery doctor
    """
    from enginery.catalog_tables import add_row, plain_table
    from enginery.checkup import check_all
    from enginery.rows import print_table

    checks = check_all()
    broken = [check for check in checks if check.core and not check.ok]
    if as_json:
        print_json({"ok": not broken, "checks": [check.to_json() for check in checks]})
    else:
        out = console()
        table = plain_table(out, "what", "found", "", "for", "next")
        for check in checks:
            state = "ok" if check.ok else ("BROKEN" if check.core else "missing")
            add_row(table, check.name, check.found, state, check.purpose, "" if check.ok else check.advice)
        print_table(out, table)
    if broken:
        note(f"error: {', '.join(check.name for check in broken)}: Enginery cannot work without")
    raise typer.Exit(FAILED if broken else DONE)


@explains_errors
def schema(
    document: Annotated[
        Document, typer.Argument(metavar="[recipe|manifest]", help="Which document.")
    ] = Document.RECIPE,
) -> None:
    """Print the JSON Schema of recipes (for editors) or of manifests (for whoever reads them).

    Example: enginery schema recipe > recipe.schema.json
    """
    if document is Document.MANIFEST:
        from artifacts.manifest import manifest_schema

        print_json(manifest_schema())
    else:
        from recipes.schema import json_schema

        print_json(json_schema())


def device_text(gpu: Gpu) -> str:
    """Say in one line what engines depend on of a GPU: multiprocessors, memory bus, caches, ECC."""
    from enginery.tables import size_text

    known = [
        (gpu.sm_count, f"{gpu.sm_count} SMs"),
        (gpu.bus_width_bits, f"{gpu.bus_width_bits}-bit bus"),
        (gpu.l2_bytes, f"L2 {size_text(gpu.l2_bytes)}"),
        (gpu.shared_memory_per_block_optin, f"shared memory {size_text(gpu.shared_memory_per_block_optin)} of a block"),
        (gpu.shared_memory_per_sm, f"{size_text(gpu.shared_memory_per_sm)} of an SM"),
        (gpu.ecc, "ECC on" if gpu.ecc else "ECC off"),
    ]
    return ", ".join([*(text for value, text in known if value is not None), *(["a MIG slice"] if gpu.mig else [])])


def unseen_driver(found: Host) -> str:
    """Say that a driver is loaded but its GPUs were not seen; empty where all is as it seems."""
    if found.gpus or not _DRIVER_FILE.exists():
        return ""
    return "an NVIDIA driver is loaded, but no GPU can be seen; pip install nvidia-ml-py, and see CUDA_VISIBLE_DEVICES"
