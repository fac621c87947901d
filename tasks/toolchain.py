"""What is installed here, and what this host is: versions and devices, found without importing what they describe."""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import os
import platform
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Final

from artifacts.host import Gpu, Host

# The runtimes that have a backend in tasks.engines, and the package whose version is theirs.
BACKENDS: Final = {"tensorrt-rtx": "tensorrt_rtx", "tensorrt": "tensorrt", "onnxruntime": "onnxruntime"}

# What runs source models, and the packages whose version is its: of CPUs and of GPUs.
FRAMEWORKS: Final = {"torch": ("torch",), "paddle": ("paddlepaddle", "paddlepaddle-gpu")}

HOST_NAME: Final = "ENGINERY_HOST"
_ARCHITECTURES: Final = {"amd64": "x86_64", "arm64": "aarch64"}
# Where the driver lets itself be spoken to: on a host with GPUs, on Jetson, and in WSL 2.
_DEVICE_NODES: Final = (Path("/dev/nvidiactl"), Path("/dev/nvmap"), Path("/dev/dxg"))


@cache
def version(package: str) -> str | None:
    """Return the full version of an installed package by its import or distribution name, else None.

    Where several distributions provide one import name (a namespace package), all are named with their versions.
    """
    found = _distribution_version(package)
    # What is not installed is told apart by looking for it, since reading every distribution's file list takes 0.5 s.
    if found is not None or not _is_importable(package):
        return found
    provided = {name: _distribution_version(name) for name in sorted(set(_distributions().get(package, ())))}
    versions = {name: found for name, found in provided.items() if found is not None}
    if len(versions) == 1:
        return next(iter(versions.values()))
    return ", ".join(f"{name}=={found}" for name, found in versions.items()) or None


def probe_host() -> Host:
    """Return this machine's fingerprint; its GPUs are those that CUDA_VISIBLE_DEVICES leaves, where that is set.

    ENGINERY_HOST names it where the system's own name does not last, as in a container.
    """
    driver, cuda, gpus = _probe_gpus()
    machine = platform.machine().lower()
    installed = {runtime: version(package) for runtime, package in BACKENDS.items()}
    return Host(
        name=os.environ.get(HOST_NAME) or platform.node(),
        os=platform.system().lower(),
        arch=_ARCHITECTURES.get(machine, machine),
        driver=driver,
        cuda=cuda,
        gpus=gpus,
        runtimes={runtime: found for runtime, found in installed.items() if found is not None},
        cpu=cpu_name(),
        frameworks={
            name: found
            for name, packages in FRAMEWORKS.items()
            if (found := next(filter(None, map(version, packages)), None))
        },
    )


def cpu_name() -> str:
    """Return the processor's model, and how many of its threads this process may use."""
    told: dict[str, str] = {}
    with contextlib.suppress(OSError), Path("/proc/cpuinfo").open(encoding="utf-8", errors="replace") as lines:
        for line in itertools.islice(lines, 64):  # one processor's; the others are as it is
            name, _, value = line.partition(":")
            told.setdefault(name.strip(), value.strip())
    # Arm's kernels tell no model name, but these two parts of one.
    parts = " ".join(told[name] for name in ("CPU implementer", "CPU part") if name in told)
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{told.get('model name') or parts or platform.machine()}, {threads} threads"


def _distribution_version(name: str) -> str | None:
    try:
        distribution = metadata.distribution(name)
    except (metadata.PackageNotFoundError, ValueError):
        return None
    # Read here: importlib.metadata parses a whole README as an e-mail for this line, a millisecond for each package.
    headers = distribution.read_text("METADATA") or distribution.read_text("PKG-INFO") or ""
    for line in headers.partition("\n\n")[0].splitlines():
        field, _colon, value = line.partition(":")
        if field.lower() == "version":
            return value.strip() or None
    return None  # an interrupted uninstall leaves a distribution whose metadata has no version


def _is_importable(name: str) -> bool:
    if "." in name:
        # Finding a submodule would import its package.
        return False
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False


@cache
def _distributions() -> dict[str, list[str]]:
    # Reads the file list of every installed distribution, so it is asked only for names that are no distribution's.
    return dict(metadata.packages_distributions())


def _probe_gpus() -> tuple[str | None, str | None, tuple[Gpu, ...]]:
    if not any(node.exists() for node in _DEVICE_NODES):
        return None, None, ()
    # Imported only where there is a driver: planning on a host without one pays nothing for it.
    from tasks.devices import probe_gpus

    return probe_gpus()
