"""Work pools in time: a target waits for its worker, what is fresh is not asked for, and a changed host's engines go through its queue."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, TypeVar

import psutil
import pytest

from artifacts.catalog import EngineCatalog, host_path
from artifacts.folder import FolderStore
from artifacts.hosts import seen_path
from artifacts.rollouts import rollouts
from recipes.pools import host_queue, pool_name
from tasks.toolchain import version
from tests.integration.building import ROOT, copy_digits, enginery, environment
from tests.integration.fleet import most_seconds, rebuild_began, write_figures
from tests.integration.test_drift import two_engines
from tests.integration.test_prefect import QUIET, Server, server

pytestmark = pytest.mark.long

__all__ = ["server"]
T = TypeVar("T")
HOST = "gpu-1"
SECONDS = 400.0


def test_targets_wait_for_workers_and_rebuilds_go_through_the_changed_hosts_queue(server: Server, tmp_path: Path):
    pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed (pip install 'enginery[rtx]')")
    new = version("tensorrt_rtx")
    assert new is not None
    old = ".".join([*new.split(".")[:2], "0.1"])  # of the same pool
    pool = pool_name("tensorrt-rtx", old, "sm89")
    models, store = tmp_path / "models", FolderStore(tmp_path / "store")
    copy_digits(models, two_engines)
    shutil.copyfile(ROOT / "prefect.yaml", models / "prefect.yaml")
    for words in (["init", "-q"], ["add", "-A"], ["-c", "user.name=t", "-c", "user.email=t@t", "commit", "-qm", "one"]):
        subprocess.run(["git", *words], cwd=models, check=True)
    # What Python's metadata says is installed on the GPU's host is older, until the upgrade.
    installed = tmp_path / "installed"
    metadata = installed / f"tensorrt_rtx-{old}.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: tensorrt-rtx\nVersion: {old}\n")
    env = {**environment(), **QUIET, **server.env, "ENGINERY_STORE": store.uri, "ENGINERY_REPOSITORY": str(models)}
    env |= {"PREFECT_WORKER_HEARTBEAT_SECONDS": "5"}
    gpu = {**env, "ENGINERY_HOST": HOST, "PYTHONPATH": os.pathsep.join([str(installed), env["PYTHONPATH"]])}

    def runs(flow: str) -> list[dict[str, Any]]:
        return server.ask("flow_runs/filter", {"flows": {"name": {"any_": [flow]}}, "sort": "EXPECTED_START_TIME_ASC"})

    def ended(flow: str, count: int) -> dict[str, Any]:
        def look() -> dict[str, Any] | None:
            done = [run for run in runs(flow) if run["state_type"] in ("COMPLETED", "FAILED", "CRASHED")]
            return done[-1] if len(done) == count else None

        return until(look)

    def engines() -> set[str]:
        return {engine.target for engine in EngineCatalog(store).engines()}

    def prefect(*words: str) -> None:
        command = [sys.executable, "-m", "prefect", "--no-prompt", *words]
        done = subprocess.run(command, cwd=models, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr

    with ExitStack() as stack:

        def start(name: str, environ: dict[str, str], *words: str) -> None:
            log = stack.enter_context((tmp_path / f"{name}.log").open("wb"))
            process = psutil.Popen([sys.executable, "-m", *words], env=environ, stdout=log, stderr=log, cwd=tmp_path)
            stack.callback(_end, process)

        for words in (["portable"], [pool, "--host", HOST]):
            assert enginery("pool", *words, "--create", cwd=tmp_path, env=env).returncode == 0
        prefect("deploy", "--all")
        start("portable", env, "prefect", "worker", "start", "--pool", "portable")
        prefect("deployment", "run", "build/recipe", "--param", "recipe=digits.yaml")
        first = ended("build", 1)
        assert first["state"]["name"] == "Waiting", first["state"]
        assert "no live worker" in first["state"]["message"]
        assert {one.partition("-")[0] for one in engines()} == {"onnxruntime"}

        queues = [word for queue in ("default", "nightly", host_queue(HOST)) for word in ("--work-queue", queue)]
        start("gpu", gpu, "prefect", "worker", "start", "--pool", pool, *queues)
        assert ended("compile", 1)["state_type"] == "COMPLETED"
        assert f"tensorrt-rtx-{old}-sm89" in engines()
        exports = server.ask("task_runs/filter", {"task_runs": {"name": {"any_": ["export"]}}})
        assert [run["state"]["name"] for run in exports].count("Completed") == 1  # else it was found in the store

        start("watch", gpu, "enginery", "watch", str(models), "--serve", "--pools")
        until(lambda: store.info(host_path(HOST)))
        prefect("deployment", "run", "build/recipe", "--param", "recipe=digits.yaml")
        second = ended("build", 2)
        assert (second["state_type"], second["state"]["name"]) == ("COMPLETED", "Completed"), second["state"]
        prefect("deployment", "run", "build/folder", "--param", "folder=.")
        assert ended("build", 3)["state_type"] == "COMPLETED"
        assert (len(runs("build")), len(runs("compile"))) == (3, 1)  # nothing was asked for that was fresh

        before, seen = engines(), store.info(seen_path(host_path(HOST)))
        until(
            lambda: store.info(seen_path(host_path(HOST))) != seen
        )  # a look is just over: the next is as far away as can be
        changed = time.time()
        shutil.rmtree(metadata)  # as an upgrade does
        began = until(lambda: rebuild_began(server)) - changed
        (rollout,) = until(lambda: [one for one in rollouts(store) if one.state in ("done", "halted")])
        assert rollout.state == "done", rollout
        assert engines() - before == {f"tensorrt-rtx-{new}-sm89"}
        (rebuilt,) = rollout.members[HOST].rebuilds
        assert (rebuilt.file, rebuilt.target, rebuilt.state) == ("digits.yaml", "tensorrt-rtx:sm89", "passed")
        assert [run["work_queue_name"] for run in runs("compile")] == ["default", host_queue(HOST)]
        assert len(runs("rebuild")) == 1
        write_figures(
            "from the change of a host's installed TensorRT-RTX, just after a look, to the start of the first rebuild on the portable "
            "pool; a server with SQLite, a store in a folder, watch and workers at their defaults",
            began,
        )
        assert began <= most_seconds()


def until(ask: Callable[[], T | None]) -> T:
    """Wait until something is there, and return it."""
    deadline = time.monotonic() + SECONDS
    while not (found := ask()):
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.5)
    return found


def _end(process: psutil.Popen) -> None:
    with suppress(psutil.NoSuchProcess):
        for running in [*process.children(recursive=True), process]:
            with suppress(psutil.NoSuchProcess):
                running.kill()
    process.wait()
