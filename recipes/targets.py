"""What runtimes can build for which GPUs: facts about hardware and versions, and the rules that follow for targets.

Sources: facts/tensorrt.md sections 1 and 2 (TensorRT-RTX's ComputeCapability enum and the builds that were tried, opset
ceilings, types by version), section 3 (hardware compatibility), section 5 (what TensorRT-RTX lacks).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Final

from recipes.choosing import candidates_of
from recipes.nodes import Key, near
from recipes.options import calibrator_refusal, options_of, place_of, refusals, uses_calibrator, version_numbers
from recipes.schema import FP8, GPUS, INT8, PRECISIONS, Options, Precision, Recipe, Target

Found = Iterator[tuple[Key, str]]

# Names that people write instead of a compute capability.
_CARDS: Final = {
    "t4": "sm75", "rtx2080": "sm75", "a100": "sm80", "a30": "sm80", "a10": "sm86", "a10g": "sm86", "a40": "sm86",
    "a6000": "sm86", "rtx3090": "sm86", "orin": "sm87", "l4": "sm89", "l40": "sm89", "l40s": "sm89", "rtx4090": "sm89",
    "rtx6000ada": "sm89", "h100": "sm90", "h200": "sm90", "gh200": "sm90", "b200": "sm100", "gb200": "sm100",
    "b300": "sm103", "thor": "sm110", "rtx5090": "sm120", "rtxpro6000": "sm120", "dgxspark": "sm121",
}  # fmt: skip
# Tensor cores multiply fp8 from compute capability 8.9 on; for older ones TensorRT-RTX says "Cannot compile for target(s)".
_BEFORE_FP8: Final = ("sm75", "sm80", "sm86", "sm87")
# ONNX has the types of these graphs from there on: half Q/DQ pairs and e4m3 from 19, bfloat16 in Conv and pooling from 22.
TYPED_OPSETS: Final[Mapping[Precision, int]] = {"int8-fp16": 19, "fp8": 19, "fp8-fp16": 19, "bf16": 22}
_VERSION: Final = re.compile(r"[0-9]+(\.[0-9]+){2,3}([a-z.+-][A-Za-z0-9.+-]*)?")


def check_targets(recipe: Recipe) -> Found:
    """Yield what is wrong with the targets: path and message."""
    seen: dict[tuple[str, str, str | None], int] = {}
    for index, target in enumerate(recipe.targets):
        at: Key = ("targets", index)
        yield from _check_gpus(target, at)
        yield from _check_version(target, at)
        yield from _check_precisions(recipe, target, at)
        for position, gpu in enumerate(target.gpus):
            same = (target.runtime, gpu, target.version)
            if same in seen:
                where = "above" if seen[same] == index else f"by targets[{seen[same]}]"
                yield (*at, "gpus", position), f"{target.runtime} for {gpu} is asked for {where} already"
            seen.setdefault(same, index)
        yield from _check_opset(recipe, target, at)
    yield from _check_options(recipe)


def refusal(runtime: str, gpu: str, precision: Precision, version: str | None = None) -> str | None:
    """Say why a runtime cannot build a precision for a GPU, or None where nothing is known against it."""
    if precision not in PRECISIONS[runtime]:
        return f"{runtime} has no precision {precision} (allowed: {', '.join(PRECISIONS[runtime])})"
    if gpu == "sm75":
        if runtime == "tensorrt-rtx" and precision != "fp16":
            return f"TensorRT-RTX does not compile {precision} for sm75 (Turing); allowed: fp16"
        if precision in ("tf32", "bf16"):
            return f"sm75 (Turing) has no {precision}; it begins with sm80"
    major = _major(version)
    if runtime == "tensorrt" and major is not None and major < 10 and precision == "bf16":
        return f"TensorRT {version} has no bf16; it begins with TensorRT 10"
    if precision in FP8:
        if gpu in _BEFORE_FP8:
            return f"{gpu} has no fp8; it begins with sm89 (Ada), allowed: {', '.join(_with_fp8(runtime))}"
        if runtime == "tensorrt" and major is not None and major < 10:
            return f"TensorRT {version} has no fp8; it begins with TensorRT 10"
    return None


def _with_fp8(runtime: str) -> list[str]:
    return [gpu for gpu in GPUS[runtime] if gpu not in _BEFORE_FP8]


def lowers_beside_pairs(runtime: str, version: str | None) -> bool:
    """Tell whether int8-fp16 is an int8 graph whose rest the compiler may lower: TensorRT 8.6, which reads no later one."""
    major = _major(version)
    return runtime == "tensorrt" and major is not None and major < 10


def typed_precision(
    recipe: Recipe, runtime: str, options: Options, version: str | None, precision: Precision
) -> Precision:
    """Return the precision of the graph that the compiler gets: a higher one where it is to lower the graph itself."""
    if uses_calibrator(recipe, runtime, precision):
        return "fp32"
    weak = runtime == "tensorrt" and options.typing == "weak"
    if precision == "int8-fp16":
        # Half Q/DQ pairs begin with opset 19, of which 8.6 reads 17: it gets the int8 graph, and lowers the rest of it.
        return "int8" if weak or lowers_beside_pairs(runtime, version) else precision
    return "fp32" if weak and precision not in ("int8", "tf32", *FP8) else precision


def typed_refusal(runtime: str, version: str | None, typed: Precision) -> str | None:
    """Say why a version of TensorRT cannot parse a graph of this precision, whose types need a later opset than it reads."""
    ceiling, least = opset_ceiling(runtime, version), TYPED_OPSETS.get(typed, 0)
    if ceiling is None or least <= ceiling:
        return None
    return f"TensorRT {version} reads ONNX up to opset {ceiling}, and a graph in {typed} has opset {least} or later"


def opset_ceiling(runtime: str, version: str | None) -> int | None:
    """Return the highest ONNX opset that a version of a runtime reads, where that is known."""
    numbers = version_numbers(version)
    if runtime != "tensorrt" or not numbers:
        return None
    if numbers[0] < 10:
        return 17
    return 20 if numbers[:2] in ((10, 0), (10, 1)) else None


def _check_gpus(target: Target, at: Key) -> Found:
    allowed = GPUS[target.runtime]
    if "gpus" not in target.model_fields_set and "cpu" not in allowed:
        yield at, f"gpus is required for {target.runtime}, and missing (allowed: {', '.join(allowed)})"
        return
    for position, gpu in enumerate(target.gpus):
        if gpu in allowed:
            major = _major(target.version)
            if target.runtime == "tensorrt" and major is not None and major < 10 and len(gpu) == len("sm100"):
                yield (*at, "gpus", position), f"TensorRT {target.version} is older than {gpu}; it needs TensorRT 10"
            continue
        plain = re.sub(r"[^a-z0-9]", "", gpu.lower()).removeprefix("nvidia").removeprefix("geforce")
        capability = _CARDS.get(plain, "sm" + re.sub(r"[^0-9]", "", plain.removeprefix("sm")))
        hint = f"did you mean {capability!r}? " if capability in allowed else near(gpu, allowed)
        if capability not in allowed and capability in GPUS["tensorrt"]:
            hint = f"{capability} takes runtime: tensorrt; "
        message = f"{target.runtime} does not build for {gpu!r} ({hint}allowed: {', '.join(allowed)})"
        yield (*at, "gpus", position), message


def _check_version(target: Target, at: Key) -> Found:
    if target.version is not None and not _VERSION.fullmatch(target.version):
        like = {"tensorrt": "10.16.1.11", "tensorrt-rtx": "1.7.1.116", "onnxruntime": "1.31.1"}[target.runtime]
        what = (
            f"{target.version!r} is not a full version, such as {like} (an engine loads only where all of it is equal)"
        )
        yield (*at, "version"), what


def _check_precisions(recipe: Recipe, target: Target, at: Key) -> Found:
    asked = target.precision if target.precision is not None else recipe.precision.build
    for position, precision in enumerate(asked):
        if precision == "auto":
            yield from _check_candidates(recipe, target, at)
            continue
        own = target.precision is not None
        if own and precision in asked[:position]:
            yield (*at, "precision", position), f"{precision} is named twice"
            continue
        reasons = [why for gpu in target.gpus if (why := refusal(target.runtime, gpu, precision, target.version))]
        typed = typed_precision(recipe, target.runtime, options_of(recipe, target), target.version, precision)
        unread = typed_refusal(target.runtime, target.version, typed)
        reasons += [unread] if unread is not None else []
        if reasons and own:
            yield (*at, "precision", position), reasons[0]
        elif reasons:
            yield at, f"{reasons[0]}, and precision.build asks for it: state this target's own precision"


def _check_candidates(recipe: Recipe, target: Target, at: Key) -> Found:
    candidates = candidates_of(recipe, target)
    for position, gpu in enumerate(target.gpus):
        reasons = [refusal(target.runtime, gpu, precision, target.version) for precision in candidates]
        if gpu in GPUS[target.runtime] and all(reasons):
            first = next((why for why in reasons if why is not None), "it has none")
            yield (*at, "gpus", position), f"auto has no candidate for {gpu}: {first}"


def _check_opset(recipe: Recipe, target: Target, at: Key) -> Found:
    ceiling = opset_ceiling(target.runtime, target.version)
    default = 18 if recipe.source.framework in ("torch", "paddle") else None
    opset = recipe.export.opset or default
    if ceiling is not None and opset is not None and opset > ceiling:
        how = f"set export.opset to {ceiling}"
        how += " and export.exporter to torchscript" if recipe.source.framework == "torch" and ceiling < 18 else ""
        yield at, f"TensorRT {target.version} reads ONNX up to opset {ceiling}, the graph gets {opset}: {how}"


def _check_options(recipe: Recipe) -> Found:
    told: set[tuple[Key, str]] = set()
    for index, target in enumerate(recipe.targets):
        options = options_of(recipe, target)
        own = target.build.model_fields_set if target.build is not None else frozenset[str]()
        if own and target.runtime == "onnxruntime":
            yield ("targets", index, "build"), "has no effect: ONNX Runtime takes none of these options"
        for gpu in target.gpus:
            for option, why in refusals(options, target.runtime, gpu, target.version):
                where = place_of(recipe, index, option)
                if (where, why) not in told:
                    told.add((where, why))
                    yield where, why
        asked = target.precision if target.precision is not None else recipe.precision.build
        refused = calibrator_refusal(options, target.runtime, target.version)
        if not set(INT8).isdisjoint(asked) and recipe.precision.int8 == "calibrator" and refused is not None:
            yield ("precision", "int8"), refused
        if options.typing == "weak" and target.runtime == "tensorrt" and recipe.precision.io == "native":
            yield (
                ("precision", "io"),
                "native is the typed graph's own type, and build.typing: weak compiles the fp32 graph",
            )
    if recipe.build.refit != "none" and all(target.runtime != "tensorrt" for target in recipe.targets):
        yield (
            ("build", "refit"),
            "has no effect: only engines of the runtime tensorrt can be refitted, and no target is of it",
        )


def _major(version: str | None) -> int | None:
    numbers = version_numbers(version)
    return numbers[0] if numbers else None
