"""A fleet in processes: one export for all pools, drift, killed workers and servers, cancellation, and whose build is first."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from artifacts.catalog import EngineCatalog, EngineId, host_path
from artifacts.hosts import read_host, seen_path
from artifacts.rollouts import rollouts
from artifacts.store import open_store
from tasks.toolchain import version
from tests.integration.building import RECIPES, copy_digits
from tests.integration.fleet import (
    Fleet,
    git,
    kill,
    most_seconds,
    rebuild_began,
    stages,
    started_fleet,
    two_pools,
    until,
    write_figures,
)

pytestmark = [pytest.mark.long, pytest.mark.timeout(3600)]

NEW = version("tensorrt_rtx") or "0.0.0.0"
SHORT = ".".join(NEW.split(".")[:2])
OLD = f"{SHORT}.0.1"  # another version for the same pool
SM89, SM120 = f"gpu-sm89-rtx{SHORT}", f"gpu-sm120-rtx{SHORT}"
ENDED = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What tells one host that it has an older TensorRT-RTX: Python's metadata is what Enginery goes by."""
    folder = tmp_path_factory.mktemp("installed")
    metadata = folder / f"tensorrt_rtx-{OLD}.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: tensorrt-rtx\nVersion: {OLD}\n")
    return folder


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory, installed: Path) -> Iterator[Fleet]:
    """Three workers in processes of their own, deployed to; the host of sm89 has the older runtime."""
    pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed (pip install 'enginery[rtx]')")
    with started_fleet(tmp_path_factory.mktemp("fleet")) as fleet:
        fleet.worker("portable", "portable")
        fleet.worker(SM89, "sm89", **older(fleet, installed))
        fleet.worker(SM120, "sm120")
        until(lambda: {pool["name"] for pool in fleet.server.ask("work_pools/filter", {})} >= {"portable", SM89, SM120})
        fleet.prefect("deploy", "--all")
        yield fleet


def older(fleet: Fleet, installed: Path) -> dict[str, str]:
    """Return what makes a process see the metadata of the older runtime, as long as that is there."""
    return {"PYTHONPATH": os.pathsep.join([str(installed), fleet.env["PYTHONPATH"]])}


def ask(fleet: Fleet, deployment: str = "build/recipe", **parameters: Any) -> str:
    """Ask for a run, and return its id."""
    with urllib.request.urlopen(f"{fleet.server.api}/deployments/name/{deployment}") as answer:
        there = json.load(answer)["id"]
    question = {"parameters": parameters or {"recipe": "digits.yaml"}, "state": {"type": "SCHEDULED"}}
    return fleet.server.ask(f"deployments/{there}/create_flow_run", question)["id"]


def ask_at_the_prompt(fleet: Fleet) -> str:
    """Ask for a build as a person does, and return the id of its run."""
    said = fleet.prefect("deployment", "run", "build/recipe", "--param", "recipe=digits.yaml")
    return re.search(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", said)[0]


def run_of(fleet: Fleet, run: str) -> dict[str, Any]:
    """Return a run as the server knows it now."""
    (found,) = fleet.server.ask("flow_runs/filter", {"flow_runs": {"id": {"any_": [run]}}})
    return found


def ended(fleet: Fleet, run: str) -> dict[str, Any]:
    """Wait for the end of a run, and return it."""

    def found() -> dict[str, Any] | None:
        there = run_of(fleet, run)
        return there if there["state_type"] in ENDED else None

    return until(found, 600, lambda: "\n".join(fleet.said(one)[-3000:] for one in fleet.processes if one != "server"))


def cancel(fleet: Fleet, run: str) -> None:
    """Cancel a run, as `prefect flow-run cancel` and the button do."""
    fleet.server.ask(f"flow_runs/{run}/set_state", {"state": {"type": "CANCELLING", "name": "Cancelling"}})


def held_stages(worker: psutil.Popen) -> list[psutil.Process]:
    """Return the processes of stages of a worker, stopped where they are: else they end while they are looked at."""
    found = stages(worker)
    for one in found:
        with suppress(psutil.NoSuchProcess):
            one.suspend()
    return found


def engines(fleet: Fleet) -> set[str]:
    """Return the targets of all engines in the store."""
    return {engine.target for engine in EngineCatalog(open_store(fleet.store)).engines("digits")}


def test_both_engines_are_built_with_one_export_and_drift_rebuilds_exactly_what_it_made_stale(
    fleet: Fleet, installed: Path
):
    run = ended(fleet, ask_at_the_prompt(fleet))
    assert run["state_name"] == "Completed", run["state"]
    tasks = fleet.server.ask("task_runs/filter", {"task_runs": {"name": {"any_": ["export"]}}})
    assert [one["state"]["name"] for one in tasks].count("Completed") == 1  # in the pools it was cached
    first = {f"tensorrt-rtx-{OLD}-sm89", f"tensorrt-rtx-{NEW}-sm120", f"onnxruntime-{version('onnxruntime')}-cpu"}
    assert engines(fleet) == first
    # What a person sees of the run that they asked for: every engine, with figures, also of those that pools have compiled.
    shown = fleet.server.artifacts(run)
    rows = [line for line in shown["engines-digits"]["data"].splitlines() if line.startswith(("| tensorrt", "| onnx"))]
    assert {row.split(" | ")[0].removeprefix("| ") for row in rows} == first
    assert all(re.search(r" \| cached \| \d+ \| \d\.\de-\d\d \| - \| `engines/digits/", row) for row in rows), rows
    assert len([key for key in shown if key.startswith("manifest-digits-")]) == 3
    asked = json.loads(shown["pools-digits"]["data"])
    assert {(one["pool"], one["state"]) for one in asked} == {(SM89, "built"), (SM120, "built")}

    store = open_store(fleet.store)
    watching = fleet.run(
        "watch",
        [sys.executable, "-m", "enginery", "watch", str(fleet.models), "--serve"],
        {**fleet.env, "ENGINERY_HOST": "sm89", **older(fleet, installed)},
    )
    try:
        until(lambda: store.info(host_path("sm89")), why=lambda: fleet.said("watch"))
        assert read_host(store, host_path("sm89"))[0].host.runtimes["tensorrt-rtx"] == OLD
        changed = time.time()
        shutil.rmtree(next(installed.glob("*.dist-info")))  # as an upgrade does
        began = until(lambda: rebuild_began(fleet.server), why=lambda: fleet.said("watch")) - changed
        (rollout,) = until(lambda: [one for one in rollouts(store) if one.state in ("done", "halted")])
        until(lambda: not read_host(store, host_path("sm89"))[0].open)
    finally:
        kill(watching)
    assert rollout.state == "done", rollout
    (rebuilt,) = rollout.members["sm89"].rebuilds
    assert (rebuilt.state, rebuilt.target) == ("passed", "tensorrt-rtx:sm89")
    assert f"{OLD} -> {NEW}" in rebuilt.why
    assert engines(fleet) - first == {f"tensorrt-rtx-{NEW}-sm89"}
    write_figures(
        "from the change of a worker's installed TensorRT-RTX, just after a look, to the start of the first rebuild on its host; "
        "a server with PostgreSQL, a store in S3, the scheduled watch at its default, three workers beside it",
        began,
    )
    assert began <= most_seconds()


def test_a_store_is_kept_in_order_from_prefect(fleet: Fleet):
    """Verify, promote and collect, as the forms ask for them; what they found is shown, also where they refuse."""

    def done(deployment: str, state: str = "COMPLETED", **parameters: Any) -> dict[str, Any]:
        run = ended(fleet, ask(fleet, deployment, **(parameters or {"store": None})))
        assert run["state_type"] == state, run["state"]
        return run

    rows = json.loads(fleet.server.artifacts(done("verify/store"))["verify"]["data"])
    assert {(row["engine"].split("/")[1], row["state"]) for row in rows} == {
        (target, "whole") for target in engines(fleet)
    }
    run = done("promote/engine", engine="-cpu/", channel="production", reason="from a form")
    assert run["name"] == "promote -cpu/ to production"
    (moved,) = json.loads(fleet.server.artifacts(run)["promote"]["data"])
    catalog = EngineCatalog(open_store(fleet.store))
    (engine,) = [one for one in catalog.engines("digits") if one.target.endswith("-cpu")]
    assert (moved["build"], moved["channel"], moved["reason"]) == (engine.build, "production", "from a form")
    assert [
        one.path for one in open_store(fleet.store).list("channels/digits/") if one.path.endswith("/production.json")
    ]
    # No build can run an engine of TensorRT-RTX here: it is refused, and the run says why.
    refused = done("promote/engine", "FAILED", engine="-sm120/", channel="production")
    assert "not executed on its device" in refused["state"]["message"]
    kept = fleet.server.artifacts(done("gc/store", dry_run=True))["gc"]["data"]
    assert str(engine) in kept
    (store,) = [one for one in fleet.server.ask("deployments/filter", {}) if one["entrypoint"].endswith(":verify")]
    assert store["parameter_openapi_schema"]["properties"]["execute"]["title"] == "Execute"


def test_a_build_outlives_a_worker_that_is_killed_in_a_compilation(fleet: Fleet):
    fleet.commit(export={"opset": 19})
    name = "compile digits.yaml tensorrt-rtx:sm120"
    before = len(fleet.runs(name))
    asked = ask(fleet)
    worker = fleet.processes["sm120"]
    until(partial(held_stages, worker))
    kill(worker)
    fleet.worker(SM120, "another")
    run = ended(fleet, asked)
    assert run["state_type"] == "COMPLETED", run["state"]
    # Where the other worker was not up yet, the build has said that it waits, and the run is taken later.
    until(lambda: [one["state_type"] for one in fleet.runs(name)[before:]] == ["CRASHED", "COMPLETED"])


def test_cancelling_ends_the_compiler_and_frees_what_it_held(fleet: Fleet):
    """First the compilation alone, then a whole build, whose compilations go with it; the next build has its way."""
    fleet.commit(export={"opset": 20})
    name = "compile digits.yaml tensorrt-rtx:sm89"
    worker = fleet.processes["sm89"]
    left = _held(fleet)  # a lease of who was killed before, until it is dead
    for alone in (True, False):
        before, asked = len(fleet.runs(name)), ask(fleet)
        compilers = until(partial(held_stages, worker))
        compilation = fleet.runs(name)[before]["id"]
        cancel(fleet, compilation if alone else asked)
        until(partial(_gone, compilers), 120, lambda: fleet.said("sm89")[-3000:])
        assert ended(fleet, compilation)["state_type"] == "CANCELLED"
        whole = ended(fleet, asked)
        assert whole["state_type"] == ("FAILED" if alone else "CANCELLED"), whole["state"]
        until(lambda: _held(fleet) <= left, 60, lambda: str(_held(fleet) - left))  # long before a claim is old
        assert not stages(worker)
    assert ended(fleet, ask(fleet))["state_name"] == "Completed"


def test_a_build_finishes_and_publishes_though_the_server_is_killed(fleet: Fleet):
    """And the watch of a host, which asks every 5 s and tries each question once here, asks until the server is back."""
    fleet.commit(precision={"build": ["fp16"]})
    watch = [sys.executable, "-m", "enginery", "watch", str(fleet.models), "--serve", "--every", "5"]
    watching = fleet.run("watch", watch, {**fleet.env, "ENGINERY_HOST": "enduring", "PREFECT_CLIENT_MAX_RETRIES": "0"})
    store, seen = open_store(fleet.store), seen_path(host_path("enduring"))
    until(lambda: store.info(seen), why=lambda: fleet.said("watch"))
    name = "compile digits.yaml tensorrt-rtx:sm89"
    before, known, asked = len(fleet.runs(name)), builds(fleet), ask(fleet)
    compilers = until(partial(held_stages, fleet.processes["sm89"]))
    kill(fleet.processes["server"])
    for one in compilers:
        one.resume()
    published = until(
        lambda: {one for one in builds(fleet) - known if one.target.endswith("-sm89")},
        why=lambda: fleet.said("sm89")[-3000:],
    )
    assert len(published) == 1
    time.sleep(25)  # long enough for whoever ends what a server does not answer, or gives up after three questions
    before_it, asked_in_vain = store.info(seen), fleet.said("watch")
    assert "does not answer" in asked_in_vain
    fleet.start_server()
    until(lambda: store.info(seen) != before_it, why=lambda: fleet.said("watch")[-3000:])
    kill(watching)
    assert ended(fleet, asked)["state_name"] == "Completed"
    assert [one["state_type"] for one in fleet.runs(name)[before:]] == ["COMPLETED"]


def test_a_person_comes_before_the_night(fleet: Fleet):
    """A worker that takes one run at a time takes what was asked for last, since that was a person."""
    kill(fleet.processes["portable"])
    fleet.commit(description="what a person has changed")
    copy_digits(fleet.folder / "another", lambda document: (two_pools(document), document.update(name="night")))
    shutil.copyfile(fleet.folder / "another" / "digits.yaml", fleet.models / "night.yaml")
    git(fleet.models, "add", "-A")
    git(fleet.models, "commit", "-qm", "a recipe that nobody has built")
    nights = [ask(fleet, "build/folder", folder=".") for _night in range(2)]
    person = ask(fleet)
    fleet.worker("portable", "one-at-a-time", "--limit", "1")
    first = ended(fleet, person)
    later = [ended(fleet, night) for night in nights]
    assert first["work_queue_name"] == "default"
    assert {night["work_queue_name"] for night in later} == {"nightly"}
    assert all(night["created"] < first["created"] for night in later)
    assert all(night["start_time"] > first["end_time"] for night in later)
    # What the night asks for waits in the night's queue as well, on the pools of the GPUs too.
    # The second night found the first one's build waiting, and asked for no other.
    (asked,) = until(lambda: fleet.runs("build night.yaml"))
    assert ended(fleet, asked["id"])["state_name"] == "Completed"
    asked_by_night = [asked, *fleet.runs("compile night.yaml tensorrt-rtx:sm89")]
    assert [run["work_queue_name"] for run in asked_by_night] == ["nightly", "nightly"]
    assert {run["work_queue_name"] for run in fleet.runs("compile digits.yaml tensorrt-rtx:sm89")} == {"default"}
    kill(fleet.processes["one-at-a-time"])
    fleet.worker("portable", "portable")


def test_what_the_store_did_not_answer_is_tried_again_and_a_recipes_own_error_is_not(fleet: Fleet):
    fleet.commit(export={"opset": 19}, precision={"build": ["fp16"]})
    fleet.faults.refused = {"PUT /fleet/store/cache/actions/compile/": (503, "SlowDown")}
    asked = ask(fleet)
    where = {"name": {"like_": "compile:onnxruntime"}, "state": {"name": {"any_": ["AwaitingRetry"]}}}
    until(lambda: fleet.server.ask("task_runs/filter", {"task_runs": where}))
    fleet.faults.refused = {}
    done = ended(fleet, asked)
    assert done["state_name"] == "Completed", done["state"]
    assert tries(fleet, asked)["compile:onnxruntime:cpu:fp16"] > 1

    source = yaml.safe_load((RECIPES / "digits.yaml").read_text())["source"]
    fleet.commit(source={**source, "arguments": {"no_such_word": 1}})
    failed = ended(fleet, ask(fleet))
    assert failed["state_type"] == "FAILED"
    assert "export" in failed["state"]["message"]
    assert set(tries(fleet, failed["id"]).values()) == {1}
    fleet.commit()


HOLDS = """
import sys, time
from tasks.gpu_slots import GpuSlots
slots, began = GpuSlots(print), time.monotonic()
while True:
    with slots("GPU-1") as free:
        print(f"{free} {time.monotonic() - began:.1f}", flush=True)
        if free:
            time.sleep(float(sys.argv[1]))
            break
    time.sleep(2.5)
"""


def test_the_slot_of_a_gpu_outlives_its_killed_holder_by_a_minute(fleet: Fleet):
    holder = fleet.run("holder", [sys.executable, "-c", HOLDS, "1000"])
    until(lambda: "True" in fleet.said("holder"))
    waiter = fleet.run("waiter", [sys.executable, "-c", HOLDS, "0"])
    until(lambda: fleet.said("waiter").count("False") > 2)
    assert "True" not in fleet.said("waiter")
    kill(holder)
    killed = time.monotonic()
    until(lambda: "True" in fleet.said("waiter"), 200, lambda: fleet.said("waiter"))
    assert time.monotonic() - killed < 150
    waiter.wait()
    ending = fleet.run("ending", [sys.executable, "-c", HOLDS, "1000"])
    until(lambda: "True" in fleet.said("ending"))
    ending.send_signal(signal.SIGINT)  # who is ended, and not killed, gives it back at once
    ending.wait()
    last = fleet.run("last", [sys.executable, "-c", HOLDS, "0"])  # which finds what was given back
    last.wait()
    assert fleet.said("last").startswith("True")


def tries(fleet: Fleet, run: str) -> dict[str, int]:
    """Return how often each step of a run was tried."""
    tasks = fleet.server.ask("task_runs/filter", {"flow_runs": {"id": {"any_": [run]}}})
    return {one["name"]: one["run_count"] for one in tasks}


def _gone(processes: list[psutil.Process]) -> bool:
    return not any(one.is_running() and one.status() != psutil.STATUS_ZOMBIE for one in processes)


def _held(fleet: Fleet) -> set[str]:
    """Return what a build holds in the store, and who is not said to have freed it: claims and leases."""
    store = open_store(fleet.store)
    claims = [json.loads(store.read(info.path)) for info in store.list("claims/")]
    return {claim["name"] for claim in claims if claim["holder"]} | {info.path for info in store.list("leases/")}


def builds(fleet: Fleet) -> set[EngineId]:
    """Return every engine in the store."""
    return set(EngineCatalog(open_store(fleet.store)).engines("digits"))
