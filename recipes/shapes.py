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
    """Return the distinct shapes that parity is measured at: `[{"name", "shapes": {input: [...]}}]`.

    They are min, opt and max of every profile, then one more of each where axes move apart (`mixed`: by name, they take
    turns at min and max): corners are often squares, and a graph that confuses height with width is right at those.
    Shapes that two profiles share are listed once, under the first name.
    """
    cases: list[dict[str, Any]] = []
    for profile, corner in itertools.product(profile_shapes(recipe), CORNERS):
        _add(cases, f"{profile['name']}/{corner}", {name: shape[corner] for name, shape in profile["inputs"].items()})
    for name, ranges in sorted(recipe.profiles.items()):
        moving = sorted(axis for axis, (low, _opt, high) in ranges.items() if low < high)
        turns = {axis: ranges[axis][0 if moving.index(axis) % 2 == 0 else 2] for axis in moving}
        extents = {axis: low for axis, (low, _opt, _high) in ranges.items()} | turns
        _add(cases, f"{name}/mixed", {key: tensor_shape(tensor, extents) for key, tensor in recipe.inputs.items()})
    return cases


def _add(cases: list[dict[str, Any]], name: str, shapes: dict[str, Shape]) -> None:
    if all(case["shapes"] != shapes for case in cases):
        cases.append({"name": name, "shapes": shapes})


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


def batch_axis(recipe: Recipe) -> str | None:
    """Return the dynamic axis that all inputs begin with, or None where they do not share one."""
    first = {tensor.shape[0] if tensor.shape else None for tensor in recipe.inputs.values()}
    axis = first.pop() if len(first) == 1 else None
    return axis if isinstance(axis, str) else None


def benchmark_cases(recipe: Recipe) -> list[dict[str, Any]]:
    """Return the shapes that speed is measured at: `[{"name", "profile", "batch", "shapes": {input: [...]}}]`.

    They are opt of every profile, with the batch axis at each of the recipe's `benchmark.batches` that the profile
    admits, where it states any. `batch` is how many samples one run takes: the extent of the batch axis, or else of the
    first axis of the first input.
    """
    axis = batch_axis(recipe)
    wanted = recipe.benchmark.batches if recipe.benchmark is not None else None
    cases: list[dict[str, Any]] = []
    for name, ranges in sorted(recipe.profiles.items()) or [("static", {})]:
        best = {key: opt for key, (_low, opt, _high) in ranges.items()}
        low, opt, high = ranges[axis] if axis is not None else (0, 0, 0)
        sizes = [opt] if axis is None or wanted is None else [size for size in wanted if low <= size <= high]
        for size in sizes:
            extents = best | ({axis: size} if axis is not None else {})
            shapes = {key: tensor_shape(tensor, extents) for key, tensor in recipe.inputs.items()}
            first = next(iter(shapes.values()))
            batch = size if axis is not None else (first[0] if first else 1)
            cases.append({"name": f"{name}/{batch}", "profile": name, "batch": batch, "shapes": shapes})
    return cases


def axis_names(tensor: Tensor) -> dict[str, str]:
    """Return the tensor's dynamic axes as JSON: position (a decimal string) -> name."""
    return {str(position): axis for position, axis in enumerate(tensor.shape) if isinstance(axis, str)}
