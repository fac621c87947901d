"""Commands that use engines: run one on arrays; verify what is published, and execute what was not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from enginery.asking import InsecureOption, TrustOption, given_policy, open_catalog, the_engine
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

if TYPE_CHECKING:
    from artifacts.catalog import EngineCatalog, EngineId
    from artifacts.trust import Trust
    from enginery.trusting import Unchecked
    from tasks.runner import Runner


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    app.command("run")(run)
    app.command("verify")(verify)


@explains_errors
def run(
    engine: Annotated[
        str,
        typer.Argument(
            metavar="ENGINE", help="Any part of a name in the store that no other has, or the folder of a pulled one."
        ),
    ],
    given: Annotated[
        Path, typer.Option("--input", metavar="FILE.npz", help="Arrays by the names of the engine's inputs.")
    ],
    output: Annotated[
        Path | None, typer.Option("--output", metavar="FILE.npz", help="Where the outputs go; without it: nowhere.")
    ] = None,
    rows: Annotated[
        int | None, typer.Option("--rows", min=1, metavar="N", help="Only the first N rows of every array.")
    ] = None,
    profile: Annotated[
        str | None, typer.Option("--profile", help="Which profile to use; default: the nearest that admits the shapes.")
    ] = None,
    repeat: Annotated[int, typer.Option("--repeat", min=1, metavar="N", help="Run so often, and time it.")] = 1,
    device: Annotated[
        int | None, typer.Option("--device", metavar="INDEX", help="Which GPU; default: the first that fits.")
    ] = None,
    graphs: Annotated[bool, typer.Option(help="Replay shapes that come back as CUDA graphs.")] = True,
    trust: TrustOption = None,
    insecure: InsecureOption = False,
    store: StoreOption = DEFAULT_STORE,
    as_json: JsonOption = False,
) -> None:
    """Run an engine on arrays of an .npz file, after its digests were checked; print what comes out, and how long it took.

    Times are whole calls: checks, copies to and from the device, and the run. With --repeat 20 a CUDA graph is replayed.

    Example: enginery run digits/onnxruntime-1.31.1-cpu/int8 --input digits/heldout.npz --rows 8 --output logits.npz
    """
    from enginery.running import outcome, print_outcome, read_inputs, save, timed_calls

    with _opened(engine, store, given_policy(trust, insecure), device=device, graphs=graphs) as runner:
        inputs, ignored = read_inputs(given, runner, rows)
        if ignored:
            note(f"{given.name}: {', '.join(ignored)} is no input of the engine, and is not used")
        found, seconds = timed_calls(runner, inputs, profile, repeat)
        document = outcome(runner, inputs, profile, found, seconds)
    if output is not None:
        save(found, output)
        document["output"] = str(output)
    if as_json:
        print_json(document)
    else:
        print_outcome(document)


@explains_errors
def verify(
    engines: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[ENGINE...]", help="Parts of names, or folders of pulled engines; default: all in the store."
        ),
    ] = None,
    execute: Annotated[
        bool,
        typer.Option(
            "--execute", help="Execute the engines that were not, and keep what was found beside their manifests."
        ),
    ] = False,
    again: Annotated[
        bool, typer.Option("--again", help="With --execute: also those that another host has executed already.")
    ] = False,
    deep: Annotated[
        bool,
        typer.Option(
            "--deep",
            help="Read the whole store: blobs, records, engines, channels; move what is damaged to quarantine/.",
        ),
    ] = False,
    spare: Annotated[
        str | None, typer.Option("--from", metavar="STORE", help="With --deep: another store to repair from.")
    ] = None,
    trust: TrustOption = None,
    insecure: InsecureOption = False,
    store: StoreOption = DEFAULT_STORE,
    as_json: JsonOption = False,
) -> None:
    """Read every byte of published engines and compare it with their manifests, and with a trust policy who signed them.

    What is damaged, or not signed by a key that the policy allows, ends with exit status 1.

    With --execute, engines that were built where they could not run are run here, if this host can: at min, opt and max of
    each profile against the source framework's outputs, and on the labelled data, judged by the gates that the manifest
    states. Exit status 1 where one fails, 3 where one waits for another host.

    With --deep, everything in the store is read. What is damaged is moved aside, never deleted, and repaired where the right
    bytes are in the store still, or in the one that --from names; exit status 1 where something could not be repaired.

    Example: enginery verify digits --execute
    """
    if deep or spare is not None:
        from enginery.verifying import verify_deep

        if not deep or engines or execute:
            raise typer.BadParameter(
                "--deep reads a whole store: it goes with --from, and with no ENGINE or --execute", param_hint="--deep"
            )
        verify_deep(open_catalog(store), spare, given_policy(trust, insecure), as_json=as_json)
        return
    from enginery.verifying import print_verified, verify_engine, verify_folder

    rows: list[dict[str, Any]] = []
    folders = [text for text in engines or () if _is_pulled(text)]
    judge = given_policy(trust, insecure)
    rows += [verify_folder(Path(text), judge) for text in folders]
    names = [text for text in engines or () if text not in folders]
    if names or not engines:
        catalog = open_catalog(store)
        rows += [
            verify_engine(catalog, engine, judge, execute=execute, again=again) for engine in _matching(catalog, names)
        ]
        if not rows:
            note(f"no engines in {catalog.store.uri}; build some: enginery build RECIPE --store {store}")
    if as_json:
        print_json(rows)
    else:
        print_verified(rows)
    states = {row["state"] for row in rows}
    if states & {"damaged", "untrusted", "failed"}:
        raise typer.Exit(FAILED)
    if "waiting" in states:
        raise typer.Exit(WAITING)


@contextmanager
def _opened(text: str, store: str, judge: Trust | Unchecked, *, device: int | None, graphs: bool) -> Iterator[Runner]:
    """Load the engine that is meant: a pulled one where it lies, one of the store from a checked copy of its files."""
    from enginery.client import load, pull

    if _is_pulled(text):
        with load(text, trust=judge, device=device, graphs=graphs) as runner:
            yield runner
        return
    catalog = open_catalog(store)
    engine = the_engine(catalog, text)
    with (
        catalog.store.scratch() as folder,
        load(pull(catalog.store, engine, folder, trust=judge), trust=judge, device=device, graphs=graphs) as runner,
    ):
        yield runner


def _matching(catalog: EngineCatalog, names: list[str]) -> list[EngineId]:
    """Return every engine that one of the texts is a part of, all without any; ends the command where one matches none."""
    if not names:
        return catalog.engines()
    found: dict[EngineId, None] = {}
    for text in names:
        matches = catalog.find(text)
        if not matches:
            near = catalog.near(text)
            hint = f"did you mean {' or '.join(near)}?" if near else "enginery list names those that are there"
            stop(FAILED, f"no engine {text!r} in {catalog.store.uri}; {hint}")
        found |= dict.fromkeys(matches)
    return list(found)


def _is_pulled(text: str) -> bool:
    """Tell whether a text is the folder (or the plan) of a pulled engine."""
    path = Path(text)
    if path.is_file() and path.suffix in (".plan", ".onnx"):
        path = path.parent
    return (path / "manifest.json").is_file()
