"""What is printed, and how errors end: tables and progress on stderr, results on stdout, one exit status.

`--json` prints one JSON document on stdout and nothing else there; where the command cannot be carried out it is
`{"error": message, "faults": [...]}`. `NO_COLOR`, pipes and CI logs get plain lines (rich decides by the stream).
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Annotated, Any, Final, NoReturn, ParamSpec, TypeVar

import typer

from artifacts.errors import AddressError, ArtifactError, PolicyError
from recipes.errors import Fault, RecipeError
from tasks.errors import CallError, TaskError

if TYPE_CHECKING:
    from rich.console import Console

DONE: Final = 0
FAILED: Final = 1
WRONG: Final = 2
WAITING: Final = 3
INTERRUPTED: Final = 130  # 128 + SIGINT, as shells count

# A list of more documents than this is for programs.
_LONG: Final = 16

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
    """Print one JSON document on stdout; of a long list, each entry on a line of its own."""
    if isinstance(document, list) and len(document) > _LONG:
        # Without indentation, which is not written in C: of a thousand plans it takes two seconds.
        lines = (json.dumps(entry, ensure_ascii=False, allow_nan=False) for entry in document)
        sys.stdout.write("[\n" + ",\n".join(lines) + "\n]\n")
    else:
        sys.stdout.write(json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def note(message: str) -> None:
    """Say something to the person at the terminal, on stderr."""
    sys.stderr.write(f"{message}\n")  # in one piece: stages speak from several threads
    sys.stderr.flush()


class StoppedError(Exception):
    """A command cannot be carried out: why, in words for its user, and the exit status."""

    def __init__(self, status: int, message: str) -> None:
        self.status = status
        super().__init__(message)


def stop(status: int, message: str) -> NoReturn:
    """End the command (which `explains_errors`) with a message on stderr and an exit status."""
    raise StoppedError(status, message)


def explains_errors(command: Callable[P, R]) -> Callable[P, R]:
    """Turn the errors that a user can meet into a message and an exit status; anything else keeps its traceback."""

    @wraps(command)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return command(*args, **kwargs)
        except RecipeError as err:
            document = {"error": str(err), "faults": [fault_json(fault) for fault in err.faults]}
            message, status = str(err), WRONG
        except StoppedError as err:
            document, message, status = {"error": str(err)}, f"error: {err}", err.status
        except ArtifactError as err:
            document, message = {"error": str(err)}, f"error: {err}"
            status = WRONG if isinstance(err, AddressError | PolicyError) else FAILED
        except TaskError as err:
            document, message = {"error": str(err)}, f"error: {err}"
            status = WRONG if isinstance(err, CallError) else FAILED
        except KeyboardInterrupt:
            document, message, status = {"error": "interrupted"}, "interrupted; what was finished is kept", INTERRUPTED
        except BrokenPipeError:
            os._exit(FAILED)
        if kwargs.get("as_json"):
            print_json(document)
        note(message)
        raise typer.Exit(status)

    return wrapped


def fault_json(fault: Fault) -> dict[str, Any]:
    """Return a fault of a recipe as JSON values."""
    return {"file": fault.file, "line": fault.line, "path": fault.path, "what": fault.what}
