"""Options of the compiler: what holds for one target, what a runtime, version or GPU cannot do, and what enters the key.

Sources: facts/tensorrt.md section 1 (flags and members by version, read from the bindings of 8.6, 10.16 and 11.4), NVIDIA's
"Working with DLA" (supported up to 10.7, and again from 11.4.1 on AGX Orin) and "Weight Streaming" (strongly typed networks
only) of the versions named.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, Final

from recipes.nodes import Key
from recipes.schema import INT8, DeviceClass, Options, Pinned, Plugin, Precision, Recipe, Target, size_bytes

# Scratch memory that a tactic may ask for, which the engine needs again wherever it runs. A data-centre GPU serves nothing
# else, so the compiler's own default holds (all of its memory). A workstation's has 8 GiB and more, and draws a desktop. A
# Jetson shares 4 to 64 GiB with the CPU and everything that runs there.
WORKSPACES: Final[Mapping[DeviceClass, int | None]] = MappingProxyType(
    {"data-center": None, "workstation": 2 << 30, "jetson": 256 << 20}
)
# Names of BuilderFlags, MemoryPools and tactic sources are TensorRT's; recipes spell them like everything else in them.
_REMOVED_IN_11: Final = ("cublas", "cublas-lt", "cudnn")
# Options that pin a file of an earlier build, and the name that it has among the inputs of a compilation.
PINS: Final[Mapping[str, str]] = MappingProxyType({"timing_cache": "timing.cache", "layers": "expected-layers.json"})
_DLA_GPUS: Final = ("sm87",)
_WEAK: Final = "TensorRT 8.6, or 10 with build.typing: weak"

Found = Iterator[tuple[str, str]]


def options_of(recipe: Recipe, target: Target) -> Options:
    """Return the options that hold for a target: the recipe's, with what the target states in their place."""
    if target.build is None:
        return recipe.build
    stated = {name: getattr(target.build, name) for name in target.build.model_fields_set}
    return recipe.build.model_copy(update=stated)


def place_of(recipe: Recipe, index: int, option: str) -> Key:
    """Return the path at which an option of a target is stated."""
    own = recipe.targets[index].build
    return (
        ("targets", index, "build", option) if own is not None and option in own.model_fields_set else ("build", option)
    )


def stated_plugins(recipe: Recipe) -> list[tuple[Key, list[Plugin]]]:
    """Return every list of plugins that a recipe states, with its path."""
    found: list[tuple[Key, list[Plugin]]] = [(("build", "plugins"), recipe.build.plugins)]
    for index, target in enumerate(recipe.targets):
        if target.build is not None:
            found.append((("targets", index, "build", "plugins"), target.build.plugins))
    return found


def stated_pins(recipe: Recipe) -> list[tuple[Key, str, Pinned]]:
    """Return every file of an earlier build that a recipe pins: its path there, the option's name, and the file."""
    parts: list[tuple[Key, Options]] = [(("build",), recipe.build)]
    parts += [(("targets", i, "build"), target.build) for i, target in enumerate(recipe.targets) if target.build]
    found = [((*at, name), name, getattr(options, name)) for at, options in parts for name in PINS]
    return [(at, name, pinned) for at, name, pinned in found if pinned is not None]


def may_refit(recipe: Recipe) -> bool:
    """Tell whether engines of some target are to be refitted, so that the structure of graphs has to be known."""
    return any(target.runtime == "tensorrt" and options_of(recipe, target).refit != "none" for target in recipe.targets)


def uses_calibrator(recipe: Recipe, runtime: str, precision: Precision) -> bool:
    """Tell whether int8 ranges of an engine come from TensorRT's calibrator rather than from Q/DQ pairs."""
    return runtime == "tensorrt" and precision in INT8 and recipe.precision.int8 == "calibrator"


def refusals(options: Options, runtime: str, gpu: str, version: str | None) -> Found:
    """Yield (option, why) for every option that a runtime, version or GPU does not have; an unknown version refuses nothing.

    ONNX Runtime takes none of the options and is not asked.
    """
    if runtime == "tensorrt-rtx":
        yield from _rtx(options)
    elif runtime == "tensorrt":
        numbers = version_numbers(version)
        yield from _anywhere(options, gpu)
        if numbers:
            yield from _in_version(options, numbers, version or "")


def calibrator_refusal(options: Options, runtime: str, version: str | None) -> str | None:
    """Say why a target cannot take int8 ranges from TensorRT's calibrator, or None."""
    numbers = version_numbers(version)
    if runtime != "tensorrt":
        return f"{runtime} has no int8 calibrator ({_WEAK}): leave precision.int8 at qdq, or state other precisions"
    if numbers and numbers[0] >= 11:
        return f"TensorRT {version} has no calibrators ({_WEAK}): leave precision.int8 at qdq"
    if numbers and numbers[0] == 10 and options.typing != "weak":
        return f"TensorRT {version} calibrates weakly typed networks only: set build.typing to weak, or leave precision.int8 at qdq"
    return None


def compile_params(options: Options, runtime: str) -> dict[str, Any]:
    """Return what of the options enters the key of a compilation, as the backends take it; what is not set is left out.

    The first four have been there from the start and always are.
    """
    stated = size_bytes(options.workspace) if options.workspace is not None else None
    params: dict[str, Any] = {
        "workspace": stated if stated is not None else WORKSPACES[options.device_class],
        "optimization_level": options.optimization_level,
        "hardware_compatibility": options.hardware_compatibility,
        "version_compatible": options.version_compatible,
    }
    if runtime != "tensorrt":
        return params
    more: dict[str, Any] = {
        "sparse_weights": options.sparsity or None,
        "tactic_sources": sorted(set(options.tactic_sources)) if options.tactic_sources is not None else None,
        "refit": options.refit if options.refit != "none" else None,
        "weight_streaming": options.weight_streaming or None,
        "max_aux_streams": options.auxiliary_streams,
        "dla": dict(options.dla) if options.dla is not None else None,
        "timing_cache": "pinned" if options.timing_cache is not None else None,
        "reproducible": options.reproducible or None,
    }
    return params | {name: value for name, value in more.items() if value is not None}


def version_numbers(version: str | None) -> tuple[int, ...]:
    """Return the numbers that a version begins with; none for None and for what is no version."""
    found = re.match(r"[0-9]{1,6}(\.[0-9]{1,6})*", version or "")
    return tuple(int(part) for part in found[0].split(".")) if found else ()


def _rtx(options: Options) -> Found:
    if options.hardware_compatibility != "none":
        yield (
            "hardware_compatibility",
            "TensorRT-RTX has no hardware compatibility; its engines name their GPUs (allowed: none)",
        )
    if options.version_compatible:
        yield "version_compatible", "TensorRT-RTX cannot build version-compatible engines; leave it out"
    if options.typing == "weak":
        yield "typing", f"TensorRT-RTX knows strongly typed networks only (weak: {_WEAK.partition(' with')[0]})"
    lacking = {
        "sparsity": options.sparsity,
        "tactic_sources": options.tactic_sources is not None,
        "weight_streaming": options.weight_streaming,
        "auxiliary_streams": options.auxiliary_streams is not None,
        "plugins": bool(options.plugins),
        "dla": options.dla is not None,
        "timing_cache": options.timing_cache is not None,
        "reproducible": options.reproducible,
        "layers": options.layers is not None,
    }
    for name in (name for name, asked in lacking.items() if asked):
        yield name, f"{_RTX[name]}; state it for the targets of the runtime tensorrt, under targets[].build"


_RTX: Final = {
    "sparsity": "TensorRT-RTX chooses kernels on the user's GPU, and is not asked for sparse ones here",
    "tactic_sources": "TensorRT-RTX times no tactics when it builds",
    "weight_streaming": "TensorRT-RTX's weight streaming is not supported here",
    "auxiliary_streams": "TensorRT-RTX decides on streams on the user's GPU",
    "plugins": "TensorRT-RTX has no plugin layers",
    "dla": "TensorRT-RTX has no DLA",
    "timing_cache": "TensorRT-RTX times no tactics when it builds",
    "reproducible": "TensorRT-RTX chooses kernels on the user's GPU",
    "layers": "TensorRT-RTX's plans are listed on the user's GPU only",
}


def _anywhere(options: Options, gpu: str) -> Found:
    if options.hardware_compatibility == "ampere+" and gpu == "sm75":
        yield "hardware_compatibility", "ampere+ leaves out sm75 (Turing), which is a target"
    if options.sparsity and gpu == "sm75":
        yield "sparsity", "sm75 (Turing) has no kernels for sparse weights; they begin with sm80"
    if options.dla is not None and gpu not in _DLA_GPUS:
        yield "dla", f"{gpu} has no DLA (allowed: {', '.join(_DLA_GPUS)}, which is Orin)"
    yield from _pins(options)
    if options.weight_streaming and options.typing == "weak":
        yield "weight_streaming", "weight streaming takes strongly typed networks: leave build.typing at strong"


def _pins(options: Options) -> Found:
    asked = [name for name in PINS if getattr(options, name) is not None] + ["reproducible"] * options.reproducible
    if asked and options.optimization_level == 0:
        yield asked[0], "optimization_level 0 takes no timing cache: raise it, or leave this out"


def _in_version(options: Options, numbers: tuple[int, ...], version: str) -> Found:
    asks = f"and a target asks for {version}"
    if options.hardware_compatibility == "same-compute-capability" and numbers < (10, 9):
        yield "hardware_compatibility", f"same-compute-capability begins with TensorRT 10.9, {asks}"
    if options.refit == "stripped" and numbers < (10,):
        yield "refit", f"stripped plans begin with TensorRT 10.0, {asks} (allowed: none, weights)"
    if options.refit != "none" and numbers < (9,):  # strings of libnvinfer.so.8.6.0
        if options.version_compatible:
            yield "refit", f"TensorRT 8.6 does not refit version-compatible plans, {asks}: leave one of the two out"
        if options.dla is not None:
            yield "refit", f"TensorRT 8.6 does not refit what runs on the DLA, {asks}: leave one of the two out"
    if options.weight_streaming and numbers < (10,):
        yield "weight_streaming", f"weight streaming begins with TensorRT 10.0, {asks}"
    if options.reproducible and options.timing_cache is not None and options.layers is None and numbers < (10, 8):
        what = "timing caches whose table of tactics can be compared begin with TensorRT 10.8"
        yield "reproducible", f"{what}, {asks}: state build.layers, the listing of the build that made the timing cache"
    if options.typing == "weak" and numbers >= (11,):
        yield "typing", f"weak typing ended with TensorRT 10, {asks} (allowed: strong)"
    gone = [name for name in options.tactic_sources or () if name in _REMOVED_IN_11]
    if gone and numbers >= (11,):
        yield "tactic_sources", f"{', '.join(gone)} ended with TensorRT 10, {asks}"
    if options.dla is not None and (10, 8) <= numbers < (11, 4, 1):
        yield "dla", f"DLA is there up to TensorRT 10.7 and from 11.4.1, {asks}"
