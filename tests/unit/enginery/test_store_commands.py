"""gc, pin and unpin, as a user meets them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from click.testing import Result
from typer.testing import CliRunner

from enginery import store_commands
from tests.unit.artifacts.test_collector import Shop


@pytest.fixture
def shop(tmp_path: Path) -> Shop:
    return Shop(tmp_path)


def run(shop: Shop, *arguments: str, status: int = 0) -> Result:
    app = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False)
    store_commands.register(app)
    done = CliRunner().invoke(app, [*arguments], env={"ENGINERY_STORE": str(shop.store.root)})
    assert done.exit_code == status, (done.stdout, done.stderr, done.exception)
    return done


def test_a_dry_run_tells_bytes_by_recipe_and_changes_nothing(shop: Shop) -> None:
    for recipe in ("digits", "swin"):
        shop.engine("fp16-a", "2026-01-01T00:00:00Z", recipe)
        shop.engine("fp16-b", "2026-01-02T00:00:00Z", recipe)
    shop.blob(b"nobody's")
    shop.age(40)
    before = shop.paths()
    done = run(shop, "gc", "--dry-run")
    assert shop.paths() == before
    rows = {cells[0]: cells[1:3] for line in done.stdout.splitlines() if (cells := line.split())}
    # A manifest, its mark and publication, the record of its compilation and its plan, which the engine's folder has for a day longer.
    assert (rows["digits"], rows["swin"], rows["(cache)"]) == (["1", "5"], ["1", "5"], ["0", "1"])
    assert "would go: 2 engines, 11 objects" in done.stdout
    assert "2 engines stay" in done.stdout
    told = json.loads(run(shop, "gc", "--dry-run", "--json").stdout)
    plan = len("compile of swin fp16-a")
    assert told["waiting"]["swin"] == {"engines": 0, "objects": 1, "bytes": plan}
    # In a folder the plan's blob and the engine's file are one file.
    sizes = {entry["path"]: entry["bytes"] for entry in told["objects"] if entry["recipe"] == "swin"}
    assert told["removed"]["swin"]["bytes"] == sum(sizes.values()) - plan
    assert set(told["kept"].values()) == {"the newest fp16 of its target"}
    removed = json.loads(run(shop, "gc", "--json").stdout)
    assert {**removed, "dry_run": True} == told


def test_one_recipe_and_at_once(shop: Shop) -> None:
    for recipe in ("digits", "swin"):
        shop.engine("fp16-a", "2026-01-01T00:00:00Z", recipe)
    shop.age(40)
    done = run(shop, "gc", "--recipe", "swin", "--keep-newest", "0", "--grace", "0s")
    assert "removed: 1 engines" in done.stdout
    assert not any("swin" in path for path in shop.paths("engines/"))
    assert shop.whole() == ["fp16-a"]


def test_a_duration_that_is_none_is_refused(shop: Shop) -> None:
    assert "is not a duration" in run(shop, "gc", "--grace", "tomorrow", status=2).output


def test_pin_keeps_and_unpin_lets_go(shop: Shop) -> None:
    old = shop.engine("fp16-a", "2026-01-01T00:00:00Z")
    shop.engine("fp16-b", "2026-01-02T00:00:00Z")
    assert "nothing is pinned" in run(shop, "pin").stderr
    assert run(shop, "pin", "fp16-a", "--reason", "audit", "--by", "ada").stdout == f"pinned: {old}\n"
    shop.age(40)
    run(shop, "gc")
    assert shop.whole() == ["fp16-a", "fp16-b"]
    (listed,) = json.loads(run(shop, "pin", "--json").stdout)
    assert (listed["engine"], listed["by"], listed["reason"]) == (str(old), "ada", "audit")
    assert "audit" in run(shop, "pin").stdout
    assert "no pin of 'fp16-b'" in run(shop, "unpin", "fp16-b", status=1).stderr
    assert run(shop, "unpin", "fp16-a").stdout == f"unpinned: {old}\n"
    run(shop, "gc")
    assert shop.whole() == ["fp16-b"]
    assert "no engine 'fp16-a'" in run(shop, "pin", "fp16-a", status=1).stderr
