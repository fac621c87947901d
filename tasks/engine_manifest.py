"""The manifest of a compiled engine, from the plan and the records of the steps that it came through."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from artifacts import manifest as m
from artifacts.host import Host
from artifacts.manifest_benchmark import BenchmarkFacts
from artifacts.manifest_gates import Gates, Measured, MetricFacts, MetricGate, ParityFacts, ParityGate, Verification
from artifacts.manifest_precision import (
    CalibrationFacts,
    CandidateFacts,
    PrecisionFacts,
    QuantizedFacts,
    Refused,
    WorstTensor,
)
from recipes.engine_stages import PLAN_NAMES
from recipes.gates import judge, judge_together
from recipes.parts import part_recipe
from recipes.plan import EnginePlan
from recipes.refitting import PLAN
from recipes.schema import QUANTIZED, Precision, Recipe
from recipes.steps import Step
from tasks.toolchain import version

if TYPE_CHECKING:
    from recipes.loader import LoadedRecipe

_GIT_SECONDS: Final = 30.0
# What a calibration by ONNX Runtime makes beside the ranges; TensorRT's own has none.
REPORT: Final = "calibration.json"
_SOURCES: Final = ("code", "weights", "model")


def engine_manifest(
    step: Step,
    engine: EnginePlan,
    steps: Sequence[Step],
    loaded: LoadedRecipe,
    host: Host,
    now: str,
    built: Collection[str],
) -> m.Manifest:
    """Describe a compiled engine.

    `steps` are the plan's, with the records of all that the engine came through; `now` is RFC 3339 in UTC; `built`
    names the steps that this build ran itself.
    """
    from recipes.loader import dump_merged

    if step.action is None or engine.given is None:
        raise ValueError(f"{step.id}: there is nothing to publish")
    params, key = step.action.params, step.action.key
    graphs = engine.parts or {"": engine}
    passed_through = {name: {passed.id: passed for passed in lineage(one, steps, name)} for name, one in graphs.items()}
    facts = {
        name: _part(
            name, one, params["parts"][name] if name else params, params["measured"], passed_through[name], loaded
        )
        for name, one in graphs.items()
    }
    ids = {step_id for used in passed_through.values() for step_id in used} | _came_through(engine.together, steps)
    used = {passed.id: passed for passed in steps if passed.id in ids}
    first = next(iter(graphs.values()))
    provenance = m.Provenance(
        key=key,
        recipe_digest=loaded.digest,
        recipe_text=dump_merged(loaded),
        source={
            f"{owner}/{name}" if owner else name: ref.digest
            for passed in used.values()
            if passed.record is not None and (owner := _owner(passed.id, engine.parts)) is not None
            for name, ref in passed.record.outputs.items()
        },
        git=_git(loaded.path),
        host=m.HostFacts(name=host.name, os=host.os, arch=host.arch, driver=host.driver),
        enginery=version("enginery") or "unknown",
        steps=tuple(_step_facts(passed, built) for passed in used.values()),
        refitted_from=_refitted_from(engine),
    )
    described: dict[str, Any] = {
        "identity": m.Identity(
            recipe=params["recipe"], target=params["target"], build=f"{engine.given}-{key[:16]}", created=now
        ),
        "compatibility": m.Compatibility(
            runtime=params["runtime"],
            runtime_version=params["runtime_version"],
            gpus=tuple(params["fallback"]["gpus"]) if engine.fallback else (params["gpu"],),
            os=host.os,
            arch=host.arch,
            device=_device(first),
            plugins=tuple(sorted(name for name in step.inputs if name.startswith("plugin-"))),
            dla_core=params.get("dla_core"),
        ),
        "files": {
            name: m.FileEntry(digest=ref.digest, size=ref.size, media_type=ref.media_type)
            for name, ref in step.inputs.items()
        },
        "provenance": provenance,
        "fallback": _fallback(params) if engine.fallback else None,
    }
    if engine.parts:
        whole = PrecisionFacts(
            asked=params["asked"],
            given=params["given"],
            wish=_wish(loaded.recipe, engine),
            tried=tuple(_read(Refused, trial) for trial in params["tried"]),
            kept=(),
            io="float32" if all(part.precision.io == "float32" for part in facts.values()) else "native",
        )
        return m.Manifest(
            schema=m.FALLBACK_SCHEMA if engine.fallback else m.PARTS_SCHEMA,
            plan="",
            inputs={},
            outputs={},
            profiles=(),
            precision=whole,
            calibration=None,
            verification=_summed_up({name: part.verification for name, part in facts.items()}, params),
            parts=facts,
            **described,
        )
    only = facts[""]
    return m.Manifest(
        schema=m.FALLBACK_SCHEMA if engine.fallback else m.MANIFEST_SCHEMA,
        **{name: getattr(only, name) for name in m.PartFacts.model_fields if name != "refitted_from"},
        **described,
    )


def _part(
    name: str,
    engine: EnginePlan,
    params: Mapping[str, Any],
    measured: Mapping[str, Any],
    used: Mapping[str, Step],
    loaded: LoadedRecipe,
) -> m.PartFacts:
    """Describe one graph: the only one of an engine (its name is empty), or one part of several."""
    if engine.given is None:
        raise ValueError(f"{name or engine.target}: there is nothing to publish")
    recipe = part_recipe(loaded.recipe, name) if name else loaded.recipe
    if engine.fallback == "source":
        return _saved_part(name, engine, params, measured, recipe)
    typed = used[_typed_id(engine.typed or engine.given, name)].facts or {}
    compiled = (engine.compile.facts if engine.compile is not None else None) or {}
    exported = used[_step_id("export", name)].facts or {}
    own = {what: measured[f"{name}/{what}" if name else what] for what in ("graph", "engine")}
    plan = PLAN_NAMES[engine.runtime]
    return m.PartFacts(
        plan=f"{name}/{plan}" if name else plan,
        inputs=_tensors(params["inputs"], typed.get("inputs", {})),
        outputs=_tensors(exported.get("outputs", {}), typed.get("outputs", {})),
        profiles=tuple(_read(m.Profile, profile) for profile in params["profiles"]),
        precision=PrecisionFacts(
            asked=params["asked"],
            given=params["given"],
            wish=_wish(recipe, engine),
            tried=tuple(_read(Refused, trial) for trial in params["tried"]),
            candidates=tuple(
                _read(CandidateFacts, candidate.to_json(engine.chosen)) for candidate in engine.candidates
            ),
            kept=tuple(compiled.get("kept", typed.get("kept", ()))),
            kept_why=typed.get("why_kept", {}),
            quantized=_quantized(engine.given, typed, compiled),
            outliers=tuple(typed.get("outliers", ())),
            io="float32" if (engine.typed or engine.given) in ("fp32", "tf32") else recipe.precision.io,
        ),
        calibration=_calibration(params["calibration"], next(iter(_calibrations(used)), None), name),
        verification=_verification({**params, "measured": own}, recipe, engine.given),
        benchmark=_benchmark(engine.benchmark),
        refitted_from=_refitted_from(engine) if name else None,
    )


def _saved_part(
    name: str, engine: EnginePlan, params: Mapping[str, Any], measured: Mapping[str, Any], recipe: Recipe
) -> m.PartFacts:
    """Describe a source model that was saved: there is no graph, and nothing of it was lowered."""
    own = {what: measured[f"{name}/{what}" if name else what] for what in ("graph", "engine", "saved")}
    plan = own["saved"]["plan"]
    return m.PartFacts(
        plan=f"{name}/{plan}" if name else plan,
        inputs=_tensors(params["inputs"], {}),
        outputs=_tensors(own["engine"]["outputs"], {}),
        profiles=tuple(_read(m.Profile, profile) for profile in params["profiles"]),
        precision=PrecisionFacts(
            asked=params["asked"],
            given=params["given"],
            wish=_wish(recipe, engine),
            tried=(),
            kept=(),
            io="float32",
        ),
        calibration=None,
        verification=_verification({**params, "measured": own}, recipe, "fp32"),
    )


def _fallback(params: Mapping[str, Any]) -> m.FallbackFacts:
    """Say what stands in for which targets; of a source model also its form, as it was found when it was saved."""
    saved = {
        what.rpartition("/")[0]: {**facts, "refused": facts.get("refused", ())}
        for what, facts in params["measured"].items()
        if what.rpartition("/")[2] == "saved"
    }
    return _read(m.FallbackFacts, {**params["fallback"], "saved": saved})


def _owner(step_id: str, parts: Collection[str]) -> str | None:
    """Return the part whose own source a step brings, empty where that is the recipe's; None for another step."""
    stage, _, subject = step_id.partition(":")
    part, _, own = subject.partition(":")
    if stage != "fetch":
        return None
    if part in parts and own.partition("/")[0] in _SOURCES:
        return part
    return "" if subject.partition("/")[0] in _SOURCES else None


def _came_through(together: Mapping[str, Step], steps: Sequence[Step]) -> set[str]:
    """Return the steps that measured the parts together, and what ran the source's."""
    own = {"fetch:labelled", "fetch:metric", "fetch:together", "reference:together"} if together else set()
    return {step.id for step in steps if step.id in own} | {step.id for step in together.values()}


def _summed_up(parts: Mapping[str, Verification], params: Mapping[str, Any]) -> Verification:
    """Return what is known of a whole: the farthest output of its parts, what they do together, and whether all passed."""
    gate = _read(MetricGate, params["together"]) if "together" in params else None
    together = {what: params["measured"].get(f"together/{what}") for what in ("graph", "engine")} if gate else {}
    verdicts = [judge_together(found, gate).passed for found in together.values() if found and gate]

    def worst(what: str, found: Mapping[str, Measured]) -> Measured:
        missing = [f"{name}: {one.reason}" for name, one in found.items() if not one.executed]
        if missing:
            return Measured(executed=False, reason="; ".join(missing))
        parities = [one.parity for one in found.values() if one.parity is not None]

        def of(field: str, choose: Callable[[list[float]], float]) -> float | None:
            values = [getattr(parity, field) for parity in parities]
            return None if None in values else choose(values)

        return Measured(
            executed=True,
            parity=ParityFacts(
                relative_l2=of("relative_l2", max),
                max_abs=of("max_abs", max),
                cosine=of("cosine", min),
                non_finite=sum(parity.non_finite for parity in parities),
            ),
            metric=_read(MetricFacts, measured["metric"]) if (measured := together.get(what)) else None,
        )

    return Verification(
        gates=Gates(parity=ParityGate(relative_l2=None, max_abs=None, cosine=None), metric=gate),
        passed=all(part.passed for part in parts.values()) and all(verdicts),
        graph=worst("graph", {name: part.graph for name, part in parts.items()}),
        engine=worst("engine", {name: part.engine for name, part in parts.items()}),
    )


def lineage(engine: EnginePlan, steps: Sequence[Step], part: str = "") -> list[Step]:
    """Return the steps that one engine (or part of one) came through, in the plan's order, those of others left out.

    Where two steps made the same bytes (a graph that needed no typing), the first made them for both.
    """
    by_id = {step.id: step for step in steps}
    makers: dict[str, Step] = {}
    for step in steps:
        if step.record is not None:
            for ref in step.record.outputs.values():
                makers.setdefault(ref.digest, step)
    own = (engine.compile, engine.verify, engine.engine_verify, engine.benchmark)
    exported = engine.fallback != "source"  # which comes of the source, whatever an exporter makes of it
    names = [
        _step_id("export", part),
        _step_id("simplify", part),
        _step_id("verify", part, "export"),
        _step_id("verify", part, "simplify"),
        _typed_id(engine.typed or engine.given or "fp32", part),
    ]
    waiting = [by_id[name] for name in names if exported and name in by_id] + [
        by_id[step.id] for step in own if step is not None
    ]
    used: set[str] = set()
    while waiting:
        step = waiting.pop()
        if step.id not in used:
            used.add(step.id)
            waiting.extend(makers[ref.digest] for ref in step.inputs.values() if ref.digest in makers)
    return [step for step in steps if step.id in used and step.record is not None]


def _device(engine: EnginePlan) -> m.DeviceFacts | None:
    """Return the device that the engine was compiled for, as its key has it; None where it is not bound to one."""
    action = engine.compile.action if engine.compile is not None else None
    device = action.toolchain.get("device") if action is not None else None
    return _read(m.DeviceFacts, device) if device is not None else None


def _refitted_from(engine: EnginePlan) -> m.RefittedFrom | None:
    if engine.refitted_from is None or engine.compile is None:
        return None
    base = engine.refitted_from
    return m.RefittedFrom(compilation=base.key, plan=engine.compile.inputs[PLAN].digest, engine=base.engine)


def _step_id(stage: str, part: str, subject: str = "") -> str:
    return ":".join(filter(None, (stage, part, subject)))


def _typed_id(precision: Precision, part: str) -> str:
    # tf32 is a flag of the compiler: its graph is the fp32 one.
    return _step_id("type", part, "fp32" if precision == "tf32" else precision)


def _wish(recipe: Recipe, engine: EnginePlan) -> tuple[str, ...]:
    if engine.fallback:
        return (engine.asked,)
    for target in recipe.targets:
        wish = target.precision or recipe.precision.build
        if target.runtime == engine.runtime and engine.gpu in target.gpus and engine.asked in wish:
            return tuple(wish)
    return tuple(recipe.precision.build)


def _read(model: type[m.PartT], document: Mapping[str, Any]) -> m.PartT:
    """Read a part from JSON values, whose arrays are lists."""
    return model.model_validate_json(json.dumps(dict(document), allow_nan=False))


def _tensors(declared: Mapping[str, Any], typed: Mapping[str, str]) -> dict[str, m.TensorFacts]:
    """Describe tensors: shapes as declared, element types as the typed graph has them."""
    return {
        name: _read(m.TensorFacts, {"dtype": typed.get(name, facts["dtype"]), "shape": facts.get("shape")})
        for name, facts in declared.items()
    }


def _quantized(given: Precision, typed: Mapping[str, Any], compiled: Mapping[str, Any]) -> QuantizedFacts | None:
    """Say how much of the typed graph, and of the engine where its layers were listed, really is int8 or fp8."""
    if given not in QUANTIZED:
        return None
    layers = compiled.get("layers")
    counted = layers.get("quantized") if isinstance(layers, Mapping) else None
    return QuantizedFacts(
        nodes=typed.get("quantized") or None,
        of_nodes=typed.get("quantizable"),
        layers=counted["int8"] + counted["fp8"] if counted and not counted["unknown"] else None,
        of_layers=counted["products"] if counted else None,
    )


def _calibrations(used: Mapping[str, Step]) -> list[Step]:
    """Return the steps that found int8 ranges, TensorRT's own calibration first."""
    return sorted(
        (step for step in used.values() if step.stage == "calibrate"),
        key=lambda step: not any(runtime in step.subject for runtime in PLAN_NAMES),
    )


def _calibration(digest: str | None, step: Step | None, part: str) -> CalibrationFacts | None:
    if digest is None:
        return None
    facts = (step.facts if step is not None else None) or {}
    worst, report = facts.get("worst"), step is not None and step.record is not None and REPORT in step.record.outputs
    return CalibrationFacts(
        digest=digest,
        samples=facts.get("samples"),
        method=facts.get("method"),
        report=f"{part}/{REPORT}" if report and part else REPORT if report else None,
        worst=_read(WorstTensor, worst) if worst is not None else None,
    )


def _verification(params: Mapping[str, Any], recipe: Recipe, given: Precision) -> Verification:
    measured = params["measured"]
    executed = [facts for facts in (measured["graph"], measured["engine"]) if facts.get("executed")]
    return Verification(
        gates=_read(Gates, params["gates"]),
        passed=bool(executed) and all(judge(facts, recipe.acceptance, given).passed for facts in executed),
        graph=_read(Measured, measured["graph"]),
        engine=_read(Measured, measured["engine"]),
    )


def _benchmark(step: Step | None) -> BenchmarkFacts | None:
    if step is None or step.record is None:
        return None
    return _read(BenchmarkFacts, {**step.record.facts, "key": step.record.key})


def _step_facts(step: Step, built: Collection[str]) -> m.StepFacts:
    if step.record is None:
        raise ValueError(f"{step.id} has not run")
    record = step.record
    return m.StepFacts(
        id=step.id,
        stage=step.stage,
        key=record.key,
        toolchain=dict(record.preimage.get("toolchain", {})),
        seconds=round(record.seconds, 4),
        started=record.started,
        reused=step.id not in built,
        host=record.producer.get("host"),
    )


def _git(recipe: Path) -> m.GitFacts | None:
    """Say which commit a recipe is of, and whether what was built may differ from it; None where there is no git."""
    recipe = recipe.resolve()
    commit = _ask_git(recipe.parent, "rev-parse", "--verify", "HEAD")
    if commit is None:
        return None
    changed = _ask_git(recipe.parent, "status", "--porcelain", "--untracked-files=no")
    # Other untracked files (a store, a virtual environment) say nothing about what was built.
    tracked = _ask_git(recipe.parent, "ls-files", "--error-unmatch", "--", recipe.name) is not None
    return m.GitFacts(commit=commit, dirty=changed != "" or not tracked)


def _ask_git(folder: Path, *arguments: str) -> str | None:
    # A hook sets GIT_DIR for its own repository; a repository's settings may name programs to run, such as a monitor.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")} | {
        "GIT_OPTIONAL_LOCKS": "0",
        "LC_ALL": "C",
    }
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), "-c", "core.fsmonitor=false", *arguments],
            env=environment,
            capture_output=True,
            check=True,
            text=True,
            timeout=_GIT_SECONDS,
        )
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return None
    return done.stdout.strip()
