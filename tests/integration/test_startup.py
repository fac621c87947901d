"""What is fresh starts nothing: planning, no-op builds and help import neither Prefect nor a framework."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.integration.building import build, copy_digits, environment, one_engine

HEAVY = {
    "alembic",
    "boto3",
    "botocore",
    "fastapi",
    "httpx",
    "numpy",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "onnxsim",
    "prefect",
    "sqlalchemy",
    "tensorrt",
    "tensorrt_rtx",
    "torch",
    "uvicorn",
}
# What a command with nothing to do can go without, though it is no framework: each takes 3 to 40 ms.
SPARED = {
    "concurrent.futures",
    "email.parser",
    "enginery.catalog_commands",
    "enginery.host_commands",
    "rich.console",
    "rich.table",
}
COMMANDS = (
    "validate", "plan", "build", "inspect", "list", "show", "resolve", "pull", "export", "run", "verify", "promote", "rollback", "history", "sign",
    "gc", "pin", "unpin", "host", "doctor", "schema", "watch", "hosts", "rollout",
)  # fmt: skip


def imported(*arguments: str, cwd: Path) -> tuple[set[str], str]:
    """Run the command line under `-X importtime`; return what it imported (modules, packages), and its stdout."""
    command = [sys.executable, "-X", "importtime", "-m", "enginery", *arguments]
    result = subprocess.run(command, cwd=cwd, env=environment(), capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    lines = [line for line in result.stderr.splitlines() if line.startswith("import time:")]
    modules = {line.rpartition("|")[2].strip() for line in lines}
    assert "enginery" in modules
    return modules | {module.partition(".")[0] for module in modules}, result.stdout


@pytest.mark.parametrize("command", [[], *([command] for command in COMMANDS)], ids=" ".join)
def test_help_imports_nothing_heavy(tmp_path: Path, command: list[str]):
    packages, said = imported(*command, "--help", cwd=tmp_path)
    assert not packages & HEAVY
    assert "Usage:" in said


def test_a_plan_of_an_empty_store_imports_nothing_heavy_and_writes_nothing(tmp_path: Path):
    copy_digits(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    packages, said = imported("plan", "digits.yaml", "--explain", cwd=tmp_path)
    assert not packages & (HEAVY | SPARED)
    assert "miss: never built" in said
    assert sorted(tmp_path.rglob("*")) == before


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a recipe that is fresh, its store as if built some time ago: what is new is not remembered."""
    folder = tmp_path_factory.mktemp("built")
    _ran, planned, _session = build(copy_digits(folder, one_engine), folder / "store")
    assert planned.fresh
    for path in (folder / "store").rglob("*"):
        os.utime(path, (time.time() - 100,) * 2)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [["plan", "digits.yaml", "--explain"], ["build", "digits.yaml"], ["plan", "digits.yaml", "--json"]],
    ids=" ".join,
)
def test_what_is_fresh_is_planned_and_built_without_anything_heavy(
    built: Path, arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    shutil.rmtree(built / "store" / "cache" / "plans", ignore_errors=True)  # what a build of before has left
    packages, said = imported(*arguments, "--store", "store", cwd=built)
    assert not packages & (HEAVY | SPARED)
    assert "recipes.planner" in packages
    assert "cached" in said
    again, said_again = imported(*arguments, "--store", "store", cwd=built)  # remembered, and so not even read
    assert not again & {"yaml", "recipes.schema", "recipes.planner"}
    assert said_again == said
    if arguments[0] == "build":  # which has left its plan in the store, for machines that remember nothing
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "elsewhere"))
        shared, said_elsewhere = imported(*arguments, "--store", "store", cwd=built)
        assert not shared & (HEAVY | SPARED | {"yaml", "recipes.schema", "recipes.planner"})
        assert said_elsewhere == said
