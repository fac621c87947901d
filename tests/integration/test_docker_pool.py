"""The Docker pool's template with a real worker and real containers: a build in a container, and what a container is given.

Docker is what DOCKER_HOST or /var/run/docker.sock leads to; else Podman's service, which speaks the same API, is started here. The
image is an empty one: the programs of this machine are mounted into it.
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import psutil
import pytest

from artifacts.catalog import EngineCatalog
from artifacts.folder import FolderStore
from tests.integration.building import ROOT, copy_digits, enginery, environment, one_engine
from tests.integration.fleet import git, kill, until
from tests.integration.test_prefect import QUIET, Server, server

pytestmark = [pytest.mark.long, pytest.mark.timeout(1200)]

__all__ = ["server"]
IMAGE = "localhost/enginery-test:1"
# Podman runs where a container may have no more than its parent, and beside both versions of cgroups.
PODMAN = """
[containers]
default_ulimits = ["nofile=4096:4096", "nproc=4096:4096"]
[engine]
runtime = "runc"
cgroup_manager = "cgroupfs"
"""


@pytest.fixture
def docker_host(tmp_path: Path) -> Iterator[str]:
    """The address of a Docker API, with the image there."""
    docker = pytest.importorskip("docker", reason="no client of Docker (pip install 'enginery[docker]')")
    with ExitStack() as ends:
        address = os.environ.get("DOCKER_HOST")
        if address is None and Path("/var/run/docker.sock").exists():
            address = "unix:///var/run/docker.sock"
        if address is None:
            address = _podman(tmp_path, ends)
        client = ends.enter_context(closing(docker.DockerClient(base_url=address)))
        until(client.ping, 60)
        empty = io.BytesIO()
        tarfile.open(fileobj=empty, mode="w").close()
        name, tag = IMAGE.split(":")
        made = client.api.import_image_from_data(empty.getvalue(), repository=name, tag=tag)
        client.images.get(json.loads(made.splitlines()[0])["status"]).tag(
            name, tag
        )  # which Podman 4 does not do before
        ends.callback(client.images.remove, IMAGE, force=True)
        yield address


def _podman(folder: Path, ends: ExitStack) -> str:
    if shutil.which("podman") is None or os.geteuid() != 0:
        pytest.skip("neither Docker nor, as root, Podman (apt-get install podman runc catatonit)")
    (folder / "containers.conf").write_text(PODMAN)
    state = Path(ends.enter_context(tempfile.TemporaryDirectory(prefix="enginery-podman-", ignore_cleanup_errors=True)))
    env = {**os.environ, "CONTAINERS_CONF": str(folder / "containers.conf"), "STORAGE_DRIVER": "vfs"}
    command = [
        "podman",
        "--root",
        str(state / "root"),
        "--runroot",
        str(state / "run"),
        "system",
        "service",
        "--time",
        "0",
    ]
    log = ends.enter_context((folder / "podman.log").open("wb"))
    service = psutil.Popen([*command, f"unix://{state}/socket"], env=env, stdout=log, stderr=log)
    ends.callback(kill, service)
    until((state / "socket").exists, 60)
    return f"unix://{state}/socket"


def mounts() -> list[str]:
    """Return the folders of this machine that hold its programs, Python's packages and this checkout."""
    inside = [sys.prefix, sys.base_prefix, str(ROOT), *(path for path in sys.path if path)]
    tops = {f"/{Path(path).resolve().parts[1]}" for path in inside} | {"/usr", "/lib", "/lib64", "/bin", "/etc", "/tmp"}
    return [f"{top}:{top}" for top in sorted(tops) if Path(top).exists()]


def test_a_build_runs_in_a_container_of_the_docker_pool(server: Server, docker_host: str, tmp_path: Path):
    pytest.importorskip("prefect_docker", reason="no Docker worker (pip install 'enginery[docker]')")
    models, store = tmp_path / "models", FolderStore(tmp_path / "store")
    copy_digits(models, one_engine)
    shutil.copyfile(ROOT / "prefect.yaml", models / "prefect.yaml")
    git(models, "init", "-q")
    git(models, "add", "-A")
    git(models, "commit", "-qm", "one")
    env = {**environment(), **QUIET, **server.env, "ENGINERY_REPOSITORY": str(models), "DOCKER_HOST": docker_host}
    env |= {"PREFECT_WORKER_QUERY_SECONDS": "2"}
    inside = {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", "PYTHONPATH": str(ROOT), "HOME": "/tmp"}
    inside |= {"GIT_CONFIG_COUNT": "1", "GIT_CONFIG_KEY_0": "safe.directory", "GIT_CONFIG_VALUE_0": "*"}
    settings = {"image": IMAGE, "volumes": mounts(), "env": inside, "network_mode": "host", "store": store.uri}
    words = [
        word
        for name, value in settings.items()
        for word in ("--set", f"{name}={value if isinstance(value, str) else json.dumps(value)}")
    ]
    done = enginery("pool", "portable", "--type", "docker", *words, "--create", cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    for command in (["deploy", "--all"], ["deployment", "run", "build/recipe", "--param", "recipe=digits.yaml"]):
        subprocess.run([sys.executable, "-m", "prefect", "--no-prompt", *command], cwd=models, env=env, check=True)
    log = tmp_path / "worker.log"
    with log.open("wb") as out:
        command = [sys.executable, "-m", "prefect", "worker", "start", "--pool", "portable", "--type", "docker"]
        worker = psutil.Popen(command, env=env, stdout=out, stderr=out, cwd=tmp_path)
    try:

        def ended() -> dict[str, Any] | None:
            runs = server.ask("flow_runs/filter", {"flows": {"name": {"any_": ["build"]}}})
            return next((run for run in runs if run["state_type"] in ("COMPLETED", "FAILED", "CRASHED")), None)

        run = until(ended, 400, log.read_text)
    finally:
        kill(worker)
    assert run["state_type"] == "COMPLETED", (run["state"], log.read_text()[-6000:])
    (engine,) = EngineCatalog(store).engines("digits")
    assert engine.target.startswith("onnxruntime-")
    assert re.search("docker://.*:[0-9a-f]{64}$", run["infrastructure_pid"])  # a container's
