"""What CUDA says of the devices that this process may use, as one JSON object on stdout: `python -I -S cuda_probe.py`.

A program of its own: initialising CUDA takes up to seconds on a host with many GPUs, is bound to the environment
(CUDA_VISIBLE_DEVICES; of MIG slices a process sees one), and must not reach a process that only plans. It needs nothing but
the driver's library, and creates no context. Where there is no driver, or it does not start, it prints null.
"""

import ctypes
import json
import sys

LIBRARY = "libcuda.so.1"
# CU_DEVICE_ATTRIBUTE_* of cuda.h, whose numbers are part of the driver's interface, by the names that a fingerprint has.
ATTRIBUTES = {
    "major": 75,
    "minor": 76,
    "sm_count": 16,
    "bus_width_bits": 37,
    "l2_bytes": 38,
    "shared_memory_per_block": 8,
    "shared_memory_per_block_optin": 97,
    "shared_memory_per_sm": 81,
    "texture_alignment": 14,
    "integrated": 18,
    "ecc": 32,
}
_FLAGS = ("integrated", "ecc")
_NO_DEVICE = 100  # CUDA_ERROR_NO_DEVICE: a driver that works, and no device that this process may use


class Cuda:
    """The driver's library, initialised. Raises OSError where there is none or it does not start."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL(LIBRARY)
        self._started = self._library.cuInit(0)
        if self._started not in (0, _NO_DEVICE):
            raise OSError(f"cuInit: {self._started}")

    def _call(self, name: str, *arguments: object) -> None:
        status = getattr(self._library, name)(*arguments)
        if status:
            raise OSError(f"{name}: {status}")

    def version(self) -> str:
        """Return the version of CUDA that the driver supports, such as "13.0"."""
        version = ctypes.c_int()
        self._call("cuDriverGetVersion", ctypes.byref(version))
        return f"{version.value // 1000}.{version.value % 1000 // 10}"

    def count(self) -> int:
        """Return how many devices this process may use."""
        if self._started == _NO_DEVICE:
            return 0
        count = ctypes.c_int()
        self._call("cuDeviceGetCount", ctypes.byref(count))
        return count.value

    def describe(self, index: int) -> dict[str, object]:
        """Return the properties of one device."""
        device = ctypes.c_int()
        self._call("cuDeviceGet", ctypes.byref(device), index)
        found: dict[str, object] = {}
        for name, number in ATTRIBUTES.items():
            value = ctypes.c_int()
            self._call("cuDeviceGetAttribute", ctypes.byref(value), number, device)
            found[name] = bool(value.value) if name in _FLAGS else value.value
        name_bytes, memory = ctypes.create_string_buffer(256), ctypes.c_size_t()
        self._call("cuDeviceGetName", name_bytes, len(name_bytes), device)
        self._call("cuDeviceTotalMem_v2", ctypes.byref(memory), device)
        found["name"], found["memory_bytes"] = name_bytes.value.decode(), memory.value
        found["uuid"] = self._uuid(device)
        found["compute_capability"] = f"sm{found.pop('major')}{found.pop('minor')}"
        return found

    def _uuid(self, device: ctypes.c_int) -> str:
        """Return the device's UUID as NVML spells it; of a MIG slice its own, which only the newer function tells."""
        parent = (ctypes.c_ubyte * 16)()
        self._call("cuDeviceGetUuid", parent, device)
        own = (ctypes.c_ubyte * 16)(*parent)
        if hasattr(self._library, "cuDeviceGetUuid_v2"):  # CUDA 11.4 and later
            self._call("cuDeviceGetUuid_v2", own, device)
        digits = bytes(own).hex()
        kind = "GPU" if bytes(own) == bytes(parent) else "MIG"
        return f"{kind}-{digits[:8]}-{digits[8:12]}-{digits[12:16]}-{digits[16:20]}-{digits[20:]}"


def main() -> None:
    """Print {"cuda": version, "devices": [properties]}, or null."""
    found = None
    try:
        cuda = Cuda()
        found = {"cuda": cuda.version(), "devices": [cuda.describe(index) for index in range(cuda.count())]}
    except (OSError, AttributeError) as err:
        sys.stderr.write(f"{err}\n")
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main()
