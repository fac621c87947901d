"""Run an exported program of PyTorch's, or TorchScript, without the code that made it."""

from __future__ import annotations

import numpy as np
import torch

from tasks.engines.saved_run import Array, Saved, SavedRunner
from tasks.errors import BackendError
from tasks.torch_program import load_program, run_program


class TorchRunner(SavedRunner):
    """A program of PyTorch's: on the first CUDA device where PyTorch has one, else (or with `cpu`) on the CPU."""

    def __init__(self, saved: Saved) -> None:
        super().__init__(saved)
        device = saved.device
        if device is not None and not (torch.cuda.is_available() and device < torch.cuda.device_count()):
            raise BackendError("no device", f"PyTorch has no cuda:{device} here", "leave the device away")
        if saved.threads is not None:
            torch.set_num_threads(saved.threads)
        data = saved.plan if isinstance(saved.plan, bytes) else saved.plan.read_bytes()
        self.device = "cpu" if saved.cpu or not torch.cuda.is_available() else f"cuda:{device or 0}"
        try:
            self._program = load_program(data, saved.form, self.device)
        except Exception as err:  # whatever it says, the file is not of this version
            raise BackendError(
                "bad data",
                f"PyTorch {torch.__version__} does not load the {saved.form}: {err}",
                "pull it again, or install the PyTorch that it was verified with",
            ) from err

    def _compute(self, arrays: list[Array]) -> list[Array]:
        # Arrays of callers may be read-only, of which PyTorch warns.
        given = [torch.from_numpy(np.require(array, requirements="W")).to(self.device) for array in arrays]
        return [_array(tensor) for tensor in run_program(self._program, given)]

    def close(self) -> None:
        """Drop the program."""
        del self._program


RUNNER = TorchRunner


def _array(tensor: torch.Tensor) -> Array:
    tensor = tensor.detach().cpu()
    return np.asarray((tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy())
