"""The step that publishes an engine: everything that its manifest states enters the key, but for times and names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Final, Literal

from recipes.engine_stages import EngineStages
from recipes.gates import gate_of, metric_gate, parity_bounds
from recipes.pipeline import saved_files
from recipes.plan import EnginePlan
from recipes.schema import QUANTIZED, Target
from recipes.steps import Output, Step
from recipes.together import TogetherStages

# What a reproducible build is built again from, as the compilation names it.
PINNED: Final = ("timing.cache", "layers.json")


def published(stages: EngineStages, engine: EnginePlan, target: Target) -> EnginePlan:
    """Publish a compiled engine; everything that its manifest states enters the key, but for times and names."""
    params, measured, inputs, gates = _stated(stages, engine)
    return _publish(stages, engine, target, params, measured, inputs, gates)


def published_in_parts(
    whole: EngineStages,
    parts: Mapping[str, EngineStages],
    engine: EnginePlan,
    target: Target,
    together: TogetherStages | None,
) -> EnginePlan:
    """Publish the engines of all parts as one: in one step, so that a reader sees all of them or none."""
    params, measured, inputs, gates = _stated_in_parts(parts, engine, together)
    return _publish(whole, engine, target, params, measured, inputs, gates)


def published_fallback(
    whole: EngineStages,
    parts: Mapping[str, EngineStages],
    engine: EnginePlan,
    fallback: Mapping[str, Any],
    together: TogetherStages | None,
) -> EnginePlan:
    """Publish what is served where an engine cannot be built; `fallback` says what it is, and for which targets."""
    params, measured, inputs, gates = _stated_in_parts(parts, engine, together) if parts else _stated(whole, engine)
    recipe = whole.pipeline.recipe
    params = {
        "recipe": recipe.name,
        "target": engine.target,
        "runtime": engine.runtime,
        "runtime_version": engine.runtime_version,
        "gpu": "cpu",
        "asked": engine.asked,
        "given": engine.given,
        "more_wanted": [],
        "to": recipe.publish.to,
        "fallback": dict(fallback),
        **params,
    }
    return _added(whole, engine, f"publish:fallback:{engine.fallback}", params, measured, inputs, gates)


def _stated_in_parts(
    parts: Mapping[str, EngineStages], engine: EnginePlan, together: TogetherStages | None
) -> tuple[dict[str, Any], dict[str, Mapping[str, Any] | None], list[Output], list[Step]]:
    """Return what is stated of an engine of several parts, as `_stated` does of one."""
    stated: dict[str, Any] = {}
    measured: dict[str, Mapping[str, Any] | None] = {}
    inputs: list[Output] = []
    gates: list[Step] = []
    for name, part in engine.parts.items():
        stated[name], found, files, before = _stated(parts[name], part)
        stated[name] |= {"asked": part.asked, "given": part.given}
        measured |= {f"{name}/{what}": facts for what, facts in found.items()}
        # Libraries of plugins are the whole engine's; every other file is named as other parts' files are.
        shared = {id(output) for output in files if output.name.startswith("plugin-")}
        inputs += [output if id(output) in shared else replace(output, folder=name) for output in files]
        gates += before
    params: dict[str, Any] = {"parts": stated, "tried": _refused(engine)}
    if together is not None:
        params["together"] = gate_of(together.asked)
        measured |= {f"together/{what}": step.facts for what, step in engine.together.items()}
        gates += engine.together.values()
    return params, measured, list({output.placed: output for output in inputs}.values()), gates


def _stated(
    stages: EngineStages, engine: EnginePlan
) -> tuple[dict[str, Any], dict[str, Mapping[str, Any] | None], list[Output], list[Step]]:
    """Return what is stated of a compiled graph: parameters, what was measured, its files and what has to pass."""
    if engine.given is None or engine.compile is None or engine.verify is None:
        raise ValueError(f"{engine.target}: nothing to publish")
    recipe = stages.pipeline.recipe
    executed = engine.engine_verify
    params: dict[str, Any] = {
        "tried": _refused(engine),
        "inputs": stages.pipeline.interface,
        "profiles": stages.pipeline.profiles,
        "gates": {
            "parity": dict(parity_bounds(recipe.acceptance, engine.given)),
            "metric": metric_gate(recipe.acceptance),
        },
        "calibration": stages.pipeline.calibration_digest() if engine.given in QUANTIZED else None,
    }
    if engine.chosen is not None:
        # Not the times, but which measurements they are, as for the benchmark below.
        params["candidates"] = [
            {"name": one.name, "passed": one.passed, "reasons": list(one.reasons), "benchmark": one.key}
            for one in engine.candidates
        ]
    if engine.refitted_from is not None:
        params["refitted_from"] = engine.refitted_from.key
    not_executed = {
        "executed": False,
        "reason": f"{engine.runtime} engines for {engine.gpu} do not run on this host",
    }
    if engine.fallback == "source":
        no_graph = {"executed": False, "reason": "the source model is served, and no graph that was exported from it"}
        found = {"saved": engine.compile.facts, "graph": no_graph, "engine": engine.verify.facts}
        return params, found, saved_files(engine.compile), [engine.verify]
    measured: dict[str, Mapping[str, Any] | None] = {
        "typed": stages.pipeline.typed(engine.typed or engine.given).facts,
        "graph": engine.verify.facts,
        "engine": executed.facts if executed is not None else not_executed,
    }
    inputs, timed = stages.files(engine, engine.compile), engine.benchmark
    inputs += _calibration_report(stages, engine)
    if timed is not None:
        # Which measurement it is enters the key, and not what was found, as that is never the same twice.
        measured["benchmark"] = {"key": timed.action.key} if timed.record and timed.action else None
        inputs += _listings(engine.compile, timed)
    if engine.options.reproducible:
        # What the recipe has to pin, so that this engine can be built again.
        inputs += [
            made for name in PINNED if (made := Output(engine.compile, name)).ref is not None and made not in inputs
        ]
    return params, measured, inputs, [gate for gate in (engine.verify, executed, timed) if gate is not None]


def _calibration_report(stages: EngineStages, engine: EnginePlan) -> list[Output]:
    """Return what says how good the ranges are that are written into the graph, where they are."""
    typed, recipe = engine.typed or engine.given, stages.pipeline.recipe
    spec, files = recipe.precision.calibration, stages.pipeline.files.calibration
    if typed not in QUANTIZED or spec is None or files is None:
        return []
    made = [Output(stages.pipeline.calibrate(typed, spec, files).step, "calibration.json")]
    if recipe.precision.keeps_auto:
        made.append(replace(stages.pipeline.kept(typed), name="sensitivity.json"))
    return made


def _publish(
    stages: EngineStages,
    engine: EnginePlan,
    target: Target,
    stated: Mapping[str, Any],
    measured: Mapping[str, Mapping[str, Any] | None],
    inputs: Sequence[Output],
    gates: Sequence[Step],
) -> EnginePlan:
    recipe = stages.pipeline.recipe
    wish = list(target.precision or recipe.precision.build)
    params = {
        "recipe": recipe.name,
        "target": engine.target,
        "runtime": engine.runtime,
        "runtime_version": engine.runtime_version,
        "gpu": engine.gpu,
        "asked": engine.asked,
        "given": engine.given,
        # Readers prefer what the recipe names first, so what it names before this is part of what is published.
        "more_wanted": wish[: wish.index(engine.asked)],
        "to": recipe.publish.to,
        **({"dla_core": engine.options.dla.core} if engine.options.dla is not None else {}),
        **stated,
    }
    return _added(
        stages, engine, f"publish:{engine.runtime}:{engine.gpu}:{engine.asked}", params, measured, inputs, gates
    )


def _added(
    stages: EngineStages,
    engine: EnginePlan,
    step_id: str,
    params: Mapping[str, Any],
    measured: Mapping[str, Mapping[str, Any] | None],
    inputs: Sequence[Output],
    gates: Sequence[Step],
) -> EnginePlan:
    step = stages.pipeline.steps.add(step_id, params=params, inputs=inputs, gates=gates, measured=measured)
    state: Literal["cached", "run", "failed"] = "run"
    if step.state == "cached":
        state = "cached"
    elif step.state in ("failed", "blocked"):
        state = "failed"
    return replace(engine, state=state, why="; ".join(step.why), publish=step)


def _refused(engine: EnginePlan) -> list[dict[str, Any]]:
    return [
        {"precision": trial.precision, "reasons": list(trial.verdict.reasons)}
        for trial in engine.trials
        if trial.verdict is not None and not trial.verdict.passed
    ]


def _listings(compiled: Step, timed: Step) -> list[Output]:
    """Return what is published beside a plan that was timed: its layers, and how long each of them took."""
    listings = [Output(compiled, "layers.json"), Output(timed, "profile.json")]
    return [listing for listing in listings if listing.ref is not None]
