"""The front door: the command line, and the client that serving code imports.

Enters: command lines, recipes, a store's address. Leaves: tables for people, one JSON document for
programs, exit statuses 0 (done), 1 (something failed), 2 (the recipe or the command line is wrong),
3 (some targets wait for a host that is not here). Map: `app` (the commands), `output` (what is
printed and how errors end), one module for each group of commands. Serving code: `enginery.load`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from enginery.client import load as load

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Import `load` when it is asked for, so that `import enginery` stays cheap."""
    if name == "load":
        from enginery.client import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
