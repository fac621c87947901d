"""A plan from what builds have packed, and one listing, is the plan that asks for each object; whatever has changed meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from artifacts.folder import FolderStore
from artifacts.fresh_plans import FreshPlans
from artifacts.gathered import RECORDS_OF, Gathered, gather, keep_packs
from artifacts.store import ObjectInfo, Store, open_store
from tasks.remembered import PlanMemory
from tasks.report import plan_report
from tasks.session import BuildSession, open_session
from tests.simulated_builds import simulate_build, write_recipe

FEW = "targets: [{runtime: onnxruntime, gpus: [cpu], precision: [fp32]}]\n"


class Asked:
    """A store that notes what it is asked for one by one."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.paths: list[str] = []

    def __getattr__(self, name: str) -> Any:
        if name in ("read", "read_versioned", "info", "list"):
            return lambda path: self.paths.append(path) or getattr(self._store, name)(path)
        return getattr(self._store, name)


def built(folder: Path, uri: str) -> Path:
    """Build a recipe of one engine, and leave what others need to plan it."""
    recipe, store = write_recipe(folder, "m"), open_store(uri)
    recipe.write_text(recipe.read_text().partition("targets:")[0] + FEW)
    simulate_build(recipe, store, folder)
    memory, session = PlanMemory(store, folder=None), open_session(recipe, store)
    planned = session.plan()
    session.finish(planned)
    memory.keep([(session, planned)], latest=True)
    memory.share()
    return recipe


def gathering(recipe: Path, store: Any) -> BuildSession:
    session = open_session(recipe, store)
    session.see(gather(store, ["m"]))
    return session


def first(prefix: str, end: str = "") -> Callable[[Store], str]:
    return lambda store: min(info.path for info in store.list(prefix) if info.path.endswith(end))


OBJECTS = {
    "a record": first("cache/actions/type/"),
    "what was published": first("cache/actions/publish/"),
    "a blob": first("cache/blobs/"),
    "a manifest": first("engines/", "/manifest.json"),
    "a plan file": first("engines/", "/model.plan"),
    "a mark": lambda store: next(info.path for info in store.list("engines/") if "/publications/" in info.path),
    "the publication": first("publications/"),
}


@pytest.mark.slow
def test_a_plan_from_packs_is_the_plan_whatever_is_lost_or_written_over(
    careless_s3_store_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("ENGINERY_S3_LOCKS", str(tmp_path))
    recipe, store = built(tmp_path, careless_s3_store_uri), open_store(careless_s3_store_uri)

    def fresh() -> bool:
        """Plan with the packs; where that says so, the plan that is made without says the same."""
        planned = gathering(recipe, store).plan()
        if planned.fresh:
            assert plan_report(planned) == plan_report(open_session(recipe, store).plan())
        return planned.fresh

    asked = Asked(store)
    session = gathering(recipe, asked)
    planned = session.plan()
    session.finish(planned)
    assert planned.fresh
    assert not asked.paths[1:], asked.paths  # none but a shard of packs
    assert session.pack(planned) == {}  # nothing that is not there
    for what, find in OBJECTS.items():
        path = find(store)
        data = store.read(path)
        store.delete(path)
        assert fresh() == (what == "a mark"), what  # without marks, its manifest makes an engine one
        if what in ("a record", "a manifest"):  # of which the bytes are read
            other = data.replace(b"1.0", b"2.0") if what == "a record" else bytes([data[0] ^ 1]) + data[1:]
            store.write(path, other)  # of the same size
            assert not fresh(), what
        store.write(path, data)
    assert fresh()


@pytest.mark.slow
def test_packs_that_are_damaged_or_of_another_kind_harm_nothing(
    careless_s3_store_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("ENGINERY_S3_LOCKS", str(tmp_path))
    recipe, store = built(tmp_path, careless_s3_store_uri), open_store(careless_s3_store_uri)
    packs = FreshPlans(store, RECORDS_OF)
    ((name, pack),) = [*packs._all([f"{number:02x}" for number in range(64)]).items()]
    step = next(iter(pack))
    for value in (None, [], {"export": 1}, {step: {"cache/x": 1, "../x": [1, "v", "t"], "a": [1, "v"]}}):
        packs.add({name: value})
        assert gather(store, ["m"]).texts == {}
        assert gathering(recipe, store).plan().fresh
    keep_packs(store, {"m": {step: pack[step]}})
    keep_packs(store, {"m": {"other": {}}})  # as two hosts do that build different targets
    assert set(pack[step]) <= gather(store, ["m"]).asked


def test_half_a_character_is_no_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    info = ObjectInfo("a", 3, 1.0, "v")
    monkeypatch.setattr(FreshPlans, "read", lambda *_names: {"m": {"export": {"a": [3, "v", "\ud800"]}}})
    monkeypatch.setattr(FolderStore, "infos", lambda *_paths: {"a": info})
    assert gather(FolderStore(tmp_path), ["m"]) == Gathered()
