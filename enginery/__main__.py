"""`enginery` and `python -m enginery`."""

from __future__ import annotations

import os

from enginery import catalog_commands, host_commands, recipe_commands
from enginery.app import app

recipe_commands.register(app)
catalog_commands.register(app)
host_commands.register(app)


def main() -> None:
    """Run the command line."""
    # Typer imports pydantic, whose search for plugins reads the metadata of every installed package.
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")
    app()


if __name__ == "__main__":
    main()
