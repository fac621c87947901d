"""Of a manifest: how fast an engine was, and what it was compared with."""

from __future__ import annotations

from pydantic import Field

from artifacts.manifest_base import Digest, Part


class Percentiles(Part):
    """Times of single runs, in milliseconds; percentiles are interpolated linearly between `runs` samples."""

    p50: float
    p90: float
    p99: float
    mean: float
    runs: int


class TimedCase(Part):
    """How fast one shape is, run in one way. See docs/benchmarks.md."""

    name: str
    profile: str
    batch: int = Field(description="Samples in one run.")
    graph: bool = Field(description="Whether runs were replayed as a CUDA graph.")
    steady: bool = Field(
        description="Whether the warm-up ended because times were steady, and not because of its limit."
    )
    warm_up_runs: int
    latency_ms: Percentiles = Field(description="Wall time of one run, inputs and outputs where it computes.")
    end_to_end_ms: Percentiles = Field(description="Wall time of one run with the copies from and to the host.")
    device_ms: Percentiles | None = Field(description="Time by the device's own clock; null: none was read.")
    throughput: float = Field(description="Samples a second, runs started one behind another, without copies.")
    copy_share: float | None = Field(description="Part of end_to_end's p50 that copies take; null: nothing is copied.")
    gpu_memory_bytes: int | None = Field(description="Memory of the device in use because of this process.")


class DeviceState(Part):
    """A device before or after it was timed; null: not told."""

    load_1min: float | None = Field(default=None, description="Load average of the host.")
    sm_mhz: int | None = None
    memory_mhz: int | None = None
    power_state: str | None = None
    slowed_by: tuple[str, ...] | None = Field(default=None, description="Why clocks are lowered, as NVML says.")
    temperature_c: int | None = None
    power_w: float | None = None


class Clocks(Part):
    """The device before the first case and after the last."""

    before: DeviceState
    after: DeviceState


class Timed(Part):
    """What was timed, with which version, on which device. `error` says why there is nothing where there is nothing."""

    version: str | None = None
    device: str | None = Field(default=None, description="Name of the GPU, or of the processor.")
    clocks: Clocks | None = None
    host_memory_bytes: int | None = Field(default=None, description="Peak of the process.")
    provider: str | None = Field(default=None, description="Of ONNX Runtime: which execution provider.")
    cases: tuple[TimedCase, ...] = ()


class Compared(Timed):
    """What people would use instead, timed in the same run."""

    name: str = Field(description="torch, torch-fp16, torch-compile or onnxruntime.")
    error: str | None = None
    dtype: str | None = None
    compile_seconds: float | None = None
    ratios: dict[str, float] = Field(
        default_factory=dict, description="Case -> its p50 latency over the engine's: above 1 the engine is faster."
    )


class TimingRule(Part):
    """When a time counted, in seconds and parts; docs/benchmarks.md says how they are used."""

    seconds: float
    window_seconds: float
    window_runs: int
    windows: int
    tolerance: float
    most_samples: int
    least_samples: int


class BenchmarkFacts(Timed):
    """How fast the engine is, and what it was compared with."""

    key: Digest = Field(description="The benchmark action's key.")
    rule: TimingRule
    compared: tuple[Compared, ...] = ()
