"""The command on engines for other servers: export triton."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from enginery.asking import (
    ArchOption,
    ChannelOption,
    InsecureOption,
    PrecisionOption,
    RuntimeOption,
    SystemOption,
    TrustOption,
    open_catalog,
    policy_of,
    request_of,
)
from enginery.output import (
    DEFAULT_STORE,
    FAILED,
    WRONG,
    JsonOption,
    StoreOption,
    explains_errors,
    note,
    print_json,
    stop,
)

if TYPE_CHECKING:
    from artifacts.catalog import EngineCatalog
    from artifacts.resolve import Request
    from artifacts.trust import Trust
    from enginery.client import PulledEngine
    from enginery.triton import Served
    from enginery.trusting import Unchecked


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    group = typer.Typer(no_args_is_help=True, rich_markup_mode=None)
    group.command("triton")(triton)
    group.callback()(export)
    app.add_typer(group, name="export")


def export() -> None:
    """Write engines for another server: a model repository for Triton Inference Server.

    Example: enginery export triton digits --out models
    """


@explains_errors
def triton(
    recipes: Annotated[list[str], typer.Argument(metavar="RECIPE...", help="Recipes' names, or their files.")],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="The model repository: DIR/MODEL/config.pbtxt.")],
    hosts: Annotated[
        list[str] | None,
        typer.Option("--host", help="Which hosts run Triton: auto (this one), or recorded ones. Repeatable."),
    ] = None,
    gpus: Annotated[
        list[str] | None,
        typer.Option("--gpu", metavar="GPU", help="Instead of hosts: compute capabilities, or cpu. Repeatable."),
    ] = None,
    runtime: RuntimeOption = None,
    system: SystemOption = None,
    arch: ArchOption = None,
    channel: ChannelOption = None,
    precision: PrecisionOption = None,
    dynamic_batching: Annotated[
        int | None,
        typer.Option(
            "--dynamic-batching",
            metavar="MICROSECONDS",
            min=0,
            help="Put requests together along the axis that leads all inputs and outputs, waiting so long for more.",
        ),
    ] = None,
    no_batch: Annotated[
        bool, typer.Option("--no-batch", help="That leading axis is no batch (but frames, points): max_batch_size 0.")
    ] = False,
    graphs: Annotated[bool, typer.Option("--cuda-graphs", help="Capture each profile's best shape.")] = False,
    trust: TrustOption = None,
    insecure: InsecureOption = False,
    store: StoreOption = DEFAULT_STORE,
    as_json: JsonOption = False,
) -> None:
    """Write a model repository for Triton Inference Server, from the engines that the hosts may load, every byte checked.

    Signatures are checked as by `pull`. Triton checks none: what is written is as safe as its folder. Engines of TensorRT and
    ONNX Runtime can be served; for hosts of several compute capabilities, a model has a plan for each.

    Example: enginery export triton digits --gpu sm80 --gpu sm89 --runtime tensorrt==10.13.3.9 --out models
    """
    from enginery.catalog_commands import recipe_name
    from enginery.exporting import export_triton, left_models
    from enginery.triton import Wishes

    if no_batch and dynamic_batching is not None:
        stop(WRONG, "--dynamic-batching puts requests into one batch, and --no-batch says that there is none; give one")
    catalog = open_catalog(store)
    none: list[str | None] = [None]
    requests = [
        request_of(catalog, host, gpu, runtime, system, arch, channel, precision, None)
        for host in hosts or none
        for gpu in gpus or none  # where both are given, request_of refuses them
    ]
    judge = policy_of(trust, insecure)
    names = list(dict.fromkeys(map(recipe_name, recipes)))
    chosen = [_chosen(catalog, name, requests, judge) for name in names]
    exported = export_triton(
        catalog.store,
        chosen,
        out,
        wishes=Wishes(graphs=graphs, batch=not no_batch, queue_delay_us=dynamic_batching),
        channel=channel,
        trust=judge,
        pulled=lambda engine: _say_plugins(engine, out),
    )
    for folder in left_models(exported):
        note(f"{folder} is of the same recipe, and was not written now: remove it, if it is not to be served")
    if as_json:
        models = [
            {"name": one.folder.name, "folder": str(one.folder), "engines": list(one.engines), "kept": one.kept}
            for one in exported
        ]
        print_json({"repository": str(out.absolute()), "models": models})
        return
    for one in exported:
        note(f"{one.folder.name}: {', '.join(one.engines)}{' (was there already)' if one.kept else ''}")
        typer.echo(str(one.folder))


def _chosen(catalog: EngineCatalog, recipe: str, requests: list[Request], judge: Trust | Unchecked) -> list[Served]:
    """Return the best engine of those that Triton serves for each request; ends the command where one finds none."""
    from enginery import client
    from enginery.catalog_commands import none_of
    from enginery.catalog_tables import print_candidates
    from enginery.triton import BACKENDS, Served

    found: dict[str, Served] = {}
    for request in requests:
        runtimes = {name: version for name, version in request.runtimes.items() if name in BACKENDS}
        asked = replace(request, runtimes=runtimes, frameworks={})
        best = (resolution := client.resolve(catalog.store, recipe, asked, trust=judge, warn=catalog.warn)).best
        if best is None:
            if resolution.candidates:
                note(f"none of the {len(resolution.candidates)} engines of {recipe} may be loaded by a Triton there:")
                print_candidates(resolution)
                note(f"Triton serves engines of {' and '.join(BACKENDS)}")
            else:
                note(none_of(catalog, recipe))
            raise typer.Exit(FAILED)
        before = found.get(str(best.identity), Served(best, ()))
        gpus = [gpu for gpu in request.gpus if gpu in best.compatibility.gpus]
        found[str(best.identity)] = Served(best, tuple(dict.fromkeys([*before.gpus, *gpus])))
    return list(found.values())


def _say_plugins(engine: PulledEngine, out: Path) -> None:
    plugins = engine.manifest.compatibility.plugins
    if plugins and engine.manifest.compatibility.runtime == "tensorrt":
        lies = f"{out}/MODEL/enginery/{engine.manifest.identity.target}"
        paths = ";".join(f"{lies}/{name}" for name in plugins)
        note(f"{engine.manifest.identity} needs plugins: start Triton with --backend-config=tensorrt,plugins={paths}")
