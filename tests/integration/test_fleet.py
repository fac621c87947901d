"""A fleet in processes: a server on PostgreSQL, an S3 store, a worker for each pool; one of them is killed in a compilation."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from artifacts.catalog import EngineCatalog
from artifacts.store import open_store
from tests.integration.building import ROOT, copy_digits, environment
from tests.integration.test_prefect import QUIET, Server
from tests.servers import s3_environment, s3_server

pytestmark = pytest.mark.long

POOLS = ("portable", "gpu-sm89-rtx1.7", "gpu-sm120-rtx1.7")


def two_pools(document: dict[str, Any]) -> None:
    document["targets"] = [
        {"runtime": "tensorrt-rtx", "gpus": ["sm89", "sm120"]},
        {"runtime": "onnxruntime", "gpus": ["cpu"]},
    ]
    document["precision"] = {"build": ["fp32"]}


def test_a_build_is_spread_over_pools_with_one_export_and_outlives_a_worker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    if shutil.which("initdb") is None:
        pytest.skip("PostgreSQL is not installed (apt-get install postgresql)")
    copy_digits(tmp_path / "models", two_pools)
    shutil.copyfile(ROOT / "prefect.yaml", tmp_path / "models" / "prefect.yaml")
    for words in (["init", "-q"], ["add", "-A"], ["-c", "user.name=t", "-c", "user.email=t@t", "commit", "-qm", "one"]):
        subprocess.run(["git", *words], cwd=tmp_path / "models", check=True)
    with ExitStack() as stack:
        aws = s3_environment(stack.enter_context(s3_server()))
        for name, value in aws.items():
            monkeypatch.setenv(name, value)
        import boto3

        boto3.session.Session().client("s3").create_bucket(Bucket="fleet")
        server = stack.enter_context(_server(tmp_path, stack.enter_context(_postgres())))
        env = {**environment(), **QUIET, **server.env, **aws, "ENGINERY_STORE": "s3://fleet/store"}
        env |= {"PREFECT_WORKER_QUERY_SECONDS": "2", "PREFECT_WORKER_HEARTBEAT_SECONDS": "5"}
        env |= {"ENGINERY_REPOSITORY": str(tmp_path / "models"), "ENGINERY_CLAIM_SECONDS": "5"}

        def prefect(*words: str) -> str:
            command = [sys.executable, "-m", "prefect", "--no-prompt", *words]
            done = subprocess.run(
                command, cwd=tmp_path / "models", env=env, capture_output=True, text=True, check=False
            )
            assert done.returncode == 0, done.stdout + done.stderr
            return done.stdout

        def worker(pool: str, name: str) -> psutil.Popen:
            command = [sys.executable, "-m", "prefect", "worker", "start", "--pool", pool, "--name", name]
            return stack.enter_context(_running(command, env, tmp_path / f"{name}.log"))

        for pool in POOLS:
            prefect("work-pool", "create", pool, "--type", "process")
        prefect("deploy", "--all")
        workers = {pool: worker(pool, pool) for pool in POOLS}
        prefect("deployment", "run", "build/recipe", "--param", "recipe=digits.yaml")

        def runs() -> dict[str, list[dict[str, Any]]]:
            found: dict[str, list[dict[str, Any]]] = {}
            for run in server.ask("flow_runs/filter", {"sort": "START_TIME_ASC"}):
                found.setdefault(run["name"], []).append(run)
            return found

        doomed = "compile digits.yaml tensorrt-rtx:sm89"
        _until(lambda: any(run["state_type"] == "RUNNING" for run in runs().get(doomed, ())))
        _kill(workers[POOLS[1]])
        worker(POOLS[1], "another")
        _until(lambda: runs()["build digits.yaml"][0]["state_type"] in ("COMPLETED", "FAILED", "CRASHED"))

        # Where the other worker was not up yet, the build has said that it waits, and the run is taken later.
        _until(lambda: [run["state_type"] for run in runs()[doomed]] == ["CRASHED", "COMPLETED"])

        found = runs()
        assert found["build digits.yaml"][0]["state_type"] == "COMPLETED", found["build digits.yaml"][0]["state"]
        tasks = server.ask("task_runs/filter", {"task_runs": {"name": {"any_": ["export"]}}})
        assert sorted(run["state"]["name"] for run in tasks).count("Completed") == 1
        engines = EngineCatalog(open_store("s3://fleet/store")).engines("digits")
        assert {engine.target.rpartition("-")[2] for engine in engines} == {"cpu", "sm89", "sm120"}


def _until(holds: Callable[[], bool], seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.5)


def _kill(process: psutil.Popen) -> None:
    """End a process and all that it started, as a host that loses power would."""
    with suppress(psutil.NoSuchProcess):
        for running in [process, *process.children(recursive=True)]:
            with suppress(psutil.NoSuchProcess):
                running.kill()
    process.wait()


@contextmanager
def _running(command: list[str], env: dict[str, str], log: Path, **more: Any) -> Iterator[psutil.Popen]:
    with log.open("wb") as stream:
        process = psutil.Popen(command, env=env, stdout=stream, stderr=stream, cwd=log.parent, **more)
    try:
        yield process
    finally:
        _kill(process)


@contextmanager
def _server(folder: Path, database: str) -> Iterator[Server]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    env = {**environment(), **QUIET, "PREFECT_HOME": str(folder / "prefect")}
    with _running(command, env | {"PREFECT_API_DATABASE_CONNECTION_URL": database}, folder / "server.log"):

        def up() -> bool:
            with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/api/health", timeout=5) as answer:
                return answer.status == 200
            return False

        _until(up, 120)
        yield Server(f"http://127.0.0.1:{port}/api", folder / "prefect")


@contextmanager
def _postgres() -> Iterator[str]:
    """Run PostgreSQL on an ephemeral port, as the user postgres where this is root, whom it refuses."""
    user = {"user": "postgres"} if os.geteuid() == 0 else {}
    folder = Path(tempfile.mkdtemp(prefix="enginery-postgres-"))
    try:
        if user:
            shutil.chown(folder, "postgres")
        data = folder / "data"
        words = ["initdb", "-D", str(data), "-U", "prefect", "--auth=trust", "--no-sync"]
        subprocess.run(words, check=True, capture_output=True, cwd=folder, **user)
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]
        program = Path(str(shutil.which("initdb"))).resolve().with_name("postgres")
        command = [str(program), "-D", str(data), "-p", str(port), "-k", str(folder), "-h", "127.0.0.1"]
        with _running(command, dict(os.environ), folder / "log", **user):
            _until((folder / f".s.PGSQL.{port}").exists, 60)
            time.sleep(1)
            yield f"postgresql+asyncpg://prefect@127.0.0.1:{port}/postgres"
    finally:
        shutil.rmtree(folder, ignore_errors=True)
