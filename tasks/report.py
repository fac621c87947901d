"""What a build did, as JSON: every step with its state and seconds, every engine with what was measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from artifacts.catalog import EngineId
from artifacts.errors import ArtifactError
from artifacts.timings import timing_summary
from recipes.gates import telling_parity
from recipes.plan import EnginePlan, Plan
from recipes.steps import Step
from tasks.session import BuildSession

if TYPE_CHECKING:
    from artifacts.manifest import Manifest, PartFacts
    from recipes.schema import Precision


def report(session: BuildSession, planned: Plan) -> dict[str, Any]:
    """Return the report of a build: recipe, exit status, steps and engines."""
    return {
        "recipe": planned.recipe,
        "store": session.store.uri,
        "status": planned.status,
        "steps": [_step(session, step) for step in planned.steps],
        "engines": [engine_report(engine) for engine in planned.engines],
    }


def plan_report(planned: Plan) -> dict[str, Any]:
    """Return a plan as JSON: recipe, exit status, steps with state, key and why, and engines."""
    return {
        "recipe": planned.recipe,
        "status": planned.status,
        "steps": [
            {
                "id": step.id,
                "stage": step.stage,
                "subject": step.subject,
                "state": step.state,
                "key": step.action.key if step.action is not None else None,
                "why": list(step.why),
                "after": list(step.after),
            }
            for step in planned.steps
        ],
        "engines": [engine_report(engine) for engine in planned.engines],
    }


def _step(session: BuildSession, step: Step) -> dict[str, Any]:
    outcome = session.outcomes.get(step.id)
    state = outcome.state if outcome is not None else step.state
    return {
        "id": step.id,
        "stage": step.stage,
        "subject": step.subject,
        "state": state,
        "seconds": round(outcome.seconds, 3) if outcome is not None and state == "built" else 0.0,
        "key": step.action.key if step.action is not None else None,
        "why": list(outcome.step.why if outcome is not None and state == "built" else step.why),
        "warnings": warnings_of(step),
    }


def warnings_of(step: Step) -> list[str]:
    """Return what a data set was suspected of when it was read, and where an engine has no layer of the precision asked for."""
    facts = step.facts or {}
    if step.stage == "fetch":
        return list(facts.get("warnings", ()))
    layers = facts.get("layers") if step.stage == "compile" else None
    counted = layers.get("quantized") if isinstance(layers, dict) else None
    if not counted or counted["int8"] or counted["fp8"] or counted["unknown"] or not counted["products"]:
        return []
    asked = step.action.params.get("precision") if step.action is not None else "int8"
    none = f"{asked} was asked for, and none of the engine's {counted['products']} layers that multiply has it"
    return [f"{none}; try another build.optimization_level, or precision.int8: qdq"]


def engine_report(engine: EnginePlan) -> dict[str, Any]:
    """Return one engine as JSON: what was asked and given, its size, its measures and where it was published."""
    if engine.parts:
        return _parted_report(engine)
    measured = (engine.engine_verify or engine.verify or _NOTHING).facts or {}
    metric = measured.get("metric") or {}
    parity = telling_parity(measured, engine.given or "fp32") or {}
    published = engine.publish.facts if engine.publish is not None and engine.publish.facts is not None else {}
    return {
        "target": engine.target,
        "runtime": engine.runtime,
        "runtime_version": engine.runtime_version,
        "gpu": engine.gpu,
        "precision": {"asked": engine.asked, "given": engine.given},
        "state": engine.state,
        **({"fallback": engine.fallback} if engine.fallback else {}),
        "why": engine.why,
        "tried": [
            {"precision": trial.precision, "passed": trial.verdict.passed, "reasons": list(trial.verdict.reasons)}
            for trial in engine.trials
            if trial.verdict is not None
        ],
        "size": sum(ref.size for ref in engine.compile.record.outputs.values())
        if engine.compile is not None and engine.compile.record is not None
        else None,
        "parity": parity.get("relative_l2"),
        "metric": metric.get("value"),
        "source_metric": metric.get("source"),
        "metric_name": metric.get("name"),
        "candidates": [candidate.to_json(engine.chosen) for candidate in engine.candidates],
        "benchmark": timing_summary(engine.benchmark.facts) if engine.benchmark is not None else None,
        "executed": engine.engine_verify is not None and engine.engine_verify.record is not None,
        "path": published.get("path"),
        "build": published.get("build"),
    }


def _parted_report(engine: EnginePlan) -> dict[str, Any]:
    """Return an engine of several parts as JSON: of the whole what is the worst or the sum of its parts, and each part."""
    parts = {name: engine_report(part) for name, part in engine.parts.items()}
    parities = [part["parity"] for part in parts.values()]
    sizes = [part["size"] for part in parts.values()]
    own = ("metric", "source_metric", "metric_name", "benchmark")
    measured = engine.together.get("engine") or engine.together.get("graph")
    metric = ((measured.facts if measured is not None else None) or {}).get("metric") or {}
    return {
        **engine_report(replace(engine, parts={})),
        "size": None if None in sizes else sum(sizes),
        "parity": None if None in parities else max(parities),
        "metric": metric.get("value"),
        "source_metric": metric.get("source"),
        "metric_name": metric.get("name"),
        "benchmark": None,
        "executed": all(part["executed"] for part in parts.values()),
        "parts": {
            name: {key: part[key] for key in ("precision", "tried", "size", "parity", "executed", *own)}
            for name, part in parts.items()
        },
    }


def pooled_report(
    engines: Sequence[Mapping[str, Any]], pools: Sequence[Mapping[str, Any]], read: Callable[[EngineId], Manifest]
) -> list[dict[str, Any]]:
    """Return the engines of a report with what pools did: published ones by their manifests, others by what became of them.

    `pools` are those of `tasks.fleet.Asked`, as JSON. An engine whose manifest `read` refuses (ArtifactError) is told as failed.
    """
    asked = {one["target"]: one for one in pools}
    found: list[dict[str, Any]] = []
    for engine in engines:
        pool = asked.get(f"{engine['runtime']}:{engine['gpu']}")
        if pool is None:
            found.append(dict(engine))
            continue
        mine, faults = None, []
        for path in pool["engines"]:
            try:
                manifest = read(EngineId(*path.split("/")[1:]))
            except ArtifactError as err:
                faults.append(str(err))
                continue
            if manifest.precision.asked == engine["precision"]["asked"]:
                mine = manifest
                break
        found.append({**engine, **(_published(mine) if mine is not None else _unpublished(pool, faults))})
    return found


def lacking(engines: Sequence[Mapping[str, Any]], pools: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return in words which engines a report tells as failed though their pools did not fail."""
    done = {one["target"] for one in pools if one["state"] in ("built", "cached")}
    return [
        f"{one['target']} {one['precision']['asked']} ({one['why']})"
        for one in engines
        if one["state"] == "failed" and f"{one['runtime']}:{one['gpu']}" in done
    ]


def figures(manifest: Manifest) -> tuple[int, float | None, float | None]:
    """Return what a manifest says of an engine: bytes of its plan, relative L2, milliseconds at the median.

    Of several parts: the sum of their plans, and the largest relative L2.
    """
    described: list[Manifest | PartFacts] = [*manifest.parts.values()] or [manifest]
    parities = [parity for one in described if (parity := _parity(one)) is not None]
    parity = max(parities) if len(parities) == len(described) else None
    timing = timing_summary(manifest.benchmark.model_dump()) if manifest.benchmark is not None else None
    return sum(manifest.files[one.plan].size for one in described), parity, timing["p50_ms"] if timing else None


def _parity(one: Manifest | PartFacts) -> float | None:
    measured = one.verification.engine if one.verification.engine.executed else one.verification.graph
    given: Any = one.precision.given
    precision: Precision = given
    parity: float | None = (telling_parity(measured.model_dump(), precision) or {}).get("relative_l2")
    return parity


def _published(manifest: Manifest) -> dict[str, Any]:
    size, parity, _p50 = figures(manifest)
    identity = manifest.identity
    return {
        "target": identity.target,
        "precision": {"asked": manifest.precision.asked, "given": manifest.precision.given},
        "state": "cached",
        "why": "",
        "size": size,
        "parity": parity,
        "benchmark": timing_summary(manifest.benchmark.model_dump()) if manifest.benchmark is not None else None,
        "executed": manifest.verification.engine.executed,
        "path": f"engines/{identity.recipe}/{identity.target}/{identity.build}",
        "build": identity.build,
    }


def _unpublished(pool: Mapping[str, Any], faults: Sequence[str]) -> dict[str, Any]:
    if pool["state"] in ("failed", "waiting"):
        return {"state": pool["state"], "why": pool["why"]}
    return {"state": "failed", "why": "; ".join(faults) or "its pool has published none"}


_NOTHING = Step("nothing", "nothing", "blocked")
