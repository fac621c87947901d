"""Builds side by side on one GPU, as a user starts them: one compile for one key, and never two on one device."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from artifacts.cache import ActionCache
from artifacts.folder import FolderStore
from artifacts.keys import Action
from tasks.gpus import LOCKS
from tests.gpu.recipes import write_recipe
from tests.integration.building import environment

pytestmark = pytest.mark.gpu

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 400


def start(recipe, store):
    command = [sys.executable, "-m", "enginery", "build", str(recipe), "--store", str(store), "--json"]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def ended(builder):
    """Return what a build reports, as states by step id."""
    out, err = builder.communicate(timeout=SECONDS)
    assert builder.returncode == 0, err
    return {step["id"]: step["state"] for step in json.loads(out)["steps"]}


@pytest.mark.timeout(SECONDS)
def test_of_two_builds_of_one_recipe_at_once_one_compiles(device, tmp_path):
    recipe, store = write_recipe(tmp_path, device["compute_capability"]), tmp_path / "store"
    one, other = (ended(builder) for builder in [start(recipe, store) for _ in range(2)])
    (compiled,) = [step for step in one if step.startswith("compile:")]
    assert sorted((one[compiled], other[compiled])) == ["built", "cached"]
    records = [info.path for info in FolderStore(store).list("cache/actions/compile/")]
    assert len(records) == 1
    record = ActionCache(FolderStore(store)).lookup("compile", Path(records[0]).stem)
    assert Action(**record.preimage).key == Path(records[0]).stem
    assert record.facts["device"]["uuid"] == device["uuid"]


@pytest.mark.timeout(SECONDS)
def test_builds_of_two_recipes_never_compute_on_one_gpu_at_once(device, tmp_path):
    """NVML sees at most one of our processes on the device, however long both builds want it."""
    nvml = pytest.importorskip("pynvml", reason="nvidia-ml-py is not installed")
    from tasks.toolchain import probe_host

    (gpu,) = [gpu for gpu in probe_host().gpus if gpu.uuid == device["uuid"]]
    nvml.nvmlInit()
    try:
        handle = nvml.nvmlDeviceGetHandleByUUID(gpu.uuid)
        before = len(nvml.nvmlDeviceGetComputeRunningProcesses(handle))
        builders = [
            start(write_recipe(tmp_path, device["compute_capability"], name, seed=seed), tmp_path / f"store-{name}")
            for seed, name in enumerate(("left", "right"))
        ]
        most = 0
        while any(builder.poll() is None for builder in builders):
            most = max(most, len(nvml.nvmlDeviceGetComputeRunningProcesses(handle)) - before)
            time.sleep(0.02)
    finally:
        nvml.nvmlShutdown()
    for builder in builders:
        assert "built" in ended(builder).values()
    if most == 0:
        pytest.skip("NVML shows no processes here (a container of its own PID namespace)")
    # The process of this test has no context: `device` asks for properties only.
    assert most == 1
    assert (LOCKS / f"enginery-{gpu.uuid}.lock").exists()
