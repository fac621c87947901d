"""Fallbacks: what is served where the engine of a target cannot be built. Verified as an engine is, and published beside them.

Of the kind `onnx` is the simplified fp32 graph, for ONNX Runtime with the execution providers that the host has. Of the
kind `source` is the model itself, as its framework runs it without the recipe's code: an exported program (or TorchScript) of
PyTorch's, an inference model of Paddle's, the author's own ONNX. That one needs no exporter to ONNX. Each is published once for
all targets that ask for it, since its bytes do not depend on them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Final, Literal, get_args

from recipes.engine_stages import EngineStages
from recipes.gates import judge
from recipes.pipeline import PADDLE
from recipes.plan import EnginePlan, Selection, Trial
from recipes.publishing import published_fallback
from recipes.schema import Recipe
from recipes.steps import Step
from recipes.together import TogetherStages

Kind = Literal["onnx", "source"]
# Fallbacks are no engines of a GPU: this stands for one in the names of their target and steps.
NAMES: Final[Mapping[Kind, str]] = {"onnx": "fallback", "source": "source"}
RUNTIME: Final = "onnxruntime"
CACHE: Final = "{cache}"


def asking(recipe: Recipe, kind: Kind) -> list[tuple[str, str]]:
    """Return the targets that ask for a kind of fallback, as runtime and GPU, in the recipe's order."""
    return [
        (target.runtime, gpu)
        for target in recipe.targets
        if (target.fallback or (recipe.fallback if target.runtime != RUNTIME else None)) == kind
        for gpu in target.gpus
    ]


def runtime_of(recipe: Recipe, kind: Kind) -> str:
    """Return what serves a fallback: ONNX Runtime, or the source's own framework."""
    framework = recipe.source.framework
    return RUNTIME if kind == "onnx" or framework == "onnx" else framework


def targets_of(recipe: Recipe) -> list[str]:
    """Return the names by which --target chooses fallbacks: onnxruntime:fallback, torch:source."""
    return [f"{runtime_of(recipe, kind)}:{NAMES[kind]}" for kind in get_args(Kind) if asking(recipe, kind)]


def fallbacks(
    whole: EngineStages,
    parts: Mapping[str, EngineStages],
    recipe: Recipe,
    chosen: Selection,
    together: TogetherStages | None = None,
) -> list[EnginePlan]:
    """Plan each kind of fallback that a chosen target asks for."""
    found = []
    for kind in get_args(Kind):
        asked, own = asking(recipe, kind), (runtime_of(recipe, kind), NAMES[kind])
        if any(chosen.includes(runtime, gpu) for runtime, gpu in (*asked, *([own] if asked else []))):
            found.append(_planned(whole, parts, recipe, kind, together))
    return found


def _planned(
    whole: EngineStages,
    parts: Mapping[str, EngineStages],
    recipe: Recipe,
    kind: Kind,
    together: TogetherStages | None,
) -> EnginePlan:
    asked, runtime, name = asking(recipe, kind), runtime_of(recipe, kind), NAMES[kind]
    version = _version(whole, runtime)
    target = "-".join(filter(None, (runtime, version, name)))
    base = EnginePlan(target, runtime, version, name, "fp32", None, "run", fallback=kind)
    if not version:
        return replace(base, state="waiting", why=f"needs a host with {runtime}; it is not installed here")
    verified = _verified if kind == "onnx" else _verified_source
    graphs = parts or {"": whole}
    made = {name: verified(stages, base) for name, stages in graphs.items()}
    reasons = [f"{name}: {one.why}" if name else one.why for name, one in made.items() if one.state == "failed"]
    if reasons:
        trials = tuple(trial for one in made.values() for trial in one.trials)
        return replace(base, state="failed", why="; ".join(reasons), trials=trials)
    engine = replace(base, given="fp32", parts=made) if parts else made[""]
    if together is not None:
        engine = replace(engine, together=together.measured(engine))
        verdict = together.verdict(engine.together)
        if verdict is not None and not verdict.passed:
            why = f"the fallback fails its gates: {', '.join(verdict.reasons)}"
            return replace(engine, state="failed", why=why, trials=(Trial("fp32", verdict),))
    stated: dict[str, Any] = {
        "kind": kind,
        "instead_of": [f"{runtime}:{gpu}" for runtime, gpu in asked],
        "gpus": ["cpu", *dict.fromkeys(gpu for _runtime, gpu in asked if gpu != "cpu")],
    }
    if runtime == RUNTIME:
        stated["providers"] = {name: providers_of(stages.pipeline.profiles) for name, stages in graphs.items()}
    return published_fallback(whole, parts, engine, stated, together)


def _version(stages: EngineStages, runtime: str) -> str:
    if runtime == RUNTIME:
        return stages.host.runtimes.get(RUNTIME, "")
    packages = {"torch": ("torch",), "paddle": PADDLE}[runtime]
    return next((found for package in packages if (found := stages.pipeline.version(package)) is not None), "")


def _verified(stages: EngineStages, base: EnginePlan) -> EnginePlan:
    """Describe the fp32 graph up to the verdict on it, as ONNX Runtime serves it."""
    pipeline = stages.pipeline
    typed = pipeline.typed("fp32")
    graph = pipeline.verify(pipeline.id("verify", "fp32"), "graph", typed)
    served = pipeline.verify(pipeline.id("verify", NAMES["onnx"]), "fallback", typed)
    engine = replace(base, given="fp32", typed="fp32", compile=typed, verify=graph, engine_verify=served)
    return _judged(stages, engine, (graph, served))


def _verified_source(stages: EngineStages, base: EnginePlan) -> EnginePlan:
    """Describe saving the source up to the verdict on what its framework makes of the files alone."""
    saved, served = stages.pipeline.save, stages.pipeline.verify_saved(base.runtime)
    engine = replace(base, given="fp32", typed="fp32", compile=saved, verify=served, engine_verify=served)
    return _judged(stages, engine, (served,))


def _judged(stages: EngineStages, engine: EnginePlan, steps: Sequence[Step]) -> EnginePlan:
    for step in steps:
        if step.facts is None:
            continue
        if step.facts.get("plugin"):
            return replace(engine, state="failed", why=f"ONNX Runtime cannot serve the model: {step.facts['reason']}")
        verdict = judge(step.facts, stages.pipeline.recipe.acceptance, "fp32")
        if not verdict.passed:
            why = f"the fallback fails its gates: {', '.join(verdict.reasons)}"
            return replace(engine, state="failed", why=why, trials=(Trial("fp32", verdict),))
    return engine


def providers_of(profiles: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return ONNX Runtime's execution providers, the fastest first, with their options as it takes them.

    TensorRT gets one profile from the least to the greatest extents of all, and the first one's best; and keeps engines and
    timings in a folder that whoever loads the graph gives in place of `CACHE`.
    Source: ONNX Runtime, TensorRT execution provider, "Configurations" and "Shape inference for dynamic shapes".
    """
    cached = {
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": CACHE,
        "trt_timing_cache_enable": "1",
        "trt_timing_cache_path": CACHE,
    }
    corners: dict[Literal["min", "opt", "max"], list[str]] = {"min": [], "opt": [], "max": []}
    for name in profiles[0]["inputs"] if profiles else ():
        spans = [profile["inputs"][name] for profile in profiles]
        if all(span["min"] == span["max"] == spans[0]["min"] for span in spans):
            continue  # nothing of it is dynamic
        least = [min(extents) for extents in zip(*(span["min"] for span in spans), strict=True)]
        most = [max(extents) for extents in zip(*(span["max"] for span in spans), strict=True)]
        for corner, shape in (("min", least), ("opt", spans[0]["opt"]), ("max", most)):
            corners[corner].append(f"{name}:{'x'.join(map(str, shape))}")  # type: ignore[index]
    shapes = {f"trt_profile_{corner}_shapes": ",".join(found) for corner, found in corners.items() if found}
    return [
        {"name": "TensorrtExecutionProvider", "options": {**cached, **shapes}},
        {"name": "CUDAExecutionProvider", "options": {}},
        {"name": "CPUExecutionProvider", "options": {}},
    ]
