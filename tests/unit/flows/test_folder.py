"""What a run of `build/folder` asks for: once, however often it asks, anew when it is retried, and not what waits already."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
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

    async def waiting(_store: str | None) -> dict[str, str]:
        return {"two.yaml": "there"}

    monkeypatch.setattr(folder, "arun_deployment", ask)
    monkeypatch.setattr(folder, "_waiting", waiting)
    monkeypatch.chdir(tmp_path)
    for name in ("one", "two"):
        write_recipe(tmp_path, name)
    for count in (1, 1, 2):
        this_run = SimpleNamespace(get_id=lambda: "f", get_run_count=lambda count=count: count)
        monkeypatch.setattr(folder, "this_run", this_run)
        with disable_run_logger():
            found = asyncio.run(folder.build_folder.fn(".", str(tmp_path / "store")))
        assert found == [{"recipe": "one.yaml", "flow_run": "r"}, {"recipe": "two.yaml", "flow_run": "there"}]
    assert len(keys) == 3
    assert keys[0] == keys[1] != keys[2]


def test_what_waits_for_one_host_alone_is_no_build_of_the_recipe(monkeypatch: pytest.MonkeyPatch):
    whole = {"recipe": "a.yaml", "store": "s", "spread": True}
    asked = [whole, {**whole, "recipe": "b.yaml", "on": "gpu-17"}, {**whole, "recipe": "c.yaml", "targets": ["cpu"]}]
    runs = [SimpleNamespace(id=index, parameters=parameters) for index, parameters in enumerate(asked)]

    async def read(*, offset: int, **_where: object) -> list[SimpleNamespace]:
        return runs[offset:]

    @contextlib.asynccontextmanager
    async def client() -> AsyncIterator[SimpleNamespace]:
        yield SimpleNamespace(read_flow_runs=read)

    monkeypatch.setattr(folder, "get_client", client)
    assert asyncio.run(folder._waiting("s")) == {"a.yaml": "0"}
