"""What is installed here, and what this host is: versions and devices, found without importing what they describe."""

from __future__ import annotations

import importlib.util
import platform
from collections.abc import Callable
from functools import cache
from importlib import metadata
from typing import Any, Final, TypeVar

from artifacts.host import Gpu, Host

# The runtimes that have a backend in tasks.engines, and the package whose version is theirs.
BACKENDS: Final = {"tensorrt-rtx": "tensorrt_rtx", "tensorrt": "tensorrt", "onnxruntime": "onnxruntime"}

T = TypeVar("T")
_ARCHITECTURES: Final = {"amd64": "x86_64", "arm64": "aarch64"}


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
    """Return this machine's fingerprint; GPUs are seen through NVML, where `nvidia-ml-py` and a driver are there."""
    driver, cuda, gpus = _probe_gpus()
    machine = platform.machine().lower()
    installed = {runtime: version(package) for runtime, package in BACKENDS.items()}
    return Host(
        name=platform.node(),
        os=platform.system().lower(),
        arch=_ARCHITECTURES.get(machine, machine),
        driver=driver,
        cuda=cuda,
        gpus=gpus,
        runtimes={runtime: found for runtime, found in installed.items() if found is not None},
    )


def _distribution_version(name: str) -> str | None:
    try:
        # An interrupted uninstall leaves a distribution whose metadata has no version.
        return metadata.version(name) or None
    except (metadata.PackageNotFoundError, KeyError, ValueError):
        return None


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
    try:
        nvml: Any = importlib.import_module("pynvml")
    except ImportError:
        return None, None, ()
    try:
        nvml.nvmlInit()
    except nvml.NVMLError:
        return None, None, ()
    try:
        cuda = nvml.nvmlSystemGetCudaDriverVersion_v2()
        found = [_gpu(nvml, index) for index in range(nvml.nvmlDeviceGetCount())]
        gpus = tuple(gpu for gpu in found if gpu is not None)
        return _text(nvml.nvmlSystemGetDriverVersion()), f"{cuda // 1000}.{cuda % 1000 // 10}", gpus
    except nvml.NVMLError:
        return None, None, ()
    finally:
        nvml.nvmlShutdown()


def _gpu(nvml: Any, index: int) -> Gpu | None:
    try:
        device = nvml.nvmlDeviceGetHandleByIndex(index)
        major, minor = nvml.nvmlDeviceGetCudaComputeCapability(device)
        name, uuid = _text(nvml.nvmlDeviceGetName(device)), _text(nvml.nvmlDeviceGetUUID(device))
    except nvml.NVMLError:
        # Fallen off the bus, or not ours to see: nothing may be built for it or loaded on it.
        return None
    return Gpu(
        name,
        uuid,
        f"sm{major}{minor}",
        _asked(nvml, lambda: int(nvml.nvmlDeviceGetMemoryInfo(device).total)),
        _asked(nvml, lambda: int(nvml.nvmlDeviceGetNumGpuCores(device))),
        _asked(nvml, lambda: int(nvml.nvmlDeviceGetMemoryBusWidth(device))),
        _asked(nvml, lambda: bool(nvml.nvmlDeviceGetEccMode(device)[0])),
    )


def _asked(nvml: Any, ask: Callable[[], T]) -> T | None:
    """Return what NVML says, or None where this GPU or driver does not tell."""
    try:
        return ask()
    except nvml.NVMLError:
        return None


def _text(value: str | bytes) -> str:
    # Older releases of nvidia-ml-py return bytes.
    return value.decode() if isinstance(value, bytes) else value
