"""What is printed, and how errors end: tables and progress on stderr, results on stdout, one exit status.

`--json` prints one JSON document on stdout and nothing else there. `NO_COLOR`, pipes and CI logs get plain lines
(rich decides by the stream).
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Annotated, Any, Final, NoReturn, ParamSpec, TypeVar

import typer

from artifacts.errors import ArtifactError
from recipes.errors import RecipeError

if TYPE_CHECKING:
    from rich.console import Console

DONE: Final = 0
FAILED: Final = 1
WRONG: Final = 2
WAITING: Final = 3

P = ParamSpec("P")
R = TypeVar("R")

StoreOption = Annotated[
    str,
    typer.Option(
        "--store",
        envvar="ENGINERY_STORE",
        show_default=True,
        help="Where artifacts and engines are kept: a folder or s3://bucket/prefix.",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout, and nothing else there.")]
DEFAULT_STORE: Final = ".enginery"


def console(*, stderr: bool = False) -> Console:
    """Return a console for stdout or stderr; without a terminal it is wide and plain, so that no cell is cut."""
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() or "COLUMNS" in os.environ else 200
    return Console(stderr=stderr, highlight=False, soft_wrap=False, width=width)


def print_json(document: Any) -> None:
    """Print one JSON document on stdout."""
    sys.stdout.write(json.dumps(document, indent=2, sort_keys=False, ensure_ascii=False, allow_nan=False) + "\n")


def note(message: str) -> None:
    """Say something to the person at the terminal, on stderr."""
    print(message, file=sys.stderr)  # noqa: T201  what people read goes to stderr


def stop(status: int, message: str) -> NoReturn:
    """End the command with a message on stderr and an exit status."""
    note(message)
    raise typer.Exit(status)


def explains_errors(command: Callable[P, R]) -> Callable[P, R]:
    """Turn the errors that a user can meet into a message and an exit status; anything else keeps its traceback."""

    @wraps(command)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return command(*args, **kwargs)
        except RecipeError as err:
            stop(WRONG, str(err))
        except ArtifactError as err:
            stop(FAILED, f"error: {err}")
        except BrokenPipeError:
            os._exit(FAILED)

    return wrapped
