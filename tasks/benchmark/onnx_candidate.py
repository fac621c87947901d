"""A graph in ONNX Runtime as a candidate: on the GPU where its CUDA provider is installed, else on the CPU."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np

from tasks.benchmark.measure import Array
from tasks.errors import BackendError
from tasks.onnx_files import brief

_RUNS_BEFORE: Final = 3
_NUMPY: Final = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


class OnnxCandidate:
    """A session with ONNX Runtime's own defaults (all optimisations, all threads).

    On a GPU inputs and outputs are bound to its memory; `device_clock` stays False, since the stream is the provider's own:
    there the latency is the wall time until its outputs are there.
    """

    device_clock = False

    def __init__(self, path: Path, *, gpu: bool) -> None:
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.log_severity_level = 3
        wanted = "CUDAExecutionProvider" if gpu else "CPUExecutionProvider"
        # TensorRT's provider, where it is there, is not what is asked for.
        providers = [name for name in (wanted, "CPUExecutionProvider") if name in ort.get_available_providers()]
        self._ort = ort
        try:
            self._session = ort.InferenceSession(str(path), options, providers=providers)
        except Exception as err:  # ONNX Runtime's exceptions share no base class
            raise BackendError("crash", f"ONNX Runtime does not load the graph: {brief(err)}") from err
        self.provider: str = self._session.get_providers()[0]
        self.version: str = ort.__version__
        self._device = "cuda" if self.provider == "CUDAExecutionProvider" else "cpu"
        self._binding: Any = None

    def prepare(self, arrays: Mapping[str, Array]) -> None:
        """Bind the inputs where the provider computes, and run a few times."""
        self._binding = self._session.io_binding()
        for value in self._session.get_inputs():
            feed = np.ascontiguousarray(arrays[value.name], dtype=_NUMPY.get(value.type))
            self._binding.bind_ortvalue_input(value.name, self._ort.OrtValue.ortvalue_from_numpy(feed, self._device, 0))
        for value in self._session.get_outputs():
            self._binding.bind_output(value.name, self._device, 0)
        try:
            for _ in range(_RUNS_BEFORE):
                self.run()
        except Exception as err:  # as above
            raise BackendError("crash", f"ONNX Runtime does not run the graph: {brief(err)}") from err

    def run(self) -> None:
        """Run once; ONNX Runtime returns when it is done."""
        self._session.run_with_iobinding(self._binding)

    def synchronize(self) -> None:
        """Wait for the outputs."""
        self._binding.synchronize_outputs()

    def request(self) -> None:
        """Run once: copies are not told apart."""
        self.run()
        self.synchronize()

    def device_ms(self, runs: int) -> list[float]:
        """Return nothing: there is no clock of a device."""
        del runs
        return []
