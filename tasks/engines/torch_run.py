"""Run an exported program of PyTorch's, or TorchScript, without the code that made it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from tasks.engines.profiles import Profile
from tasks.engines.saved_run import Array, SavedRunner
from tasks.errors import BackendError
from tasks.torch_program import load_program, run_program


class TorchRunner(SavedRunner):
    """A program of PyTorch's: on the first CUDA device where PyTorch has one, else (or with `cpu`) on the CPU."""

    def __init__(
        self,
        data: bytes,
        form: str,
        inputs: Mapping[str, str],
        outputs: Mapping[str, str],
        profiles: Sequence[Profile],
        *,
        device: int | None,
        cpu: bool = False,
    ) -> None:
        super().__init__(inputs, outputs, profiles)
        if device is not None and not (torch.cuda.is_available() and device < torch.cuda.device_count()):
            raise BackendError("no device", f"PyTorch has no cuda:{device} here", "leave the device away")
        self.device = "cpu" if cpu or not torch.cuda.is_available() else f"cuda:{device or 0}"
        try:
            self._program = load_program(data, form, self.device)
        except Exception as err:  # whatever it says, the file is not of this version
            raise BackendError(
                "bad data",
                f"PyTorch {torch.__version__} does not load the {form}: {err}",
                "pull it again, or install the PyTorch that it was verified with",
            ) from err

    def _compute(self, arrays: list[Array]) -> list[Array]:
        # Arrays of callers may be read-only, of which PyTorch warns.
        given = [torch.from_numpy(np.require(array, requirements="W")).to(self.device) for array in arrays]
        return [_array(tensor) for tensor in run_program(self._program, given)]

    def close(self) -> None:
        """Drop the program."""
        del self._program


def load(
    plan: Path | bytes,
    form: str,
    inputs: Mapping[str, str],
    outputs: Mapping[str, str],
    profiles: Sequence[Profile],
    *,
    threads: int | None,
    device: int | None,
    cpu: bool = False,
) -> TorchRunner:
    """Load a program (see `saved_run.open_saved`)."""
    if threads is not None:
        torch.set_num_threads(threads)
    data = plan if isinstance(plan, bytes) else plan.read_bytes()
    return TorchRunner(data, form, inputs, outputs, profiles, device=device, cpu=cpu)


def _array(tensor: torch.Tensor) -> Array:
    tensor = tensor.detach().cpu()
    return np.asarray((tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy())
