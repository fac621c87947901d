"""The units of docs/systemd: what systemd thinks of them, and a real systemd that keeps a worker through kills and an outage."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.integration.building import ROOT, copy_digits, environment, one_engine
from tests.integration.fleet import git, kill, until
from tests.integration.test_prefect import QUIET, Server

UNITS = ROOT / "docs" / "systemd"
SYSTEMD = Path("/usr/lib/systemd/systemd")
# A manager of its own, in a mount namespace where the system counts as booted with systemd.
MANAGER = "mount -t tmpfs tmpfs /run && mkdir /run/systemd /run/systemd/system && exec /usr/lib/systemd/systemd --user"
VARIABLES = ("PATH", "HOME", "PYTHONPATH", "LD_LIBRARY_PATH", "SSL_CERT_FILE", "TMPDIR")


def test_systemd_takes_the_units_as_they_stand(tmp_path: Path):
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd is not installed (apt-get install systemd)")
    for unit in UNITS.iterdir():
        text = unit.read_text()
        assert re.search(r"^ExecStart=/opt/enginery/bin/(prefect|enginery) ", text, re.MULTILINE)
        for setting in ("Restart=always", "StartLimitIntervalSec=0", "User=enginery"):
            assert f"\n{setting}\n" in text, unit.name
        # Programs and users have to be there for systemd: those of this machine.
        shutil.copyfile(unit, tmp_path / unit.name)
        (tmp_path / unit.name).write_text(re.sub("/opt/enginery/bin/(prefect|enginery)", "/bin/true", text))

    def verify() -> str:
        names = ["enginery-worker@gpu-sm90-trt10.16.service", "enginery-watch.service", "prefect-server.service"]
        command = ["systemd-analyze", "verify", "--man=no", *(str(tmp_path / name) for name in names)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
        return done.stdout + done.stderr if done.returncode or done.stderr else ""

    assert verify() == ""
    broken = tmp_path / "enginery-watch.service"
    broken.write_text(broken.read_text().replace("Restart=always", "Restart=often"))
    assert "restart specifier" in verify()


class Systemd:
    """A manager of units with those of docs/systemd, on a host where Enginery lies in this checkout's environment."""

    def __init__(self, folder: Path, ends: ExitStack, **env: str) -> None:
        self.run = folder / "run"
        (folder / "units").mkdir()
        self.run.mkdir(mode=0o700)
        environ = {name: os.environ[name] for name in VARIABLES if name in os.environ} | env
        (folder / "worker.env").write_text("".join(f'{name}="{value}"\n' for name, value in environ.items()))
        for unit in UNITS.iterdir():
            text = unit.read_text().replace("/opt/enginery/bin/prefect", f"{sys.executable} -m prefect")
            text = text.replace("/etc/enginery/", f"{folder}/").replace("User=enginery\n", "")
            (folder / "units" / unit.name).write_text(text.replace("RestartSec=15", "RestartSec=2"))
        self.env = {**os.environ, "XDG_RUNTIME_DIR": str(self.run), "SYSTEMD_UNIT_PATH": f"{folder / 'units'}:"}
        with (folder / "systemd.log").open("wb") as log:
            command = ["unshare", "--mount", "--propagation", "private", "sh", "-c", MANAGER]
            self.process = psutil.Popen(command, env=self.env, stdout=log, stderr=log, cwd=folder)
        ends.callback(self._end)
        until((self.run / "systemd" / "private").exists, 60, (folder / "systemd.log").read_text)

    def control(self, *words: str) -> str:
        """Ask the manager, as `systemctl` does."""
        command = ["nsenter", "--target", str(self.process.pid), "--mount", "systemctl", "--user", *words]
        done = subprocess.run(command, env=self.env, capture_output=True, text=True, check=False, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def main(self, unit: str) -> int:
        """Return the process of a unit; 0 while there is none."""
        return int(self.control("show", unit, "--property=MainPID", "--value"))

    def _end(self) -> None:
        with suppress(Exception):
            self.control("stop", "enginery-worker@portable")
        kill(self.process)


@pytest.fixture
def ends() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_a_worker_comes_back_after_a_kill_and_after_an_outage_that_ended_it(tmp_path: Path, ends: ExitStack):
    """The server is away until the worker has ended by itself, which it does sooner here, as each question is asked once."""
    if not SYSTEMD.exists() or os.geteuid() != 0 or shutil.which("unshare") is None:
        pytest.skip("systemd is not installed (apt-get install systemd), or this is not root")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    server = Server(f"http://127.0.0.1:{port}/api", tmp_path / "prefect")
    env = {**environment(), **QUIET, **server.env, "ENGINERY_REPOSITORY": str(tmp_path / "models")}

    def start() -> psutil.Popen:
        command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
        with (tmp_path / "server.log").open("ab") as log:
            process = psutil.Popen(command, env={**env, "PREFECT_API_URL": ""}, stdout=log, stderr=log, cwd=tmp_path)
        ends.callback(kill, process)
        until(lambda: server.ask("work_pools/filter", {}) is not None, 300, (tmp_path / "server.log").read_text)
        return process

    def prefect(*words: str) -> None:
        command = [sys.executable, "-m", "prefect", "--no-prompt", *words]
        subprocess.run(command, cwd=tmp_path / "models", env=env, check=True, capture_output=True, timeout=300)

    def built(count: int) -> list[dict[str, Any]]:
        where = {"flows": {"name": {"any_": ["build"]}}, "flow_runs": {"state": {"type": {"any_": ["COMPLETED"]}}}}
        found = server.ask("flow_runs/filter", where)
        return found if len(found) == count else []

    running = start()
    copy_digits(tmp_path / "models", one_engine)
    shutil.copyfile(ROOT / "prefect.yaml", tmp_path / "models" / "prefect.yaml")
    git(tmp_path / "models", "init", "-q")
    git(tmp_path / "models", "add", "-A")
    git(tmp_path / "models", "commit", "-qm", "one")
    prefect("work-pool", "create", "portable", "--type", "process")
    prefect("deploy", "--all")
    told = {**QUIET, **server.env, "PREFECT_CLIENT_MAX_RETRIES": "0", "PREFECT_WORKER_QUERY_SECONDS": "2"}
    host = Systemd(tmp_path, ends, **told, ENGINERY_STORE=str(tmp_path / "store"), PYTHONPATH=str(ROOT))
    unit = "enginery-worker@portable"
    host.control("start", unit)
    said = (tmp_path / "systemd.log").read_text

    def takes_a_run(count: int) -> None:
        prefect("deployment", "run", "build/recipe", "--param", "recipe=digits.yaml")
        until(lambda: built(count), 300, said)

    takes_a_run(1)
    first = host.main(unit)
    os.kill(first, 9)
    second = until(lambda: host.main(unit) not in (0, first) and host.main(unit), 60, said)
    takes_a_run(2)
    kill(running)
    until(lambda: host.main(unit) not in (0, second), 400, said)  # it has ended by itself, and is there again
    start()
    takes_a_run(3)
    host.control("stop", unit)
    assert host.main(unit) == 0
