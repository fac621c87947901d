"""`enginery` and `python -m enginery`."""

from __future__ import annotations

import atexit
import gc
import importlib
import os
import sys
from collections.abc import Iterable, Sequence
from functools import cache
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import typer

# Which module has which commands, in the order in which help shows them. Only the module of the command that is asked
# for is imported: with every module, and every option made, a command would start later the more of them there are.
MODULES: Final[dict[str, tuple[str, ...]]] = {
    "enginery.recipe_commands": ("validate", "plan", "build"),
    "enginery.inspect_commands": ("inspect",),
    "enginery.catalog_commands": ("list", "show", "resolve", "pull"),
    "enginery.export_commands": ("export",),
    "enginery.run_commands": ("run", "verify"),
    "enginery.bench_commands": ("bench",),
    "enginery.channel_commands": ("promote", "rollback", "history"),
    "enginery.sign_commands": ("sign",),
    "enginery.store_commands": ("gc", "pin", "unpin", "mirror"),
    "enginery.host_commands": ("host", "doctor", "schema"),
    "enginery.watch_commands": ("watch", "hosts", "rollout"),
    "enginery.pool_commands": ("pool",),
}
_GARBAGE: Final = 100_000


def main() -> None:
    """Run the command line."""
    # What imports make, stays: looking through it for garbage at every 700 new objects, and again when the process
    # ends, is a fifth of what a command with nothing to do takes.
    gc.set_threshold(_GARBAGE)
    atexit.register(gc.freeze)
    # Typer imports pydantic, whose search for plugins reads the metadata of every installed package.
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")
    command_line(modules_for(sys.argv[1:]))()


def command_line(modules: Iterable[str] = MODULES) -> typer.Typer:
    """Return the application with the commands of these modules, or of all."""
    from enginery.app import app

    for module in modules:
        _register(module)
    return app


def modules_for(arguments: Sequence[str]) -> tuple[str, ...]:
    """Return the modules that a command line needs: one, or all for help, completion and what is no command."""
    found = tuple(module for module, commands in MODULES.items() if arguments and arguments[0] in commands)
    return found if found and "_ENGINERY_COMPLETE" not in os.environ else tuple(MODULES)


@cache
def _register(module: str) -> None:
    from enginery.app import app

    importlib.import_module(module).register(app)


if __name__ == "__main__":
    # `-m` puts the working folder first, where a recipes.py of the user's would hide ours; unless that is where we are.
    if sys.path[0] == os.getcwd() != os.path.dirname(os.path.dirname(__file__)):  # noqa: PTH109, PTH120 - pathlib imports more
        del sys.path[0]
    main()
