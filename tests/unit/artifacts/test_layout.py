"""A store of the layout before this one is read as it is, and a newer one is refused by every command."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from typer.testing import CliRunner

from artifacts.catalog import EngineCatalog
from artifacts.layout import LAYOUT_NAME
from artifacts.store import open_store
from enginery.__main__ import MODULES, command_line
from enginery.client import pull, resolve
from tests.unit.artifacts.test_resolve import request

GOLDEN = Path(__file__).parents[2] / "golden" / "store-v0"


@pytest.fixture
def old(tmp_path: Path) -> Path:
    return Path(shutil.copytree(GOLDEN, tmp_path / "store"))


def test_a_store_of_the_layout_before_is_read_and_gets_the_document_with_the_first_write(
    old: Path, tmp_path: Path
) -> None:
    store = open_store(str(old))
    (engine,) = EngineCatalog(store).engines()
    assert EngineCatalog(store).channels("digits", "production") == {engine.target: engine.build}
    found = resolve(store, "digits", request(channel="production"))
    assert found.best is not None
    pulled = pull(store, found.best, tmp_path / "pulled")
    assert pulled.plan.read_bytes() == b"a plan of layout 0\n"
    assert not (old / LAYOUT_NAME).exists()
    EngineCatalog(store).publish(found.best)
    assert (old / LAYOUT_NAME).read_text() == '{"enginery": "store", "layout": 1}\n'


COMMANDS = (
    "list", "show digits", "resolve digits", "pull digits --to pulled", "export triton digits --out models", "verify", "verify --deep", "verify --execute", "gc",
    "gc --dry-run", "pin", "pin digits", "unpin digits", "history digits --channel production",
    "rollback digits --channel production", "promote digits --channel production", "sign digits --key KEY", "host --record",
    "plan recipes/digits.yaml", "build recipes/digits.yaml", "run digits --input x=1x4", "bench digits", "watch recipes/digits.yaml", "hosts",
    "rollout", "mirror STORE other", "mirror other STORE",
)  # fmt: skip


def test_every_command_that_opens_a_store_is_among_these() -> None:
    known = {name for names in MODULES.values() for name in names}
    assert known - {command.split()[0] for command in COMMANDS} == {"validate", "inspect", "doctor", "schema", "pool"}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_refuses_a_newer_layout(
    old: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.setenv("ENGINERY_STORE", str(old))
    words = [{"STORE": str(old), "other": str(tmp_path / "other")}.get(word, word) for word in command.split()]
    key = tmp_path / "key.pem"
    if "KEY" in command:
        subprocess.run(["openssl", "ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", str(key)], check=True)
    (old / LAYOUT_NAME).write_text('{"layout": 2}')
    before = sorted(old.rglob("*"))
    done = CliRunner().invoke(command_line(), [word.replace("KEY", str(key)) for word in words])
    assert done.exit_code == 1, done.output
    assert "this store has layout 2, and this release knows layouts up to 1" in done.output
    assert sorted(old.rglob("*")) == before
