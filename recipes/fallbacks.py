"""Fallbacks: what is served where the engine of a target cannot be built. Verified as an engine is, and published beside them.

Of the kind `onnx` is the simplified fp32 graph, for ONNX Runtime with the execution providers that the host has. One is
published for all targets that ask for it, since its bytes do not depend on them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Final, Literal

from recipes.engine_stages import EngineStages
from recipes.gates import judge
from recipes.plan import EnginePlan, Selection, Trial
from recipes.publishing import published_fallback
from recipes.schema import Recipe

NAME: Final = "fallback"
# Fallbacks are no engines of a GPU: this stands for one in the names of their target and steps.
RUNTIME: Final = "onnxruntime"
FALLBACK: Final = f"{RUNTIME}:{NAME}"
CACHE: Final = "{cache}"


def asking(recipe: Recipe) -> list[tuple[str, str]]:
    """Return the targets that ask for a fallback, as runtime and GPU, in the recipe's order."""
    return [
        (target.runtime, gpu)
        for target in recipe.targets
        if (target.fallback or (recipe.fallback if target.runtime != RUNTIME else None)) not in (None, "none")
        for gpu in target.gpus
    ]


def fallbacks(
    whole: EngineStages, parts: Mapping[str, EngineStages], recipe: Recipe, chosen: Selection
) -> list[EnginePlan]:
    """Plan the fallback, where a chosen target asks for one."""
    asked = asking(recipe)
    if not any(chosen.includes(runtime, gpu) for runtime, gpu in (*asked, *([(RUNTIME, NAME)] if asked else []))):
        return []
    version = whole.host.runtimes.get(RUNTIME, "")
    base = EnginePlan(f"{RUNTIME}-{version}-{NAME}", RUNTIME, version, NAME, "fp32", None, "run", fallback="onnx")
    stated = {
        "kind": "onnx",
        "instead_of": [f"{runtime}:{gpu}" for runtime, gpu in asked],
        "gpus": ["cpu", *dict.fromkeys(gpu for _runtime, gpu in asked if gpu != "cpu")],
    }
    if not version:
        return [replace(base, state="waiting", why=f"needs a host with {RUNTIME}; it is not installed here")]
    made = {name: _verified(stages, base) for name, stages in (parts or {"": whole}).items()}
    reasons = [f"{name}: {one.why}" if name else one.why for name, one in made.items() if one.state == "failed"]
    if reasons:
        return [replace(base, state="failed", why="; ".join(reasons))]
    engine = replace(base, given="fp32", parts=made) if parts else made[""]
    providers = {name: providers_of(stages.pipeline.profiles) for name, stages in (parts or {"": whole}).items()}
    return [published_fallback(whole, parts, engine, {**stated, "providers": providers})]


def _verified(stages: EngineStages, base: EnginePlan) -> EnginePlan:
    """Describe the fp32 graph up to the verdict on it, as ONNX Runtime serves it."""
    pipeline = stages.pipeline
    typed = pipeline.typed("fp32")
    graph = pipeline.verify(pipeline.id("verify", "fp32"), "graph", typed)
    served = pipeline.verify(pipeline.id("verify", NAME), NAME, typed)
    engine = replace(base, given="fp32", typed="fp32", compile=typed, verify=graph, engine_verify=served)
    for step in (graph, served):
        if step.facts is None:
            continue
        if step.facts.get("plugin"):
            return replace(engine, state="failed", why=f"ONNX Runtime cannot serve the model: {step.facts['reason']}")
        verdict = judge(step.facts, pipeline.recipe.acceptance, "fp32")
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
