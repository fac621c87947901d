"""Of a manifest: what was measured of an engine, and which gates it had to pass."""

from __future__ import annotations

from pydantic import Field, model_validator

from artifacts.manifest_base import Part


class ParityFacts(Part):
    """Distance from the source framework's outputs, the worst over outputs and shapes; null: not finite."""

    relative_l2: float | None
    max_abs: float | None
    cosine: float | None
    non_finite: int = Field(description="How many NaN and Inf the outputs held.")


class CaseFacts(Part):
    """Parity at one shape."""

    name: str
    relative_l2: float | None
    max_abs: float | None
    cosine: float | None


class MetricFacts(Part):
    """The recipe's own measure on its held-out data, of this engine and of its source."""

    name: str
    value: float | None
    source: float | None
    samples: int | None = None


class Measured(Part):
    """What was measured by running something; `executed` false says that it was not run, and why."""

    executed: bool
    reason: str | None = None
    parity: ParityFacts | None = None
    cases: tuple[CaseFacts, ...] = ()
    data: ParityFacts | None = Field(
        default=None, description="Parity on the metric's held-out data; int8 is judged by it where it was measured."
    )
    data_of: str | None = Field(
        default=None,
        description="What `data` was measured on where that is not the metric's: held-out calibration data.",
    )
    metric: MetricFacts | None = None

    @model_validator(mode="after")
    def _says_what_it_is(self) -> Measured:
        if self.executed and self.parity is None:
            raise ValueError("executed, but without a measure of parity")
        if not self.executed and not self.reason:
            raise ValueError("not executed, but without a reason")
        return self


class ParityGate(Part):
    """Bounds on parity; null: no bound."""

    relative_l2: float | None
    max_abs: float | None
    cosine: float | None


class MetricGate(Part):
    """Bounds on the recipe's metric; null: no bound."""

    name: str
    floor: float | None
    max_drop: float | None
    ceiling: float | None = None
    lower_is_better: bool = Field(default=False, description="Whether it is a rate of errors: max_drop is a rise then.")


class Gates(Part):
    """What was demanded of the precision that was given."""

    parity: ParityGate
    metric: MetricGate | None


class Verification(Part):
    """What was demanded and what was found: of the graph (in ONNX Runtime), and of the engine itself."""

    gates: Gates
    passed: bool = Field(description="Whether everything that was executed passed the gates.")
    graph: Measured
    engine: Measured
