"""The GPUs of this host: NVML lists them (MIG slices too), CUDA tells what an engine depends on.

CUDA is asked in a process of its own (`cuda_probe`), and once for each boot and driver: what it told is kept in the user's
cache folder, since starting CUDA takes longer than planning a build. What may change without a reboot is asked of NVML each
time: which devices there are, the driver, and whether memory is checked (ECC).
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Final, TypeVar

from artifacts.host import Gpu

VISIBLE: Final = "CUDA_VISIBLE_DEVICES"
_PROBE: Final = Path(__file__).with_name("cuda_probe.py")
_PROBE_SECONDS: Final = 60.0
_BUSY_PERCENT: Final = 5
_ORDER: Final = "CUDA_DEVICE_ORDER"
_BOOT_FILE: Final = Path("/proc/sys/kernel/random/boot_id")
_DRIVER_FILE: Final = Path("/proc/driver/nvidia/version")
_DRIVER: Final = re.compile(r"Kernel Module.*?\s([0-9]+(?:\.[0-9]+)+)\s")

T = TypeVar("T")


@dataclass(frozen=True)
class _Asked:
    """What CUDA said: its version, and the devices that it showed."""

    cuda: str
    devices: tuple[Gpu, ...]


def probe_gpus() -> tuple[str | None, str | None, tuple[Gpu, ...]]:
    """Return the driver's version, that of CUDA, and the GPUs that may be used here.

    CUDA_VISIBLE_DEVICES limits them, where it is set; then they come in CUDA's order, else in that of the bus. Where NVML
    is missing, CUDA alone lists them, and of MIG slices shows one.
    """
    driver, listed = _ask_nvml()
    driver = driver if driver is not None else _driver_version()
    memory = _Memory(driver)
    if listed is None or VISIBLE in os.environ:
        asked = memory.ask({})
        if asked is None:
            return driver, None, listed or ()
        checked = {gpu.uuid: gpu.ecc for gpu in listed or ()}
        return driver, asked.cuda, tuple(replace(gpu, ecc=checked.get(gpu.uuid, gpu.ecc)) for gpu in asked.devices)
    cuda: str | None = None
    told: dict[str, Gpu] = {}
    for group in _groups(listed):
        asked = memory.ask({VISIBLE: ",".join(gpu.uuid for gpu in group if not gpu.mig) or group[0].uuid})
        if asked is not None:
            cuda = asked.cuda
            told |= {gpu.uuid: gpu for gpu in asked.devices}
            if group[0].mig and asked.devices:
                told |= {gpu.uuid: asked.devices[0] for gpu in group}
    return driver, cuda, tuple(_merged(gpu, told.get(gpu.uuid)) for gpu in listed)


def _groups(listed: Iterable[Gpu]) -> list[list[Gpu]]:
    """Return what CUDA is asked about at once: all whole GPUs, and one for all MIG slices of one kind.

    A process sees either whole GPUs or one MIG slice (MIG user guide, "CUDA Device Enumeration"); slices of one profile of
    one model have the same name and the same properties.
    """
    groups: dict[tuple[str, str] | None, list[Gpu]] = {}
    for gpu in listed:
        groups.setdefault((gpu.name, gpu.compute_capability) if gpu.mig else None, []).append(gpu)
    return list(groups.values())


def _merged(gpu: Gpu, told: Gpu | None) -> Gpu:
    """Return a GPU with what CUDA told of it, which is what TensorRT compares; identity and ECC are NVML's."""
    if told is None:
        return gpu
    own = {name: value for name, value in asdict(told).items() if value is not None}
    ecc = gpu.ecc if gpu.ecc is not None else told.ecc
    return replace(gpu, **{**own, "name": gpu.name, "uuid": gpu.uuid, "mig": gpu.mig, "ecc": ecc})


class _Memory:
    """What CUDA told since the host was started with this driver, by the environment that it was asked in."""

    def __init__(self, driver: str | None) -> None:
        self._era = f"{_read(_BOOT_FILE).strip()} {driver}"
        home = os.environ.get("XDG_CACHE_HOME") or str(Path("~/.cache").expanduser())
        self._file = Path(home) / "enginery" / "devices.json"

    def ask(self, environment: Mapping[str, str]) -> _Asked | None:
        """Return what CUDA says under these variables besides this process's own, or None where it does not start."""
        seen = {name: environment.get(name, os.environ.get(name)) for name in (VISIBLE, _ORDER)}
        key = json.dumps(seen, sort_keys=True)
        known = self._known()
        found = _asked(known.get(key))
        if found is None:
            told = _ask_cuda(environment)
            found = _asked(told)
            if found is not None and found.devices:
                self._keep({**known, key: told})
        return found

    def _known(self) -> dict[str, Any]:
        try:
            document = json.loads(self._file.read_bytes())
            known = document["asked"] if document["era"] == self._era else {}
        except (OSError, ValueError, KeyError, TypeError):
            return {}
        return known if isinstance(known, dict) else {}

    def _keep(self, asked: Mapping[str, Any]) -> None:
        """Write what is known, whole or not at all; where there is no such folder, CUDA is asked again next time."""
        with contextlib.suppress(OSError):
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=self._file.parent, delete=False) as stream:
                temporary = Path(stream.name)
                json.dump({"era": self._era, "asked": asked}, stream)
            temporary.replace(self._file)


def _asked(told: Any) -> _Asked | None:
    """Read what the probe printed; None where it is nothing of the kind."""
    names = {known.name for known in fields(Gpu)}
    try:
        devices = [
            Gpu(
                **{name: value for name, value in device.items() if name in names},
                mig=device["uuid"].startswith("MIG-"),
            )
            for device in told["devices"]
        ]
        return _Asked(str(told["cuda"]), tuple(devices))
    except (KeyError, TypeError, AttributeError):
        return None


def _ask_cuda(environment: Mapping[str, str]) -> Any:
    """Ask CUDA in a process of its own: a driver that hangs or crashes must not take a plan with it."""
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-S", str(_PROBE)],
            env={**os.environ, **environment},
            capture_output=True,
            check=True,
            timeout=_PROBE_SECONDS,
        )
        return json.loads(done.stdout)
    except (OSError, subprocess.SubprocessError, ValueError):
        return None


def _ask_nvml() -> tuple[str | None, tuple[Gpu, ...] | None]:
    """Return the driver's version and the devices that NVML lists; None where NVML cannot be asked."""
    try:
        nvml: Any = importlib.import_module("pynvml")
        nvml.nvmlInit()
    except ImportError:
        return None, None
    except nvml.NVMLError:
        return None, None
    try:
        gpus = [gpu for index in range(nvml.nvmlDeviceGetCount()) for gpu in _devices_at(nvml, index)]
        return _text(nvml.nvmlSystemGetDriverVersion()), tuple(gpus)
    except nvml.NVMLError:
        return None, None
    finally:
        nvml.nvmlShutdown()


def _devices_at(nvml: Any, index: int) -> Sequence[Gpu]:
    """Return one GPU, or the slices that it is divided into: then it is not to be used as a whole."""
    try:
        device = nvml.nvmlDeviceGetHandleByIndex(index)
        major, minor = nvml.nvmlDeviceGetCudaComputeCapability(device)
        whole = _gpu(nvml, device, f"sm{major}{minor}")
    except nvml.NVMLError:
        # Fallen off the bus, or not ours to see: nothing may be built for it or loaded on it.
        return ()
    mode = answer(nvml, lambda: nvml.nvmlDeviceGetMigMode(device)[0])
    if mode != nvml.NVML_DEVICE_MIG_ENABLE:
        return (whole,)
    slices = []
    for position in range(answer(nvml, lambda: int(nvml.nvmlDeviceGetMaxMigDeviceCount(device))) or 0):
        with contextlib.suppress(nvml.NVMLError):  # there are fewer slices than there may be
            part = nvml.nvmlDeviceGetMigDeviceHandleByIndex(device, position)
            slices.append(replace(_gpu(nvml, part, whole.compute_capability), ecc=whole.ecc, mig=True))
    return slices


def _gpu(nvml: Any, device: Any, compute_capability: str) -> Gpu:
    return Gpu(
        _text(nvml.nvmlDeviceGetName(device)),
        _text(nvml.nvmlDeviceGetUUID(device)),
        compute_capability,
        answer(nvml, lambda: int(nvml.nvmlDeviceGetMemoryInfo(device).total)),
        bus_width_bits=answer(nvml, lambda: int(nvml.nvmlDeviceGetMemoryBusWidth(device))),
        ecc=answer(nvml, lambda: bool(nvml.nvmlDeviceGetEccMode(device)[0])),
    )


def busy_gpus(uuids: Sequence[str]) -> frozenset[str]:
    """Return which of these GPUs (or MIG slices) somebody computes on; none where NVML cannot be asked.

    Busy is a device with a process that has a CUDA context on it, or whose kernels took more than a few percent of the last
    sample period. In a container, NVML may not show the processes of others; how busy the device is, it shows.
    """
    try:
        nvml: Any = importlib.import_module("pynvml")
        nvml.nvmlInit()
    except ImportError:
        return frozenset()
    except nvml.NVMLError:
        return frozenset()
    try:
        return frozenset(uuid for uuid in uuids if _is_busy(nvml, uuid))
    finally:
        nvml.nvmlShutdown()


def _is_busy(nvml: Any, uuid: str) -> bool:
    device = answer(nvml, lambda: nvml.nvmlDeviceGetHandleByUUID(uuid))
    if device is None:
        return False
    processes = answer(nvml, lambda: nvml.nvmlDeviceGetComputeRunningProcesses(device))
    percent = answer(nvml, lambda: int(nvml.nvmlDeviceGetUtilizationRates(device).gpu))
    return bool(processes) or (percent or 0) > _BUSY_PERCENT


def answer(nvml: Any, ask: Callable[[], T]) -> T | None:
    """Return what NVML says, or None where this GPU or driver does not tell."""
    try:
        return ask()
    except nvml.NVMLError:
        return None


def _text(value: str | bytes) -> str:
    # Older releases of nvidia-ml-py return bytes.
    return value.decode() if isinstance(value, bytes) else value


def _driver_version() -> str | None:
    """Return the driver's version as the kernel module states it, for hosts without NVML."""
    found = _DRIVER.search(_read(_DRIVER_FILE))
    return found[1] if found is not None else None


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8", errors="replace")
    except OSError:
        return ""
