"""Commands on recipes: validate, plan, build."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

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
    fault_json,
    note,
    print_json,
)
from enginery.since import SinceOption
from recipes.errors import Fault, RecipeError

if TYPE_CHECKING:
    from artifacts.store import Store
    from enginery.since import Taken
    from recipes.plan import Plan
    from tasks.remembered import Remembered
    from tasks.session import BuildSession

_PLANNERS: Final = 16  # how many recipes are planned at once where a store is across the network

RecipesArgument = Annotated[list[Path], typer.Argument(metavar="RECIPE", help="Recipes (YAML), or folders of them.")]
TargetOption = Annotated[
    list[str] | None,
    typer.Option("--target", metavar="RUNTIME[:GPU]", help="Only these targets, e.g. tensorrt-rtx:sm89. Repeatable."),
]
VerboseOption = Annotated[bool, typer.Option("-v", "--verbose", help="Say more: compiler logs, every step.")]


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    app.command("validate")(validate)
    app.command("plan")(plan)
    app.command("build")(build)


@explains_errors
def validate(
    recipes: RecipesArgument,
    show: Annotated[bool, typer.Option("--print", help="Print each recipe as merged with what it includes.")] = False,
    since: SinceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Check recipes and everything they name; report all faults at once, with file and line.

    No code of a recipe is run, and nothing is written.

    Example: enginery validate recipes/
    """
    from recipes.files import gather
    from recipes.loader import dump_merged, load

    faults: list[Fault] = []
    paths, taken = _chosen(recipes, since)
    names = {} if taken is None else taken.others
    good: list[tuple[Path, str]] = []
    for path in paths:
        try:
            loaded = load(path)
            gather(loaded)
        except RecipeError as err:
            faults.extend(err.faults)
            continue
        name = loaded.recipe.name
        faults.extend(name_faults(names, path, name))
        good.append((path, name))
        if show and not as_json:
            typer.echo(f"# {path}\n{dump_merged(loaded)}")
    if as_json:
        listed = [fault_json(fault) for fault in faults]
        valid = [
            {"file": str(path), "name": name} | ({"since": taken.to_json(path)} if taken is not None else {})
            for path, name in good
        ]
        print_json({"valid": valid, "faults": listed})
    elif not show:
        for path, name in good:
            typer.echo(f"{path}: ok ({name})")
    for fault in faults:
        note(str(fault))
    raise typer.Exit(WRONG if faults else DONE)


@explains_errors
def plan(
    recipes: RecipesArgument,
    explain: Annotated[
        bool, typer.Option("--explain", help="Say for every stage why it runs, with the value that changed.")
    ] = False,
    target: TargetOption = None,
    since: SinceOption = None,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Print Markdown, as for a comment on a pull request.")
    ] = False,
    store: StoreOption = DEFAULT_STORE,
    as_json: JsonOption = False,
) -> None:
    """Show what a build would run, and why. Touches nothing, runs no code of a recipe, starts no server.

    Example: enginery plan recipes/digits.yaml --explain
    Example: enginery plan recipes --since origin/main --markdown
    """
    from enginery.tables import print_plan

    paths, taken = _chosen(recipes, since)
    documents = _plan_reports(paths, store, target or [], taken)
    if as_json:
        print_json(documents[0] if len(documents) == 1 and taken is None else documents)
    elif markdown:
        from enginery.markdown import plan_markdown

        typer.echo(plan_markdown(documents, taken))
    else:
        for document in documents:
            print_plan(document, explain=explain)
    raise typer.Exit(_worst([document["status"] for document in documents]))


@explains_errors
def build(
    recipes: RecipesArgument,
    target: TargetOption = None,
    since: SinceOption = None,
    store: StoreOption = DEFAULT_STORE,
    jobs: Annotated[int, typer.Option("--jobs", "-j", min=1, help="How many stages run at once.")] = 2,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Run every stage that is stale, and publish verified engines.

    Cached stages cost nothing: a second build of an unchanged recipe only says so.

    Example: enginery build recipes/digits.yaml --target tensorrt-rtx:sm89
    """
    from artifacts.store import open_store
    from enginery.tables import print_build
    from tasks.remembered import PlanMemory

    if os.environ.get("ENGINERY_SIGN_KEY"):
        from artifacts.signing import require_signer

        require_signer()  # before hours of compiling
    opened = open_store(store)
    paths, taken = _chosen(recipes, since)
    show = (lambda _report: None) if as_json else print_build
    memory = PlanMemory(opened, tuple(target or ()), warn=_warn)
    fresh = {path: found for path, found in memory.recall(paths).items() if found.is_latest}
    sessions = _sessions(paths, opened, target or [], known=fresh, jobs=jobs, taken=taken)
    # Of many, so that those which are fresh are found at once, and not one after the other.
    many = len(sessions) > 1 or not opened.uri.startswith("file:")
    plans = dict(zip(sessions, _plans(list(sessions.values())), strict=True)) if many else {}
    found: list[tuple[BuildSession, Plan]] = []
    reports: list[dict[str, Any]] = []
    for path in paths:
        if path in fresh:
            reports.append(fresh[path].build_report(opened.uri))
            show(reports[-1])
        else:
            from enginery.building import build_session

            reports.append(
                build_session(
                    sessions[path],
                    show=show,
                    verbose=verbose,
                    quiet=as_json,
                    planned=plans.get(path),
                    fresh=lambda session, planned: found.append((session, planned)),
                )
            )
    memory.keep(found, latest=True)
    memory.share()
    if as_json:
        if taken is not None:
            reports = [report | {"since": taken.to_json(path)} for path, report in zip(paths, reports, strict=True)]
        print_json(reports[0] if len(reports) == 1 and taken is None else reports)
    raise typer.Exit(_worst([document["status"] for document in reports]))


def recipe_paths(paths: list[Path]) -> list[Path]:
    """Return the recipes that are meant: files as they are, and of a folder every *.yaml that states a version.

    A folder's other YAML files (shared bases, data) are left out: a recipe is a file with a top-level `enginery:`.
    """
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = [file for file in sorted(path.glob("*.yaml")) if _states_version(file)]
            if not inside:
                raise RecipeError(
                    [Fault(str(path), 0, "", "no recipe in this folder (a *.yaml file with a top-level 'enginery: 1')")]
                )
            found.extend(inside)
        else:
            found.append(path)
    return list(dict.fromkeys(found))


def _chosen(recipes: list[Path], since: str | None) -> tuple[list[Path], Taken | None]:
    """Return the recipes that are meant; with a revision those that changes since touch, which is told on stderr."""
    paths = recipe_paths(recipes)
    if since is None:
        return paths, None
    from enginery.since import touched_since

    taken = touched_since(paths, since)
    taken.tell()
    return list(taken.files), taken


def name_faults(names: dict[str, Path], path: Path, name: str) -> list[Fault]:
    """Take up a recipe's name among `names`, and tell if it is another recipe's: their engines would be mixed."""
    first = names.setdefault(name, path)
    return (
        [] if first == path else [Fault(str(path), 0, "name", f"{name!r} is the name of {first} too; names are unique")]
    )


def _states_version(file: Path) -> bool:
    try:
        with file.open("rb") as stream:
            return any(line.startswith(b"enginery:") for line in stream)
    except OSError:
        return not file.is_dir()  # the loader says what is wrong with it


def _plan_reports(
    paths: list[Path], store: str, targets: list[str], taken: Taken | None = None
) -> list[dict[str, Any]]:
    """Plan every recipe, but for those whose plan is known to be fresh still."""
    from artifacts.store import open_store
    from tasks.remembered import PlanMemory

    opened = open_store(store)
    memory = PlanMemory(opened, tuple(targets), warn=_warn)
    fresh = memory.recall(paths)
    sessions = _sessions(paths, opened, targets, known=fresh, taken=taken)
    documents = {path: found.report for path, found in fresh.items()}
    if sessions:
        from tasks.report import plan_report

        plans = dict(zip(sessions, _plans(list(sessions.values())), strict=True))
        documents |= {path: plan_report(planned) for path, planned in plans.items()}
        memory.keep([(sessions[path], planned) for path, planned in plans.items()])
    if taken is not None:
        documents = {path: document | {"since": taken.to_json(path)} for path, document in documents.items()}
    return [documents[path] for path in paths]


def _plans(sessions: list[BuildSession]) -> list[Plan]:
    """Plan, many recipes at once where each waits for a store across the network."""
    if not sessions or sessions[0].store.uri.startswith("file:"):
        return [session.plan() for session in sessions]
    from concurrent.futures import ThreadPoolExecutor

    from artifacts.gathered import gather

    gathered = gather(sessions[0].store, {session.recipe_name for session in sessions})
    for session in sessions:
        session.see(gathered)
    # Of those that were packed nothing is waited for: one after the other takes half as long as beside one another.
    unknown = [session for session in sessions if session.recipe_name not in gathered.recipes]
    with ThreadPoolExecutor(_PLANNERS) as pool:
        plans = dict(zip(map(id, unknown), pool.map(lambda session: session.plan(), unknown), strict=True))
    return [plans[id(session)] if id(session) in plans else session.plan() for session in sessions]


def _sessions(
    paths: list[Path],
    store: Store,
    targets: list[str],
    *,
    known: Mapping[Path, Remembered],
    jobs: int = 2,
    taken: Taken | None = None,
) -> dict[Path, BuildSession]:
    """Open every recipe but those that are `known`, before anything is run, so that all faults of all are told at once."""
    sessions: dict[Path, BuildSession] = {}
    faults: list[Fault] = []
    names = {} if taken is None else taken.others
    for path in paths:
        if path in known:
            faults.extend(name_faults(names, path, known[path].report["recipe"]))
            continue
        from tasks.session import open_session

        try:
            session = open_session(path, store, targets=tuple(targets), jobs=jobs, warn=_warn)
        except RecipeError as err:
            faults.extend(err.faults)
        else:
            faults.extend(_unknown_targets(session, path, targets))
            faults.extend(name_faults(names, path, session.recipe_name))
            sessions[path] = session
    if faults:
        raise RecipeError(faults)
    return sessions


def _unknown_targets(session: BuildSession, path: Path, targets: list[str]) -> list[Fault]:
    from recipes.fallbacks import targets_of

    known = {
        name
        for spec in session.loaded.recipe.targets
        for gpu in spec.gpus
        for name in (spec.runtime, f"{spec.runtime}:{gpu}")
    }
    known |= {*targets_of(session.loaded.recipe)}
    return [
        Fault(
            str(path),
            0,
            "targets",
            f"--target {name}: no such target in this recipe (allowed: {', '.join(sorted(known))})",
        )
        for name in targets
        if name not in known
    ]


def _warn(text: str) -> None:
    note(f"warning: {text}")


def _worst(statuses: list[int]) -> int:
    return next((status for status in (FAILED, WAITING) if status in statuses), DONE)
