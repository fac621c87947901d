"""Whole builds with real stages, without Prefect: what the flow does, driven by threads."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from artifacts.store import open_store
from recipes.plan import Plan
from recipes.steps import Step
from tasks.drive import drive
from tasks.session import BuildSession, Outcome, open_session

ROOT = Path(__file__).resolve().parents[2]
RECIPES = ROOT / "recipes"


def copy_digits(folder: Path, change=lambda _document: None) -> Path:
    """Copy the digits recipe with its code and data, after a change of the document, and return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copytree(
        RECIPES / "digits", folder / "digits", ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True
    )
    document = yaml.safe_load((RECIPES / "digits.yaml").read_text())
    document["targets"] = [
        {"runtime": "tensorrt-rtx", "gpus": ["sm89"]},
        {"runtime": "onnxruntime", "gpus": ["cpu"], "precision": ["fp32", "int8"]},
    ]
    change(document)
    path = folder / "digits.yaml"
    path.write_text(yaml.safe_dump(document, sort_keys=False))
    return path


def edit_recipe(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    """Return a function that applies a change of the document to the recipe in a folder."""

    def apply(folder: Path) -> None:
        path = folder / "digits.yaml"
        document = yaml.safe_load(path.read_text())
        change(document)
        path.write_text(yaml.safe_dump(document, sort_keys=False))

    return apply


def fewer_engines(document: dict[str, Any]) -> None:
    """Leave one engine of each runtime, for tests that care for stages more than for engines."""
    document["targets"] = [
        {"runtime": "tensorrt-rtx", "gpus": ["sm89"], "precision": ["int8"]},
        {"runtime": "onnxruntime", "gpus": ["cpu"], "precision": ["fp32"]},
    ]
    document["precision"]["build"] = ["int8"]
    document["precision"]["fallback"] = {"int8": ["fp32"]}


def one_engine(document: dict[str, Any]) -> None:
    """Leave one fp32 engine for ONNX Runtime, for tests that care for neither stages nor engines."""
    document["targets"] = [{"runtime": "onnxruntime", "gpus": ["cpu"]}]
    document["precision"] = {"build": ["fp32"]}


def link_store(source: str, target: str) -> None:
    """Copy one file for `shutil.copytree`; files of a store, which are never changed in place, by a hard link."""
    if "/store/" in source:
        Path(target).hardlink_to(source)
    else:
        shutil.copyfile(source, target)


def build(
    recipe: Path, store: str | Path, *, targets: tuple[str, ...] = (), fails: tuple[str, ...] = ()
) -> tuple[set[str], Plan, BuildSession]:
    """Build and return the ids of the steps that ran, the last plan, and the session; `fails` are the steps that have to fail."""
    session = open_session(recipe, open_store(str(store)), targets=targets)

    async def run(step: Step, planned: Plan) -> Outcome:
        return await asyncio.to_thread(session.ensure, step, planned)

    planned = asyncio.run(drive(session, run))
    session.finish(planned)
    failed = {name: outcome.message for name, outcome in session.outcomes.items() if outcome.state == "failed"}
    assert set(failed) == set(fails), failed
    return {name for name, outcome in session.outcomes.items() if outcome.state == "built"}, planned, session


def environment() -> dict[str, str]:
    """Return this process's environment without what the user has set for Enginery and Prefect."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "ENGINERY_"))}
    return {**kept, "PYTHONPATH": str(ROOT), "NO_COLOR": "1"}


def enginery(
    *arguments: str, cwd: Path, env: dict[str, str] | None = None, timeout: float = 300
) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "enginery", *arguments],
        cwd=cwd,
        env={**environment(), **(env or {})},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
