"""Arrays of other libraries that lie on a GPU, seen where they lie: DLPack, else `__cuda_array_interface__`.

Neither copies. DLPack (https://dmlc.github.io/dlpack/latest/python_spec.html) orders the producer's work before the
stream that is named to it; of the CUDA array interface (https://numba.readthedocs.io/en/stable/cuda/cuda_array_interface.html)
version 3 names the stream to wait for.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from tasks.errors import CallError

_CPU: Final = (1, 3, 11)  # kDLCPU, kDLCUDAHost, kDLROCMHost: numpy reads them
_CUDA: Final = (2, 13)  # kDLCUDA, kDLCUDAManaged
_KINDS: Final = {0: "int", 1: "uint", 2: "float", 4: "bfloat", 6: "bool"}
_INTERFACE_VERSION_WITH_STREAM: Final = 3


@dataclass(frozen=True)
class DeviceArray:
    """Memory on GPU `device`, C-contiguous: `address`, `shape`, element type by name; `owner` keeps it alive."""

    address: int
    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    device: int | None
    owner: Any


class _Tensor(ctypes.Structure):
    """DLTensor of dlpack.h, ABI 0.x and 1.x alike."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


_get_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_get_pointer.restype = ctypes.c_void_p
_get_pointer.argtypes = (ctypes.py_object, ctypes.c_char_p)


def on_device(value: object, stream: int, where: str, wait: Callable[[int], None]) -> DeviceArray | None:
    """Return a view of an array that lies on a GPU; None for one on the host, and for what is no array.

    `stream` is where the memory will be used; `wait` makes that stream wait for another one. Raises CallError for
    devices that are not NVIDIA's and for arrays that are not C-contiguous.
    """
    tell = getattr(value, "__dlpack_device__", None)
    if tell is not None:
        kind = int(tell()[0])
        if kind in _CPU:
            return None
        if kind not in _CUDA:
            raise CallError(
                f"{where} lies on a device of DLPack's type {kind}; give it on the host, or on a CUDA device"
            )
        # The producer orders its pending work before our stream.
        return of_capsule(value.__dlpack__(stream=stream), where)  # type: ignore[attr-defined]  # as DLPack demands
    interface = getattr(value, "__cuda_array_interface__", None)
    if interface is None:
        return None
    if interface.get("version", 0) >= _INTERFACE_VERSION_WITH_STREAM and interface.get("stream") is not None:
        wait(int(interface["stream"]))
    shape, dtype = tuple(map(int, interface["shape"])), np.dtype(interface["typestr"])
    strides = interface.get("strides")
    if strides is not None and not _contiguous(shape, [step // dtype.itemsize for step in strides]):
        raise _not_contiguous(where)
    return DeviceArray(int(interface["data"][0]), shape, dtype.name, math.prod(shape) * dtype.itemsize, None, value)


def of_capsule(capsule: object, where: str) -> DeviceArray:
    """Read a DLPack capsule, whatever its device; the capsule stays unconsumed and frees the memory when it goes."""
    tensor = _Tensor.from_address(_get_pointer(capsule, b"dltensor"))
    shape = tuple(tensor.shape[axis] for axis in range(tensor.ndim))
    if tensor.strides and not _contiguous(shape, [tensor.strides[axis] for axis in range(tensor.ndim)]):
        raise _not_contiguous(where)
    if tensor.lanes != 1 or tensor.code not in _KINDS:
        raise CallError(
            f"{where} has elements of DLPack's type {tensor.code} with {tensor.lanes} lanes; give plain numbers"
        )
    kind = _KINDS[tensor.code]
    dtype = kind if kind == "bool" else f"{kind}{tensor.bits}"
    address = (tensor.data or 0) + tensor.byte_offset
    return DeviceArray(address, shape, dtype, math.prod(shape) * tensor.bits // 8, tensor.device_id, capsule)


def _contiguous(shape: tuple[int, ...], strides: list[int]) -> bool:
    expected = 1
    for extent, stride in zip(reversed(shape), reversed(strides), strict=True):
        if extent != 1 and stride != expected and 0 not in shape:
            return False
        expected *= extent
    return True


def _not_contiguous(where: str) -> CallError:
    return CallError(f"{where} is not C-contiguous; make it so first (tensor.contiguous())")
