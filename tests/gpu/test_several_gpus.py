"""Several GPUs on one host: each build takes one that nobody holds, and on a worker the slot of the same GPU."""

import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest

from artifacts.cache import ActionCache
from artifacts.folder import FolderStore
from tasks.gpus import held
from tests.gpu.recipes import write_recipe
from tests.gpu.test_two_builds import ROOT, SECONDS, ended, start
from tests.integration.building import environment

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(SECONDS)]

QUIET = {"PREFECT_SERVER_ANALYTICS_ENABLED": "false", "DO_NOT_TRACK": "1", "PREFECT_SERVER_UI_ENABLED": "false"}
# A flow as a worker runs it: what takes slots.
FLOW = "import asyncio, sys; from flows.build import build; asyncio.run(build(sys.argv[1], store=sys.argv[2]))"

OCCUPIED = """
from tasks.engines.cuda import Cuda
cuda = Cuda()
here = cuda.allocate(8 << 30)
print("there", flush=True)
while True:
    cuda.copy(here, here + (4 << 30), 4 << 30)
    cuda.synchronize()
"""


@pytest.fixture(scope="module")
def gpus(device):
    """UUIDs of the GPUs of this host that are of one kind; several, or the test is skipped."""
    from tasks.toolchain import probe_host

    found = [gpu.uuid for gpu in probe_host().gpus if gpu.compute_capability == device["compute_capability"]]
    if len(found) < 2:
        pytest.skip(f"one GPU alone is here ({device['name']})")
    return found


def compiled_on(store):
    """Return the UUID of the GPU on which the only engine of a store was compiled."""
    folder = FolderStore(store)
    (path,) = [info.path for info in folder.list("cache/actions/compile/")]
    return ActionCache(folder).lookup("compile", Path(path).stem).facts["device"]["uuid"]


def test_builds_at_once_take_a_gpu_each(gpus, device, tmp_path):
    with ExitStack() as all_but_two:
        for uuid in gpus[2:]:
            all_but_two.enter_context(held([uuid], busy=lambda _uuids: (), waits=lambda: None, give_up=lambda: False))
        builders = {
            name: start(write_recipe(tmp_path, device["compute_capability"], name, seed=seed), tmp_path / name)
            for seed, name in enumerate(("left", "right"))
        }
        for builder in builders.values():
            assert "built" in ended(builder).values()
    used = [compiled_on(tmp_path / name) for name in builders]
    sys.stdout.write(f"{used} of {gpus}\n")
    assert sorted(used) == sorted(gpus[:2])


def test_a_gpu_that_is_held_is_left_alone(gpus, device, tmp_path):
    with held([gpus[0]], busy=lambda _uuids: (), waits=lambda: None, give_up=lambda: False):
        ended(start(write_recipe(tmp_path, device["compute_capability"]), tmp_path / "store"))
    assert compiled_on(tmp_path / "store") in gpus[1:]


def test_a_gpu_on_which_another_computes_is_left_alone(gpus, device, tmp_path):
    """The other knows nothing of our locks: it is seen by NVML, as a process or by how busy the GPU is."""
    from tasks.devices import busy_gpus

    env = {**environment(), "CUDA_VISIBLE_DEVICES": gpus[0]}
    with subprocess.Popen([sys.executable, "-c", OCCUPIED], cwd=ROOT, env=env, stdout=subprocess.PIPE) as other:
        try:
            assert other.stdout.readline() == b"there\n"
            time.sleep(2)  # the driver's sample period is a second at most (nvmlDeviceGetUtilizationRates)
            seen = busy_gpus(gpus)
            if gpus[0] not in seen:
                pytest.skip("NVML shows neither the processes nor the load of others here")
            ended(start(write_recipe(tmp_path, device["compute_capability"]), tmp_path / "store"))
        finally:
            other.kill()
    assert compiled_on(tmp_path / "store") in gpus[1:]


@pytest.fixture(scope="module")
def api(tmp_path_factory):
    """A Prefect server's address."""
    home = tmp_path_factory.mktemp("prefect")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    env = {**environment(), **QUIET, "PREFECT_HOME": str(home)}
    with (home / "log").open("wb") as log:
        process = psutil.Popen(command, env=env, stdout=log, stderr=log, cwd=home)
    try:
        address, deadline = f"http://127.0.0.1:{port}/api", time.monotonic() + 120
        while True:
            try:
                with urllib.request.urlopen(f"{address}/health", timeout=5):
                    break
            except (urllib.error.URLError, ConnectionError):
                assert process.is_running(), (home / "log").read_text()
                assert time.monotonic() < deadline, (home / "log").read_text()
                time.sleep(0.3)
        yield address
    finally:
        for running in [*process.children(recursive=True), process]:
            running.kill()
        process.wait()


def ask(address, question=None):
    data = None if question is None else json.dumps(question).encode()
    request = urllib.request.Request(address, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)


def test_a_flow_takes_the_slot_of_the_gpu_and_gives_it_back(api, device, tmp_path):
    recipe = write_recipe(tmp_path, device["compute_capability"])
    env = {**environment(), **QUIET, "PREFECT_API_URL": api, "PREFECT_HOME": str(tmp_path / "home")}
    command = [sys.executable, "-c", FLOW, str(recipe), str(tmp_path / "store")]
    taken = set()
    log = (tmp_path / "log").open("wb")
    with log, subprocess.Popen(command, cwd=ROOT, env=env, stdout=log, stderr=log) as run:
        while run.poll() is None:
            limits = ask(f"{api}/v2/concurrency_limits/filter", {})
            taken |= {limit["name"] for limit in limits if limit["active_slots"]}
            time.sleep(0.1)
    assert run.returncode == 0, (tmp_path / "log").read_text()[-5000:]
    used = f"gpu:{compiled_on(tmp_path / 'store')}"
    assert taken == {used}
    (limit,) = ask(f"{api}/v2/concurrency_limits/filter", {})
    assert (limit["name"], limit["limit"], limit["active_slots"]) == (used, 1, 0)
