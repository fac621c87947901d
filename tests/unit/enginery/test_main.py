"""The command line imports the module of the command that is asked for, and every module where help needs all."""

from __future__ import annotations

import importlib

import pytest
import typer

from enginery.__main__ import MODULES, modules_for


@pytest.mark.parametrize("module", MODULES)
def test_each_module_has_the_commands_that_are_looked_for_in_it(module: str):
    app = typer.Typer()
    importlib.import_module(module).register(app)
    found = [*app.registered_commands, *app.registered_groups]  # a group has commands of its own: export triton
    assert tuple(one.name for one in found) == MODULES[module]


@pytest.mark.parametrize(
    ("arguments", "modules"),
    [
        (["plan", "recipes"], ("enginery.recipe_commands",)),
        (["list"], ("enginery.catalog_commands",)),
        (["-h"], tuple(MODULES)),
        ([], tuple(MODULES)),
        (["--help", "doctor"], tuple(MODULES)),
        (["bild"], tuple(MODULES)),
    ],
)
def test_only_what_a_command_needs_is_imported(arguments: list[str], modules: tuple[str, ...]):
    assert modules_for(arguments) == modules


def test_completion_knows_every_command(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("_ENGINERY_COMPLETE", "complete_bash")
    assert modules_for(["plan"]) == tuple(MODULES)
