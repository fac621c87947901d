"""Commands on channels: promote, rollback, history."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from enginery.asking import InsecureOption, KeyOption, TrustOption, given_policy, open_catalog, the_engine
from enginery.catalog_commands import recipe_name
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
    from artifacts.channels import SignedMove
    from enginery.moving import Mover

ChannelOption = Annotated[str, typer.Option("--channel", metavar="NAME", help="The channel: staging, production...")]
ReasonOption = Annotated[str | None, typer.Option("--reason", metavar="WHY", help="Why; kept in the history.")]
ByOption = Annotated[str | None, typer.Option("--by", metavar="WHO", help="Who moves it; default: user@host.")]


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    app.command("promote")(promote)
    app.command("rollback")(rollback)
    app.command("history")(history)


@explains_errors
def promote(
    engine: Annotated[str, typer.Argument(metavar="ENGINE", help="Its name, or any part of it that no other has.")],
    channel: ChannelOption,
    reason: ReasonOption = None,
    by: ByOption = None,
    allow_unexecuted: Annotated[
        bool, typer.Option("--allow-unexecuted", help="Though it never ran on its device. Needs --reason.")
    ] = False,
    allow_slower: Annotated[
        bool, typer.Option("--allow-slower", help="Though it is slower than what it replaces. Needs --reason.")
    ] = False,
    max_slower: Annotated[
        float, typer.Option("--max-slower", metavar="SHARE", min=0.0, help="How much slower is not slower.")
    ] = 0.05,
    key: KeyOption = None,
    trust: TrustOption = None,
    insecure: InsecureOption = False,
    store: StoreOption = DEFAULT_STORE,
    as_json: JsonOption = False,
) -> None:
    """Make a channel name an engine, after its gates, its execution on the device and its speed are looked at.

    Two who promote at once do so one after the other, and the history has both. `resolve --channel` and
    `pull --channel` give what the channel names.

    Example: enginery promote digits/onnxruntime-1.31.1-cpu/fp32 --channel production --reason "release 12"
    """
    waived = [name for name, given in (("unexecuted", allow_unexecuted), ("slower", allow_slower)) if given]
    if waived and not reason:
        stop(WRONG, f"--allow-{waived[0]} needs --reason, which the history keeps")
    mover = _mover(store, channel, by, reason, key, trust, insecure)
    found = the_engine(mover.catalog, engine)
    moved = mover.promote(found, channel, waived=waived, max_slower=max_slower)
    if moved is not None:
        for waiver in moved.move.waived:
            note(f"WARNING: promoted though {waiver} ({reason})")
    elif not as_json:
        note(f"{channel} of {found.recipe}/{found.target} names {found.build} already")
    _tell([moved] if moved is not None else [], as_json=as_json)


@explains_errors
def rollback(
    recipe: Annotated[
        str, typer.Argument(metavar="RECIPE[/TARGET]", help="The target, where the channel has several.")
    ],
    channel: ChannelOption,
    to: Annotated[str | None, typer.Option("--to", metavar="BUILD", help="An earlier build than the last.")] = None,
    all_targets: Annotated[bool, typer.Option("--all-targets", help="Of a recipe with several targets: all.")] = False,
    reason: ReasonOption = None,
    by: ByOption = None,
    key: KeyOption = None,
    trust: TrustOption = None,
    insecure: InsecureOption = False,
    store: StoreOption = DEFAULT_STORE,
    as_json: JsonOption = False,
) -> None:
    """Make a channel name again what it named before its last promotion; once more goes one further back.

    Example: enginery rollback digits/onnxruntime-1.31.1-cpu --channel production --reason "wrong labels"
    """
    from artifacts.channels import channels_of

    mover = _mover(store, channel, by, reason, key, trust, insecure)
    name, _slash, target = (
        (recipe_name(recipe), "", "") if recipe.endswith((".yaml", ".yml")) else recipe.partition("/")
    )
    targets = [found.head.move.target for found in channels_of(mover.catalog.store, name, channel)]
    chosen = [target] if target else targets
    if not targets or (target and target not in targets):
        there = f"it has it for {', '.join(targets)}" if targets else "enginery history tells what there is"
        stop(FAILED, f"nothing was ever promoted to {channel} of {recipe} in {mover.catalog.store.uri}; {there}")
    if len(chosen) > 1 and not all_targets:
        names = " or ".join(f"{name}/{target}" for target in targets)
        stop(WRONG, f"{channel} of {name} has {len(targets)} targets; give {names}, or --all-targets")
    moved = [mover.rollback(name, target, channel, build=to) for target in chosen]
    _tell(moved, as_json=as_json)


@explains_errors
def history(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe's name, or its file.")],
    channel: Annotated[str | None, typer.Option("--channel", metavar="NAME", help="Only this channel.")] = None,
    store: StoreOption = DEFAULT_STORE,
    as_json: JsonOption = False,
) -> None:
    """Tell what the channels of a recipe named, since when, who moved them, why, and from which commit.

    Example: enginery history digits --channel production
    """
    from artifacts.channels import channels_of

    catalog, name = open_catalog(store), recipe_name(recipe)
    moves = [signed for found in channels_of(catalog.store, name, channel) for signed in found.moves]
    if as_json:
        print_json([_json(signed) for signed in moves])
    elif moves:
        _print(moves)
    else:
        note(f"nothing was ever promoted to {channel or 'a channel'} of {name} in {catalog.store.uri}")


def _mover(
    store: str, channel: str, by: str | None, reason: str | None, key: str | None, trust: Path | None, insecure: bool
) -> Mover:
    import os

    from artifacts.channels import check_name
    from artifacts.signing import PASSWORD, open_signer
    from enginery.moving import Mover, this_user
    from enginery.trusting import trust_of

    check_name(channel)
    judge = trust_of(given_policy(trust, insecure))
    signer = open_signer(key, password=os.environ.get(PASSWORD)) if key else None
    return Mover(open_catalog(store), by or this_user(), reason, signer, judge, unsigned_over_signed=insecure)


def _tell(moves: list[SignedMove], *, as_json: bool) -> None:
    if as_json:
        print_json([_json(signed) for signed in moves])
        return
    for signed in moves:
        move = signed.move
        speed = "speed not compared"
        if move.speed is not None:
            speed = f"{abs(move.speed.slower_by):.1%} {'slower' if move.speed.slower_by > 0 else 'faster'} than before"
        said = f"; {speed}" if move.action == "promote" else ""
        typer.echo(f"{move.channel}: {move.recipe}/{move.target}/{move.build}")
        note(f"move {move.sequence} by {move.by}, {'signed' if signed.signature is not None else 'not signed'}{said}")


def _json(signed: SignedMove) -> dict[str, Any]:
    from artifacts.signing import hint_of

    return signed.move.model_dump(mode="json") | {
        "signed_by": None if signed.signature is None else hint_of(signed.signature)
    }


def _print(moves: list[SignedMove]) -> None:
    from artifacts.signing import hint_of
    from enginery.rows import Rows, print_rows

    table = Rows(("channel", "target", "move", "when", "who", "build", "commit", "key", "what"))
    for signed in moves:
        move = signed.move
        what = move.action + (f" ({', '.join(move.waived)} allowed)" if move.waived else "")
        key = (hint_of(signed.signature) or "?")[:12] if signed.signature is not None else "not signed"
        cells = (
            move.channel, move.target, str(move.sequence), move.time or "not known", move.by, move.build,
            (move.commit or "")[:12], key, f"{what}: {move.reason}" if move.reason else what,
        )  # fmt: skip
        table.add_row(*map(_printable, cells))
    print_rows(table)


def _printable(text: str) -> str:
    # Whoever may write to a store may write anything here, such as what moves a terminal's cursor.
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)
