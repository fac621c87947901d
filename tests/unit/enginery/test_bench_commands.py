"""The bench command where nothing can be timed: an engine that this host may not load, and a name that nothing has."""

from __future__ import annotations

import json

import pytest
import typer
from typer.testing import CliRunner

from artifacts.catalog import EngineCatalog
from artifacts.folder import FolderStore
from enginery import bench_commands, catalog_commands
from tests.engines import make_engine


@pytest.fixture
def run(tmp_path):
    store = FolderStore(tmp_path / "store")
    names = {"recipe": "digits", "target": "tensorrt-rtx-1.7.1.116-sm89", "build": "fp16-aaaaaaaaaaaaaaaa"}
    EngineCatalog(store).publish(make_engine(store, tmp_path, **names))
    app = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False)
    bench_commands.register(app)
    catalog_commands.register(app)
    return lambda *words: CliRunner().invoke(app, [*words, "--store", str(store.root)])


def test_an_engine_that_this_host_may_not_load_waits_and_says_what_for(run):
    done = run("bench", "fp16")
    assert done.exit_code == 3
    assert "may not be loaded here" in done.stderr
    assert "sm89" in done.stderr
    done = run("bench", "fp16", "--json")
    assert done.exit_code == 3
    assert "sm89" in json.loads(done.stdout)["error"]


def test_a_name_that_nothing_has_is_told_with_what_is_near(run):
    done = run("bench", "digit/fp16")
    assert done.exit_code == 1
    assert "no engine" in done.stderr
