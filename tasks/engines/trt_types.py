"""TensorRT's element types and numpy's: what is cast on the way in, and how bfloat16 travels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import numpy as np

from tasks.errors import BackendError

Array = np.ndarray[Any, np.dtype[Any]]

# numpy's type for each of TensorRT's, by name. numpy has no bfloat16: its bits travel as uint16.
DTYPES: Final = {
    "FLOAT": np.float32,
    "HALF": np.float16,
    "BF16": np.uint16,
    "INT8": np.int8,
    "UINT8": np.uint8,
    "INT32": np.int32,
    "INT64": np.int64,
    "BOOL": np.bool_,
}
# How manifests, DLPack and ONNX call them; what is not here (FP8, INT4) is no type of an input or output of ours.
NAMES: Final = {
    "FLOAT": "float32",
    "HALF": "float16",
    "BF16": "bfloat16",
    "INT8": "int8",
    "UINT8": "uint8",
    "INT32": "int32",
    "INT64": "int64",
    "BOOL": "bool",
}


def as_type(values: Array, kind: str, where: str) -> Array:
    """Return a contiguous array of the type that the plan takes. Raises BackendError("bad data")."""
    wanted = np.dtype(DTYPES[kind]) if kind in DTYPES else None
    convert: Callable[[Array], Array] | None = None
    if wanted is None:
        raise BackendError("bad data", f"{where} has the type {kind}, which numpy cannot hold", "use io: float32")
    floating = np.issubdtype(values.dtype, np.floating)
    if kind == "BF16" and floating:
        convert = bf16_bits
    elif values.dtype == wanted or (floating and kind in ("FLOAT", "HALF")):
        convert = None
    elif values.dtype == np.int64 and kind == "INT32":
        limits = np.iinfo(np.int32)
        if values.size and (values.min() < limits.min or values.max() > limits.max):
            raise BackendError(
                "bad data", f"{where}: values beyond int32, which is what the plan takes", "use smaller ones"
            )
    elif not (values.dtype == np.int32 and kind == "INT64"):
        raise BackendError("bad data", f"{where} is {values.dtype}, the plan takes {kind}", "give the recipe's dtype")
    # A copy in any case where the caller may write while the device still reads would cost more than it saves.
    return convert(values) if convert is not None else np.ascontiguousarray(values, dtype=wanted).reshape(values.shape)


def bf16_bits(values: Array) -> Array:
    """Round to bfloat16, to nearest with ties to even, and return its bits."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    kept: Array = np.where(np.isnan(values), np.uint16(0x7FC0), rounded).reshape(values.shape)
    return kept


def widened(values: Array, kind: str) -> Array:
    """Return an output as numpy can hold it: bfloat16 as float32, anything else as it is."""
    if kind != "BF16":
        return values
    bits: np.ndarray[Any, np.dtype[np.uint32]] = values.astype(np.uint32) << np.uint32(16)
    return bits.view(np.float32)


def type_name(kind: str) -> str:
    """Return the name that people know for one of TensorRT's types."""
    return NAMES.get(kind, kind.lower())
