"""A fleet in processes: a Prefect server on PostgreSQL, an S3 store, workers that are started and killed."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, TypeVar

import psutil
import pytest

from tasks.toolchain import version
from tests.integration.building import ROOT, copy_digits, environment
from tests.integration.test_prefect import QUIET, Server
from tests.servers import Faults, bad_network, s3_environment, s3_server

T = TypeVar("T")
BUCKET = "fleet"


@dataclass
class Fleet:
    """A server, a store, a Git repository of recipes, and what runs there."""

    folder: Path
    env: dict[str, str]
    database: str
    port: int
    ends: ExitStack
    faults: Faults  # of the network between the fleet and its store
    processes: dict[str, psutil.Popen] = field(default_factory=dict)

    @property
    def models(self) -> Path:
        """The Git repository of recipes."""
        return self.folder / "models"

    @property
    def store(self) -> str:
        """The address of the store."""
        return self.env["ENGINERY_STORE"]

    @property
    def server(self) -> Server:
        """What can be asked of the Prefect server."""
        return Server(self.env["PREFECT_API_URL"], self.folder / "prefect")

    def start_server(self) -> None:
        """Start the Prefect server, on the port and the database that it had."""
        command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(self.port)]
        server = {**self.env, "PREFECT_API_URL": "", "PREFECT_API_DATABASE_CONNECTION_URL": self.database}
        self.run("server", command, server)
        until(lambda: _answers(f"{self.env['PREFECT_API_URL']}/health"), 600)

    def run(self, name: str, command: Sequence[str], env: dict[str, str] | None = None) -> psutil.Popen:
        """Start a process that is ended, with all that it started, when the fleet is."""
        log = (self.folder / f"{name}.log").open("ab")
        process = psutil.Popen(list(command), env=env or self.env, stdout=log, stderr=log, cwd=self.folder)
        log.close()
        self.processes[name] = process
        self.ends.callback(kill, process)
        return process

    def worker(self, pool: str, name: str, *words: str, **env: str) -> psutil.Popen:
        """Start a worker of a pool, on a host of its own name."""
        command = [sys.executable, "-m", "prefect", "worker", "start", "--pool", pool, "--name", name]
        command += ["--type", "process", *words]  # which makes the pool where there is none
        return self.run(name, command, {**self.env, "ENGINERY_HOST": name, **env})

    def prefect(self, *words: str) -> str:
        """Run a command of Prefect's, as a person would in the repository."""
        command = [sys.executable, "-m", "prefect", "--no-prompt", *words]
        done = subprocess.run(command, cwd=self.models, env=self.env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def commit(self, **change: Any) -> None:
        """Change the recipe's top-level entries, as an edit that is merged."""
        copy_digits(self.models, lambda document: (two_pools(document), document.update(change)))
        git(self.models, "add", "-A")
        git(self.models, "commit", "-qm", "a change")

    def runs(self, name: str) -> list[dict[str, Any]]:
        """Return the flow runs of a name, in the order in which they were asked for."""
        where = {"flow_runs": {"name": {"any_": [name]}}, "sort": "EXPECTED_START_TIME_ASC"}
        return self.server.ask("flow_runs/filter", where)

    def said(self, name: str) -> str:
        """Return what a process has said."""
        return (self.folder / f"{name}.log").read_text(errors="replace")


def two_pools(document: dict[str, Any]) -> None:
    document["targets"] = [
        {"runtime": "tensorrt-rtx", "gpus": ["sm89", "sm120"]},
        {"runtime": "onnxruntime", "gpus": ["cpu"]},
    ]
    document["precision"] = {"build": ["fp32"]}


def git(folder: Path, *words: str) -> None:
    """Run git in a folder."""
    subprocess.run(["git", "-c", "user.name=t", "-c", "user.email=t@t", *words], cwd=folder, check=True)


def until(ask: Callable[[], T], seconds: float = 400, why: Callable[[], str] = lambda: "it did not come to pass") -> T:
    """Wait until something is true, and return it; a server that is too busy to say is asked again."""
    deadline = time.monotonic() + seconds
    while True:
        with suppress(urllib.error.URLError, TimeoutError, ConnectionError):
            if found := ask():
                return found
        assert time.monotonic() < deadline, why()
        time.sleep(0.2)


def kill(process: psutil.Popen) -> None:
    """End a process and all that it started, as a host that loses power would."""
    with suppress(psutil.NoSuchProcess):
        for running in [process, *process.children(recursive=True)]:
            with suppress(psutil.NoSuchProcess):
                running.kill()
    process.wait()


def stages(process: psutil.Popen) -> list[psutil.Process]:
    """Return the processes of stages that run below another."""
    found = []
    with suppress(psutil.NoSuchProcess):
        for child in process.children(recursive=True):
            with suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
                if "tasks.child" in child.cmdline():
                    found.append(child)
    return found


@contextmanager
def started_fleet(folder: Path) -> Iterator[Fleet]:
    """Start the server and the store, and make the repository; workers and deployments are the caller's."""
    with ExitStack() as ends:
        endpoint = ends.enter_context(s3_server())
        between, faults = ends.enter_context(bad_network(endpoint))
        aws = s3_environment(endpoint)
        patch = ends.enter_context(pytest.MonkeyPatch.context())
        for name, value in aws.items():
            patch.setenv(name, value)
        import boto3

        boto3.session.Session().client("s3").create_bucket(Bucket=BUCKET)
        database = ends.enter_context(postgres())
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]
        env = {**environment(), **QUIET, **s3_environment(between), "ENGINERY_STORE": f"s3://{BUCKET}/store"}
        env |= {"PREFECT_API_URL": f"http://127.0.0.1:{port}/api", "PREFECT_HOME": str(folder / "prefect")}
        env |= {"ENGINERY_REPOSITORY": str(folder / "models")}
        env |= {"PREFECT_WORKER_QUERY_SECONDS": "2", "PREFECT_WORKER_HEARTBEAT_SECONDS": "5"}
        env |= {"ENGINERY_CLAIM_SECONDS": "10"}
        fleet = Fleet(folder, env, database, port, ends, faults)
        fleet.models.mkdir()
        shutil.copyfile(ROOT / "prefect.yaml", fleet.models / "prefect.yaml")
        git(fleet.models, "init", "-q")
        fleet.commit()
        fleet.start_server()
        yield fleet


def rebuild_began(server: Server) -> float:
    """Return when the first rebuild began, by its own state on the server; 0 while there is none."""
    runs = server.ask("flow_runs/filter", {"flows": {"name": {"any_": ["rebuild"]}}, "limit": 5})
    starts = [run["start_time"] for run in runs if run["start_time"]]
    return min((datetime.fromisoformat(start.replace("Z", "+00:00")).timestamp() for start in starts), default=0.0)


def most_seconds() -> float:
    """Return in how many seconds after a change the first rebuild has to begin: 60, and longer where others use the processors."""
    return 60.0 * max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))


def write_figures(what: str, began: float) -> None:
    """Add a measured time to the file that ENGINERY_FLEET_FIGURES names, if it does."""
    if file := os.environ.get("ENGINERY_FLEET_FIGURES"):
        path = Path(file)
        figures = json.loads(path.read_text()) if path.exists() else []
        figures.append(
            {
                "what": f"seconds {what}",
                "first_rebuild_began": round(began, 1),
                "load_average_1min_for_each_cpu": round(os.getloadavg()[0] / (os.cpu_count() or 1), 1),
                "cpus": os.cpu_count(),
                "command": f"ENGINERY_FLEET_FIGURES=FILE python -m pytest -m long {os.environ['PYTEST_CURRENT_TEST'].partition('::')[0]}",
                "versions": {name: version(name) for name in ("enginery", "prefect", "tensorrt_rtx")},
                "date": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
            }
        )
        path.write_text(json.dumps(figures, indent=1) + "\n")


def _answers(address: str) -> bool:
    with suppress(OSError, urllib.error.URLError), urllib.request.urlopen(address, timeout=5) as answer:
        return answer.status == 200
    return False


def postgres_programs() -> Path:
    """Return the folder of PostgreSQL's server programs; as root, they are installed where they are missing. Else a skip."""

    def there() -> Path | None:
        found = shutil.which("initdb")
        installed = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
        return Path(found).resolve().parent if found else installed[-1].parent if installed else None

    if (programs := there()) is not None:
        return programs
    if os.geteuid() == 0 and shutil.which("apt-get") is not None:
        for words in (["update", "-qq"], ["install", "-y", "-qq", "postgresql"]):
            quiet = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
            subprocess.run(["apt-get", *words], check=False, env=quiet, capture_output=True)
        if (programs := there()) is not None:
            return programs
    pytest.skip("PostgreSQL's server is not installed, and cannot be without root (apt-get install postgresql)")


@contextmanager
def postgres() -> Iterator[str]:
    """Run PostgreSQL on an ephemeral port, as the user postgres where this is root, whom it refuses."""
    programs = postgres_programs()
    user: dict[str, Any] = {"user": "postgres"} if os.geteuid() == 0 else {}
    folder = Path(tempfile.mkdtemp(prefix="enginery-postgres-"))
    try:
        if user:
            shutil.chown(folder, "postgres")
        data = folder / "data"
        words = [str(programs / "initdb"), "-D", str(data), "-U", "prefect", "--auth=trust", "--no-sync"]
        subprocess.run(words, check=True, capture_output=True, cwd=folder, **user)
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]
        command = [str(programs / "postgres"), "-D", str(data), "-p", str(port), "-k", str(folder), "-h", "127.0.0.1"]
        with (folder / "log").open("wb") as log:
            process = psutil.Popen(command, stdout=log, stderr=log, cwd=folder, **user)
        try:
            ready = [str(programs / "pg_isready"), "-h", "127.0.0.1", "-p", str(port)]
            until(lambda: subprocess.run(ready, check=False, capture_output=True).returncode == 0, 120)
            where = ["-h", "127.0.0.1", "-p", str(port), "-U", "prefect"]
            subprocess.run([str(programs / "createdb"), *where, "prefect"], check=True, capture_output=True)
            yield f"postgresql+asyncpg://prefect@127.0.0.1:{port}/prefect"
        finally:
            kill(process)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
