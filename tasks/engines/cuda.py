"""The little of CUDA that engines need: devices and their properties, memory, streams and graphs, by the driver's API.

The driver's API (package `cuda-bindings`) rather than the runtime's: it needs no CUDA toolkit, and a newer binding works on
an older driver. A device's primary context is used, which is also the one that TensorRT's own CUDA runtime uses.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from functools import cache
from typing import Any, Final

import numpy as np

from tasks.errors import BackendError

Array = np.ndarray[Any, np.dtype[Any]]

# What TensorRT compares with the device that a plan was built on, besides the compute capability ("Engine compatibility",
# developer guide; facts/tensorrt.md section 3), by the name it has in a key and the driver's CU_DEVICE_ATTRIBUTE_*.
_ATTRIBUTES: Final = {
    "sm_count": "MULTIPROCESSOR_COUNT",
    "bus_width_bits": "GLOBAL_MEMORY_BUS_WIDTH",
    "l2_bytes": "L2_CACHE_SIZE",
    "shared_memory_per_block": "MAX_SHARED_MEMORY_PER_BLOCK",
    "shared_memory_per_block_optin": "MAX_SHARED_MEMORY_PER_BLOCK_OPTIN",
    "shared_memory_per_sm": "MAX_SHARED_MEMORY_PER_MULTIPROCESSOR",
    "texture_alignment": "TEXTURE_ALIGNMENT",
}
_FLAGS: Final = {"integrated": "INTEGRATED", "ecc": "ECC_ENABLED"}
_NO_DEVICE: Final = (
    "NO_DEVICE",
    "INSUFFICIENT_DRIVER",
    "SYSTEM_DRIVER_MISMATCH",
    "DEVICE_UNAVAILABLE",
    "SYSTEM_NOT_READY",
)
_ADVICE: Final = "use a host with an NVIDIA GPU and its driver; `enginery doctor` says what is missing"


def device_count() -> int:
    """Return how many GPUs this process may use. Raises BackendError("no device") where there is no driver."""
    return int(_call("cuDeviceGetCount"))


def device_properties(index: int = 0) -> dict[str, Any]:
    """Return what TensorRT compares of a device, and what names it; no context is created.

    name, uuid, compute_capability ("sm90"), memory_bytes; sm_count, bus_width_bits, l2_bytes, shared_memory_per_block,
    shared_memory_per_block_optin and shared_memory_per_sm (bytes), texture_alignment (bytes); integrated and ecc (bool).
    Raises BackendError("no device").
    """
    driver, device = _driver(), _device(index)
    attribute = driver.CUdevice_attribute

    def read(name: str) -> int:
        return int(_call("cuDeviceGetAttribute", getattr(attribute, f"CU_DEVICE_ATTRIBUTE_{name}"), device))

    major, minor = read("COMPUTE_CAPABILITY_MAJOR"), read("COMPUTE_CAPABILITY_MINOR")
    return {
        "name": _call("cuDeviceGetName", 256, device).split(b"\0")[0].decode(),
        "uuid": _uuid(device),
        "compute_capability": f"sm{major}{minor}",
        "memory_bytes": int(_call("cuDeviceTotalMem", device)),
        **{name: read(spelled) for name, spelled in _ATTRIBUTES.items()},
        **{name: bool(read(spelled)) for name, spelled in _FLAGS.items()},
    }


def _uuid(device: Any) -> str:
    """Return a device's UUID as NVML spells it. A process that sees a MIG slice sees that alone, by the name it was given."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    if visible.startswith("MIG-"):
        return visible.partition(",")[0]
    uuid = bytes(_call("cuDeviceGetUuid", device).bytes).hex()
    return f"GPU-{uuid[:8]}-{uuid[8:12]}-{uuid[12:16]}-{uuid[16:20]}-{uuid[20:]}"


def driver_version() -> str:
    """Return the CUDA version that the driver supports, such as "13.0"."""
    version = int(_call("cuDriverGetVersion"))
    return f"{version // 1000}.{version % 1000 // 10}"


def find_device(compute_capability: str) -> dict[str, Any]:
    """Return the properties of the first device of a compute capability, and its `index`.

    Raises BackendError("no device") naming the devices that are here.
    """
    found = [device_properties(index) for index in range(device_count())]
    for index, properties in enumerate(found):
        if properties["compute_capability"] == compute_capability:
            return {"index": index, **properties}
    here = ", ".join(f"{one['name']} ({one['compute_capability']})" for one in found) or "none"
    raise BackendError("no device", f"no {compute_capability} GPU is here (found: {here})", _ADVICE)


class Cuda:
    """One device in use by one thread at a time: its primary context, one stream, and memory that `close` frees."""

    def __init__(self, index: int = 0) -> None:
        """Retain the device's primary context and make it current. Raises BackendError("no device")."""
        self.index = index
        self._device = _device(index)
        self._context = _call("cuDevicePrimaryCtxRetain", self._device)
        _call("cuCtxSetCurrent", self._context)
        self._stream = _call("cuStreamCreate", 1)  # CU_STREAM_NON_BLOCKING: the default stream orders nothing here
        self._memory: set[int] = set()
        self._pinned: set[int] = set()
        self._graphs: dict[int, Any] = {}
        self._events: list[Any] = []

    def make_current(self) -> None:
        """Let the calling thread use this device; needed in every thread but the one that made this object."""
        _call("cuCtxSetCurrent", self._context)

    @property
    def stream(self) -> int:
        """The stream, as the integer that TensorRT takes."""
        return int(self._stream)

    def free_bytes(self) -> int:
        """Return how much device memory is free for anyone."""
        return int(_call("cuMemGetInfo")[0])

    def allocate(self, size: int) -> int:
        """Return the address of `size` bytes (at least one). Raises BackendError("out of memory")."""
        address = int(_call("cuMemAlloc", max(size, 1)))
        self._memory.add(address)
        return address

    def free(self, address: int) -> None:
        """Free what `allocate` returned."""
        self._memory.remove(address)
        _call("cuMemFree", address)

    def pinned(self, size: int) -> Array:
        """Return `size` bytes (at least one) of page-locked host memory, which `free_pinned` or `close` frees."""
        address = int(_call("cuMemAllocHost", max(size, 1)))
        self._pinned.add(address)
        memory: Array = np.ctypeslib.as_array((ctypes.c_uint8 * max(size, 1)).from_address(address))
        return memory

    def free_pinned(self, memory: Array) -> None:
        """Free what `pinned` returned; no view of it may be used after."""
        self._pinned.remove(memory.ctypes.data)
        _call("cuMemFreeHost", memory.ctypes.data)

    def wait_for(self, stream: int) -> None:
        """Let what comes next in our stream wait for what another one holds now (1: the legacy default stream)."""
        event = _call("cuEventCreate", 2)  # CU_EVENT_DISABLE_TIMING
        _call("cuEventRecord", event, stream)
        _call("cuStreamWaitEvent", self._stream, event, 0)
        _call("cuEventDestroy", event)  # freed when it has happened

    def copy(self, target: int, source: int, size: int) -> None:
        """Copy from device to device, in stream order."""
        if size:
            _call("cuMemcpyDtoDAsync", target, source, size, self._stream)

    def upload(self, address: int, array: Array) -> None:
        """Copy a contiguous array to the device, in stream order; the array must live until `synchronize`."""
        if array.nbytes:
            _call("cuMemcpyHtoDAsync", address, array.ctypes.data, array.nbytes, self._stream)

    def download(self, array: Array, address: int) -> None:
        """Copy from the device into a contiguous array, in stream order; it is whole after `synchronize`."""
        if array.nbytes:
            _call("cuMemcpyDtoHAsync", array.ctypes.data, address, array.nbytes, self._stream)

    def synchronize(self) -> None:
        """Wait for the stream; errors of kernels that ran in it are raised here."""
        _call("cuStreamSynchronize", self._stream)

    def begin_capture(self) -> None:
        """Record what is put into the stream from here on, instead of running it."""
        relaxed = _driver().CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        _call("cuStreamBeginCapture", self._stream, relaxed)

    def end_capture(self) -> Any:
        """Return what was recorded as a graph that `launch` replays."""
        graph = _call("cuStreamEndCapture", self._stream)
        try:
            ready = _call("cuGraphInstantiate", graph, 0)
        finally:
            _call("cuGraphDestroy", graph)
        self._graphs[id(ready)] = ready
        return ready

    def launch(self, graph: Any) -> None:
        """Replay a graph in the stream."""
        _call("cuGraphLaunch", graph, self._stream)

    def drop(self, graph: Any) -> None:
        """Forget a graph that will not be launched again."""
        del self._graphs[id(graph)]
        _call("cuGraphExecDestroy", graph)

    def event(self) -> Any:
        """Return an event: a moment of the stream, as the device's own clock has it."""
        made = _call("cuEventCreate", 0)
        self._events.append(made)
        return made

    def record(self, event: Any) -> None:
        """Let the event be the moment when the stream gets here."""
        _call("cuEventRecord", event, self._stream)

    def elapsed_ms(self, first: Any, last: Any) -> float:
        """Return the milliseconds between two recorded events that are over (resolution about 0.5 us)."""
        return float(_call("cuEventElapsedTime", first, last))

    def close(self) -> None:
        """Free everything; nothing of this object may be used after."""
        with contextlib.suppress(BackendError):  # after a kernel's fault every call fails, and nothing is left to free
            self.synchronize()
            for graph in self._graphs.values():
                _call("cuGraphExecDestroy", graph)
            for event in self._events:
                _call("cuEventDestroy", event)
            for address in sorted(self._memory):
                _call("cuMemFree", address)
            for address in sorted(self._pinned):
                _call("cuMemFreeHost", address)
            _call("cuStreamDestroy", self._stream)
        self._graphs, self._events, self._memory, self._pinned = {}, [], set(), set()
        with contextlib.suppress(BackendError):
            _call("cuDevicePrimaryCtxRelease", self._device)


@cache
def _driver() -> Any:
    from cuda.bindings import driver

    try:
        (status,) = driver.cuInit(0)
    except (RuntimeError, OSError) as err:  # no libcuda.so.1
        raise BackendError("no device", f"the CUDA driver cannot be used: {err}", _ADVICE) from err
    if status != driver.CUresult.CUDA_SUCCESS:
        raise _failure("cuInit", status.name)
    return driver


def _device(index: int) -> Any:
    if not 0 <= index < device_count():
        raise BackendError("no device", f"there is no CUDA device {index}", _ADVICE)
    return _call("cuDeviceGet", index)


def _call(name: str, *arguments: Any) -> Any:
    """Call a function of the driver; return what it gives beside the status, as one value where it is one."""
    driver = _driver()
    try:
        status, *values = getattr(driver, name)(*arguments)
    except RuntimeError as err:  # a driver older than this function
        raise BackendError("no device", f"the CUDA driver has no {name}: {err}", "install a newer driver") from err
    if status != driver.CUresult.CUDA_SUCCESS:
        raise _failure(name, status.name)
    return values[0] if len(values) == 1 else tuple(values)


def _failure(name: str, status: str) -> BackendError:
    what = f"{name}: {status}"
    if status == "CUDA_ERROR_OUT_OF_MEMORY":
        return BackendError("out of memory", what, "free memory on the GPU, or lower the profiles' maxima")
    if any(word in status for word in _NO_DEVICE):
        return BackendError("no device", what, _ADVICE)
    return BackendError(
        "crash", what, "a kernel failed on the device, or the driver did; look at `dmesg` for Xid messages"
    )
