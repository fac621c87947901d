"""Commands on a fleet's hosts: watch this one, list all, and see, resume or abandon rollouts."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from enginery.output import (
    DEFAULT_STORE,
    DONE,
    FAILED,
    WAITING,
    WRONG,
    JsonOption,
    StoreOption,
    explains_errors,
    note,
    print_json,
    stop,
)

if TYPE_CHECKING:
    from artifacts.rollouts import Rollout
    from artifacts.store import Store


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    app.command("watch")(watch)
    app.command("hosts")(hosts)
    app.command("rollout")(rollout)


@explains_errors
def watch(
    recipes: Annotated[
        list[Path] | None, typer.Argument(metavar="[RECIPE...]", help="Recipes, or folders of them; default: recipes/.")
    ] = None,
    serve: Annotated[
        bool, typer.Option("--serve", help="Deploy it for this host on a Prefect server, and go on looking.")
    ] = False,
    every: Annotated[float, typer.Option("--every", min=5, metavar="SECONDS", help="With --serve: how often.")] = 20,
    pools: Annotated[
        bool, typer.Option("--pools", help="With --serve: rebuilds go through the fleet's work pools (docs/fleet.md).")
    ] = False,
    canary: Annotated[
        int,
        typer.Option(
            "--canary", min=0, help="Engines of a change's first host that pass before others follow; 0: all."
        ),
    ] = 20,
    store: StoreOption = DEFAULT_STORE,
    as_json: JsonOption = False,
) -> None:
    """Record this host in the store, and tell which engines a change of driver, runtime or GPU made stale.

    Once, and without Prefect: what is found stays in the store for whoever rebuilds. With --serve, `watch/HOST` runs on a
    schedule and an automation runs `rebuild/HOST` here; PREFECT_API_URL names the server. Exit status 3: something is due.

    Example: enginery watch recipes/ --store s3://models/engines
    """
    from artifacts.store import open_store
    from tasks.drift import look

    paths = [path.absolute() for path in recipes or [Path("recipes")]]
    for path in paths:
        if not path.exists():
            stop(WRONG, f"{path}: there is no such recipe or folder")
    opened = open_store(store)
    if serve:
        if not os.environ.get("PREFECT_API_URL"):
            stop(WRONG, "--serve needs a Prefect server: set PREFECT_API_URL to its address")
        from enginery.serving import serve_host
        from tasks.toolchain import probe_host

        serve_host(probe_host().name, [str(path) for path in paths], opened.uri, every, pools=pools, canary=canary)
        return
    found = look(opened, paths, warn=lambda text: note(f"warning: {text}"), enough=canary)
    document = found.to_json()
    if as_json:
        print_json(document)
    else:
        _tell(document)
    raise typer.Exit(WAITING if found.due else DONE)


@explains_errors
def hosts(store: StoreOption = DEFAULT_STORE, as_json: JsonOption = False) -> None:
    """List the hosts that a store knows: what they are, when they were last seen, and what changed last.

    A host that was not seen for 15 minutes has vanished: no rollout waits for it.

    Example: enginery hosts --store s3://models/engines
    """
    from artifacts.errors import IntegrityError
    from artifacts.hosts import VANISHED_SECONDS, host_ages, read_host
    from artifacts.store import open_store
    from enginery.rows import Rows, print_rows, say

    opened = open_store(store)
    rows: list[dict[str, Any]] = []
    for path, age in sorted(host_ages(opened).items()):
        try:
            record, _version = read_host(opened, path)
        except IntegrityError as err:
            note(f"warning: {err}; passed over")
            continue
        found = record.host.to_json()
        last = record.history[-1] if record.history else None
        changed = f"{last.time}: {', '.join(map(str, last.changes))}" if last is not None else ""
        state = "vanished" if age > VANISHED_SECONDS else "seen"
        rows.append({**found, "seconds_ago": round(age), "state": state, "changed": changed, "open": list(record.open)})
    if as_json:
        print_json(rows)
        return
    if not rows:
        say(f"no hosts in {opened.uri}; on each: enginery watch --store {store}")
        return
    table = Rows(("host", "seen", "GPU", "driver", "runtimes", "last change"))
    for row in rows:
        gpus = ", ".join(f"{gpu['compute_capability']} {gpu['name']}" for gpu in row["gpus"]) or "none"
        runtimes = ", ".join(f"{name} {found}" for name, found in row["runtimes"].items())
        seen = f"{row['seconds_ago']} s ago{' (vanished)' if row['state'] == 'vanished' else ''}"
        table.add_row(row["name"], seen, gpus, row["driver"] or "none", runtimes, row["changed"])
    print_rows(table)


@explains_errors
def rollout(
    name: Annotated[str | None, typer.Argument(metavar="[ROLLOUT]", help="Which one; default: all.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with a halted one: what failed is tried again.")
    ] = False,
    accept: Annotated[bool, typer.Option("--accept", help="With --resume: what failed counts as passed.")] = False,
    abandon: Annotated[bool, typer.Option("--abandon", help="Rebuild nothing because of this change.")] = False,
    reason: Annotated[str, typer.Option("--reason", help="Why it is abandoned; kept.")] = "",
    store: StoreOption = DEFAULT_STORE,
    as_json: JsonOption = False,
) -> None:
    """Show how changes go through the hosts in waves; resume one that failed, or abandon it.

    The first host with a change is the canary: the others follow when its engines have passed their gates. Exit status 1
    where one is halted.

    Example: enginery rollout tensorrt-rtx-1.7.1.116-0a1b2c3d --resume
    """
    from artifacts.rollouts import read_rollout, rollouts
    from artifacts.store import open_store

    opened = open_store(store)
    if (resume or abandon) and (name is None or (resume and abandon)):
        stop(WRONG, "name one rollout, and give either --resume or --abandon; enginery rollout lists them")
    if name is None:
        found = rollouts(opened)
    elif resume or abandon:
        found = [_decide(opened, name, resume=resume, accept=accept, reason=reason)]
    else:
        found = [read_rollout(opened, name)]
    if as_json:
        print_json([one.to_json() for one in found])
    else:
        _print(found, whole=name is not None)
    raise typer.Exit(FAILED if any(one.state == "halted" for one in found) else DONE)


def _decide(store: Store, name: str, *, resume: bool, accept: bool, reason: str) -> Rollout:
    from artifacts.errors import NotFoundError
    from artifacts.rollouts import change_rollout, rollout_path
    from enginery.moving import this_user
    from tasks.drift import instant

    def decide(found: Rollout | None) -> Rollout:
        if found is None:
            raise NotFoundError(store.uri, rollout_path(name))
        if resume:
            return found.resumed(this_user(), instant(), accept=accept)
        return found.abandon(this_user(), reason, instant())

    return change_rollout(store, name, decide)


def _print(found: list[Rollout], *, whole: bool) -> None:
    from enginery.rows import Rows, print_rows, say

    if not found:
        say("no rollouts: no change of a host has made an engine stale")
    for one in found:
        why = one.halted or one.abandoned
        say(
            f"{one.id}: {one.state}{f' ({why})' if why else ''}; {', '.join(one.changes)}; canary {one.canary or 'none'}"
        )
        table = Rows(("host", "recipe", "target", "asked", "state", "why"))
        for host, member in one.members.items():
            for rebuild in member.rebuilds:
                told = member.left or rebuild.reason or rebuild.why
                table.add_row(host, rebuild.recipe, rebuild.target, rebuild.asked, rebuild.state, told)
        print_rows(table)
        for line in one.log if whole else ():
            say(line)


def _tell(document: dict[str, Any]) -> None:
    from enginery.rows import say

    say(f"{document['host']}: {', '.join(document['changes']) or 'as it was'}")
    for one in document["stale"]:
        say(f"stale: {one['engine']} ({one['why']})")
    for one in document["lost"]:
        say(f"cannot be built here any more: {one}")
    for rollout_name, rebuilds in document["due"].items():
        say(f"due: {len(rebuilds)} engines, rollout {rollout_name}")
