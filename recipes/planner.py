"""The planner: a recipe, its files and a host become steps with keys, and engines with what they need.

Pure: records come through `lookup`, versions through `version`. The build runs the steps that are
`ready`, plans again, and ends when none is left, so this is the only description of the order of work.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from artifacts.host import Host
from artifacts.refits import Base
from recipes.choosing import Candidate, candidates_of
from recipes.engine_stages import EngineStages
from recipes.fallbacks import fallbacks
from recipes.files import RecipeFiles
from recipes.gates import Verdict, judge
from recipes.options import calibrator_refusal, options_of, refusals
from recipes.parts import built_in, part_recipe
from recipes.pipeline import Pipeline, Version
from recipes.plan import EnginePlan, Plan, Selection, Trial
from recipes.publishing import published, published_in_parts
from recipes.refitting import Bases, Refits
from recipes.schema import EXACTNESS, FLOAT16, INT8, QUANTIZED, Asked, Precision, Recipe, Target
from recipes.searching import Search
from recipes.steps import Lookup, Step, Steps
from recipes.support import refused_nodes, source_fails, told_of_sample
from recipes.targets import refusal, typed_refusal
from recipes.together import TogetherStages

# Kinds of a compiler's failures that say of a graph's types, and not of this host or the recipe, that they do not serve.
OF_PRECISION: Final = ("unsupported operator:", "no kernel:")


def plan(
    recipe: Recipe,
    files: RecipeFiles,
    host: Host,
    *,
    version: Version,
    lookup: Lookup,
    previous: Callable[[], Mapping[str, Mapping[str, Any]]] = dict,
    failures: Mapping[str, str] | None = None,
    selection: Selection | None = None,
    bases: Bases = lambda _identity: (),
    spent: Mapping[str, float] | None = None,
) -> Plan:
    """Plan a recipe on a host.

    `version` gives the full version of an installed package (None: not installed) without importing it; `lookup`
    gives the action record of (stage, key); `previous` gives the last build's preimages by step id, for explanations
    (it is not asked where nothing is stale); `failures` has what failed in this build, by key; `bases` lists what may be
    refitted (`artifacts.refits`); `spent` has the seconds that this build has spent on steps, by key.
    """
    steps = Steps(lookup, previous, failures or {})
    refits, chosen = Refits(steps, bases), selection or Selection()
    lowered = _lowered(recipe, chosen)
    whole = _Engines(
        EngineStages(Pipeline(recipe, files, version, steps, calibrated=lowered), host), refits, spent or {}
    )
    parts = {
        name: replace(
            whole,
            stages=EngineStages(
                Pipeline(
                    part_recipe(recipe, name),
                    files.parts[name],
                    version,
                    steps,
                    name,
                    part.module,
                    own=part.source is not None,
                    calibrated=lowered,
                ),
                host,
            ),
        )
        for name, part in recipe.parts.items()
    }
    every = [*(one.stages.pipeline for one in parts.values()), *([whole.stages.pipeline] if parts else [])]
    for pipeline in every:
        pipeline.together = every
    inner = {name: engines.stages for name, engines in parts.items()}
    asked_of = recipe.acceptance.together
    together = TogetherStages(asked_of, whole.stages.pipeline, inner) if asked_of is not None and parts else None
    planned = [
        _in_parts(whole, parts, together, target, gpu, asked) if parts else whole.plan(target, gpu, asked)
        for target in recipe.targets
        for gpu in target.gpus
        if chosen.includes(target.runtime, gpu)
        for asked in target.precision or recipe.precision.build
    ]
    if together is not None:
        together.reference()  # also where another host compiles, which then needs none of the source's frameworks
    planned += fallbacks(whole.stages, inner, recipe, chosen, together)
    return Plan(recipe.name, steps.all(), tuple(planned))


@dataclass(frozen=True)
class Until:
    """How far an engine is planned: to its typed graph alone, or compiled once `gates` have passed, in a precision up to `last`."""

    compiled: bool = True
    gates: tuple[Step, ...] = ()
    last: Precision | None = None


_COMPILED: Final = Until()
_TYPED: Final = Until(compiled=False)


@dataclass(frozen=True)
class _Engines:
    """Describes what each engine takes beyond the portable steps: compile, verify where it can run, publish."""

    stages: EngineStages
    refits: Refits
    spent: Mapping[str, float]

    def plan(self, target: Target, gpu: str, asked: Asked) -> EnginePlan:
        """Plan one engine: the first precision of the chain that passes its gates is compiled and published."""
        engine = self.passing(target, gpu, asked)
        return (
            published(self.stages, engine, target) if engine.state == "run" and engine.compile is not None else engine
        )

    def base(self, target: Target, gpu: str, asked: Asked) -> EnginePlan:
        """Return an engine of which nothing is planned yet."""
        version = self.stages.host.runtimes.get(target.runtime, target.version or "")
        name = "-".join(part for part in (target.runtime, version, gpu) if part)
        options = options_of(self.stages.pipeline.recipe, target)
        return EnginePlan(name, target.runtime, version, gpu, asked, None, "run", options=options)

    def passing(
        self,
        target: Target,
        gpu: str,
        asked: Asked,
        given_up: Mapping[Precision, Verdict] | None = None,
        until: Until = _COMPILED,
    ) -> EnginePlan:
        """Plan one engine up to its publication, of which it has the steps before where it is in the state `run`.

        `given_up` has the precisions that pass by themselves, and are not taken all the same. Where the last precision that
        `until` admits is tried in vain, none is given, and the last trial says why.
        """
        recipe = self.stages.pipeline.recipe
        base = self.base(target, gpu, asked)
        options, version = base.options, base.runtime_version
        for step in self.stages.portable_gates():
            verdict, exported = self._verdict(step, "fp32"), step.subject.endswith("export")
            failed = exported and step.state == "failed"
            if failed or (verdict is not None and not verdict.passed):
                what = "exported" if exported else "simplified"
                reasons = ", ".join(verdict.reasons) if verdict is not None else "; ".join(step.why)
                itself = source_fails(step.facts, recipe.acceptance)
                explained = self.stages.pipeline.explain if exported and itself is None else None
                told = (
                    told_of_sample(explained.facts, recipe.source.framework) if explained is not None else itself or ""
                )
                return replace(base, state="failed", why=f"the {what} graph fails: {reasons}{told}")
        waiting = self.stages.waits(target, gpu)
        lacking = next((why for _option, why in refusals(options, target.runtime, gpu, version or None)), None)
        if waiting is None and lacking is not None:
            return replace(base, state="failed", why=lacking)
        base = replace(base, support=self.stages.support(base, target, waiting))
        unread = refused_nodes(base.support.facts) if base.support is not None else None
        if unread is not None:
            return replace(base, state="failed", why=unread)
        if asked == "auto":
            return self._fastest(base, target, waiting)
        trials: list[Trial] = []
        chain = (asked, *recipe.precision.fallback.get(asked, ()))
        for left, precision in zip(reversed(range(len(chain))), chain, strict=True):
            mark = self.stages.pipeline.steps.mark()
            if given_up is not None and precision in given_up:
                trials.append(Trial(precision, given_up[precision]))
                continue
            engine, verdict = self._trial(base, precision, waiting, until)
            unbuilt = _unbuilt(engine) if left else None
            if unbuilt is not None:
                own = self.stages.pipeline.steps.since(mark)
                broken = [step.id for step in own if step.state in ("failed", "blocked")]
                base = replace(base, tolerated=(*base.tolerated, *broken))
                verdict = Verdict(passed=False, reasons=(unbuilt,))
            trials.append(Trial(precision, verdict))
            if engine.state == "waiting":
                return replace(engine, trials=tuple(trials))
            if verdict is None or verdict.passed:
                return replace(engine, benchmark=self.stages.benchmark(engine), trials=tuple(trials))
            if left and precision == until.last:
                return replace(base, trials=tuple(trials))
        return replace(
            base, state="failed", why=f"no precision passed its gates: {_told(trials)}", trials=tuple(trials)
        )

    def _trial(
        self, base: EnginePlan, precision: Precision, waiting: str | None, until: Until
    ) -> tuple[EnginePlan, Verdict | None]:
        """Describe building one precision up to the verdict on it; `waiting` says what this host lacks to compile it."""
        recipe = self.stages.pipeline.recipe
        refused = refusal(base.runtime, base.gpu, precision, base.runtime_version or None)
        if refused is None and precision in INT8 and recipe.precision.int8 == "calibrator":
            refused = calibrator_refusal(base.options, base.runtime, base.runtime_version or None)
        # The graph that is compiled; what a weakly typed compiler makes of it is judged when it is executed.
        source = self.stages.typed(base, precision)
        refused = refused or typed_refusal(base.runtime, base.runtime_version or None, source)
        if refused is not None:
            return base, Verdict(passed=False, reasons=(refused,))
        typed = self.stages.pipeline.typed(source)
        graph = self.stages.pipeline.verify(
            self.stages.pipeline.id("verify", source), "graph", typed, tf32=source == "tf32", precision=source
        )
        verdict = self._verdict(graph, source)
        wanted = replace(base, given=precision, typed=source, verify=graph)
        if not until.compiled:
            return wanted, verdict
        if waiting is not None and (verdict is None or verdict.passed):
            return replace(base, state="waiting", why=waiting), verdict
        reasons: list[str] = []
        for made, origin in self._ways(wanted, precision, (graph, *until.gates), verdict, reasons):
            engine = replace(wanted, compile=made, refitted_from=origin)
            engine = replace(engine, engine_verify=self.stages.execute(engine, precision, again=bool(reasons)))
            verdict = self._verdict(graph, source) and self._judged(engine.engine_verify or graph, precision)
            if verdict is None or verdict.passed:
                return engine, verdict
            reasons.append(f"compiled: what was refitted does not pass: {', '.join(verdict.reasons)}")
        return wanted, verdict

    def _fastest(self, base: EnginePlan, target: Target, waiting: str | None) -> EnginePlan:
        """Plan the fastest candidate that passes: one candidate at a time, so that each is alone on its device.

        When the budget is spent and one has passed, candidates that would have to be made are left for another build.
        """
        precision, steps = self.stages.pipeline.recipe.precision, self.stages.pipeline.steps
        levels: tuple[int | None, ...] = (None,)
        if precision.optimization_levels is not None and base.runtime != "onnxruntime":
            levels = tuple(precision.optimization_levels)
        search = Search(steps, self.spent, precision.budget, measured=base.runtime != "tensorrt-rtx")
        for level, one in itertools.product(levels, candidates_of(self.stages.pipeline.recipe, target)):
            candidate, mark = Candidate(one, level), steps.mark()
            if search.skips(candidate):
                continue
            engine, verdict = self._trial(_at_level(base, level), one, waiting, _COMPILED)
            if engine.state == "waiting":
                return engine
            timed = self.stages.timed(engine) if verdict is not None and verdict.passed else None
            if not search.weighs(candidate, mark, engine, verdict, timed):
                return search.noted(base)
        engine = search.best(base)
        if engine.chosen is None:
            return engine
        asked = self.stages.pipeline.recipe.benchmark
        if engine.benchmark is not None and asked is not None and asked.compare:
            engine = replace(engine, benchmark=self.stages.timed(engine, compare=asked.compare))
        return engine

    def _verdict(self, step: Step, precision: Precision) -> Verdict | None:
        """Judge a graph; one that only plugins can run passes so far: its engines are judged when they are executed."""
        if step.facts is not None and step.facts.get("plugin"):
            return Verdict(passed=True, reasons=())
        return self._judged(step, precision)

    def _judged(self, step: Step, precision: Precision) -> Verdict | None:
        if step.facts is None:
            return None
        return judge(step.facts, self.stages.pipeline.recipe.acceptance, precision)

    def _ways(
        self,
        engine: EnginePlan,
        precision: Precision,
        gates: Sequence[Step],
        verdict: Verdict | None,
        reasons: Sequence[str],
    ) -> Iterator[tuple[Step, Base | None]]:
        """Yield the steps that can make a plan, the cheapest first, unless the graph has failed its gates."""
        if verdict is None or verdict.passed:
            wanted = self.stages.compilation(engine, precision, gates)
            yield from self.refits.ways(wanted, self.stages.pipeline.typed(engine.typed or precision), reasons)


def _unbuilt(engine: EnginePlan) -> str | None:
    """Return in one line why a compiler refused a graph for its precision, which another precision may not meet."""
    if engine.compile is None or engine.compile.state != "failed":
        return None
    words = engine.compile.why[0].partition("\n")[0]
    return words if words.startswith(OF_PRECISION) else None


def _in_parts(
    whole: _Engines,
    parts: Mapping[str, _Engines],
    together: TogetherStages | None,
    target: Target,
    gpu: str,
    asked: Asked,
) -> EnginePlan:
    """Plan one engine of several parts: each gives way by its own chain, and what one cannot have the whole has not.

    Where a part has no precision that passes, the whole gives way by the recipe's chain: every part is asked for the next.
    """
    base, trials = whole.base(target, gpu, asked), list[Trial]()
    if asked == "auto":
        return replace(base, state="failed", why="auto chooses for models of one graph")
    for precision in (asked, *whole.stages.pipeline.recipe.precision.fallback.get(asked, ())):
        engine, reasons = _agreed(replace(base, trials=tuple(trials)), parts, together, whole, target, precision)
        base = replace(base, tolerated=engine.tolerated)
        if reasons:
            trials.append(Trial(precision, Verdict(passed=False, reasons=reasons)))
            continue
        if engine.state == "waiting":
            return engine
        inner = {name: engines.stages for name, engines in parts.items()}
        return published_in_parts(whole.stages, inner, engine, target, together)
    return replace(base, state="failed", why=f"no precision passed its gates: {_told(trials)}", trials=tuple(trials))


def _agreed(
    base: EnginePlan,
    parts: Mapping[str, _Engines],
    together: TogetherStages | None,
    whole: _Engines,
    target: Target,
    precision: Precision,
) -> tuple[EnginePlan, tuple[str, ...]]:
    """Plan the parts of an engine that is asked for in a precision: those that pass together, or why none do.

    While they do not pass together, one part after the other gives way, by its own chain.
    """
    given_up: dict[str, dict[Precision, Verdict]] = {name: {} for name in parts}
    until, made = dict.fromkeys(parts, _COMPILED), dict[str, EnginePlan]()

    def planned(name: str, until: Until) -> EnginePlan:
        asked = built_in(whole.stages.pipeline.recipe.parts[name], precision)
        return parts[name].passing(target, base.gpu, asked, given_up[name], until)

    while True:
        if together is not None:
            graphs = {name: planned(name, _TYPED) for name in parts}
            reasons = _failed(graphs)
            if reasons:
                return base, reasons
            engine = replace(base, parts=graphs)
            judged = together.graphs(engine)
            verdict = together.verdict({"graph": judged})
            if verdict is not None and not verdict.passed:
                name = together.giving_way(engine)
                base = _tolerant(base, _broken(made, given_up if name is None else [name]))
                if name is None:
                    return base, verdict.reasons
                _give_up(given_up[name], graphs[name].given, verdict)
                continue
            until = {name: Until(gates=(judged,), last=one.given) for name, one in graphs.items()}
        made = {name: planned(name, until[name]) for name in parts}
        # A compilation that failed before a part gave way, in this round or in one before.
        base = _tolerant(base, (step for one in made.values() for step in one.tolerated))
        reasons = _failed(made)
        if reasons:
            return base, reasons
        engine = replace(base, parts=made)
        waiting = next((one.why for one in made.values() if one.state == "waiting"), None)
        if waiting is not None:
            return replace(engine, state="waiting", why=waiting), ()
        # What gave way when it was compiled is another combination, whose graphs are judged first.
        unbuilt = {name: one.trials[-1].verdict for name, one in made.items() if one.given is None}
        for name, verdict in unbuilt.items():
            _give_up(given_up[name], until[name].last, verdict)
        if unbuilt:
            continue
        # What people call it by: the least exact that any part was given.
        given = min((one.given for one in made.values() if one.given is not None), key=EXACTNESS.__getitem__)
        engine = replace(engine, given=given)
        if together is None:
            return engine, ()
        engine = replace(engine, together=together.measured(engine))
        verdict = together.verdict(engine.together)
        if verdict is None or verdict.passed:
            return engine, ()
        name = together.giving_way(engine)
        executed = [step.id for step in engine.together.values() if step.state in ("failed", "blocked")]
        base = _tolerant(base, [*executed, *_broken(made, made if name is None else [name])])
        if name is None:
            return base, verdict.reasons
        _give_up(given_up[name], made[name].given, verdict)


def _failed(made: Mapping[str, EnginePlan]) -> tuple[str, ...]:
    return tuple(f"{name}: {one.why}" for name, one in made.items() if one.state == "failed")


def _give_up(given_up: dict[Precision, Verdict], precision: Precision | None, verdict: Verdict | None) -> None:
    if precision is None or verdict is None:
        raise ValueError("nothing to give up")
    given_up[precision] = verdict


def _tolerant(base: EnginePlan, steps: Iterable[str]) -> EnginePlan:
    return replace(base, tolerated=tuple(dict.fromkeys((*base.tolerated, *steps))))


def _broken(made: Mapping[str, EnginePlan], names: Iterable[str]) -> list[str]:
    """Return which steps failed of parts of a combination that is given up: what takes their place may pass."""
    parts = [made[name] for name in names if name in made]
    own = [step for part in parts for step in (part.compile, part.engine_verify, part.benchmark)]
    return [step.id for step in own if step is not None and step.state in ("failed", "blocked")]


def _lowered(recipe: Recipe, chosen: Selection) -> bool:
    """Tell whether anything that is planned may be of a precision that calibration data is read for."""
    for target in recipe.targets:
        if any(chosen.includes(target.runtime, gpu) for gpu in target.gpus):
            for asked in target.precision or recipe.precision.build:
                tried = candidates_of(recipe, target) if asked == "auto" else (asked,)
                chain = [*tried, *(one for first in tried for one in recipe.precision.fallback.get(first, ()))]
                if any(one in (*QUANTIZED, *FLOAT16) for one in chain):
                    return True
    return False


def _at_level(base: EnginePlan, level: int | None) -> EnginePlan:
    if level is None:
        return base
    options = base.options.model_copy(update={"optimization_level": level})
    return replace(base, options=options, variant=f"-o{level}")


def _told(trials: Sequence[Trial]) -> str:
    return "; ".join(f"{trial.precision}: {', '.join(trial.verdict.reasons)}" for trial in trials if trial.verdict)
