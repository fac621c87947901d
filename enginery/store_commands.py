"""Commands on stores: gc, pin, unpin, mirror."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from artifacts.errors import ArtifactError
from enginery.asking import open_catalog, the_engine
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
    from artifacts.catalog import EngineId
    from artifacts.garbage import Removal
    from artifacts.store import Store

_NOBODY: Final = "(cache)"
_UPLOAD_SECONDS: Final = 7 * 86400.0


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    app.command("gc")(collect)
    app.command("pin")(pin)
    app.command("unpin")(unpin)
    app.command("mirror")(mirror)


@explains_errors
def collect(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go, and write nothing.")] = False,
    keep_days: Annotated[
        float, typer.Option("--keep-days", metavar="N", min=0, help="Engines that were published since then stay.")
    ] = 30.0,
    keep_newest: Annotated[
        int, typer.Option("--keep-newest", metavar="N", min=0, help="So many stay of each target and precision.")
    ] = 1,
    keep_moves: Annotated[
        int, typer.Option("--keep-moves", metavar="N", min=0, help="What a channel's last N moves named stays.")
    ] = 10,
    grace: Annotated[
        str, typer.Option("--grace", metavar="TIME", help="What was written or used since then stays: 24h, 30m.")
    ] = "24h",
    recipe: Annotated[
        str | None,
        typer.Option("--recipe", metavar="RECIPE", help="Only engines of this recipe, and what only they had."),
    ] = None,
    store: StoreOption = DEFAULT_STORE,
    as_json: JsonOption = False,
) -> None:
    """Remove what nothing needs any more: engines, then the records and blobs that only they had.

    Engines stay that a channel or a pin names, that a recipe's last build made, that are young, and the newest of each target
    and precision. What builds that are under way use stays. An engine goes in two steps: no one finds it any more; its
    files go when the grace period has passed since, so that whoever is fetching them can finish.

    Example: enginery gc --dry-run
    """
    from artifacts.collector import Collector
    from artifacts.garbage import Policy
    from enginery.catalog_commands import recipe_name

    catalog = open_catalog(store)
    name = recipe_name(recipe) if recipe is not None else None
    policy = Policy(keep_days, keep_newest, keep_moves, _seconds(grace), name)
    collector = Collector(catalog.store, policy, catalog.warn)
    collected = collector.preview() if dry_run else collector.collect()
    if not dry_run and recipe is None:
        _abandon_uploads(collector.store)
    linked = catalog.store.uri.startswith("file:")
    shared = collected.found.shared if linked else frozenset[str]()
    gone, waiting = _by_recipe(collected.removed, shared), _by_recipe(collected.waiting, frozenset())
    if as_json:
        kept = {str(engine): why for engine, why in sorted(collected.found.kept.items())}
        objects = [
            {"path": removal.path, "bytes": removal.size, "recipe": removal.recipe or None, "why": removal.why}
            for removal in collected.removed
        ]
        print_json({"dry_run": dry_run, "removed": gone, "waiting": waiting, "kept": kept, "objects": objects})
    else:
        _print_collected(gone, waiting, len(collected.found.kept), dry_run=dry_run)


@explains_errors
def pin(
    engine: Annotated[
        str | None,
        typer.Argument(
            metavar="[ENGINE]", help="Its name, or any part of it that no other has; without it: list pins."
        ),
    ] = None,
    reason: Annotated[str | None, typer.Option("--reason", metavar="WHY", help="Why; kept with the pin.")] = None,
    by: Annotated[str | None, typer.Option("--by", metavar="WHO", help="Who pins it; default: user@host.")] = None,
    store: StoreOption = DEFAULT_STORE,
    as_json: JsonOption = False,
) -> None:
    """Keep an engine from being collected as garbage, until unpin; without one, list what is pinned.

    Example: enginery pin digits/onnxruntime-1.31.1-cpu/fp32 --reason "the audit of May"
    """
    from artifacts import pins
    from enginery.moving import this_user

    catalog = open_catalog(store)
    if engine is not None:
        found = the_engine(catalog, engine)
        pins.pin(catalog, found, by or this_user(), reason)
        if not as_json:
            typer.echo(f"pinned: {found}")
            return
    pinned = pins.pins(catalog.store)
    if as_json:
        print_json([{"engine": str(one), **document} for one, document in sorted(pinned.items())])
    elif pinned:
        _print_pins(pinned)
    else:
        note(f"nothing is pinned in {catalog.store.uri}")


@explains_errors
def unpin(
    engine: Annotated[str, typer.Argument(metavar="ENGINE", help="Its name, or any part of it that no other pin has.")],
    store: StoreOption = DEFAULT_STORE,
    as_json: JsonOption = False,
) -> None:
    """Take a pin out, so that the engine may be collected when nothing else keeps it.

    Example: enginery unpin digits/onnxruntime-1.31.1-cpu/fp32
    """
    from artifacts import pins

    catalog = open_catalog(store)
    # Not only engines that are there: what is pinned may be gone.
    matches = [one for one in pins.pins(catalog.store) if engine.strip("/") in str(one)]
    if not matches:
        stop(FAILED, f"no pin of {engine!r} in {catalog.store.uri}; enginery pin lists those that are there")
    if len(matches) > 1 and engine not in map(str, matches):
        names = "\n".join(f"  {match}" for match in matches)
        stop(WRONG, f"{engine!r} is a part of {len(matches)} pinned engines' names; give more of one:\n{names}")
    found = next((match for match in matches if str(match) == engine), matches[0])
    pins.unpin(catalog.store, found)
    if as_json:
        print_json({"unpinned": str(found)})
    else:
        typer.echo(f"unpinned: {found}")


@explains_errors
def mirror(
    source: Annotated[str, typer.Argument(metavar="FROM", help="The store to copy from.")],
    target: Annotated[str, typer.Argument(metavar="TO", help="The store to copy to; both stay as they are otherwise.")],
    recipe: Annotated[
        str | None, typer.Option("--recipe", metavar="RECIPE", help="Only engines of this recipe.")
    ] = None,
    channel: Annotated[
        str | None, typer.Option("--channel", metavar="NAME", help="Only engines that this channel names, and it.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Copy engines, with all that they came through, from one store to another: folders and S3, in any pair.

    What is there already is not sent again, so that the same command goes on where a killed one stopped. Signatures go along, and
    are compared at the other end, and checked there by the policy that ENGINERY_TRUST names.
    A channel that went another way at the other end stays as it is there. Exit status 1 where something was left.

    Example: enginery mirror .enginery s3://backup/engines --channel production
    """
    from artifacts.mirror import Mirror
    from artifacts.store import open_store
    from enginery.catalog_commands import recipe_name
    from enginery.rows import say
    from enginery.tables import size_text
    from enginery.trusting import trust_of

    name = recipe_name(recipe) if recipe is not None else None
    done = Mirror(
        open_store(source),
        open_store(target),
        name,
        channel,
        lambda message: note(f"warning: {message}"),
        trust_of(None),
    ).run()
    if as_json:
        print_json(
            {
                "objects": done.objects, "bytes": done.size, "engines": done.engines, "channels": done.channels,
                "left": done.left,
            }
        )  # fmt: skip
    else:
        say(
            f"mirrored: {len(done.engines)} engines are there; sent {done.objects} objects, {size_text(done.size)}; "
            f"{len(done.channels)} channels moved" + (f"; {len(done.left)} left" if done.left else "")
        )
    if done.left:
        raise typer.Exit(FAILED)


def _abandon_uploads(store: Store) -> None:
    """Abort what killed uploads left in S3, whose parts cost money: after a week nobody goes on with them."""
    if store.uri.startswith("s3:"):
        from artifacts.s3 import S3Store

        if isinstance(store, S3Store):
            try:
                count = store.abandon_uploads(_UPLOAD_SECONDS)
            except ArtifactError as err:  # it takes a right of its own, and some services do not list uploads
                note(f"warning: uploads that were never completed stay: {err}")
                return
            if count:
                note(f"aborted {count} uploads that were begun more than a week ago and never completed")


def _seconds(text: str) -> float:
    from recipes.schema import duration_seconds

    try:
        return float(duration_seconds(text))
    except ValueError as err:
        raise typer.BadParameter(str(err), param_hint="--grace") from err


def _by_recipe(removals: tuple[Removal, ...], shared: frozenset[str]) -> dict[str, dict[str, int]]:
    """Return engines, objects and bytes by recipe. `shared` are blobs whose bytes an engine's files still have."""
    found: dict[str, dict[str, int]] = {}
    for removal in sorted(removals, key=lambda removal: removal.recipe):
        row = found.setdefault(removal.recipe or _NOBODY, {"engines": 0, "objects": 0, "bytes": 0})
        row["engines"] += removal.path.startswith("engines/") and removal.path.endswith("/manifest.json")
        row["objects"] += 1
        row["bytes"] += 0 if removal.path in shared else removal.size
    return found


def _print_collected(
    gone: dict[str, dict[str, int]], waiting: dict[str, dict[str, int]], kept: int, *, dry_run: bool
) -> None:
    from enginery.rows import Rows, print_rows, say
    from enginery.tables import size_text

    table = Rows(("recipe", "engines", "objects", "size", "later"))
    for recipe in sorted({*gone, *waiting}):
        now = gone.get(recipe, {"engines": 0, "objects": 0, "bytes": 0})
        later = waiting.get(recipe)
        table.add_row(
            recipe, str(now["engines"]), str(now["objects"]), size_text(now["bytes"]),
            size_text(later["bytes"]) if later is not None else "",
        )  # fmt: skip
    if table.rows:
        print_rows(table)
    total = sum(row["bytes"] for row in gone.values())
    engines = sum(row["engines"] for row in gone.values())
    objects = sum(row["objects"] for row in gone.values())
    later_total = sum(row["bytes"] for row in waiting.values())
    did = "would go" if dry_run else "removed"
    more = f", and {size_text(later_total)} when the grace period has passed" if later_total else ""
    say(f"{did}: {engines} engines, {objects} objects, {size_text(total)}{more}; {kept} engines stay")


def _print_pins(pinned: dict[EngineId, dict[str, Any]]) -> None:
    from enginery.rows import Rows, print_rows

    table = Rows(("engine", "by", "when", "why"))
    for engine, document in sorted(pinned.items()):
        table.add_row(str(engine), *(str(document.get(name) or "") for name in ("by", "time", "reason")))
    print_rows(table)
