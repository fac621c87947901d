"""Parts: a recipe that exports several graphs of one model, seen as one recipe for each of them.

What a part does not say is the recipe's: how it is exported, the precisions and what takes their place, parity bounds, the
profiles for the axes that it has. Data belong to a part alone, since inputs do. See docs/adr/0007-parts.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

from recipes.nodes import Key
from recipes.schema import Asked, OnnxSource, PaddleSource, Part, PartPrecision, Precision, PrecisionPlan, Recipe

# Folders of an engine in a store, words that name steps of the whole, and folders of a step that runs all parts.
RESERVED: Final = ("signatures", "verification", "composition", "fallback", "together", "run", "shared")


def built_in(part: Part, asked: Precision) -> Precision:
    """Return what a part is built in where its engine is asked for in a precision."""
    return part.precision.build.get(asked, asked) if part.precision is not None else asked


def part_recipe(recipe: Recipe, name: str) -> Recipe:
    """Return one part of a recipe as a recipe of one graph."""
    part = recipe.parts[name]

    def own(asked: Sequence[Asked]) -> list[Asked]:
        return list(dict.fromkeys(one if one == "auto" else built_in(part, one) for one in asked))

    targets = [
        target if target.precision is None else target.model_copy(update={"precision": own(target.precision)})
        for target in recipe.targets
    ]
    build = own(recipe.precision.build)
    wanted = {*build, *(one for target in targets for one in target.precision or ())}
    precision = _precision(recipe.precision, part.precision or PartPrecision.model_construct(), build, wanted)
    lowered = {*wanted, *(one for chain in precision.fallback.values() for one in chain), "fp32"}
    acceptance = recipe.acceptance.model_copy(
        update={
            "parity": {
                **{one: bounds for one, bounds in recipe.acceptance.parity.items() if one in lowered},
                **(part.acceptance.parity if part.acceptance is not None else {}),
            },
            "metric": part.acceptance.metric if part.acceptance is not None else None,
            "together": None,
        }
    )
    changes = {
        "parts": {},
        "source": part.source or recipe.source,
        "inputs": part.inputs,
        "outputs": part.outputs,
        "export": part.export or recipe.export,
        "precision": precision,
        "acceptance": acceptance,
        "targets": targets,
    }
    made = recipe.model_copy(update=changes)
    profiles = part.profiles
    if profiles is None:
        narrowed = {
            profile: {axis: extents for axis, extents in ranges.items() if axis in made.axes}
            for profile, ranges in recipe.profiles.items()
        }
        profiles = narrowed if made.axes else {}
    return made.model_copy(update={"profiles": profiles})


def _precision(whole: PrecisionPlan, part: PartPrecision, build: list[Asked], wanted: set[Asked]) -> PrecisionPlan:
    fallback = part.fallback
    if fallback is None:  # an inherited chain for what this part is never built in is no fault
        fallback = {one: chain for one, chain in whole.fallback.items() if one in wanted}
    keep = part.keep
    if keep is None:
        lowered = wanted | {one for chain in fallback.values() for one in chain}
        keep = whole.keep if lowered - {"fp32", "tf32"} else []
    return whole.model_copy(
        update={
            "build": build,
            "fallback": fallback,
            "keep": keep,
            "io": part.io or whole.io,
            "calibration": part.calibration,
        }
    )


def place_in(recipe: Recipe, name: str, path: Key) -> Key:
    """Return where a recipe states what a fault of a part's own recipe is about: in the part, or for all of them."""
    part = recipe.parts[name]
    if not path or path[0] in ("inputs", "outputs"):
        return ("parts", name, *path)
    stated = getattr(part, str(path[0]), None)
    if stated is None:
        return path
    if path[0] == "precision" and len(path) > 1:
        inside = getattr(stated, str(path[1]), None)
        return ("parts", name, *path) if inside else path
    return ("parts", name, *path)


def whole_recipe(recipe: Recipe) -> Recipe | None:
    """Return what its parts do together as a recipe of one graph, whose inputs and metric they are; None without a gate."""
    together = recipe.acceptance.together
    if together is None:
        return None
    acceptance = recipe.acceptance.model_copy(update={"metric": together, "together": None, "parity": {}})
    return recipe.model_copy(update={"parts": {}, "inputs": together.inputs, "outputs": None, "acceptance": acceptance})


def place_in_whole(path: Key) -> Key:
    """Return where a recipe states what a fault of `whole_recipe` is about."""
    return ("acceptance", "together", *(path if path[:1] == ("inputs",) else path[2:]))


def _sources(recipe: Recipe) -> Iterator[tuple[Key, str]]:
    """Yield what is wrong with where parts come from: several may be made of one model, and one of a file."""
    for name, part in recipe.parts.items():
        source = part.source or recipe.source
        if isinstance(source, OnnxSource) or (isinstance(source, PaddleSource) and source.graph is not None):
            what = f"a saved graph is one part: give {name!r} a file of its own, under parts.{name}.source"
            if part.source is None:
                yield ("parts", name), what
            if part.module is not None:
                yield ("parts", name, "module"), "has no effect: a saved graph is the part itself"
    frameworks = {(part.source or recipe.source).framework for part in recipe.parts.values()}
    asked = {target.fallback or recipe.fallback for target in recipe.targets}
    if "source" in asked and len(frameworks) > 1:
        yield (
            ("fallback",),
            f"parts come from {', '.join(sorted(frameworks))}, which no one framework serves: write onnx",
        )
    if recipe.has_own_sources and recipe.source != next(iter(recipe.parts.values())).source:
        yield ("source",), "has no effect: every part has a source of its own"


def check_parts(recipe: Recipe) -> Iterator[tuple[Key, str]]:
    """Yield what is wrong with the parts as such; each is checked as a recipe of its own besides."""
    if not recipe.parts:
        return
    yield from _sources(recipe)
    for field in ("inputs", "outputs"):
        if getattr(recipe, field):
            yield (field,), "belongs to a part: move it to parts.NAME"
    if recipe.precision.calibration is not None:
        yield (
            ("precision", "calibration"),
            "belongs to a part, as inputs do: move it to parts.NAME.precision.calibration",
        )
    if recipe.acceptance.metric is not None:
        what = "belongs to a part, as inputs do: move it to parts.NAME.acceptance.metric, or judge all parts together "
        yield ("acceptance", "metric"), f"{what}by acceptance.together"
    if len(recipe.parts) == 1:
        yield ("parts",), "one part is no reason for parts: state its inputs and outputs in the recipe itself"
    asked = {one for target in recipe.targets for one in target.precision or recipe.precision.build}
    if "auto" in asked:
        yield ("precision", "build"), "auto chooses for models of one graph: name precisions for one in parts"
    chains = {one for chain in recipe.precision.fallback.values() for one in chain}
    for name, part in recipe.parts.items():
        if part.acceptance is not None and part.acceptance.together is not None:
            at_together: Key = ("parts", name, "acceptance", "together")
            yield at_together, "is for all parts: move it to acceptance.together"
        if name in RESERVED:
            yield ("parts", name), f"{name!r} is the name of something else in an engine's folder: choose another"
        for one in part.precision.build if part.precision is not None else ():
            if one not in asked | chains:
                at: Key = ("parts", name, "precision", "build", one)
                yield at, f"no target is asked for in {one}, so this never applies (asked: {', '.join(sorted(asked))})"
    axes = {axis for part in recipe.parts.values() for tensor in part.inputs.values() for axis in tensor.shape}
    for profile, ranges in recipe.profiles.items():
        for axis in ranges:
            if axis not in axes:
                yield ("profiles", profile, axis), f"no part has an axis {axis!r}"
