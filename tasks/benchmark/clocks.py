"""What state the device is in: clocks, power and why it may be slowed down, read through NVML around a measurement."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from typing import Any, Final

# nvml.h, nvmlClocksEventReason* (before driver 535: nvmlClocksThrottleReason*).
_REASONS: Final = {
    0x1: "gpu idle",
    0x2: "application clocks",
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x10: "sync boost",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "hardware power brake",
    0x100: "display clocks",
}


class Gauge:
    """Reads one GPU, or the host alone where `uuid` is None or NVML cannot be asked."""

    def __init__(self, uuid: str | None = None) -> None:
        self._nvml: Any = None
        self._device: Any = None
        if uuid is not None:
            self._nvml, self._device = _open(uuid)

    def read(self) -> dict[str, Any]:
        """Return load_1min of the host, and of the GPU sm_mhz, memory_mhz, power_state, slowed_by, temperature_c, power_w.

        What the driver does not tell is None; without a GPU there are no such keys.
        """
        state: dict[str, Any] = {"load_1min": round(os.getloadavg()[0], 2)}
        nvml, device = self._nvml, self._device
        if nvml is None:
            return state
        return state | {
            "sm_mhz": _asked(nvml, lambda: int(nvml.nvmlDeviceGetClockInfo(device, nvml.NVML_CLOCK_SM))),
            "memory_mhz": _asked(nvml, lambda: int(nvml.nvmlDeviceGetClockInfo(device, nvml.NVML_CLOCK_MEM))),
            "power_state": _asked(nvml, lambda: f"P{nvml.nvmlDeviceGetPerformanceState(device)}"),
            "slowed_by": _asked(nvml, lambda: reasons(nvml.nvmlDeviceGetCurrentClocksThrottleReasons(device))),
            "temperature_c": _asked(
                nvml, lambda: int(nvml.nvmlDeviceGetTemperature(device, nvml.NVML_TEMPERATURE_GPU))
            ),
            "power_w": _asked(nvml, lambda: round(nvml.nvmlDeviceGetPowerUsage(device) / 1000, 1)),
        }

    def used_bytes(self) -> int | None:
        """Return how much memory of the GPU is in use by everyone, or None where it is not told."""
        nvml = self._nvml
        return None if nvml is None else _asked(nvml, lambda: int(nvml.nvmlDeviceGetMemoryInfo(self._device).used))


def reasons(mask: int) -> list[str]:
    """Return NVML's reasons for lowered clocks by name; a bit that is not known here by its value."""
    bits = [1 << position for position in range(mask.bit_length()) if mask >> position & 1]
    return [_REASONS.get(bit, f"reason {bit:#x}") for bit in bits]


def _open(uuid: str) -> tuple[Any, Any]:
    try:
        nvml: Any = importlib.import_module("pynvml")
    except ImportError:
        return None, None
    try:
        nvml.nvmlInit()
        return nvml, nvml.nvmlDeviceGetHandleByUUID(uuid)
    except nvml.NVMLError:
        return None, None


def _asked(nvml: Any, ask: Callable[[], Any]) -> Any:
    try:
        return ask()
    except nvml.NVMLError:
        return None
