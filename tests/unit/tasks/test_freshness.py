import os
from dataclasses import replace

import pytest

from artifacts.catalog import host_path
from artifacts.errors import UnavailableError
from artifacts.folder import FolderStore
from artifacts.hosts import VANISHED_SECONDS, see_host, seen_path
from recipes.pools import pool_name, portable_host
from tasks import patience
from tasks.freshness import Freshness, _planned, engines_on, known_kinds, portable_plans
from tasks.remembered import leave_plan
from tasks.session import open_session
from tasks.toolchain import probe_host
from tests.simulated_builds import simulate_build, write_recipe

pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed (pip install 'enginery[rtx]')")

HERE = probe_host()
VERSION = HERE.runtimes["tensorrt-rtx"]
POOL = pool_name("tensorrt-rtx", VERSION, "sm89")


def seen(store, host):
    see_host(store, host_path(host.name), host, "2026-01-01T00:00:00Z")


def test_a_target_is_fresh_where_every_host_of_its_pool_would_plan_it_so(tmp_path):
    recipe, store = write_recipe(tmp_path, "one"), FolderStore(tmp_path / "store")
    simulate_build(recipe, store, tmp_path)
    session = open_session(recipe, store, host=portable_host(HERE))
    waiting = [engine.target for engine in session.plan().engines if engine.state == "waiting"]
    assert len(waiting) == 6  # the portable pool cannot tell
    versions = session.versions_read()

    def published(pool=POOL):
        return Freshness(recipe, store, versions).published("tensorrt-rtx", "sm89", pool)

    assert not published()  # no host is known
    seen(store, replace(HERE, name="a"))
    seen(store, replace(HERE, name="b"))  # of the same kind: planned once
    assert len(known_kinds(store)) == 1
    (path,) = published()
    assert store.info(f"{path}/manifest.json")
    assert not published("gpu-sm89-rtx0.9")
    # Another patch of the version is of the same pool, and has no engine yet.
    patched = ".".join([*VERSION.split(".")[:2], "999.1"])
    seen(store, replace(HERE, name="c", runtimes={**HERE.runtimes, "tensorrt-rtx": patched}))
    assert not published()
    gone = store.root / seen_path(host_path("c"))
    for path in (gone, store.root / host_path("c")):
        if path.exists():
            os.utime(path, (path.stat().st_mtime - VANISHED_SECONDS - 9,) * 2)
    assert published()
    (tmp_path / "one.onnx").write_bytes(b"another graph")
    assert not published()


def test_a_build_of_a_folder_is_given_what_builds_that_spread_have_left(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    (tmp_path / "file").write_text("")  # this machine remembers nothing
    recipe, store = write_recipe(tmp_path, "one"), FolderStore(tmp_path / "store")
    simulate_build(recipe, store, tmp_path)
    seen(store, replace(HERE, name="a"))
    assert portable_plans([recipe], store) == {}
    for path in store.root.rglob("*"):
        os.utime(path, (path.stat().st_mtime - 100,) * 2)
    session = open_session(recipe, store, host=portable_host(HERE))
    leave_plan(session)
    ((planned, freshness),) = portable_plans([recipe], store).values()
    waiting = [(one.runtime, one.runtime_version, one.gpu) for one in session.plan().engines if one.state == "waiting"]
    assert [(one.runtime, one.runtime_version, one.gpu) for one in planned.engines] == waiting
    assert not planned.ready
    assert len(freshness.published("tensorrt-rtx", "sm89", POOL)) == 1
    assert not freshness.published("tensorrt-rtx", "sm89", "gpu-sm89-rtx0.9")
    next(store.root.glob("engines/one/*sm89*/*/model.plan")).unlink()
    ((_planned, freshness),) = portable_plans([recipe], store).values()  # which knows nothing of GPUs
    assert not freshness.published("tensorrt-rtx", "sm89", POOL)
    next(store.root.glob("cache/actions/simplify/*")).unlink()
    assert portable_plans([recipe], store) == {}


def test_what_was_planned_with_other_packages_is_not_made_here(tmp_path):
    recipe, store = write_recipe(tmp_path, "one"), FolderStore(tmp_path / "store")
    simulate_build(recipe, store, tmp_path)
    session = open_session(recipe, store, versions={"onnxruntime": "0.0.1"})
    planned = session.plan()
    step = next(one for one in planned.ready if "onnxruntime" in one.action.toolchain)
    outcome = session.ensure(step, planned)
    assert outcome.state == "failed"
    assert "is planned with onnxruntime 0.0.1, here is" in outcome.message


def test_a_store_that_does_not_answer_at_once_is_asked_again(tmp_path, monkeypatch):
    monkeypatch.setattr(patience, "_FIRST_SECONDS", 0.0)
    recipe, store = write_recipe(tmp_path, "one"), FolderStore(tmp_path / "store")
    seen(store, replace(HERE, name="a"))
    away, read_versioned, listed = ["list", "plan"], FolderStore.read_versioned, FolderStore.list

    def refusing(what, call):
        def refused(*asked):
            if what in away:
                away.remove(what)
                raise UnavailableError("not now")
            return call(*asked)

        return refused

    monkeypatch.setattr(FolderStore, "list", refusing("list", listed))
    (host,) = [host for host, _engines in Freshness(recipe, store, {})._plans]
    monkeypatch.setattr(FolderStore, "read_versioned", refusing("plan", read_versioned))
    assert engines_on(recipe, store, host, {})
    assert away == []


def test_what_is_no_report_is_not_known():
    reports = [{}, {"recipe": "a", "engines": [{"state": "waiting"}]}, {"recipe": "a", "engines": 1}, None]
    assert [_planned(report) for report in reports] == [None] * 4
