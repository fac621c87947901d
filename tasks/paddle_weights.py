"""Weights for a Paddle layer: safetensors, or a `.pdparams` file, which is a pickle, read without running any of it.

`paddle.save` pickles a dict of numpy arrays (or of `(name, array)` pairs). Numpy's own constructors are not called either:
stand-ins note what the file says of each array, and the arrays are made from plain bytes.
"""

from __future__ import annotations

import io
import pickle
import pickletools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np

from tasks.code import plain_words
from tasks.errors import BackendError
from tasks.seeded import Array

# What paddle.save adds to a state dict, and which is no tensor.
_NOTES: Final = ("StructuredToParameterName@@", "UnpackBigParamInfor@@")


def read_weights(path: Path) -> dict[str, Array]:
    """Return the tensors of a weights file by name. Raises BackendError("bad data") where it holds anything else."""
    return _safetensors(path) if path.suffix == ".safetensors" else _pdparams(path)


def _safetensors(path: Path) -> dict[str, Array]:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        return dict(load_file(str(path)))
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, AttributeError) as err:
        raise _unreadable(path, f"not readable as safetensors: {err}", "fetch or save the weights again") from err


def _pdparams(path: Path) -> dict[str, Array]:
    data = path.read_bytes()
    try:
        _require_small_memo(data)
        content = _ArraysOnly(io.BytesIO(data)).load()
    except _RefusedError as err:
        raise _unreadable(
            path,
            f"refused: it holds more than arrays, and reading it could run code (it names {err})",
            "save only the tensors: paddle.save(layer.state_dict(), 'weights.pdparams'), or safetensors.paddle.save_file",
        ) from err
    except Exception as err:  # a pickle that is cut short or damaged raises nearly anything
        words = plain_words(f"{type(err).__name__}: {err}", 300)
        raise _unreadable(path, f"not readable as a Paddle state dict: {words}", "fetch or save it again") from err
    if not isinstance(content, Mapping):
        raise _unreadable(path, f"expected a state dict, found a {type(content).__name__}", "save layer.state_dict()")
    found = {str(name): _array(value) for name, value in content.items() if name not in _NOTES}
    wrong = [name for name, value in found.items() if value is None]
    if wrong or "UnpackBigParamInfor@@" in content:
        what = (
            f"{wrong[0]} is no array"
            if wrong
            else "its arrays are cut in pieces, as protocol 2 and 3 do for large ones"
        )
        raise _unreadable(path, what, "save the tensors with safetensors.paddle.save_file")
    return {name: value for name, value in found.items() if value is not None}


def _array(value: object) -> Array | None:
    if isinstance(value, tuple) and len(value) == 2:  # (name of the parameter, its value)
        value = value[1]
    return value.array if isinstance(value, _Array) else None


def _require_small_memo(data: bytes) -> None:
    """Raise ValueError for a pickle that is cut short, or numbers its values beyond what it can hold.

    The unpickler takes memory for as many values as the greatest number says.
    """
    for opcode, number, _at in pickletools.genops(data):
        if opcode.name == "LONG_BINPUT" and isinstance(number, int) and number > len(data):
            raise ValueError(f"value {number} of a file of {len(data)} bytes")


class _RefusedError(Exception):
    """The pickle names something that is neither an array nor its type."""


class _Dtype:
    """Stands for numpy.dtype: notes the kind of plain numbers, refuses the rest."""

    def __init__(self, kind: object, *_: object) -> None:
        if not isinstance(kind, str) or np.dtype(kind).kind not in "fiub":
            raise _RefusedError(f"arrays of {kind!r}")
        self.plain = np.dtype(kind)

    def __setstate__(self, state: Any) -> None:
        if state[1] in ("<", ">"):
            self.plain = self.plain.newbyteorder(state[1])


class _Array:
    """Stands for numpy.ndarray: holds what the pickle says of it as an array of plain numbers."""

    array: Array

    def __setstate__(self, state: Any) -> None:
        _version, shape, dtype, fortran, data = state
        if not isinstance(dtype, _Dtype) or not isinstance(data, bytes):
            raise _RefusedError("an array that is not of plain numbers")
        flat = np.frombuffer(data, dtype=dtype.plain)
        self.array = np.array(flat.reshape(shape, order="F" if fortran else "C"), order="C")


def _reconstruct(*_: object) -> _Array:
    return _Array()


class _ArraysOnly(pickle.Unpickler):
    """An unpickler that knows arrays and nothing else."""

    _KNOWN: Final = {
        ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
        ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
        ("numpy", "ndarray"): _Array,
        ("numpy", "dtype"): _Dtype,
        ("collections", "OrderedDict"): dict,
    }

    def find_class(self, module: str, name: str) -> Any:
        """Return the stand-in for a name of the file, or refuse it."""
        if (module, name) not in self._KNOWN:
            raise _RefusedError(f"{module}.{name}")
        return self._KNOWN[module, name]


def _unreadable(path: Path, what: str, advice: str) -> BackendError:
    return BackendError("bad data", f"{path.name}: {what}", advice)
