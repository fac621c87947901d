"""The workflow for CI: valid by GitHub's schema, without what is unsafe, and its shell steps run as they stand.

Git and enginery are real; `pip`, `gh` and `prefect` are programs that write down what they were asked for.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from artifacts.catalog import EngineCatalog
from artifacts.store import open_store
from tests.contract import graphs
from tests.integration.building import ROOT, enginery, environment
from tests.integration.fleet import kill, until
from tests.integration.test_prefect import QUIET, Server, server
from tests.simulated_builds import write_recipe

__all__ = ["server"]
WORKFLOW = ROOT / "docs" / "ci" / "enginery.yml"
SCRIPTS = Path(sysconfig.get_path("scripts"))
RECORDER = '#!/bin/sh\necho "$(basename "$0") $*" >> "$ASKED"\n'


@pytest.mark.parametrize(
    "command",
    [
        ["check-jsonschema", "--builtin-schema", "vendor.github-workflows"],
        ["zizmor", "--offline", "--no-config", "--quiet"],
    ],
    ids=lambda command: command[0],
)
def test_the_workflow_passes_its_linters(command: list[str], tmp_path: Path):
    def run(path: Path) -> subprocess.CompletedProcess[str]:
        program = SCRIPTS / command[0]
        if not program.exists():
            pytest.skip(f"{command[0]} is not installed")
        return subprocess.run([program, *command[1:], path], capture_output=True, text=True, check=False)

    done = run(WORKFLOW)
    assert done.returncode == 0, done.stdout + done.stderr
    broken = tmp_path / "broken.yml"  # each finds what it is for
    unpinned = (
        WORKFLOW.read_text().replace("runs-on:", "run-on:").replace("@11bd71901bbe5b1630ceea73d27597364c9af683", "@v4")
    )
    broken.write_text(unpinned)
    assert run(broken).returncode != 0


@pytest.fixture
def house(tmp_path: Path) -> Path:
    """A clone whose origin/main has two recipes."""
    (tmp_path / "origin" / "recipes").mkdir(parents=True)
    for name in ("one", "two"):
        write_recipe(tmp_path / "origin" / "recipes", name)
    git(tmp_path / "origin", "init", "-q", "-b", "main")
    commit(tmp_path / "origin")
    git(tmp_path, "clone", "-q", "origin", "house")
    return tmp_path / "house"


def git(folder: Path, *words: str) -> str:
    names = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    return subprocess.run(
        ["git", *names, "-C", str(folder), *words], capture_output=True, text=True, check=True
    ).stdout.strip()


def commit(folder: Path) -> None:
    git(folder, "add", "-A")
    git(folder, "commit", "-qm", "a change")


def run_job(house: Path, job: str, *, server: Server | None = None, **expressions: str) -> tuple[int, str, str]:
    """Run a job's shell steps as a runner does (`bash -e`); return the status, what else was asked, and the summary.

    With a server, `prefect` is the real one, which asks it.
    """
    document: dict[str, Any] = yaml.safe_load(WORKFLOW.read_text())
    tools = house.parent / "tools"
    tools.mkdir(exist_ok=True)
    for name in ("pip", "gh", "prefect"):
        (tools / name).write_text(RECORDER)
        (tools / name).chmod(0o755)
    real = {"enginery": f"exec {sys.executable} -m enginery", "python": f"exec {sys.executable}"}
    real |= {"prefect": f"exec {sys.executable} -m prefect"} if server is not None else {}
    for name, program in real.items():
        (tools / name).write_text(f'#!/bin/sh\n{program} "$@"\n')
        (tools / name).chmod(0o755)
    asked, summary = house.parent / "asked", house.parent / "summary"
    for path in (asked, summary):
        path.write_text("")
    base = {**environment(), "PYTHONPATH": str(ROOT), "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}"}
    base |= {"ASKED": str(asked), "GITHUB_STEP_SUMMARY": str(summary)}
    if server is not None:
        base |= {**QUIET, "PREFECT_HOME": server.env["PREFECT_HOME"]}
        expressions |= {"PREFECT_API_URL": server.api, "PREFECT_API_AUTH_STRING": ""}
    status = 0
    for step in document["jobs"][job]["steps"]:
        if "run" in step and status == 0:
            stated = {**document["env"], **step.get("env", {})}
            given = {name: expressions.get(name, value) for name, value in stated.items()}
            left = {
                name for name, value in given.items() if "${{" in value and not name.startswith(("AWS_", "PREFECT_"))
            }
            assert left <= {"GH_TOKEN"}, left
            status = subprocess.run(
                ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", step["run"]],
                cwd=house,
                env={**base, **given},
                check=False,
            ).returncode
    return status, asked.read_text(), summary.read_text()


def plan(house: Path) -> tuple[int, str, str]:
    return run_job(house, "plan", BASE="origin/main", ENGINERY_STORE=str(house.parent / "store"), NUMBER="7")


def test_a_pull_request_gets_the_table_of_what_it_touches(house: Path):
    git(house, "checkout", "-qb", "work")
    (house / "recipes" / "two.onnx").write_text("another graph")
    commit(house)
    status, asked, summary = plan(house)
    assert status == 0
    assert "1 of 2 recipes touched" in summary
    assert "| two |" in summary
    assert "recipes/two.onnx (changed)" in summary
    assert "| one |" not in summary
    assert asked.splitlines()[-1] == "gh pr comment 7 --edit-last --create-if-none --body-file plan.md"
    assert (house / "plan.md").read_text() == summary


def test_engines_that_wait_for_a_gpu_fail_no_pull_request_and_faults_do(house: Path):
    git(house, "checkout", "-qb", "work")
    recipe = house / "recipes" / "two.yaml"
    recipe.write_text(recipe.read_text() + "  - {runtime: tensorrt, gpus: [sm90], version: 10.16.1.11}\n")
    commit(house)
    status, asked, _summary = plan(house)
    assert (status, "gh pr comment" in asked) == (0, True)
    recipe.write_text(recipe.read_text() + "targest: []\n")
    commit(house)
    status, asked, _summary = plan(house)
    assert (status, "gh pr comment" in asked) == (2, False)


def test_a_merge_starts_a_build_of_each_touched_recipe(house: Path):
    before = git(house, "rev-parse", "HEAD")
    store = str(house.parent / "store")
    status, asked, _summary = run_job(house, "build", BEFORE=before, ENGINERY_STORE=store)
    assert (status, "deployment" in asked) == (0, False)
    write_recipe(house / "recipes", "three")
    (house / "recipes" / "two.onnx").unlink()
    git(house, "rm", "-q", "recipes/two.yaml")
    commit(house)
    status, asked, _summary = run_job(house, "build", BEFORE=before, ENGINERY_STORE=store)
    assert status == 0
    named = "--flow-run-name build recipes/three.yaml --param recipe=recipes/three.yaml"
    started = [f"prefect deployment run build/recipe {named} --param store={store}"]
    assert asked.splitlines()[1:] == started
    # A recipe that cannot be read fails the job, and keeps no other from being built.
    (house / "recipes" / "one.yaml").write_text("enginery: 1\nname: one\ntargest: []\n")
    commit(house)
    status, asked, _summary = run_job(house, "build", BEFORE=before, ENGINERY_STORE=store)
    assert (status, asked.splitlines()[1:]) == (2, started)


def test_each_merge_has_a_group_of_its_own():
    """Of runs that wait in one group, GitHub keeps the newest alone: what a merge before it touched would not be built."""
    group = yaml.safe_load(WORKFLOW.read_text())["concurrency"]["group"]
    assert "github.event_name == 'push' && github.sha || github.ref" in group


BASE = """
source: {framework: onnx, model: {file: model.onnx}}
inputs: {x: {shape: [batch, 3, 8, 8]}}
profiles: {online: {batch: [1, 1, 4]}}
precision: {build: [fp32]}
targets: [{runtime: onnxruntime, gpus: [cpu]}]
"""


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_a_merge_is_built_by_a_worker(server: Server, tmp_path: Path):
    """A branch is merged, the runner's checkout runs the job, and the server's runs are of what the merge touches, and no more."""
    models, store = tmp_path / "models", str(tmp_path / "store")
    (models / "recipes").mkdir(parents=True)
    write_recipe(models / "recipes", "other")
    graphs.save(graphs.classifier(), models / "recipes")
    (models / "recipes" / "base.inc").write_text(BASE)
    (models / "recipes" / "real.yaml").write_text("enginery: 1\nname: real\ninclude: base.inc\n")
    shutil.copyfile(ROOT / "prefect.yaml", models / "prefect.yaml")
    git(models, "init", "-q", "-b", "main")
    commit(models)
    env = {**environment(), **QUIET, **server.env, "ENGINERY_STORE": store, "ENGINERY_REPOSITORY": str(models)}
    env |= {"PREFECT_WORKER_QUERY_SECONDS": "2"}
    assert enginery("pool", "portable", "--create", cwd=models, env=env).returncode == 0
    deploy = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all"]
    done = subprocess.run(deploy, cwd=models, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr

    def merge(change: str, text: str) -> tuple[int, str, str]:
        """Merge a branch that adds a line to a file; run the job in a checkout, as the runner of a push to main does."""
        before = git(models, "rev-parse", "main")
        git(models, "checkout", "-qb", f"work-{before[:8]}")
        with (models / change).open("a") as file:
            file.write(text)
        commit(models)
        git(models, "checkout", "-q", "main")
        git(models, "merge", "-q", "--no-ff", "-m", "a merge", f"work-{before[:8]}")
        assert len(git(models, "rev-list", "--parents", "-n1", "HEAD").split()) == 3
        house = tmp_path / before[:8] / "house"
        house.parent.mkdir()
        git(house.parent, "clone", "-q", str(models), "house")
        return run_job(house, "build", server=server, BEFORE=before, ENGINERY_STORE=store)

    def runs() -> list[dict[str, Any]]:
        return server.ask("flow_runs/filter", {"sort": "EXPECTED_START_TIME_ASC"})

    assert merge("notes.md", "nothing that a recipe reads\n")[0] == 0
    assert runs() == []
    assert (
        merge("recipes/base.inc", "description: touched\n")[0] == 0
    )  # which real.yaml includes, and other.yaml does not
    assert [run["name"] for run in runs()] == ["build recipes/real.yaml"]  # before any worker has it
    assert [run["parameters"] for run in runs()] == [{"spread": True, "recipe": "recipes/real.yaml", "store": store}]
    worker = [sys.executable, "-m", "prefect", "worker", "start", "--pool", "portable", "--name", "one"]
    with (tmp_path / "log").open("wb") as log:
        process = psutil.Popen(worker, env=env, stdout=log, stderr=log, cwd=tmp_path)
    try:
        ended = ("COMPLETED", "FAILED", "CRASHED")
        until(lambda: runs()[0]["state_type"] in ended, 900, lambda: (tmp_path / "log").read_text()[-3000:])
    finally:
        kill(process)
    assert [(run["name"], run["state_name"]) for run in runs()] == [("build recipes/real.yaml", "Completed")]
    assert {engine.recipe for engine in EngineCatalog(open_store(store)).engines()} == {"real"}
