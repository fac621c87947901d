"""Gates: what passes, what fails, and the words that say why."""

from __future__ import annotations

from typing import get_args

import pytest

from recipes.gates import DEFAULT_PARITY, Verdict, judge, parity_bounds, telling_parity
from recipes.schema import Acceptance, Parity, Precision

PARITY = {"relative_l2": 1e-5, "max_abs": 1e-4, "cosine": 1.0, "non_finite": 0}
DATA = {"data": {"data": "heldout.npz"}}


def facts(metric=None, **parity):
    return {"executed": True, "parity": PARITY | parity, "metric": metric}


def accept(**metric):
    return Acceptance.model_validate({"metric": {"name": "top1", **DATA, **metric}})


def test_every_precision_has_bounds_and_lower_ones_are_wider():
    assert set(DEFAULT_PARITY) == set(get_args(Precision))
    order = [DEFAULT_PARITY[name].relative_l2 for name in ("fp32", "fp16", "bf16", "int8")]
    assert order == sorted(order)
    assert parity_bounds(Acceptance(), "fp16") is DEFAULT_PARITY["fp16"]


@pytest.mark.parametrize(
    ("value", "bounds", "reasons"),
    [
        (0.10, {"ceiling": 0.1, "max_drop": 0.02}, []),
        (0.05, {"max_drop": 0.0}, []),  # fewer errors than the source are no loss
        (0.11, {"ceiling": 0.1}, ["cer 0.11 > ceiling 0.1"]),
        (0.11, {"max_drop": 0.02}, ["cer 0.11 is more than 0.02 above 0.08"]),
        (None, {"ceiling": 0.1}, ["cer not finite > ceiling 0.1"]),
    ],
)
def test_of_a_rate_of_errors_less_is_better(value, bounds, reasons):
    found = judge(facts({"name": "cer", "value": value, "source": 0.08}), accept(name="cer", **bounds), "fp32")
    assert found.reasons == tuple(reasons)


def test_a_callable_may_be_a_rate_of_errors():
    gate = accept(name="own.py:wer", better="lower", max_drop=0.01)
    assert judge(facts({"value": 0.1, "source": 0.3}), gate, "fp32").passed
    assert not judge(facts({"value": 0.3, "source": 0.1}), gate, "fp32").passed


def test_stated_bounds_replace_the_defaults_whole():
    stated = Parity(max_abs=0.5)
    acceptance = Acceptance(parity={"fp16": stated})
    assert parity_bounds(acceptance, "fp16") is stated
    assert parity_bounds(acceptance, "int8") is DEFAULT_PARITY["int8"]
    assert judge(facts(relative_l2=9.0), acceptance, "fp16").passed


def test_good_measures_pass():
    assert judge(facts(), Acceptance(), "fp32") == Verdict(passed=True)
    assert judge(
        facts({"name": "top1", "value": 0.98, "source": 0.985}), accept(floor=0.97, max_drop=0.01), "fp16"
    ).passed


@pytest.mark.parametrize(
    ("found", "acceptance", "precision", "reasons"),
    [
        ({"executed": False, "reason": "no GPU"}, Acceptance(), "fp32", ["not executed: no GPU"]),
        ({}, Acceptance(), "fp32", ["not executed: no reason recorded"]),
        (facts(non_finite=3), Acceptance(), "fp32", ["3 NaN or Inf in the outputs"]),
        (facts(relative_l2=2e-4), Acceptance(), "fp32", ["relative_l2 0.0002 > 0.0001"]),
        (facts(relative_l2=None, cosine=None), Acceptance(), "fp16", ["relative_l2 not finite > 0.01", "cosine not finite < 0.999"]),
        (facts(cosine=0.9), Acceptance(), "int8", ["cosine 0.9 < 0.97"]),
        (facts(max_abs=1.0), Acceptance(parity={"fp32": Parity(max_abs=0.5)}), "fp32", ["max_abs 1 > 0.5"]),
        (facts(), accept(floor=0.9), "fp32", ["top1 was not measured"]),
        (facts({"value": 0.96, "source": 0.97}), accept(floor=0.97), "fp32", ["top1 0.96 < floor 0.97"]),
        (facts({"value": 0.96, "source": 0.98}), accept(max_drop=0.01), "fp32", ["top1 0.96 is more than 0.01 below 0.98"]),
        (facts({"value": None, "source": 0.98}), accept(floor=0.9, max_drop=0.01), "fp32", ["top1 not finite < floor 0.9", "top1 not finite is more than 0.01 below 0.98"]),
        (facts({"value": 0.9, "source": None}), accept(max_drop=0.01), "fp32", ["top1 0.9 is more than 0.01 below not finite"]),
    ],
)  # fmt: skip
def test_each_gate_that_fails_is_named(found, acceptance, precision, reasons):
    assert judge(found, acceptance, precision) == Verdict(passed=False, reasons=tuple(reasons))


@pytest.mark.parametrize(("value", "passed"), [(0.97, True), (0.9699, False)])
def test_bounds_themselves_pass(value, passed):
    """A drop that is the bound as written must pass, whatever binary fractions make of it."""
    assert judge(facts({"value": value, "source": 0.98}), accept(floor=0.97, max_drop=0.01), "fp32").passed is passed


def test_int8_is_judged_where_its_ranges_hold():
    """Seeded inputs leave the calibrated ranges; with labelled data, that is what the bounds are for."""
    noise, good, bad = {"relative_l2": 0.5, "cosine": 0.9}, PARITY, PARITY | {"relative_l2": 0.3}
    assert judge(facts(**noise) | {"data": good}, Acceptance(), "int8").passed
    assert not judge(facts(**noise) | {"data": None}, Acceptance(), "int8").passed
    assert not judge(facts(**noise) | {"data": good}, Acceptance(), "fp16").passed
    found = judge(facts() | {"data": bad}, Acceptance(), "int8")
    assert found.reasons == ("relative_l2 0.3 > 0.25 on the labelled data",)


@pytest.mark.parametrize("precision", get_args(Precision))
def test_what_is_not_finite_fails_on_either_kind_of_input(precision):
    assert judge(facts() | {"data": PARITY | {"non_finite": 2}}, Acceptance(), precision) == Verdict(
        passed=False, reasons=("2 NaN or Inf in the outputs on the labelled data",)
    )
    assert not judge(facts(non_finite=1) | {"data": PARITY}, Acceptance(), precision).passed


def test_what_is_shown_is_what_the_bounds_hold_for():
    found = facts(relative_l2=0.5) | {"data": PARITY}
    assert telling_parity(found, "int8") == PARITY
    assert telling_parity(found, "fp16")["relative_l2"] == 0.5
    assert telling_parity(facts(relative_l2=0.5), "int8")["relative_l2"] == 0.5
    assert telling_parity({}, "int8") is None


def test_int8_without_labels_is_judged_on_held_out_calibration_data():
    noise = facts(relative_l2=0.4, cosine=0.9)
    spared = {"data_of": "held-out calibration data", "data": PARITY | {"relative_l2": 0.1}}
    assert judge(noise | spared, Acceptance(), "int8").passed
    spared["data"] = PARITY | {"relative_l2": 0.3}
    found = judge(facts() | spared, Acceptance(), "int8")
    assert found.reasons == ("relative_l2 0.3 > 0.25 on held-out calibration data",)
