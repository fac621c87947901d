from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from tasks.errors import BackendError
from tasks.metrics import Distance, built_in, distance, exact_match, top1

FLOATS = arrays.arrays(
    st.sampled_from([np.float32, np.float64, np.float16]),
    arrays.array_shapes(max_dims=3, max_side=5),
    elements=st.floats(-1000, 1000, width=16),
)
ANY = arrays.arrays(np.float32, 6, elements=st.floats(width=32, allow_nan=False, allow_infinity=False))


@given(FLOATS)
def test_nothing_is_far_from_itself(x):
    assert distance(x, x.copy()) == Distance(0.0, 0.0, 1.0, 0)


@given(ANY)
def test_even_the_largest_and_smallest_numbers_do_not_overflow(x):
    assert distance(x, x) == Distance(0.0, 0.0, 1.0, 0)
    assume(np.abs(x).max() > 1e-30)
    assert distance(x, np.zeros_like(x)).relative_l2 == pytest.approx(1.0)


@given(FLOATS, st.sampled_from([0.125, 2.0, 64.0, 1024.0]), st.integers(0, 100))
def test_relative_l2_and_cosine_do_not_depend_on_scale(x, factor, seed):
    x = x.astype(np.float64)
    assume(np.linalg.norm(x) > 1e-3)
    y = x + np.random.default_rng(seed).normal(size=x.shape)
    one, other = distance(x, y), distance(x * factor, y * factor)
    assert other.relative_l2 == pytest.approx(one.relative_l2)
    assert other.cosine == pytest.approx(one.cosine, abs=1e-12)
    assert other.max_abs == pytest.approx(one.max_abs * factor)


def test_the_measures_are_those_of_the_definition():
    found = distance(np.array([3.0, 4.0], np.float32), np.array([3.0, 5.0], np.float32))
    assert found.relative_l2 == pytest.approx(1 / 5)
    assert found.max_abs == 1
    assert found.cosine == pytest.approx((9 + 20) / (5 * math.sqrt(34)))


@given(FLOATS, st.sampled_from([np.nan, np.inf, -np.inf]), st.data())
def test_what_is_not_finite_is_counted_wherever_it_is(x, bad, data):
    y = x.copy()
    place = data.draw(st.integers(0, x.size - 1))
    y.flat[place] = bad
    for found in (distance(x, y), distance(y, x), distance(y, y)):
        assert found.non_finite == 1
        assert not math.isfinite(found.relative_l2)
        assert math.isnan(found.cosine)


def test_a_reference_of_zeros_is_met_by_zeros_only():
    zeros = np.zeros(3, np.float32)
    assert distance(zeros, zeros).relative_l2 == 0
    assert distance(zeros, zeros + 1).relative_l2 == math.inf


def test_integers_are_equal_or_not():
    found = distance(np.array([1, 2, 3, 1000]), np.array([1, 2, 3, 7]))
    assert found == Distance(0.25, 993.0, 0.75, 0)
    assert distance(np.array([True, False]), np.array([True, True])).relative_l2 == 0.5
    assert distance(np.zeros((0, 3)), np.zeros((0, 3))) == Distance(0.0, 0.0, 1.0, 0)


def test_half_precision_is_widened_before_it_is_compared():
    x = np.full(70_000, 100, np.float16)  # its sum of squares is no float16
    assert distance(x, x * np.float16(2)).relative_l2 == pytest.approx(1.0)


def test_shapes_that_differ_are_not_broadcast():
    with pytest.raises(ValueError, match="shapes differ"):
        distance(np.zeros((2, 1)), np.zeros((2, 3)))


def test_top1():
    scores = np.array([[0.1, 0.9], [0.8, 0.2], [0.3, 0.7], [0.6, 0.4]])
    assert top1({"y": scores}, np.array([1, 0, 0, 0])) == 0.75
    assert top1({"y": scores}, np.array([[1], [0], [0], [1]])) == 0.5
    with pytest.raises(BackendError, match=r"labels have shape \[3\], the answers \[4\]"):
        top1({"y": scores}, np.array([1, 0, 0]))


def test_character_error_rate_counts_edits_over_the_labels_characters():
    labels = np.array([[1, 2, 3, -1], [4, 5, -1, -1]])
    assert built_in("cer")({"y": labels}, labels) == 0.0
    # one replaced, one missing, one too many: 3 edits of 5 characters
    assert built_in("cer")({"y": np.array([[1, 9, -1, -1], [4, 5, 6, -1]])}, labels) == pytest.approx(3 / 5)
    assert built_in("cer")({"y": np.tile(np.arange(9), (2, 1))}, np.array([[8], [8]])) == 8.0


def test_scores_are_read_as_ctc_does():
    steps = np.array([[1, 1, 0, 1, 2, 0, 0, 3]])  # 1, (blank) 1, 2, 3
    scores = np.eye(4, dtype=np.float32)[steps]
    assert built_in("cer")({"y": scores}, np.array([[1, 1, 2, 3]])) == 0.0
    assert built_in("cer")({"y": scores}, np.array([[1, 2, 3, -1]])) == pytest.approx(1 / 3)
    with pytest.raises(BackendError, match=r"labels have shape \[1\]"):
        built_in("cer")({"y": scores}, np.array([1]))
    with pytest.raises(BackendError, match="no label has a character"):
        built_in("cer")({"y": scores}, np.array([[-1, -1]]))


def test_exact_match_wants_every_element():
    tokens = np.array([[1, 2], [3, 4]])
    assert exact_match({"y": tokens}, np.array([[1, 2], [3, 5]])) == 0.5
    scores = np.eye(5, dtype=np.float32)[tokens]
    assert exact_match({"y": scores}, tokens) == 1.0
