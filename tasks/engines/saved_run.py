"""Source models that were saved, run by their own framework from their files alone, under the interface of an engine.

Frameworks are imported where one is opened, and nowhere else. Inputs and outputs lie on the host, also where the framework
computes on a GPU.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from tasks.engines.host_arrays import OnHost, written
from tasks.engines.profiles import Profile
from tasks.errors import BackendError

Array = np.ndarray[Any, np.dtype[Any]]

# Framework -> (module of its runner, extra that installs it).
_RUNNERS: Final = {
    "torch": ("tasks.engines.torch_run", "enginery[torch]"),
    "paddle": ("tasks.engines.paddle_run", "enginery[paddle]"),
}


@dataclass(frozen=True)
class Saved:
    """A saved model, and how to run it.

    `form` is the manifest's; `inputs` and `outputs` are element types by name, in the model's order; `threads` bounds the threads
    of the framework, for the whole process; `device` is a CUDA device (None: the first that the framework has, else the CPU);
    with `cpu` none is used, also where there is one.
    """

    plan: Path | bytes
    form: str
    inputs: Mapping[str, str]
    outputs: Mapping[str, str]
    profiles: Sequence[Profile]
    threads: int | None = None
    device: int | None = None
    cpu: bool = False


class SavedRunner(OnHost, ABC):
    """What both frameworks share."""

    def __init__(self, saved: Saved) -> None:
        """Keep what a caller asks of a runner; subclasses load the model."""
        self.inputs = dict(saved.inputs)
        self.outputs = list(saved.outputs)
        self.types = {**saved.inputs, **saved.outputs}
        self.profiles = list(saved.profiles)
        self.device = "cpu"
        self.warnings: list[str] = []

    @abstractmethod
    def _compute(self, arrays: list[Array]) -> list[Array]:
        """Take arrays in the model's order, and return arrays in its order."""

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

    @abstractmethod
    def close(self) -> None:
        """Drop the model."""


def open_saved(framework: str, saved: Saved) -> SavedRunner:
    """Load a saved source model whose bytes were checked, into its framework.

    Raises BackendError: "missing package", "no device", "bad data".
    """
    module, extra = _RUNNERS[framework]
    try:
        opened = importlib.import_module(module)
    except ImportError as err:
        raise BackendError(
            "missing package", f"{framework} cannot be imported: {err}", f"install it: pip install '{extra}'"
        ) from err
    runner: SavedRunner = opened.RUNNER(saved)
    return runner
