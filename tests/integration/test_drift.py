"""A host's runtime changes under a served watch: the schedule sees it, and an automation rebuilds exactly what it made stale."""

from __future__ import annotations

import contextlib
import json
import os
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
from tests.integration.test_prefect import QUIET, Server, server

pytestmark = pytest.mark.long

__all__ = ["server"]
OLD = "1.0.0.1"
MOST_SECONDS = 60.0
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
            began = _until(lambda: _began(server), serving, tmp_path) - changed
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
    busy = os.getloadavg()[0] / (os.cpu_count() or 1)
    if file := os.environ.get("ENGINERY_DRIFT_FIGURES"):
        recorded = datetime.fromisoformat(drift.time.replace("Z", "+00:00")).timestamp()
        figures = {
            "what": "seconds from the change of the installed version, at the default schedule",
            "recorded_in_store": round(recorded - changed, 1),  # whole seconds are what a record keeps
            "first_rebuild_began": round(began, 1),
            "load_average_1min_for_each_cpu": round(busy, 1),
            "cpus": os.cpu_count(),
            "versions": {name: version(name) for name in ("enginery", "prefect", "tensorrt_rtx")},
            "date": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        }
        Path(file).write_text(json.dumps(figures, indent=1) + "\n")
    # On processors that others use too, starting a process takes as many times longer.
    assert began <= MOST_SECONDS * max(1.0, busy)


def _until(ask: Callable[[], T], serving: subprocess.Popen[bytes], folder: Path) -> T:
    """Wait until something is true, and return it."""
    deadline = time.monotonic() + 150
    while not (found := ask()):
        assert serving.poll() is None, (folder / "log").read_text()
        assert time.monotonic() < deadline, (folder / "log").read_text()
        time.sleep(0.3)
    return found


def _began(server: Server) -> float:
    """Return when the first rebuild began, by its own state on the server; 0 while there is none."""
    runs = server.ask("flow_runs/filter", {"flows": {"name": {"any_": ["rebuild"]}}, "limit": 5})
    starts = [run["start_time"] for run in runs if run["start_time"]]
    return min((datetime.fromisoformat(start.replace("Z", "+00:00")).timestamp() for start in starts), default=0.0)


def _events(server: Server) -> list[dict[str, object]]:
    question = {"filter": {"event": {"prefix": ["enginery."]}}, "limit": 50}
    return server.ask("events/filter", question)["events"]  # type: ignore[call-overload, no-any-return]
