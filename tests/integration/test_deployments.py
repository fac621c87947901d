"""`prefect deploy --all` on a real server: the pools that `enginery pool` makes, the forms, and a worker that takes a run."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.integration.building import ROOT, copy_digits, enginery, environment, one_engine
from tests.integration.test_prefect import QUIET, Server, server

pytestmark = pytest.mark.slow

__all__ = ["server"]
IMAGE = "image=registry.example.com/enginery@sha256:" + "0123456789abcdef" * 4
GPU = "gpu-sm90-trt10.16"


def test_pools_and_deployments_are_made_and_a_worker_runs_what_is_asked(server: Server, tmp_path: Path):
    copy_digits(tmp_path / "models", one_engine)
    shutil.copyfile(ROOT / "prefect.yaml", tmp_path / "models" / "prefect.yaml")
    for words in (["init", "-q"], ["add", "-A"], ["-c", "user.name=t", "-c", "user.email=t@t", "commit", "-qm", "one"]):
        subprocess.run(["git", *words], cwd=tmp_path / "models", check=True)
    env = {**environment(), **QUIET, **server.env, "ENGINERY_REPOSITORY": str(tmp_path / "models")}
    env |= {"ENGINERY_STORE": str(tmp_path / "store"), "PREFECT_WORKER_QUERY_SECONDS": "1"}

    def pool(*words: str) -> None:
        done = enginery("pool", *words, "--create", cwd=tmp_path, env=env)
        assert done.returncode == 0, done.stderr

    pool("portable")
    _patch(server, "work_pools/portable", {"concurrency_limit": 3})
    pool("portable", "--set", "stream_output=false")  # again: its template is renewed, and nothing else
    pool(GPU, "--type", "kubernetes", "--set", IMAGE, "--set", "gpu_product=NVIDIA-H100-80GB-HBM3")
    pools = {one["name"]: one for one in server.ask("work_pools/filter", {})}
    assert pools["portable"]["concurrency_limit"] == 3
    assert pools["portable"]["base_job_template"]["variables"]["properties"]["stream_output"]["default"] is False
    assert (pools[GPU]["type"], pools["portable"]["type"]) == ("kubernetes", "process")
    refused = enginery("pool", GPU, "--create", cwd=tmp_path, env=env)
    assert (refused.returncode, "of type kubernetes" in refused.stderr) == (2, True)

    command = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all"]
    done = subprocess.run(command, cwd=tmp_path / "models", env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    deployments = {one["entrypoint"]: one for one in server.ask("deployments/filter", {})}
    required = {name: one["parameter_openapi_schema"].get("required", []) for name, one in deployments.items()}
    assert required == {
        "flows.build:build": ["recipe"],
        "flows.folder:build_folder": [],
        "flows.compile:compile": ["recipe", "target"],
        "flows.watch:watch": [],
        "flows.upkeep:verify": [],
        "flows.upkeep:promote": ["engine"],
        "flows.upkeep:collect_garbage": [],
        "flows.rebuild:rebuild_on_pools": ["rollout", "host"],
    }
    for entry, one in deployments.items():
        assert one["description"], entry
        for name, schema in one["parameter_openapi_schema"]["properties"].items():
            assert schema["description"], (entry, name)
            assert schema["title"] != name, (entry, name)
            assert ("default" in schema) == (name not in required[entry]), (entry, name)
    forms = {name: one["parameter_openapi_schema"]["properties"] for name, one in deployments.items()}
    assert "tensorrt:sm90" in forms["flows.compile:compile"]["target"]["enum"]
    assert forms["flows.build:build"]["recipe"]["examples"] == ["recipes/digits.yaml"]
    (asked_for, _nothing) = forms["flows.build:build"]["targets"]["anyOf"]
    assert {"tensorrt", "tensorrt:sm90", "onnxruntime:cpu"} <= set(asked_for["items"]["enum"])
    assert (forms["flows.build:build"]["jobs"]["minimum"], forms["flows.build:build"]["jobs"]["default"]) == (1, 2)
    assert deployments["flows.build:build"]["parameters"] == {"spread": True}
    assert forms["flows.folder:build_folder"]["queue"]["default"] == "nightly"
    assert forms["flows.upkeep:promote"]["channel"]["examples"] == ["staging", "production"]

    with pytest.raises(urllib.error.HTTPError) as refusal:  # by the schema, before anything runs
        _run(server, deployments["flows.compile:compile"], {"recipe": "digits.yaml", "target": "tensorrt:sm9"})
    assert "tensorrt:sm90" in refusal.value.read().decode()
    with pytest.raises(urllib.error.HTTPError) as refusal:
        _run(server, deployments["flows.upkeep:collect_garbage"], {"grace": "soon"})
    assert "soon" in refusal.value.read().decode()
    # Prefect's server holds job variables against the template's schema.
    with pytest.raises(urllib.error.HTTPError) as refusal:
        _run(server, _on_kubernetes(server, deployments["flows.compile:compile"]), {}, {"image": "enginery:latest"})
    assert "enginery:latest" in refusal.value.read().decode()

    asked = _run(server, deployments["flows.watch:watch"], {"recipes": ["digits.yaml"]})
    with (tmp_path / "log").open("wb") as log:
        command = [sys.executable, "-m", "prefect", "worker", "start", "--pool", "portable", "--name", "one"]
        worker = psutil.Popen(command, env=env, stdout=log, stderr=log, cwd=tmp_path)
    try:
        deadline = time.monotonic() + 120
        while not (run := _read(server, f"flow_runs/{asked['id']}"))["end_time"]:
            assert time.monotonic() < deadline, (tmp_path / "log").read_text()
            time.sleep(0.5)
    finally:
        for process in (*worker.children(recursive=True), worker):
            process.kill()
        worker.wait()
    assert run["state"]["type"] == "COMPLETED", run["state"]
    assert list((tmp_path / "store" / "hosts").glob("*.json"))


def _on_kubernetes(server: Server, deployment: dict[str, Any]) -> dict[str, Any]:
    document = {"name": GPU, "flow_id": deployment["flow_id"], "work_pool_name": GPU}
    return server.ask("deployments/", document)  # type: ignore[return-value]


def _run(
    server: Server, deployment: dict[str, Any], parameters: dict[str, Any], job: dict[str, Any] | None = None
) -> Any:
    question = {"parameters": parameters, "job_variables": job or {}, "state": {"type": "SCHEDULED"}}
    return server.ask(f"deployments/{deployment['id']}/create_flow_run", question)


def _read(server: Server, path: str) -> dict[str, Any]:
    with urllib.request.urlopen(f"{server.api}/{path}") as answer:
        return json.load(answer)


def _patch(server: Server, path: str, document: dict[str, Any]) -> None:
    request = urllib.request.Request(
        f"{server.api}/{path}", json.dumps(document).encode(), {"Content-Type": "application/json"}, method="PATCH"
    )
    urllib.request.urlopen(request).close()
