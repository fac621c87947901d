"""The command line: every command, in the order in which a user meets them."""

from __future__ import annotations

from typing import Annotated

import typer

from enginery import __version__

app = typer.Typer(
    name="enginery",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help=(
        "One YAML recipe per model; one command makes verified TensorRT engines for every GPU you own.\n\n"
        "Start with: enginery validate RECIPE, enginery plan RECIPE --explain, enginery build RECIPE.\n\n"
        "Exit status: 0 done, 1 something failed, 2 the recipe or the command line is wrong, 3 some targets wait for a "
        "host that is not here."
    ),
)


def _version(value: bool) -> None:
    if value:
        typer.echo(f"enginery {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Hold options that come before every command."""
