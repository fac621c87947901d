"""Arrays of callers where a runtime takes and gives them on the host alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from tasks.errors import CallError

Array = np.ndarray[Any, np.dtype[Any]]


class OnHost:
    """What executions share that take and give arrays on the host, from any thread."""

    def adopt(self, value: object, where: str) -> None:
        """Refuse what lies on a GPU, with CallError; everything else is left to numpy."""
        device = getattr(value, "__dlpack_device__", None)
        if (device is not None and int(device()[0]) not in (1, 3)) or hasattr(value, "__cuda_array_interface__"):
            raise CallError(f"{where} lies on a device; this engine takes its inputs on the host, give it there")

    def make_current(self) -> None:
        """Do nothing: there is no context of a thread."""


def written(found: dict[str, Array], out: Mapping[str, Array], where: str) -> dict[str, Array]:
    """Copy outputs to where the caller wants them. Raises CallError where that has another shape."""
    for name, target in out.items():
        if target.shape != found[name].shape:
            raise CallError(
                f"{where}: the output {name} is {list(found[name].shape)} at these inputs, `out` has "
                f"{list(target.shape)} for it"
            )
        np.copyto(target, found[name])
        found[name] = target
    return found
