"""A host's fingerprint, as plain values: what may be built here, and what may be loaded here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Gpu:
    """One NVIDIA GPU. `compute_capability` is spelled `sm89`; memory is in bytes, None where it is the host's own.

    `cores` (CUDA cores), `bus_width_bits` and `ecc` are None where the driver does not tell.
    """

    name: str
    uuid: str
    compute_capability: str
    memory_bytes: int | None
    cores: int | None = None
    bus_width_bits: int | None = None
    ecc: bool | None = None

    def device(self) -> dict[str, Any]:
        """Return what an engine depends on, besides the compute capability: all but which of such GPUs it is.

        TensorRT compares memory bus width, L2 size, shared memory and number of multiprocessors when it loads a plan
        (developer guide, "Engine Compatibility"); the model's name with its cores, memory and ECC tells these apart.
        """
        return {
            "name": self.name,
            "memory_bytes": self.memory_bytes,
            "cores": self.cores,
            "bus_width_bits": self.bus_width_bits,
            "ecc": self.ecc,
        }


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
            Gpu(
                str(gpu["name"]),
                str(gpu["uuid"]),
                str(gpu["compute_capability"]),
                gpu["memory_bytes"],
                gpu.get("cores"),
                gpu.get("bus_width_bits"),
                gpu.get("ecc"),
            )
            for gpu in value.get("gpus", ())
        )
        return cls(
            value["name"], value["os"], value["arch"], value.get("driver"), value.get("cuda"), gpus, dict(runtimes)
        )

    def gpu(self, compute_capability: str) -> Gpu | None:
        """Return the first GPU of a compute capability, if one is here."""
        return next((gpu for gpu in self.gpus if gpu.compute_capability == compute_capability), None)

    def has_gpu(self, compute_capability: str) -> bool:
        """Tell whether a GPU of this compute capability is here; every host has `cpu`."""
        return compute_capability == "cpu" or any(gpu.compute_capability == compute_capability for gpu in self.gpus)
