"""Names of Prefect work pools by what their hosts can do: pure rules, so that who builds and who works agree unasked.

`portable` runs every stage that needs no particular GPU, and engines for ONNX Runtime. `gpu-sm90-trt10.16` compiles and
executes TensorRT 10.16 engines for sm90, `gpu-sm89-rtx1.7` TensorRT-RTX engines for sm89 (which are compiled without a GPU too).
A pool's hosts share major and minor version; a recipe that pins a whole version waits for a host that has it.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Final

from artifacts.host import Host
from recipes.options import version_numbers
from recipes.schema import GPUS

PORTABLE: Final = "portable"
NIGHTLY: Final = "nightly"  # the work queue of what nobody waits for
_SHORT: Final[Mapping[str, str]] = {"tensorrt": "trt", "tensorrt-rtx": "rtx"}
_GPU_POOL: Final = re.compile(r"gpu-sm\d{2,3}-(trt|rtx)\d+\.\d+")


def pool_name(runtime: str, version: str, gpu: str) -> str:
    """Return the pool that compiles for a GPU (`sm89`) with a runtime of a full version such as `10.16.1.11`.

    Raises ValueError where the version has no major and minor number.
    """
    if runtime not in _SHORT:
        return PORTABLE
    numbers = version_numbers(version)
    if len(numbers) < 2:
        raise ValueError(f"{runtime} {version!r}: not a full version, such as 10.16.1.11")
    return f"{_stem(runtime, gpu)}{numbers[0]}.{numbers[1]}"


def pools_of(host: Host) -> tuple[str, ...]:
    """Return the pools that a host can work for, `portable` first.

    TensorRT compiles for the GPUs that are there, TensorRT-RTX for any that it knows.
    """
    found = [PORTABLE]
    for runtime, version in sorted(host.runtimes.items()):
        if runtime == "tensorrt":
            gpus = sorted({gpu.compute_capability for gpu in host.gpus})
        else:
            gpus = [gpu for gpu in GPUS[runtime] if gpu != "cpu"] if runtime in _SHORT else []
        found += [pool_name(runtime, version, gpu) for gpu in gpus]
    return tuple(found)


def choose_pool(runtime: str, version: str, gpu: str, there: Collection[str], live: Collection[str]) -> str | None:
    """Return the pool for a target among those that are `there`, of which `live` have a worker; None where none fits.

    Where a recipe names no version (""), the newest pool with a live worker, else the newest.
    """
    if runtime not in _SHORT:
        return PORTABLE
    if version:
        name = pool_name(runtime, version, gpu)
        return name if name in there else None
    stem = _stem(runtime, gpu)
    fitting = sorted((name for name in there if name.startswith(stem)), key=lambda name: _order(name, stem))
    alive = [name for name in fitting if name in live]
    best = alive or fitting
    return best[-1] if best else None


def has_pool(runtime: str) -> bool:
    """Tell whether targets of a runtime have pools of their own, and are not the portable pool's."""
    return runtime in _SHORT


def host_queue(host: str) -> str:
    """Return the work queue of each pool in which runs wait that only this host is to take."""
    return f"host-{re.sub(r'[^A-Za-z0-9._-]', '-', host)}"


def is_pool_name(name: str) -> bool:
    """Tell whether builds ask a pool of this name for anything."""
    return name == PORTABLE or _GPU_POOL.fullmatch(name) is not None


def portable_host(host: Host) -> Host:
    """Return a host as the portable pool sees it: what has a pool of its own is not compiled there."""
    runtimes = {name: version for name, version in host.runtimes.items() if name not in _SHORT}
    return replace(host, runtimes=runtimes, gpus=())


def _stem(runtime: str, gpu: str) -> str:
    return f"gpu-{gpu}-{_SHORT[runtime]}"


def _order(name: str, stem: str) -> tuple[int, ...]:
    return tuple(int(part) for part in name.removeprefix(stem).split(".") if part.isdecimal())
