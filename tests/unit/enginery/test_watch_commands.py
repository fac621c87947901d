import json
from dataclasses import replace

import typer
from typer.testing import CliRunner

from artifacts.folder import FolderStore
from artifacts.hosts import see_host
from artifacts.rollouts import Rebuild, Rollout, change_rollout
from enginery import watch_commands
from tasks.toolchain import probe_host

A = Rebuild("digits", "digits.yaml", "tensorrt-rtx:sm89", "fp16", "miss: toolchain.tensorrt_rtx 1.6 -> 1.7")


def run(*arguments, status=0, env=None):
    app = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False)
    watch_commands.register(app)
    done = CliRunner().invoke(app, [*map(str, arguments)], env=env)
    assert done.exit_code == status, (done.stdout, done.stderr, done.exception)
    return done


def test_watch_records_this_host_and_tells_what_changed(tmp_path):
    (tmp_path / "recipes").mkdir()
    at = ("--store", tmp_path / "store")
    assert "as it was" in run("watch", tmp_path / "recipes", *at).stdout
    path = next((tmp_path / "store" / "hosts").glob("*.json"))
    path.unlink()
    see_host(
        FolderStore(tmp_path / "store"),
        f"hosts/{path.name}",
        replace(probe_host(), driver="1.2.3"),
        "2026-01-01T00:00:00Z",
    )
    changed = json.loads(run("watch", tmp_path / "recipes", *at, "--json").stdout)
    assert changed["changes"] == [f"driver 1.2.3 -> {probe_host().driver or 'none'}"]
    (row,) = json.loads(run("hosts", *at, "--json").stdout)
    assert (row["name"], row["state"]) == (probe_host().name, "seen")
    assert "driver 1.2.3 -> " in run("hosts", *at).stdout


def test_what_cannot_be_watched_is_said(tmp_path):
    assert "no such recipe" in run("watch", tmp_path / "nothing", status=2).stderr
    assert "PREFECT_API_URL" in run("watch", tmp_path, "--serve", status=2, env={"PREFECT_API_URL": ""}).stderr


def test_a_halted_rollout_is_shown_and_resumed_or_abandoned(tmp_path):
    at = ("--store", tmp_path)
    assert "no rollouts" in run("rollout", *at).stdout
    store = FolderStore(tmp_path)
    halted = Rollout("rtx", ("tensorrt-rtx 1.6 -> 1.7",)).joined("one", [A], "t")
    change_rollout(store, "rtx", lambda _none: halted.marked("one", A.key, "t", state="failed", reason="12 % slower"))
    shown = run("rollout", *at, status=1).stdout
    assert "rtx: halted (the canary one: digits tensorrt-rtx:sm89 fp16: 12 % slower)" in shown
    assert "name one rollout" in run("rollout", *at, "--resume", status=2).stderr
    assert json.loads(run("rollout", "rtx", *at, "--resume", "--json").stdout)[0]["state"] == "canary"
    assert "nothing to resume" in run("rollout", "rtx", *at, "--resume", status=1).stderr
    assert "abandoned (by " in run("rollout", "rtx", *at, "--abandon", "--reason", "1.8 comes").stdout
    assert "nothing at rollouts/x.json" in run("rollout", "x", *at, "--abandon", status=1).stderr
