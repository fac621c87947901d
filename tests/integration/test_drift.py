"""A host's runtime changes under a served watch: the schedule sees it, and an automation rebuilds exactly what it made stale."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, TypeVar

import psutil
import pytest

from artifacts.catalog import EngineCatalog, host_path
from artifacts.folder import FolderStore
from artifacts.hosts import read_host
from artifacts.rollouts import rollouts
from tasks.toolchain import version
from tests.integration.building import copy_digits, enginery, environment
from tests.integration.fleet import most_seconds, rebuild_began
from tests.integration.test_prefect import QUIET, Server, server

pytestmark = [pytest.mark.long, pytest.mark.timeout(3600)]

__all__ = ["server"]
OLD = "1.0.0.1"
T = TypeVar("T")


def two_engines(document: dict[str, Any]) -> None:
    document["targets"] = [
        {"runtime": "tensorrt-rtx", "gpus": ["sm89"]},
        {"runtime": "onnxruntime", "gpus": ["cpu"]},
    ]
    document["precision"] = {"build": ["fp32"]}


def test_a_new_runtime_is_seen_on_schedule_and_exactly_its_engines_are_rebuilt(server: Server, tmp_path: Path):
    pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed (pip install 'enginery[rtx]')")
    recipe, store = copy_digits(tmp_path / "recipes", two_engines), FolderStore(tmp_path / "store")
    # What Python's metadata says is installed is what Enginery goes by. Until the upgrade that is an older version; the
    # compiler itself is the one that is here.
    installed = tmp_path / "installed"
    metadata = installed / f"tensorrt_rtx-{OLD}.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: tensorrt-rtx\nVersion: {OLD}\n")
    env = {
        **environment(),
        **QUIET,
        **server.env,
        "PYTHONPATH": os.pathsep.join([str(installed), environment()["PYTHONPATH"]]),
        "ENGINERY_HOST": "gpu-1",
        "ENGINERY_STORE": store.uri,
    }
    done = enginery("build", str(recipe), cwd=tmp_path, env={**env, "PREFECT_API_URL": ""})
    assert done.returncode == 0, done.stderr
    before = set(EngineCatalog(store).engines())
    assert {engine.target for engine in before} == {
        f"tensorrt-rtx-{OLD}-sm89",
        f"onnxruntime-{version('onnxruntime')}-cpu",
    }

    log = (tmp_path / "log").open("wb")
    command = [sys.executable, "-m", "enginery", "watch", str(recipe.parent), "--serve"]
    with log, subprocess.Popen(command, cwd=tmp_path, env=env, stdout=log, stderr=log) as serving:
        try:
            _until(lambda: store.info(host_path("gpu-1")), serving, tmp_path)
            assert read_host(store, host_path("gpu-1"))[0].host.runtimes["tensorrt-rtx"] == OLD
            changed = time.time()
            shutil.rmtree(metadata)  # as an upgrade does
            began = _until(lambda: rebuild_began(server), serving, tmp_path) - changed
            (rollout,) = _until(
                lambda: [one for one in rollouts(store) if one.state in ("done", "halted")], serving, tmp_path
            )
            assert rollout.state == "done", rollout
            seen = _until(lambda: not read_host(store, host_path("gpu-1"))[0].open, serving, tmp_path)
            assert seen
        finally:
            running = [] if serving.poll() is not None else psutil.Process(serving.pid).children(recursive=True)
            serving.kill()
            for process in running:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
    new = set(EngineCatalog(store).engines()) - before
    assert [engine.target for engine in new] == [f"tensorrt-rtx-{version('tensorrt_rtx')}-sm89"]
    (rebuilt,) = rollout.members["gpu-1"].rebuilds
    assert (rebuilt.state, rebuilt.target, rebuilt.engine) == ("passed", "tensorrt-rtx:sm89", str(*new))
    assert f"{OLD} -> {version('tensorrt_rtx')}" in rebuilt.why
    (drift,) = read_host(store, host_path("gpu-1"))[0].history
    assert [(one.what, one.old, one.new) for one in drift.changes] == [("tensorrt-rtx", OLD, version("tensorrt_rtx"))]
    (drifted,) = [
        event
        for event in _events(server)
        if event["event"] == "enginery.host.drifted" and event["resource"]["prefect.resource.name"] == "gpu-1"
    ]
    assert [one["engine"] for one in drifted["payload"]["stale"]] == [rebuilt.replaces]
    if file := os.environ.get("ENGINERY_DRIFT_FIGURES"):
        recorded = datetime.fromisoformat(drift.time.replace("Z", "+00:00")).timestamp()
        figures = {
            "what": "seconds from the change of the installed version, at the default schedule",
            "recorded_in_store": round(recorded - changed, 1),  # whole seconds are what a record keeps
            "first_rebuild_began": round(began, 1),
            "load_average_1min_for_each_cpu": round(os.getloadavg()[0] / (os.cpu_count() or 1), 1),
            "cpus": os.cpu_count(),
            "versions": {name: version(name) for name in ("enginery", "prefect", "tensorrt_rtx")},
            "date": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        }
        Path(file).write_text(json.dumps(figures, indent=1) + "\n")
    assert began <= most_seconds()


class Watched:
    """A host in a process: a served watch, and what Python's metadata says is installed there."""

    def __init__(self, name: str, folder: Path, server: Server, store: FolderStore, recipes: Path) -> None:
        self.name = name
        self.log = folder / f"{name}.log"
        self.installed = folder / name
        self.metadata = self.installed / f"tensorrt_rtx-{OLD}.dist-info"
        self.metadata.mkdir(parents=True)
        (self.metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: tensorrt-rtx\nVersion: {OLD}\n")
        self.env = {
            **environment(),
            **QUIET,
            **server.env,
            "PYTHONPATH": os.pathsep.join([str(self.installed), environment()["PYTHONPATH"]]),
            "ENGINERY_HOST": name,
            "ENGINERY_STORE": store.uri,
        }
        command = [sys.executable, "-m", "enginery", "watch", str(recipes), "--serve", "--every", "10"]
        with self.log.open("wb") as log:
            self.process = psutil.Popen(command, cwd=folder, env=self.env, stdout=log, stderr=log)

    def break_compiler(self) -> Path:
        """Let the new version be one that cannot be imported here, and return what is to be removed to mend it."""
        module = self.installed / "tensorrt_rtx.py"
        module.write_text("raise ImportError('libtensorrt_rtx.so.1: cannot open shared object file')\n")
        return module

    def kill(self) -> None:
        """End it and all that it started."""
        with contextlib.suppress(psutil.NoSuchProcess):
            for process in [self.process, *self.process.children(recursive=True)]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
        self.process.wait()


def test_an_upgrade_that_breaks_the_first_host_reaches_no_other_until_it_is_mended_and_resumed(
    server: Server, tmp_path: Path
):
    pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed (pip install 'enginery[rtx]')")
    recipe, store = copy_digits(tmp_path / "recipes", two_engines), FolderStore(tmp_path / "store")
    names = ("wave-1", "wave-2")
    hosts = [Watched(name, tmp_path, server, store, recipe.parent) for name in names]
    first, second = hosts

    def wait(ask: Callable[[], T]) -> T:
        deadline = time.monotonic() + 300
        while not (found := ask()):
            said = "\n".join(host.log.read_text()[-4000:] for host in hosts)
            assert all(host.process.poll() is None for host in hosts), said
            assert time.monotonic() < deadline, said
            time.sleep(0.5)
        return found

    def rebuilds(name: str) -> list[dict[str, Any]]:
        where = {"flows": {"name": {"any_": ["rebuild"]}}, "flow_runs": {"tags": {"all_": [f"host:{name}"]}}}
        return server.ask("flow_runs/filter", {**where, "sort": "START_TIME_ASC"})

    try:
        done = enginery("build", str(recipe), cwd=tmp_path, env={**first.env, "PREFECT_API_URL": ""})
        assert done.returncode == 0, done.stderr
        before = set(EngineCatalog(store).engines())
        wait(lambda: all(store.info(host_path(name)) for name in names))

        mend = first.break_compiler()
        shutil.rmtree(first.metadata)
        wait(lambda: rollouts(store))
        shutil.rmtree(second.metadata)
        halted = wait(lambda: next((one for one in rollouts(store) if one.halted and len(one.members) == 2), None))
        assert halted.canary == "wave-1"
        assert halted.halted.startswith("the canary wave-1: digits tensorrt-rtx:sm89 fp32: ")
        assert "cannot open shared object file" in halted.halted
        time.sleep(25)  # two looks of the second host
        (untouched,) = rollouts(store)
        assert [one.state for one in untouched.members["wave-2"].rebuilds] == ["pending"]
        assert rebuilds("wave-2") == []
        assert set(EngineCatalog(store).engines()) == before

        mend.unlink()
        resumed = enginery("rollout", halted.id, "--resume", cwd=tmp_path, env=first.env)
        assert resumed.returncode == 0, resumed.stderr
        (rolled,) = wait(lambda: [one for one in rollouts(store) if one.state == "done"])
        said = "\n".join(rolled.log)
        assert re.search(
            r"wave-1: .* passed.*the canary wave-1 passed; the other hosts follow.*wave-2: .* passed", said, re.DOTALL
        )
        wait(lambda: rebuilds("wave-2") and rebuilds("wave-2")[-1]["state_type"] == "COMPLETED")
        assert rebuilds("wave-2")[0]["start_time"] > rebuilds("wave-1")[-1]["start_time"]
        # What the canary has built is there for the second host, which builds it no second time.
        assert [one.target for one in set(EngineCatalog(store).engines()) - before] == [
            f"tensorrt-rtx-{version('tensorrt_rtx')}-sm89"
        ]
    finally:
        for host in hosts:
            host.kill()


def _until(ask: Callable[[], T], serving: subprocess.Popen[bytes], folder: Path) -> T:
    """Wait until something is true, and return it."""
    deadline = time.monotonic() + 150
    while not (found := ask()):
        assert serving.poll() is None, (folder / "log").read_text()
        assert time.monotonic() < deadline, (folder / "log").read_text()
        time.sleep(0.3)
    return found


def _events(server: Server) -> list[dict[str, object]]:
    question = {"filter": {"event": {"prefix": ["enginery."]}}, "limit": 50}
    return server.ask("events/filter", question)["events"]  # type: ignore[call-overload, no-any-return]
