"""Commands on published engines: list, show, resolve, pull."""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from enginery.asking import (
    ArchOption,
    ChannelOption,
    EngineArgument,
    GpuOption,
    HostOption,
    InsecureOption,
    PrecisionOption,
    RuntimeOption,
    ShapeOption,
    SystemOption,
    TrustOption,
    given_policy,
    open_catalog,
    policy_of,
    request_of,
    the_engine,
)
from enginery.output import (
    DEFAULT_STORE,
    FAILED,
    JsonOption,
    StoreOption,
    explains_errors,
    note,
    print_json,
    stop,
)

if TYPE_CHECKING:
    from artifacts.catalog import EngineCatalog, EngineId
    from artifacts.manifest import Manifest
    from artifacts.resolve import Request, Resolution
    from artifacts.trust import Trust
    from enginery.trusting import Unchecked

RecipeArgument = Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe's name, or its file.")]


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    app.command("list")(list_engines)
    app.command("show")(show)
    app.command("resolve")(resolve)
    app.command("pull")(pull)


@explains_errors
def list_engines(
    recipe: Annotated[str | None, typer.Argument(metavar="[RECIPE]", help="Only engines of this recipe.")] = None,
    store: StoreOption = DEFAULT_STORE,
    as_json: JsonOption = False,
) -> None:
    """List the engines that a store holds, with what was measured of each.

    Example: enginery list digits
    """
    from enginery.catalog_tables import engine_json, print_engines

    catalog = open_catalog(store)
    name = recipe_name(recipe) if recipe is not None else None
    manifests = catalog.manifests(name)
    if as_json:
        print_json([engine_json(manifest) for manifest in manifests])
    elif manifests:
        print_engines(manifests)
    elif name is not None:
        note(none_of(catalog, name))
    else:
        note(f"no engines in {catalog.store.uri}; build some: enginery build RECIPE --store {store}")


@explains_errors
def show(
    engine: EngineArgument,
    ranges: Annotated[
        bool, typer.Option("--ranges", help="Show what each tensor's calibrated range costs instead, the worst first.")
    ] = False,
    store: StoreOption = DEFAULT_STORE,
    as_json: JsonOption = False,
) -> None:
    """Show one engine's manifest: what it is, what may load it, what was measured, where it came from.

    Example: enginery show digits/tensorrt-rtx-1.7.1.116-sm89/fp16
    """
    from artifacts.attestation import effective
    from artifacts.refs import digest_bytes
    from enginery.catalog_tables import print_engine, print_ranges

    catalog = open_catalog(store)
    found = the_engine(catalog, engine)
    data = catalog.manifest_bytes(found)
    manifest = catalog.read_manifest(found, data)
    if ranges:
        reports = _ranges(catalog, found, manifest)
        print_json(reports) if as_json else print_ranges(reports)
        return
    later = catalog.attestations(found, digest_bytes(data))
    if as_json:
        executed = [attestation.model_dump(mode="json", by_alias=True) for attestation in later]
        print_json(json.loads(data) | ({"executed_later": executed} if executed else {}))
    else:
        print_engine(effective(manifest, later), later)


def _ranges(catalog: EngineCatalog, engine: EngineId, manifest: Manifest) -> dict[str, Any]:
    """Read the calibration report of each part of an engine (of its only graph, under an empty name)."""
    import tempfile

    of_parts = {name: part.calibration for name, part in manifest.parts.items()} or {"": manifest.calibration}
    names = {part: one.report for part, one in of_parts.items() if one is not None and one.report is not None}
    if not names:
        stop(
            FAILED,
            f"{engine} has no calibration report: it has no calibrated ranges, or TensorRT's own, "
            "or was published before there were reports",
        )
    with tempfile.TemporaryDirectory() as folder:
        for index, name in enumerate(names.values()):
            catalog.fetch(engine, name, manifest.files[name], Path(folder, str(index)))
        return {part: json.loads(Path(folder, str(index)).read_text("utf-8")) for index, part in enumerate(names)}


@explains_errors
def resolve(
    recipe: RecipeArgument,
    host: HostOption = None,
    gpu: GpuOption = None,
    runtime: RuntimeOption = None,
    system: SystemOption = None,
    arch: ArchOption = None,
    channel: ChannelOption = None,
    precision: PrecisionOption = None,
    shape: ShapeOption = None,
    trust: TrustOption = None,
    insecure: InsecureOption = False,
    store: StoreOption = DEFAULT_STORE,
    as_json: JsonOption = False,
) -> None:
    """Find the best engine that a host may load; where none fits, say why for each, with exit status 1.

    The engine's name goes to stdout, the table of all candidates to stderr.

    Example: enginery resolve digits --gpu sm89 --runtime tensorrt-rtx==1.7.1.116 --shape image=64x1x8x8
    """
    catalog = open_catalog(store)
    request = request_of(catalog, host, gpu, runtime, system, arch, channel, precision, shape)
    # Which engine it would be is told without a policy too; nothing is handed out.
    judge = given_policy(trust, insecure)
    resolution = _resolve(catalog, recipe_name(recipe), request, judge, as_json=as_json)
    if resolution.best is None:
        raise typer.Exit(FAILED)


@explains_errors
def pull(
    recipe: RecipeArgument,
    to: Annotated[Path, typer.Option("--to", metavar="DIR", help="Where the engine goes: DIR/RECIPE/TARGET/BUILD.")],
    host: HostOption = None,
    gpu: GpuOption = None,
    runtime: RuntimeOption = None,
    system: SystemOption = None,
    arch: ArchOption = None,
    channel: ChannelOption = None,
    precision: PrecisionOption = None,
    shape: ShapeOption = None,
    trust: TrustOption = None,
    insecure: InsecureOption = False,
    store: StoreOption = DEFAULT_STORE,
    as_json: JsonOption = False,
) -> None:
    """Fetch the best engine that a host may load, every byte checked, and print the path of its plan.

    What is there already is checked, and not fetched again.

    Example: enginery pull digits --to engines --store s3://models/engines
    """
    from enginery import client

    catalog = open_catalog(store)
    request = request_of(catalog, host, gpu, runtime, system, arch, channel, precision, shape)
    judge = policy_of(trust, insecure)
    resolution = _resolve(catalog, recipe_name(recipe), request, judge, as_json=as_json, quiet=True)
    if resolution.best is None:
        raise typer.Exit(FAILED)
    pulled = client.pull(catalog.store, resolution.best, to, channel=channel, trust=judge)
    if as_json:
        print_json(
            {
                "engine": str(resolution.best.identity),
                "folder": str(pulled.folder),
                "plan": str(pulled.plan),
                "files": {name: entry.model_dump() for name, entry in pulled.manifest.files.items()},
            }
        )
    else:
        note(f"{resolution.best.identity}: {len(pulled.manifest.files)} file(s), checked")
        typer.echo(pulled.plan)


def _resolve(
    catalog: EngineCatalog,
    name: str,
    request: Request,
    judge: Trust | Unchecked,
    *,
    as_json: bool,
    quiet: bool = False,
) -> Resolution:
    """Resolve and print: with `quiet` only what failed. Ends the command where the recipe has no engine at all."""
    from enginery import client
    from enginery.catalog_tables import fallback_words, print_candidates, resolution_json

    resolution = client.resolve(catalog.store, name, request, trust=judge, warn=catalog.warn)
    if as_json and not (quiet and resolution.best is not None):
        print_json(resolution_json(name, request, resolution))
    if resolution.best is not None and resolution.best.fallback is not None:
        note(fallback_words(resolution.best))
    if not resolution.candidates:
        note(none_of(catalog, name))
    elif resolution.best is None:
        note(f"none of the {len(resolution.candidates)} engines of {name} may be loaded there:")
        print_candidates(resolution)
    elif not quiet and not as_json:
        typer.echo(str(resolution.best.identity))
        print_candidates(resolution)
    return resolution


def recipe_name(recipe: str) -> str:
    """Return the name that is meant: a file's recipe is asked for its own."""
    if not recipe.endswith((".yaml", ".yml")):
        return recipe.strip("/")
    from recipes.loader import load

    return load(Path(recipe)).recipe.name


def none_of(catalog: EngineCatalog, name: str) -> str:
    """Say that a recipe has no engines, and which recipes have."""
    recipes = list(dict.fromkeys(engine.recipe for engine in catalog.engines()))
    near = difflib.get_close_matches(name, recipes, n=3, cutoff=0.5)
    if near:
        hint = f"did you mean {' or '.join(near)}?"
    elif recipes:
        hint = f"it holds engines of {', '.join(recipes)}"
    else:
        hint = "it holds no engine at all; build some: enginery build RECIPE"
    return f"no engines of {name!r} in {catalog.store.uri}; {hint}"
