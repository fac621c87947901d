"""Of a manifest: which precision was asked for and given, what was tried, and what calibration found."""

from __future__ import annotations

from pydantic import Field

from artifacts.manifest_base import Digest, Part


class Refused(Part):
    """A precision that was tried and did not pass its gates."""

    precision: str
    reasons: tuple[str, ...]


class CandidateFacts(Part):
    """One way to build the engine that was considered, where the fastest was asked for."""

    name: str = Field(description="Precision, and the optimisation level where several were tried: fp16-o5.")
    precision: str
    optimization_level: int | None
    passed: bool | None = Field(description="null: it was not tried, for the reason given.")
    reasons: tuple[str, ...]
    p50_ms: float | None = Field(description="Geometric mean of the p50 latency over the cases; null: not measured.")
    graph: bool | None = Field(description="Whether that is with a CUDA graph.")
    chosen: bool


class QuantizedFacts(Part):
    """How much is int8 or fp8; null: not known (engines are listed by the runtime tensorrt alone)."""

    nodes: int | None = Field(description="Nodes of the typed graph that take Q/DQ pairs.")
    of_nodes: int | None = Field(description="Its convolutions and matrix products.")
    layers: int | None = Field(default=None, description="Layers of the engine that multiply in int8 or fp8.")
    of_layers: int | None = Field(default=None, description="All of its layers that multiply.")


class PrecisionFacts(Part):
    """The precision that was asked for, the one that was given, and what became of those between."""

    asked: str
    given: str
    wish: tuple[str, ...] = Field(description="The recipe's precisions for this target, most wanted first.")
    tried: tuple[Refused, ...]
    kept: tuple[str, ...] = Field(description="Names of the ONNX nodes that were kept in fp32.")
    quantized: QuantizedFacts | None = Field(
        default=None, description="Of int8 and fp8: how much of the graph, and of the engine, really is."
    )
    kept_why: dict[str, str] = Field(
        default_factory=dict, description="Where keep: auto was asked for: why each node was kept, by its name."
    )
    outliers: tuple[str, ...] = Field(
        default=(), description="Tensors that overflow float16 on the data seen: nodes that give or take them are kept."
    )
    candidates: tuple[CandidateFacts, ...] = Field(
        default=(), description="Where auto was asked for: every candidate, in the order in which they were tried."
    )
    io: str = Field(description="Type of float inputs and outputs: float32, or native (that of the precision).")


class WorstTensor(Part):
    """The tensor that its int8 range serves least."""

    tensor: str
    clipped: float = Field(description="Share of the values beyond the range.")
    snr_db: float | None = Field(description="Signal over rounding error, in decibels; null: no error, or no signal.")


class CalibrationFacts(Part):
    """What the int8 ranges were found on."""

    digest: Digest = Field(description="Content of the calibration set.")
    samples: int | None
    method: str | None
    report: str | None = Field(
        default=None, description="Which of the files says what each tensor's range costs, the worst first."
    )
    worst: WorstTensor | None = Field(default=None, description="The first of that report.")
