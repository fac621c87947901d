"""Builds as Prefect shows them: against a server, and with the embedded one; and that none of it leaves the machine."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
import pytest

from artifacts.store import open_store
from tasks.remembered import PlanMemory
from tasks.session import open_session
from tests.integration.building import ROOT, copy_digits, enginery, environment, one_engine
from tests.servers import bad_network

pytestmark = pytest.mark.slow

QUIET = {"PREFECT_SERVER_ANALYTICS_ENABLED": "false", "DO_NOT_TRACK": "1", "PREFECT_SERVER_UI_ENABLED": "false"}
START_SECONDS = 600.0  # of a machine that others keep busy
EVENT_SECONDS = 30.0
STRACE = ["strace", "-f", "--seccomp-bpf", "-qq", "-e", "trace=connect,sendto,sendmsg,sendmmsg"]
# Every line that a build may say on stderr in a pipe.
SAID = re.compile(r"digits: \d+ of \d+ stages to run, \d+ cached|  ((run  |built|FAIL ) \S+ |\.\.\.   \S+) .*")


@dataclass(frozen=True)
class Server:
    """A running Prefect server."""

    api: str
    home: Path

    @property
    def env(self) -> dict[str, str]:
        """What leads a build to the server."""
        return {"PREFECT_API_URL": self.api, "PREFECT_HOME": str(self.home)}

    def ask(self, path: str, question: dict[str, Any]) -> list[dict[str, Any]]:
        """Ask the REST API."""
        request = urllib.request.Request(
            f"{self.api}/{path}", json.dumps(question).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)

    def last_run(self) -> tuple[dict[str, Any], dict[str, tuple[str, str]]]:
        """Return the last flow run, and the name and message of the state of each of its task runs, by name.

        What became of a task run reaches the server as an event, which it takes in when it has time, also after the flow's end.
        """
        (flow,) = self.ask("flow_runs/filter", {"sort": "START_TIME_DESC", "limit": 1})
        deadline = time.monotonic() + EVENT_SECONDS
        while True:
            runs = self.ask("task_runs/filter", {"flow_runs": {"id": {"any_": [flow["id"]]}}})
            if all(run["state"]["type"] != "RUNNING" for run in runs) or time.monotonic() > deadline:
                break
            time.sleep(0.2)
        states = {run["name"]: (run["state"]["name"], run["state"]["message"] or "") for run in runs}
        assert len(states) == len(runs), "a step has two task runs"
        return flow, states

    def artifacts(self, flow: dict[str, Any]) -> dict[str, dict[str, Any]]:
        """Return what a flow run has left in the UI, by key."""
        found = self.ask("artifacts/filter", {"flow_runs": {"id": {"any_": [flow["id"]]}}})
        return {one["key"]: one for one in found}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A Prefect server as users start it, on an ephemeral port, with a home of its own."""
    home = tmp_path_factory.mktemp("prefect")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    with (home / "log").open("wb") as log:
        process = psutil.Popen(
            command, env={**environment(), **QUIET, "PREFECT_HOME": str(home)}, stdout=log, stderr=log, cwd=home
        )
    try:
        deadline = time.monotonic() + START_SECONDS
        while not _healthy(f"http://127.0.0.1:{port}/api/health"):
            assert process.is_running(), (home / "log").read_text()
            assert time.monotonic() < deadline, (home / "log").read_text()
            time.sleep(0.2)
        yield Server(f"http://127.0.0.1:{port}/api", home)
    finally:
        for running in [*process.children(recursive=True), process]:
            running.kill()
        process.wait()


def _healthy(address: str) -> bool:
    try:
        with urllib.request.urlopen(address, timeout=5) as answer:
            return answer.status == 200
    except (urllib.error.URLError, ConnectionError):
        return False


def timed(document: dict[str, Any]) -> None:
    """Leave one engine, whose speed is measured."""
    one_engine(document)
    document["benchmark"] = {"batches": [1], "seconds": 0.1}


def later(document: dict[str, Any]) -> None:
    """Change what `timed` leaves, as an edit that is merged later."""
    timed(document)
    document["export"]["opset"] = 20


def test_a_server_shows_every_step_with_what_became_of_it(server: Server, tmp_path: Path):
    recipe = copy_digits(tmp_path, timed)
    steps = _build(tmp_path, {**server.env, "ENGINERY_BAR_SECONDS": "0"})
    flow, shown = server.last_run()
    assert flow["name"] == f"build {recipe.name}"
    assert flow["state"]["type"] == "COMPLETED"
    assert {name: state for name, (state, _message) in shown.items()} == {
        name: {"built": "Completed", "cached": "Cached"}[state] for name, state in steps.items()
    }
    assert shown["export"][0] == "Completed"
    first = server.artifacts(flow)
    assert len([name for name in first if name.startswith("manifest-digits-onnxruntime")]) == 1
    rows = json.loads(first["stages-digits"]["data"])
    assert {f"{row['stage']}" for row in rows} == {name.partition(":")[0] for name in steps}
    assert {row["stage"]: row["why"] for row in rows}["export"] == "miss: never built"
    assert float(first["progress-export"]["data"]) == 100.0
    assert first["progress-export"]["description"].startswith("export")
    found = re.search(r"\| (\d\.\de-\d\d) \| (\d+\.\d{3}) \|", first["engines-digits"]["data"])
    assert found is not None  # nothing was built before

    copy_digits(tmp_path, later)
    steps = _build(tmp_path, server.env)
    flow, shown = server.last_run()
    second = server.artifacts(flow)
    (link,) = (text["data"] for name, text in second.items() if name.startswith("manifest-digits-onnxruntime"))
    path = re.search(r"\(file://(.*)\)", link)[1]
    assert json.loads(Path(path).read_text())["identity"]["recipe"] == "digits"
    beside = r"\| \d\.\de-\d\d \((\d\.\de-\d\d)\) \| \d+\.\d{3} \((\d+\.\d{3})\) \|"
    assert re.search(beside, second["engines-digits"]["data"]).groups() == found.groups()  # those of the build before
    assert any("opset 18 -> 20" in row["why"] for row in json.loads(second["stages-digits"]["data"]))
    said = server.ask("logs/filter", {"logs": {"flow_run_id": {"any_": [flow["id"]]}}, "limit": 200})
    assert any(line["message"].startswith("export ") and line["task_run_id"] for line in said)
    kept = {"fetch:code", "fetch:weights", "fetch:labelled", "reference:parity", "reference:labelled", "verify:fp32"}
    assert {name for name, (state, _message) in shown.items() if state == "Cached"} == kept
    assert {name for name, (state, _message) in shown.items() if state == "Completed"} == set(steps) - kept
    assert len(steps) > len(kept)

    # The flow on its own, as a worker or a script runs it; it leaves its plan for other machines.
    shutil.rmtree(tmp_path / "store" / "cache" / "plans", ignore_errors=True)
    code = "import asyncio; from flows.build import build; print(asyncio.run(build('digits.yaml', store='store')))"
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**environment(), **server.env},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "'status': 0" in result.stdout
    flow, shown = server.last_run()
    assert flow["state"]["type"] == "COMPLETED"
    assert {name: state for name, (state, _message) in shown.items()} == dict.fromkeys(steps, "Cached")
    memory = PlanMemory(open_store(str(tmp_path / "store")), folder=None)
    assert memory.recall([copy_digits(tmp_path / "checkout", later)])


def test_a_server_shows_a_failure_in_the_words_of_the_stage(server: Server, tmp_path: Path):
    bars = {**server.env, "ENGINERY_BAR_SECONDS": "0"}
    copy_digits(tmp_path, one_engine)
    model = tmp_path / "digits" / "model.py"
    broken = model.read_text().replace(
        "    return DigitsNet(", "    raise ValueError('no such width')\n    return DigitsNet("
    )
    model.write_text(broken)
    result = enginery("build", "digits.yaml", "--store", "store", cwd=tmp_path, env=server.env)
    assert result.returncode == 1
    assert "ValueError: no such width" in result.stderr
    flow, shown = server.last_run()
    assert flow["state"]["type"] == "FAILED"
    assert "export" in flow["state"]["message"]
    state, message = shown["export"]
    assert state == "Failed"
    assert "ValueError: no such width" in message
    assert shown["fetch:code"][0] == "Completed"
    assert "simplify" not in shown  # it never ran

    said = _said(server, flow)
    assert (logging.ERROR, True) in {(level, own) for level, line, own in said if "ValueError: no such width" in line}

    # A failure is no result: nothing has to be cleared. Now the compiler fails, with too little memory for its kernels.
    pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed (pip install 'enginery[rtx]')")
    copy_digits(tmp_path, without_workspace)
    result = enginery("build", "digits.yaml", "--store", "store", cwd=tmp_path, env=bars)
    assert result.returncode == 1
    flow, shown = server.last_run()
    assert shown["export"][0] == "Completed"
    assert shown["compile:tensorrt-rtx:sm89:fp32"][0] == "Failed"
    assert "raise build.workspace" in shown["compile:tensorrt-rtx:sm89:fp32"][1]
    levels = {(line.split(" ", 1)[0], level) for level, line, own in _said(server, flow) if own}
    assert {("[error]", logging.ERROR), ("[info]", logging.INFO)} <= levels
    assert {level for word, level in levels if word.endswith("Warning:")} <= {logging.WARNING}
    assert {level for word, level in levels if word == "[error]"} == {logging.ERROR}
    shown_bars = {
        name: float(one["data"]) for name, one in server.artifacts(flow).items() if name.startswith("progress")
    }
    assert shown_bars["progress-export"] == 100.0
    assert "progress-compile-tensorrt-rtx-sm89-fp32" in shown_bars  # as far as the compiler said that it was


def without_workspace(document: dict[str, Any]) -> None:
    """Leave one engine that no compiler can make."""
    document["targets"] = [{"runtime": "tensorrt-rtx", "gpus": ["sm89"]}]
    document["precision"] = {"build": ["fp32"]}
    document["build"] = {"workspace": "1MiB"}


def _said(server: Server, flow: dict[str, Any]) -> list[tuple[int, str, bool]]:
    """Return what a run has said: level, text, and whether it is of a task's own."""
    said = server.ask("logs/filter", {"logs": {"flow_run_id": {"any_": [flow["id"]]}}, "limit": 200})
    return [(line["level"], line["message"], line["task_run_id"] is not None) for line in said]


def test_a_worker_tries_again_what_the_store_fails_and_nothing_else(
    server: Server, tmp_path: Path, s3_store_uri: str, monkeypatch: pytest.MonkeyPatch
):
    """S3 answers 503 for a while and refuses one write for good; in the next build, the model's code is wrong."""
    recipe = copy_digits(tmp_path, one_engine)
    model = tmp_path / "digits" / "model.py"
    model.write_text(
        model.read_text().replace(
            "    return DigitsNet(", "    raise ValueError('no such width')\n    return DigitsNet("
        )
    )
    steps = {step.id: step for step in open_session(recipe, open_store(s3_store_uri)).plan().steps}

    def write_of(step: str) -> str:
        place = urlsplit(s3_store_uri)
        return f"PUT /{place.netloc}{place.path}/cache/actions/fetch/{steps[step].action.key}"

    endpoint = os.environ["AWS_ENDPOINT_URL_S3"]
    with bad_network(endpoint) as (address, faults):
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", address)
        faults.refused = {
            write_of("fetch:weights"): (503, "SlowDown"),
            write_of("fetch:labelled"): (403, "AccessDenied"),
        }
        code = (
            f"import asyncio; from flows.build import build; asyncio.run(build('digits.yaml', store={s3_store_uri!r}))"
        )
        env = {**environment(), **server.env, "AWS_MAX_ATTEMPTS": "1"}
        with subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, env=env, stderr=subprocess.PIPE) as process:
            while process.poll() is None and not server.ask(
                "task_runs/filter", {"task_runs": {"state": {"name": {"any_": ["AwaitingRetry"]}}}}
            ):
                time.sleep(0.2)
            faults.refused = {name: answer for name, answer in faults.refused.items() if answer[0] != 503}
            said = process.communicate()[1].decode()
    assert process.returncode == 1, said
    flow, shown = server.last_run()
    assert flow["state"]["type"] == "FAILED"
    tries = {
        run["name"]: run["run_count"]
        for run in server.ask("task_runs/filter", {"flow_runs": {"id": {"any_": [flow["id"]]}}})
    }
    assert shown["fetch:weights"][0] == "Completed"
    assert tries["fetch:weights"] > 1
    assert shown["fetch:labelled"][0] == "Failed"
    assert "access denied" in shown["fetch:labelled"][1]
    assert {name for name, count in tries.items() if count > 1} == {"fetch:weights"}

    env |= {"AWS_ENDPOINT_URL_S3": endpoint}  # past the proxy, which is gone
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, check=False, timeout=300
    )
    assert done.returncode == 1
    flow, shown = server.last_run()
    assert "ValueError: no such width" in shown["export"][1]
    runs = server.ask("task_runs/filter", {"flow_runs": {"id": {"any_": [flow["id"]]}}})
    assert {run["run_count"] for run in runs if run["name"] == "export"} == {1}


@dataclass(frozen=True)
class Embedded:
    """A build without a configured server, and what was seen of it."""

    folder: Path
    env: dict[str, str]
    report: dict[str, Any]
    stderr: str
    connections: list[str]
    trace: list[str] | None

    @property
    def home(self) -> Path:
        """Where the embedded server keeps its database."""
        return Path(self.env["PREFECT_HOME"])


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> Embedded:
    """Build with the embedded server, every Python process listened to, and every system call where strace is here."""
    top = tmp_path_factory.mktemp("embedded")
    copy_digits(top / "work", one_engine)
    (top / "hook").mkdir()
    for name in ("recipes", "tasks"):  # which hide nothing of ours
        (top / "work" / f"{name}.py").write_text("")
    (top / "hook" / "sitecustomize.py").write_text(LISTENER)
    env = {"PREFECT_HOME": str(top / "prefect")}
    heard = {"PYTHONPATH": f"{top / 'hook'}:{ROOT}", "TEST_CONNECTIONS": str(top / "connections")}
    command = [sys.executable, "-m", "enginery", "build", "digits.yaml", "--store", "store", "--json"]
    traced = _can_trace()
    result = subprocess.run(
        [*STRACE, "-o", str(top / "trace"), *command] if traced else command,
        cwd=top / "work",
        env={**environment(), **env, **heard},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return Embedded(
        top / "work",
        env,
        json.loads(result.stdout),
        result.stderr,
        (top / "connections").read_text().splitlines(),
        (top / "trace").read_text().splitlines() if traced else None,
    )


def test_the_embedded_server_records_every_step(embedded: Embedded):
    wanted = {
        step["id"]: {"built": "Completed", "cached": "Cached"}[step["state"]] for step in embedded.report["steps"]
    }
    with closing(sqlite3.connect(f"file:{embedded.home / 'prefect.db'}?mode=ro", uri=True)) as database:
        tasks = database.execute("SELECT name, state_name FROM task_run").fetchall()
        flows = database.execute("SELECT name, state_type FROM flow_run").fetchall()
    assert dict(tasks) == wanted
    assert len(tasks) == len(wanted)
    assert flows == [("build digits.yaml", "COMPLETED")]


def test_the_embedded_server_says_nothing(embedded: Embedded):
    assert [line for line in embedded.stderr.splitlines() if not SAID.fullmatch(line)] == []


def test_nothing_is_asked_of_another_machine(embedded: Embedded):
    said = set(embedded.connections)
    assert "connect 127.0.0.1" in said  # the hook heard how the build talks to its server
    assert {line for line in said if not re.match(r"(connect|resolve) (127\.0\.0\.1|localhost|::1|/)", line)} == set()


def test_no_system_call_leaves_the_machine(embedded: Embedded):
    if embedded.trace is None:
        pytest.skip("strace is not installed, or may not trace here (apt-get install strace)")
    lines = [line for line in embedded.trace if re.search(r"sin6?_port", line)]
    assert any('sin_addr=inet_addr("127.0.0.1")' in line for line in lines)
    assert [line for line in lines if '"127.0.0.1"' not in line and '"::1"' not in line] == []
    assert [line for line in lines if "htons(53)" in line] == []  # a resolver may listen on this machine too


def test_a_build_of_nothing_starts_nothing(embedded: Embedded):
    home = embedded.home.with_name("none")
    steps = _build(embedded.folder, {**embedded.env, "PREFECT_HOME": str(home)})
    assert set(steps.values()) == {"cached"}
    assert not home.exists()


def test_a_server_that_cannot_be_reached_costs_a_warning_and_not_the_build(tmp_path: Path):
    copy_digits(tmp_path, one_engine)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    env = {"PREFECT_HOME": str(tmp_path / "prefect"), "PREFECT_API_URL": f"http://127.0.0.1:{port}/api"}
    result = enginery("build", "digits.yaml", "--store", "store", "--json", cwd=tmp_path, env=env)
    assert result.returncode == 0, result.stderr
    assert "warning: Prefect did not record this build" in result.stderr
    assert {engine["state"] for engine in json.loads(result.stdout)["engines"]} == {"cached"}


def _build(folder: Path, env: dict[str, str]) -> dict[str, str]:
    """Build, and return what became of every step."""
    result = enginery("build", "digits.yaml", "--store", "store", "--json", cwd=folder, env=env)
    assert result.returncode == 0, result.stderr
    assert "warning" not in result.stderr
    return {step["id"]: step["state"] for step in json.loads(result.stdout)["steps"]}


def _can_trace() -> bool:
    """Whether strace is here and may trace; where not, the hook in every Python process still listens."""
    if shutil.which("strace") is None:
        return False
    return subprocess.run([*STRACE, "-o", "/dev/null", "true"], check=False, capture_output=True).returncode == 0


# Loaded by every Python process of a build: writes down where sockets are connected to, and which names are looked up.
LISTENER = """
import os
import sys


def listen(event, arguments):
    if event == "socket.connect":
        address = arguments[1]
        said = f"connect {address[0] if isinstance(address, tuple) else address}"
    elif event in ("socket.getaddrinfo", "socket.gethostbyname"):
        name = arguments[0]
        said = f"resolve {name.decode() if isinstance(name, bytes) else name}"
    else:
        return
    with open(os.environ["TEST_CONNECTIONS"], "a") as stream:
        stream.write(said + "\\n")


sys.addaudithook(listen)
"""
