"""The recipe's PyTorch module as a candidate: eager or compiled, fp32 or fp16, on the GPU or the CPU."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import torch

from tasks.benchmark.measure import Array
from tasks.code import recipe_code
from tasks.torch_module import call_order, flat_outputs

_RUNS_BEFORE: Final = 3


class TorchCandidate:
    """A module in eval mode with PyTorch's own defaults; fp16 means that weights and float inputs are halves."""

    def __init__(self, module: torch.nn.Module, *, gpu: bool, half: bool, compiled: bool) -> None:
        """Move the module to its device. Compilation (mode "reduce-overhead") happens in the first runs of a shape."""
        self._device = torch.device("cuda" if gpu else "cpu")
        self._half = half
        module = module.to(self._device)
        self._module = module.half() if half else module
        self._call: Callable[..., Any] = (
            torch.compile(self._module, mode="reduce-overhead", dynamic=False) if compiled else self._module
        )
        self.device_clock = gpu
        self.compile_seconds: float | None = None
        self._compiled = compiled
        self._hosts: Sequence[torch.Tensor] = ()
        self._inputs: Sequence[torch.Tensor] = ()
        self._names: Sequence[str] | None = None
        self._outputs: Any = None

    def prepare(self, arrays: Mapping[str, Array]) -> None:
        """Copy the inputs to the device, and run a few times; the recipe's code is blamed for what it raises."""
        order = call_order(self._module, list(arrays))
        self._names = list(arrays) if order is None else None
        names = list(arrays) if order is None else order
        self._hosts = [self._typed(torch.from_numpy(arrays[name].copy())) for name in names]
        self._inputs = [tensor.to(self._device) for tensor in self._hosts]
        begin = time.perf_counter()
        with recipe_code("running the module to time it"):
            for _ in range(_RUNS_BEFORE):
                self.run()
            self.synchronize()
        if self._compiled:
            self.compile_seconds = round((self.compile_seconds or 0.0) + time.perf_counter() - begin, 3)

    def run(self) -> None:
        """Start one run."""
        with torch.inference_mode():
            if self._names is None:
                self._outputs = self._call(*self._inputs)
            else:
                self._outputs = self._call(**dict(zip(self._names, self._inputs, strict=True)))

    def synchronize(self) -> None:
        """Wait for the runs."""
        if self._device.type == "cuda":
            torch.cuda.synchronize()

    def request(self) -> None:
        """Copy the inputs to the device, run, and copy the outputs to the host, which waits for them."""
        for tensor, host in zip(self._inputs, self._hosts, strict=True):
            tensor.copy_(host)
        self.run()
        for tensor in flat_outputs(self._outputs):
            tensor.cpu()

    def device_ms(self, runs: int) -> list[float]:
        """Time single runs by CUDA events; one at a time."""
        found = []
        for _ in range(runs):
            first, last = _event(), _event()
            first.record()
            self.run()
            last.record()
            torch.cuda.synchronize()
            found.append(float(first.elapsed_time(last)))
        return found

    def _typed(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.half() if self._half and tensor.is_floating_point() else tensor


def _event() -> Any:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]  # as torch's stubs have it
