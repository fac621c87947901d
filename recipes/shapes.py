"""Profiles to tensor shapes: what a compiler is told, and which shapes parity is measured at.

The order of keys in YAML carries no meaning, so profiles and axes are taken by name.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping
from typing import Any

from recipes.schema import Recipe, Tensor

Shape = list[int]
CORNERS = ("min", "opt", "max")


def tensor_shape(tensor: Tensor, extents: Mapping[str, int]) -> Shape:
    """Return the tensor's shape with every dynamic axis at the given extent."""
    return [axis if isinstance(axis, int) else extents[axis] for axis in tensor.shape]


def profile_shapes(recipe: Recipe) -> list[dict[str, Any]]:
    """Return every profile as JSON, by name: `{"name", "inputs": {input: {"min": [...], "opt": [...], "max": [...]}}}`.

    A recipe without dynamic axes has the one profile `static`.
    """
    profiles: Mapping[str, Mapping[str, list[int]]] = recipe.profiles or {"static": {}}
    return [
        {
            "name": name,
            "inputs": {
                input_name: {
                    corner: tensor_shape(tensor, {axis: extents[index] for axis, extents in ranges.items()})
                    for index, corner in enumerate(CORNERS)
                }
                for input_name, tensor in recipe.inputs.items()
            },
        }
        for name, ranges in sorted(profiles.items())
    ]


def parity_cases(recipe: Recipe) -> list[dict[str, Any]]:
    """Return the distinct shapes at min, opt and max of every profile: `[{"name", "shapes": {input: [...]}}]`.

    Shapes that two profiles share are listed once, under the first name.
    """
    cases: list[dict[str, Any]] = []
    for profile, corner in itertools.product(profile_shapes(recipe), CORNERS):
        shapes = {name: corners[corner] for name, corners in profile["inputs"].items()}
        if all(case["shapes"] != shapes for case in cases):
            cases.append({"name": f"{profile['name']}/{corner}", "shapes": shapes})
    return cases


def random_cases(recipe: Recipe, count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Return `count` seeded random shapes inside the profiles (corners excepted only by chance)."""
    choose = random.Random(seed)
    cases: list[dict[str, Any]] = []
    for index in range(count if recipe.axes else 0):
        name, ranges = choose.choice(sorted(recipe.profiles.items()))
        extents = {axis: choose.randint(low, high) for axis, (low, _opt, high) in sorted(ranges.items())}
        shapes = {input_name: tensor_shape(tensor, extents) for input_name, tensor in recipe.inputs.items()}
        cases.append({"name": f"{name}/random-{index}", "shapes": shapes})
    return cases


def trace_shapes(recipe: Recipe) -> dict[str, Shape]:
    """Return the shapes that an exporter traces with: the least opt of each axis, those of 1 raised to 2.

    An exporter that sees an extent of 1 may specialise the graph on it (broadcasting), so where the
    profiles allow 2 anywhere, 2 is used.
    """
    extents: dict[str, int] = {}
    for axis in recipe.axes:
        ranges = [profile[axis] for profile in recipe.profiles.values()]
        least = min(opt for _low, opt, _high in ranges)
        extents[axis] = 2 if least == 1 and any(high >= 2 for _low, _opt, high in ranges) else least
    return {name: tensor_shape(tensor, extents) for name, tensor in recipe.inputs.items()}


def axis_names(tensor: Tensor) -> dict[str, str]:
    """Return the tensor's dynamic axes as JSON: position (a decimal string) -> name."""
    return {str(position): axis for position, axis in enumerate(tensor.shape) if isinstance(axis, str)}
