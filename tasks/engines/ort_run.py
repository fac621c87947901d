"""Run an engine for ONNX Runtime on the CPU, under the same interface as a TensorRT plan.

The file was optimised as far as is portable when it was compiled; loading it, ONNX Runtime adds the layouts of this CPU.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from tasks.engines.host_arrays import OnHost, written
from tasks.engines.profiles import Profile
from tasks.errors import BackendError
from tasks.onnx_files import brief

Array = np.ndarray[Any, np.dtype[Any]]

_NAMES: Final = {"tensor(float)": "float32", "tensor(double)": "float64"}
_ADVICE: Final = {
    "unsupported operator": "build for a runtime that has this operator",
    "version mismatch": "install the onnxruntime that the engine was made with",
    "bad data": "fetch the engine again; its file is no graph that ONNX Runtime reads",
    "out of memory": "give smaller batches, or use a host with more memory",
    "crash": "run the graph at this shape by hand to see why",
}


class OrtRunner(OnHost):
    """An ONNX file in an ONNX Runtime session. Sessions may be shared between threads."""

    def __init__(
        self,
        graph: Path | bytes,
        profiles: Sequence[Profile],
        *,
        threads: int | None = None,
        providers: Sequence[tuple[str, Mapping[str, str]]] = (("CPUExecutionProvider", {}),),
    ) -> None:
        """Load a graph, from its file where it has external data beside it.

        `profiles` are the shapes that were verified; `threads` bounds the threads of one call (None: all CPUs);
        `providers` are execution providers with their options, the most wanted first, of which those are used that this ONNX
        Runtime has. Inputs and outputs lie on the host whatever the provider. Raises BackendError: "unsupported operator", "version mismatch", "bad data".
        """
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        if threads is not None:
            options.intra_op_num_threads = threads
        there = set(onnxruntime.get_available_providers())
        used = [(name, dict(given)) for name, given in providers if name in there]
        try:
            self._session = onnxruntime.InferenceSession(
                graph if isinstance(graph, bytes) else str(graph), options, providers=used
            )
        except Exception as err:  # ONNX Runtime's exceptions share no base class
            raise _failure(err, f"ONNX Runtime {onnxruntime.__version__} does not load the graph") from err
        self.types = {value.name: _type_name(value.type) for value in self._values()}
        self.inputs = {value.name: value.type for value in self._session.get_inputs()}
        self.outputs = [value.name for value in self._session.get_outputs()]
        self.profiles = list(profiles)
        self.device = "cpu" if self._session.get_providers()[0] == "CPUExecutionProvider" else "cuda:0"
        self.warnings: list[str] = []

    def run(
        self, feeds: Mapping[str, Any], profile: int, out: Mapping[str, Any], where: str = "this call"
    ) -> dict[str, Any]:
        """Run once; `profile` is one of those that admit the feeds, and changes nothing here."""
        del profile
        try:
            values: list[Array] = self._session.run(self.outputs, dict(feeds))
        except Exception as err:  # as above
            raise _failure(err, where) from err
        return written(dict(zip(self.outputs, values, strict=True)), out, where)

    def close(self) -> None:
        """Drop the session."""
        del self._session

    def _values(self) -> list[Any]:
        return [*self._session.get_inputs(), *self._session.get_outputs()]


def _type_name(kind: str) -> str:
    return _NAMES.get(kind, kind.removeprefix("tensor(").removesuffix(")"))


def _failure(error: Exception, where: str) -> BackendError:
    words, kind = brief(error), "crash"
    name = type(error).__name__
    if name == "NotImplemented" or "not a registered" in words or "No Op registered" in words:
        kind = "unsupported operator"
    elif "Unsupported model IR version" in words or ("opset" in words and "official" in words):
        kind = "version mismatch"
    elif name in ("InvalidProtobuf", "InvalidGraph", "NoSuchFile"):
        kind = "bad data"
    elif "bad_alloc" in words or "Failed to allocate memory" in words:
        kind = "out of memory"
    return BackendError(kind, f"{where}: {words}", _ADVICE[kind])
