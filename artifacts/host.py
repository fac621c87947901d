"""A host's fingerprint, as plain values: what may be built here, and what may be loaded here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Final

# What of a GPU an engine depends on besides the compute capability: all but which of such GPUs it is. TensorRT compares
# memory bus width, L2 size, shared memory, texture alignment, number of multiprocessors and integrated or discrete when it
# loads a plan (developer guide, "Engine Compatibility"); name, memory and ECC tell apart what these do not.
DEVICE_FACTS: Final = (
    "name",
    "memory_bytes",
    "sm_count",
    "bus_width_bits",
    "l2_bytes",
    "shared_memory_per_block",
    "shared_memory_per_block_optin",
    "shared_memory_per_sm",
    "texture_alignment",
    "integrated",
    "ecc",
)


@dataclass(frozen=True)
class Gpu:
    """One NVIDIA GPU, or one MIG slice of one. `compute_capability` is spelled `sm89`.

    `memory_bytes` and what has a default are None where the driver does not tell. `sm_count` is the number of streaming
    multiprocessors, `l2_bytes` the size of the second-level cache, `shared_memory_*` in bytes: of a block, of a block that
    asks for more (opt-in), of a multiprocessor; `texture_alignment` in bytes.
    """

    name: str
    uuid: str
    compute_capability: str
    memory_bytes: int | None
    sm_count: int | None = None
    bus_width_bits: int | None = None
    l2_bytes: int | None = None
    shared_memory_per_block: int | None = None
    shared_memory_per_block_optin: int | None = None
    shared_memory_per_sm: int | None = None
    texture_alignment: int | None = None
    integrated: bool | None = None
    ecc: bool | None = None
    mig: bool = False

    def device(self) -> dict[str, Any]:
        """Return what an engine depends on, besides the compute capability: DEVICE_FACTS."""
        return {name: getattr(self, name) for name in DEVICE_FACTS}


@dataclass(frozen=True)
class Host:
    """A machine: operating system, architecture, driver, GPUs, and the full version of every installed runtime.

    `frameworks` are those of sources, which serve a source model where no engine fits: `torch`, `paddle`.
    `cpu` is the processor's model and how many of its threads this process may use: what times on it depend on.
    """

    name: str
    os: str
    arch: str
    driver: str | None = None
    cuda: str | None = None
    gpus: tuple[Gpu, ...] = ()
    runtimes: Mapping[str, str] = field(default_factory=dict)
    cpu: str | None = None
    frameworks: Mapping[str, str] = field(default_factory=dict)

    @property
    def driver_branch(self) -> str | None:
        """The driver's branch: "580" of "580.159.04"; None where no driver is known."""
        return self.driver.partition(".")[0] if self.driver is not None else None

    def to_json(self) -> dict[str, Any]:
        """Return the fingerprint as JSON values."""
        return asdict(self) | {"driver_branch": self.driver_branch}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Host:
        """Read back what `to_json` wrote; keys that are not known are ignored.

        Raises KeyError, TypeError or ValueError for anything else.
        """
        for name in ("name", "os", "arch"):
            if not isinstance(value[name], str):
                raise TypeError(f"{name} is not a string")
        runtimes, frameworks = (_versions(value, name) for name in ("runtimes", "frameworks"))
        gpus = tuple(_gpu_from_json(gpu) for gpu in value.get("gpus", ()))
        return cls(
            value["name"],
            value["os"],
            value["arch"],
            value.get("driver"),
            value.get("cuda"),
            gpus,
            runtimes,
            value.get("cpu"),
            frameworks,
        )

    def gpu(self, compute_capability: str) -> Gpu | None:
        """Return the first GPU of a compute capability, if one is here."""
        return next((gpu for gpu in self.gpus if gpu.compute_capability == compute_capability), None)

    def has_gpu(self, compute_capability: str) -> bool:
        """Tell whether a GPU of this compute capability is here; every host has `cpu`."""
        return compute_capability == "cpu" or any(gpu.compute_capability == compute_capability for gpu in self.gpus)


def _versions(value: Mapping[str, Any], name: str) -> dict[str, str]:
    found = value.get(name, {})
    if not isinstance(found, dict) or not all(isinstance(version, str) for version in found.values()):
        raise TypeError(f"{name} are not names with versions")
    return dict(found)


def _gpu_from_json(value: Mapping[str, Any]) -> Gpu:
    known = {found.name: value[found.name] for found in fields(Gpu) if found.name in value}
    return Gpu(**{**known, **{name: str(value[name]) for name in ("name", "uuid", "compute_capability")}})
