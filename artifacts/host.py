"""A host's fingerprint, as plain values: what may be built here, and what may be loaded here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Gpu:
    """One NVIDIA GPU. `compute_capability` is spelled `sm89`; memory is in bytes, None where it is the host's own."""

    name: str
    uuid: str
    compute_capability: str
    memory_bytes: int | None


@dataclass(frozen=True)
class Host:
    """A machine: operating system, architecture, driver, GPUs, and the full version of every installed runtime."""

    name: str
    os: str
    arch: str
    driver: str | None = None
    cuda: str | None = None
    gpus: tuple[Gpu, ...] = ()
    runtimes: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return the fingerprint as JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Host:
        """Read back what `to_json` wrote; keys that are not known are ignored.

        Raises KeyError, TypeError or ValueError for anything else.
        """
        for name in ("name", "os", "arch"):
            if not isinstance(value[name], str):
                raise TypeError(f"{name} is not a string")
        runtimes = value.get("runtimes", {})
        if not isinstance(runtimes, dict) or not all(isinstance(found, str) for found in runtimes.values()):
            raise TypeError("runtimes are not names with versions")
        gpus = tuple(
            Gpu(str(gpu["name"]), str(gpu["uuid"]), str(gpu["compute_capability"]), gpu["memory_bytes"])
            for gpu in value.get("gpus", ())
        )
        return cls(
            value["name"], value["os"], value["arch"], value.get("driver"), value.get("cuda"), gpus, dict(runtimes)
        )

    def has_gpu(self, compute_capability: str) -> bool:
        """Tell whether a GPU of this compute capability is here; every host has `cpu`."""
        return compute_capability == "cpu" or any(gpu.compute_capability == compute_capability for gpu in self.gpus)
