"""What a run of `build/folder` asks for: once, however often it asks, and anew when it is retried."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from prefect.logging import disable_run_logger

from flows import folder
from tests.simulated_builds import write_recipe


def test_a_retried_run_asks_for_other_builds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    keys: list[str] = []

    async def ask(_name: str, *, idempotency_key: str, **_asked: Any) -> SimpleNamespace:
        keys.append(idempotency_key)
        return SimpleNamespace(id="r")

    monkeypatch.setattr(folder, "arun_deployment", ask)
    monkeypatch.chdir(tmp_path)
    write_recipe(tmp_path, "one")
    for count in (1, 1, 2):
        this_run = SimpleNamespace(get_id=lambda: "f", get_run_count=lambda count=count: count)
        monkeypatch.setattr(folder, "this_run", this_run)
        with disable_run_logger():
            asyncio.run(folder.build_folder.fn(".", str(tmp_path / "store")))
    assert len(keys) == 3
    assert keys[0] == keys[1] != keys[2]
