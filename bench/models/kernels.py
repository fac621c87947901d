"""Which kernels ran on the GPU and for how long, by CUPTI's activity records, through ctypes.

TensorRT 8.6 shows a region that its graph compiler took as one layer; the kernels inside are seen only from below. Offsets
are those of CUpti_ActivityKernel4 and later (cupti_activity.h), which are equal up to the name.
"""

from __future__ import annotations

import ctypes
import os
import struct
from pathlib import Path
from typing import Any

_KERNEL = 10  # CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL
_SIZE = 8 << 20
_PLACES = (
    "usr/local/cuda*/extras/CUPTI/lib64/libcupti.so*",
    "usr/local/cuda*/lib64/libcupti.so*",
    "usr/local/cuda*/targets/*/lib/libcupti.so*",
    "usr/lib/x86_64-linux-gnu/libcupti.so*",
)


def find_cupti() -> str | None:
    """Return the library that CUPTI_LIBRARY names, else the newest of this machine's CUDA toolkits."""
    found = [str(path) for place in _PLACES for path in Path("/").glob(place)]
    return os.environ.get("CUPTI_LIBRARY") or max(found, default=None)


class Kernels:
    """Records kernels between `start` and `stop`; make one before CUDA is used."""

    def __init__(self, library: str) -> None:
        self._cupti = ctypes.CDLL(library)
        self._buffers: dict[int, Any] = {}
        self.found: list[tuple[int, int, int, tuple[int, ...], str]] = []
        request = ctypes.CFUNCTYPE(
            None, ctypes.POINTER(ctypes.c_void_p), ctypes.POINTER(ctypes.c_size_t), ctypes.POINTER(ctypes.c_size_t)
        )
        complete = ctypes.CFUNCTYPE(
            None, ctypes.c_void_p, ctypes.c_uint32, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t
        )
        self._callbacks = request(self._give), complete(self._take)
        self._check(self._cupti.cuptiActivityRegisterCallbacks(*self._callbacks))

    def start(self) -> None:
        self.found.clear()
        self._check(self._cupti.cuptiActivityEnable(_KERNEL))

    def stop(self) -> list[dict[str, Any]]:
        """Return the kernels in the order in which they started: name, microseconds, start, stream, grid."""
        self._check(self._cupti.cuptiActivityFlushAll(1))
        self._check(self._cupti.cuptiActivityDisable(_KERNEL))
        return [
            {"name": name, "us": (end - start) / 1000, "start": start / 1000, "stream": stream, "grid": grid}
            for start, end, stream, grid, name in sorted(self.found)
        ]

    def _give(self, buffer: Any, size: Any, most: Any) -> None:
        memory = ctypes.create_string_buffer(_SIZE + 8)
        address = (ctypes.addressof(memory) + 7) & ~7
        self._buffers[address] = memory
        buffer[0], size[0], most[0] = address, _SIZE, 0

    def _take(self, _context: int, _stream: int, buffer: int, _size: int, valid: int) -> None:
        record = ctypes.c_void_p()
        while (
            valid
            and self._cupti.cuptiActivityGetNextRecord(
                ctypes.c_void_p(buffer), ctypes.c_size_t(valid), ctypes.byref(record)
            )
            == 0
        ):
            head = ctypes.string_at(record.value, 112)
            (kind,) = struct.unpack_from("<I", head)
            if kind != _KERNEL:
                continue
            start, end = struct.unpack_from("<QQ", head, 16)
            (stream,) = struct.unpack_from("<I", head, 48)
            grid = struct.unpack_from("<6i", head, 52)
            (name,) = struct.unpack_from("<Q", head, 104)
            text = ctypes.string_at(name).decode(errors="replace") if name else "?"
            self.found.append((start, end, stream, grid, text))
        self._buffers.pop(buffer, None)

    @staticmethod
    def _check(status: int) -> None:
        if status:
            raise RuntimeError(f"CUPTI says {status}")


def per_run(kernels: list[dict[str, Any]], runs: int) -> list[dict[str, Any]]:
    """Fold the kernels of equal runs into one run: the median time of each, in order.

    Where they do not divide into runs, the sum by name instead, longest first.
    """
    if kernels and len(kernels) % runs == 0:
        count = len(kernels) // runs
        rows = []
        for index in range(count):
            same = [kernels[run * count + index] for run in range(runs)]
            times = sorted(kernel["us"] for kernel in same)
            rows.append(
                {"name": same[0]["name"][:200], "us": round(times[runs // 2], 2), "grid": list(same[0]["grid"])}
            )
        return rows
    total: dict[str, list[float]] = {}
    for kernel in kernels:
        total.setdefault(kernel["name"], []).append(kernel["us"])
    ordered = sorted(total.items(), key=lambda item: -sum(item[1]))
    return [
        {"name": name[:200], "us": round(sum(times) / runs, 2), "count": len(times) / runs} for name, times in ordered
    ]
