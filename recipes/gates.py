"""Gates: does a precision pass, given what was measured and what the recipe accepts.

Thresholds are applied here, to recorded measurements, and not inside the `verify` stage, so that a
changed threshold re-runs no measurement.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Protocol

from recipes.schema import QUANTIZED, Acceptance, Metric, Parity, Precision

# Default bounds on the distance to the fp32 source. Relative L2 is |y - x| / |x| over all elements of an output.
# fp32: NVIDIA's Polygraphy compares with rtol = atol = 1e-5, and export parity of 1e-5 is what users of OCR encoders
# ask for (facts: peers.md); 1e-4 leaves room for reordered sums in deep graphs. tf32 and fp16 keep 10 mantissa bits
# (unit roundoff 2^-11 = 4.9e-4) and bf16 keeps 7 (2^-8 = 3.9e-3); both are given about 20 roundoffs, since errors grow
# with depth. int8: the measured 8.4e-3 of a small net (facts: tensorrt.md section 8) grows to several percent in real
# ones, so its bound only catches collapse, and the metric is the gate that matters. fp8 keeps 3 mantissa bits (2^-4 =
# 6e-2 of any one value), and is bounded alike.
# (Constructed without validation: constants need none, and its schema would be built at start-up.)
DEFAULT_PARITY: Final[Mapping[Precision, Parity]] = {
    "fp32": Parity.model_construct(relative_l2=1e-4),
    "tf32": Parity.model_construct(relative_l2=1e-2, cosine=0.999),
    "fp16": Parity.model_construct(relative_l2=1e-2, cosine=0.999),
    "bf16": Parity.model_construct(relative_l2=8e-2, cosine=0.99),
    "int8": Parity.model_construct(relative_l2=0.25, cosine=0.97),
    "int8-fp16": Parity.model_construct(relative_l2=0.25, cosine=0.97),
    "int8-dynamic": Parity.model_construct(relative_l2=0.25, cosine=0.97),
    "fp8": Parity.model_construct(relative_l2=0.25, cosine=0.97),
    "fp8-fp16": Parity.model_construct(relative_l2=0.25, cosine=0.97),
}


class ParityBounds(Protocol):
    """Bounds on parity, of a recipe or of a manifest; None: no bound."""

    @property
    def relative_l2(self) -> float | None:
        """Greatest relative L2 distance."""

    @property
    def max_abs(self) -> float | None:
        """Greatest absolute difference."""

    @property
    def cosine(self) -> float | None:
        """Least cosine."""


class MetricBounds(Protocol):
    """Bounds on the recipe's metric, of a recipe or of a manifest; None: no bound."""

    @property
    def name(self) -> str:
        """The metric."""

    @property
    def floor(self) -> float | None:
        """Least value."""

    @property
    def ceiling(self) -> float | None:
        """Greatest value."""

    @property
    def max_drop(self) -> float | None:
        """How far it may be worse than the source's."""

    @property
    def lower_is_better(self) -> bool:
        """Whether it is a rate of errors."""


@dataclass(frozen=True)
class Verdict:
    """Whether the gates passed; `reasons` names each gate that failed, with the bound and what was found."""

    passed: bool
    reasons: tuple[str, ...] = ()


def parity_bounds(acceptance: Acceptance, precision: Precision) -> Parity:
    """Return the bounds in force: the recipe's where it states them, else the default of the precision."""
    stated = acceptance.parity.get(precision)
    return stated if stated is not None else DEFAULT_PARITY[precision]


def metric_gate(acceptance: Acceptance) -> dict[str, Any] | None:
    """Return the bounds on the recipe's metric, as a manifest states them; None without one."""
    return None if acceptance.metric is None else gate_of(acceptance.metric)


def gate_of(metric: Metric) -> dict[str, Any]:
    """Return bounds on a metric as a manifest states them."""
    lower = {"ceiling": metric.ceiling, "lower_is_better": True} if metric.lower_is_better else {}
    return {"name": metric.name, "floor": metric.floor, "max_drop": metric.max_drop, **lower}


def judge(facts: Mapping[str, Any], acceptance: Acceptance, precision: Precision) -> Verdict:
    """Judge the facts of a `verify` record.

    `facts` is `{"executed", "parity": {"relative_l2", "max_abs", "cosine", "non_finite"}, "data": like parity or None,
    "metric": {"name", "value", "source"} or None}`. What was not executed does not pass.

    Bounds hold for seeded inputs (`parity`) and for the labelled data (`data`). For int8 they hold for the labelled data
    alone where there is any, and without it for calibration samples held out (`data_of`): ranges are those of real inputs, which seeded ones leave and are clipped. (Digits: 0.013 on
    held-out data, 0.08 on noise, whose activations are twice as large; calibrated on that noise, 0.013 on it.)
    """
    return judge_by(facts, parity_bounds(acceptance, precision), acceptance.metric, precision)


def judge_by(facts: Mapping[str, Any], bounds: ParityBounds, gate: MetricBounds | None, precision: str) -> Verdict:
    """Judge facts as `judge` does, by bounds that are known already: a manifest states those that held for its engine."""
    if not facts.get("executed"):
        return Verdict(passed=False, reasons=(f"not executed: {facts.get('reason', 'no reason recorded')}",))
    reasons: list[str] = []
    data = facts.get("data")
    places = [("", facts["parity"], precision not in QUANTIZED or data is None)]
    places += [(f" on {facts.get('data_of') or 'the labelled data'}", data, True)] if data is not None else []
    for where, parity, bounded in places:
        if parity["non_finite"]:
            reasons.append(f"{parity['non_finite']} NaN or Inf in the outputs{where}")
        if bounded:
            reasons += [f"{reason}{where}" for reason in _out_of_bounds(parity, bounds)]
    if gate is not None:
        reasons += _metric_reasons(facts.get("metric"), gate)
    if reasons:  # what is wrong with the source itself
        reasons += facts.get("told", ())
    return Verdict(passed=not reasons, reasons=tuple(reasons))


def judge_together(facts: Mapping[str, Any], gate: MetricBounds) -> Verdict:
    """Judge what the parts of a model do together: by the metric alone, since each part has its own parity."""
    if not facts.get("executed"):
        return Verdict(passed=False, reasons=(f"together: not executed: {facts.get('reason', 'no reason recorded')}",))
    reasons = [f"together: {reason}" for reason in _metric_reasons(facts.get("metric"), gate)]
    if facts.get("non_finite"):
        reasons.append(f"together: {facts['non_finite']} NaN or Inf in the outputs")
    return Verdict(passed=not reasons, reasons=tuple(reasons))


def telling_parity(facts: Mapping[str, Any], precision: Precision) -> Mapping[str, Any] | None:
    """Return the parity to show for a precision: of int8 that on the labelled data, where its bounds hold (`judge`)."""
    found: Mapping[str, Any] | None = facts.get("data") if precision in QUANTIZED else None
    return found if found is not None else facts.get("parity")


def _metric_reasons(metric: Mapping[str, Any] | None, gate: MetricBounds) -> list[str]:
    if metric is None:
        return [f"{gate.name} was not measured"]
    reasons: list[str] = []
    value, source = metric["value"], metric["source"]
    if gate.floor is not None and not _at_least(value, gate.floor):
        reasons.append(f"{gate.name} {_number(value)} < floor {gate.floor:g}")
    if gate.ceiling is not None and not _at_most(value, gate.ceiling):
        reasons.append(f"{gate.name} {_number(value)} > ceiling {gate.ceiling:g}")
    sign, side = (-1, "above") if gate.lower_is_better else (1, "below")
    if gate.max_drop is not None and not (
        value is not None and source is not None and _at_most(sign * (source - value), gate.max_drop)
    ):
        reasons.append(f"{gate.name} {_number(value)} is more than {gate.max_drop:g} {side} {_number(source)}")
    return reasons


def _out_of_bounds(parity: Mapping[str, Any], bounds: ParityBounds) -> list[str]:
    reasons = []
    for name in ("relative_l2", "max_abs"):
        bound = getattr(bounds, name)
        if bound is not None and not _at_most(parity[name], bound):
            reasons.append(f"{name} {_number(parity[name])} > {bound:g}")
    if bounds.cosine is not None and not _at_least(parity["cosine"], bounds.cosine):
        reasons.append(f"cosine {_number(parity['cosine'])} < {bounds.cosine:g}")
    return reasons


# A measure that could not be expressed (NaN, infinite) is recorded as None, and never passes.
def _at_most(value: float | None, bound: float) -> bool:
    return value is not None and value <= bound + 1e-12


def _at_least(value: float | None, bound: float) -> bool:
    return value is not None and value >= bound - 1e-12


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4g}"
