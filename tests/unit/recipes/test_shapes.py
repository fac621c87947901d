"""Profiles to shapes: what compilers, exporters and parity get."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recipes.schema import Recipe
from recipes.shapes import (
    axis_names,
    batch_axis,
    benchmark_cases,
    parity_cases,
    profile_shapes,
    random_cases,
    tensor_shape,
    trace_shapes,
)
from tests.unit.recipes.recipe_text import recipe


def static(tmp_path):
    return recipe(tmp_path, lambda d: d.update(inputs={"image": {"shape": [2, 3]}}, profiles={}))


def test_profiles_by_name(tmp_path):
    assert profile_shapes(recipe(tmp_path)) == [
        {"name": "bulk", "inputs": {"image": {"min": [1, 1, 8, 8], "opt": [64, 1, 8, 8], "max": [256, 1, 8, 8]}}},
        {"name": "online", "inputs": {"image": {"min": [1, 1, 8, 8], "opt": [1, 1, 8, 8], "max": [4, 1, 16, 8]}}},
    ]


def test_a_static_recipe_has_one_profile_one_case_and_nothing_random(tmp_path):
    made = static(tmp_path)
    assert profile_shapes(made) == [
        {"name": "static", "inputs": {"image": {"min": [2, 3], "opt": [2, 3], "max": [2, 3]}}}
    ]
    assert parity_cases(made) == [{"name": "static/min", "shapes": {"image": [2, 3]}}]
    assert random_cases(made, 3) == []
    assert trace_shapes(made) == {"image": [2, 3]}


def test_shapes_that_profiles_share_are_compared_once(tmp_path):
    assert [case["name"] for case in parity_cases(recipe(tmp_path))] == [
        "bulk/min",
        "bulk/opt",
        "bulk/max",
        "online/max",
        "online/mixed",
    ]


def test_parity_is_measured_where_height_and_width_differ(tmp_path):
    def square(d):
        d["inputs"] = {"image": {"shape": ["batch", 3, "height", "width"]}}
        side = [32, 64, 128]
        d["profiles"] = {"p": {"width": side, "batch": [1, 1, 8], "height": side}, "q": {"batch": [1, 2, 4], "height": [64, 64, 64], "width": [64, 64, 64]}}  # fmt: skip

    cases = {case["name"]: case["shapes"]["image"] for case in parity_cases(recipe(tmp_path, square))}
    assert cases["p/mixed"] == [1, 3, 128, 32]
    assert "q/mixed" not in cases  # one axis moves there: min says it already


@pytest.mark.parametrize(
    ("online", "bulk", "traced"),
    [([1, 1, 4], [1, 64, 256], 2), ([1, 8, 16], [1, 64, 256], 8), ([1, 1, 1], [1, 1, 2], 2), ([1, 1, 1], [1, 1, 1], 1)],
)  # fmt: skip
def test_exporters_trace_the_least_opt_and_never_1_where_2_is_allowed(tmp_path, online, bulk, traced):
    def change(d):
        d["profiles"]["online"]["batch"] = online
        d["profiles"]["bulk"]["batch"] = bulk

    assert trace_shapes(recipe(tmp_path, change)) == {"image": [traced, 1, 8, 8]}


def test_names_of_axes_by_position(tmp_path):
    tensor = recipe(tmp_path).inputs["image"]
    assert axis_names(tensor) == {"0": "batch", "2": "height"}
    assert tensor_shape(tensor, {"batch": 5, "height": 7}) == [5, 1, 7, 8]


RANGES = st.tuples(st.integers(1, 9), st.integers(0, 9), st.integers(0, 9)).map(
    lambda r: [r[0], r[0] + r[1], r[0] + r[1] + r[2]]
)
PROFILES = st.dictionaries(st.sampled_from("abcd"), st.fixed_dictionaries({"n": RANGES, "h": RANGES}), min_size=1)


@given(PROFILES, st.integers(0, 99), st.randoms(use_true_random=False))
def test_cases_lie_inside_a_profile_and_key_order_means_nothing(profiles, seed, choose):
    def made(shuffle):
        def order(mapping):
            keys = list(mapping)
            choose.shuffle(keys)
            return {key: mapping[key] for key in keys} if shuffle else mapping

        inputs = {"x": {"shape": ["n", 3, "h"]}, "y": {"shape": ["h", "n"]}}
        return Recipe.model_validate(
            {
                "enginery": 1, "name": "p", "source": {"framework": "onnx", "model": {"file": "m.onnx"}},
                "inputs": order(inputs), "targets": [{"runtime": "onnxruntime"}],
                "profiles": order({name: order(ranges) for name, ranges in profiles.items()}),
            }
        )  # fmt: skip

    plain, shuffled = made(shuffle=False), made(shuffle=True)
    for derive in (profile_shapes, parity_cases, trace_shapes, lambda recipe: random_cases(recipe, 4, seed)):
        assert derive(plain) == derive(shuffled)
    cases = random_cases(plain, 4, seed)
    assert len(cases) == 4
    for case in [*cases, *parity_cases(plain)]:
        n, three, h = case["shapes"]["x"]
        assert case["shapes"]["y"] == [h, n]
        assert three == 3
        ranges = profiles[case["name"].partition("/")[0]]
        assert ranges["n"][0] <= n <= ranges["n"][2]
        assert ranges["h"][0] <= h <= ranges["h"][2]
    shapes = [case["shapes"] for case in parity_cases(plain)]
    assert all(shapes.count(shape) == 1 for shape in shapes)


def test_speed_is_measured_at_opt_of_every_profile(tmp_path):
    assert benchmark_cases(recipe(tmp_path)) == [
        {"name": "bulk/64", "profile": "bulk", "batch": 64, "shapes": {"image": [64, 1, 8, 8]}},
        {"name": "online/1", "profile": "online", "batch": 1, "shapes": {"image": [1, 1, 8, 8]}},
    ]


def test_batches_are_measured_in_the_profiles_that_admit_them(tmp_path):
    made = recipe(tmp_path, lambda d: d.update(benchmark={"batches": [2, 16]}))
    assert [(case["name"], case["batch"], case["shapes"]["image"][0]) for case in benchmark_cases(made)] == [
        ("bulk/2", 2, 2),
        ("bulk/16", 16, 16),
        ("online/2", 2, 2),
    ]


def test_without_a_batch_axis_the_first_extent_counts_the_samples(tmp_path):
    assert batch_axis(static(tmp_path)) is None
    assert benchmark_cases(static(tmp_path)) == [
        {"name": "static/2", "profile": "static", "batch": 2, "shapes": {"image": [2, 3]}}
    ]


def test_inputs_that_begin_with_different_axes_share_no_batch(tmp_path):
    made = recipe(tmp_path, lambda d: d["inputs"].update(mask={"shape": ["height", "batch"]}))
    assert batch_axis(made) is None
    assert {case["shapes"]["mask"][1] for case in benchmark_cases(made)} == {1, 64}
