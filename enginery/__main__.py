"""`enginery` and `python -m enginery`."""

from __future__ import annotations

from enginery import catalog_commands, host_commands, recipe_commands
from enginery.app import app

recipe_commands.register(app)
catalog_commands.register(app)
host_commands.register(app)


def main() -> None:
    """Run the command line."""
    app()


if __name__ == "__main__":
    main()
