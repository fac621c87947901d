"""Source models that were saved, run by their own framework from their files alone, under the interface of an engine.

Frameworks are imported where one is opened, and nowhere else. Inputs and outputs lie on the host, also where the framework
computes on a GPU.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from tasks.engines.host_arrays import refuse_device_array, written
from tasks.engines.profiles import Profile
from tasks.errors import BackendError

Array = np.ndarray[Any, np.dtype[Any]]

# Framework -> (module of its runner, extra that installs it).
_RUNNERS: Final = {
    "torch": ("tasks.engines.torch_run", "enginery[torch]"),
    "paddle": ("tasks.engines.paddle_run", "enginery[paddle]"),
}


class SavedRunner:
    """What both frameworks share; `_compute` takes arrays in the model's order and gives arrays in its order."""

    def __init__(self, inputs: Mapping[str, str], outputs: Mapping[str, str], profiles: Sequence[Profile]) -> None:
        """Take the element types by name of inputs and outputs, in the model's order; subclasses load the model."""
        self.inputs = dict(inputs)
        self.outputs = list(outputs)
        self.types = {**inputs, **outputs}
        self.profiles = list(profiles)
        self.device = "cpu"
        self.warnings: list[str] = []

    def _compute(self, arrays: list[Array]) -> list[Array]:
        raise NotImplementedError

    def adopt(self, value: object, where: str) -> None:
        """Refuse what lies on a GPU; leave everything else to numpy."""
        refuse_device_array(value, where)

    def run(
        self, feeds: Mapping[str, Any], profile: int, out: Mapping[str, Any], where: str = "this call"
    ) -> dict[str, Any]:
        """Run once; `profile` is one of those that admit the feeds, and changes nothing here."""
        del profile
        try:
            values = self._compute([feeds[name] for name in self.inputs])
        except Exception as err:  # frameworks' exceptions share no base class
            words = " ".join(str(err).split())[-600:]
            full = "out of memory" in words.lower() or "can't allocate memory" in words
            kind, advice = ("out of memory", "give smaller batches") if full else ("crash", "run the model by hand")
            raise BackendError(kind, f"{where}: {type(err).__name__}: {words}", advice) from err
        return written(dict(zip(self.outputs, values, strict=True)), out, where)

    def make_current(self) -> None:
        """Do nothing: any thread may use it."""

    def close(self) -> None:
        """Drop the model."""


def open_saved(
    framework: str,
    plan: Path | bytes,
    form: str,
    *,
    inputs: Mapping[str, str],
    outputs: Mapping[str, str],
    profiles: Sequence[Profile],
    threads: int | None = None,
    device: int | None = None,
    cpu: bool = False,
) -> SavedRunner:
    """Load a saved source model whose bytes were checked, into its framework.

    `form` is the manifest's; `threads` bounds the threads of the framework, for the whole process; `device` is a CUDA device (None: the first
    that the framework has, else the CPU); with `cpu` none is used, also where there is one. Raises BackendError: "missing package", "no device", "bad data".
    """
    module, extra = _RUNNERS[framework]
    try:
        opened = importlib.import_module(module)
    except ImportError as err:
        raise BackendError(
            "missing package", f"{framework} cannot be imported: {err}", f"install it: pip install '{extra}'"
        ) from err
    runner: SavedRunner = opened.load(plan, form, inputs, outputs, profiles, threads=threads, device=device, cpu=cpu)
    return runner
