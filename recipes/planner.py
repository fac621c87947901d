"""The planner: a recipe, its files and a host become steps with keys, and engines with what they need.

Pure: records come through `lookup`, versions through `version`. The build runs the steps that are
`ready`, plans again, and ends when none is left, so this is the only description of the order of work.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, Literal

from artifacts.host import Host
from artifacts.refits import Base
from recipes.choosing import Candidate, candidates_of
from recipes.files import RecipeFiles
from recipes.gates import Verdict, judge, parity_bounds
from recipes.options import calibrator_refusal, compile_params, options_of, refusals, uses_calibrator
from recipes.parts import built_in, part_recipe
from recipes.pipeline import Pipeline, Version, graph_files
from recipes.plan import EnginePlan, Plan, Selection, Trial
from recipes.refitting import Bases, Compilation, Refits
from recipes.schema import EXACTNESS, FP8, INT8, QUANTIZED, Asked, Precision, Recipe, Target
from recipes.searching import Search
from recipes.steps import Lookup, Output, Step, Steps
from recipes.targets import lowers_beside_pairs, refusal

# The package whose version enters the keys of what a runtime compiles, and the name of the file it makes.
RUNTIME_PACKAGES: Final = {"tensorrt-rtx": "tensorrt_rtx", "tensorrt": "tensorrt", "onnxruntime": "onnxruntime"}
CUDA_FLAVOURS: Final = ("cu11", "cu12", "cu13")
# What a reproducible build is built again from, as the compilation names it.
PINNED: Final = ("timing.cache", "layers.json")
PLAN_NAMES: Final = {"tensorrt-rtx": "model.plan", "tensorrt": "model.plan", "onnxruntime": "model.onnx"}


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
    whole = _Engines(Pipeline(recipe, files, version, steps), host, refits, spent or {})
    parts = {
        name: replace(
            whole,
            pipeline=Pipeline(part_recipe(recipe, name), files.parts[name], version, steps, name, part.module),
        )
        for name, part in recipe.parts.items()
    }
    planned = [
        _in_parts(whole, parts, target, gpu, asked) if parts else whole.plan(target, gpu, asked)
        for target in recipe.targets
        for gpu in target.gpus
        if chosen.includes(target.runtime, gpu)
        for asked in target.precision or recipe.precision.build
    ]
    return Plan(recipe.name, steps.all(), tuple(planned))


@dataclass(frozen=True)
class _Engines:
    """Describes what each engine takes beyond the portable steps: compile, verify where it can run, publish."""

    pipeline: Pipeline
    host: Host
    refits: Refits
    spent: Mapping[str, float]
    parts: Mapping[str, _Engines] = field(default_factory=dict)

    def plan(self, target: Target, gpu: str, asked: Asked) -> EnginePlan:
        """Plan one engine: the first precision of the chain that passes its gates is compiled and published."""
        engine = self.passing(target, gpu, asked)
        return self.published(engine, target) if engine.state == "run" and engine.compile is not None else engine

    def base(self, target: Target, gpu: str, asked: Asked) -> EnginePlan:
        """Return an engine of which nothing is planned yet."""
        version = self.host.runtimes.get(target.runtime, target.version or "")
        name = "-".join(part for part in (target.runtime, version, gpu) if part)
        options = options_of(self.pipeline.recipe, target)
        return EnginePlan(name, target.runtime, version, gpu, asked, None, "run", options=options)

    def passing(self, target: Target, gpu: str, asked: Asked) -> EnginePlan:
        """Plan one engine up to its publication, of which it has the steps before where it is in the state `run`."""
        recipe = self.pipeline.recipe
        base = self.base(target, gpu, asked)
        options, version = base.options, base.runtime_version
        for step in self._portable_gates():
            verdict = self._verdict(step, "fp32")
            if verdict is not None and not verdict.passed:
                what = "exported" if step.subject.endswith("export") else "simplified"
                return replace(base, state="failed", why=f"the {what} graph fails: {', '.join(verdict.reasons)}")
        waiting = self._waits(target, gpu)
        lacking = next((why for _option, why in refusals(options, target.runtime, gpu, version or None)), None)
        if waiting is None and lacking is not None:
            return replace(base, state="failed", why=lacking)
        if asked == "auto":
            return self._fastest(base, target, waiting)
        trials: list[Trial] = []
        for precision in (asked, *recipe.precision.fallback.get(asked, ())):
            engine, verdict = self._trial(base, precision, waiting)
            trials.append(Trial(precision, verdict))
            if engine.state == "waiting":
                return replace(engine, trials=tuple(trials))
            if verdict is None or verdict.passed:
                return replace(engine, benchmark=self._benchmark(engine), trials=tuple(trials))
        return replace(
            base, state="failed", why=f"no precision passed its gates: {_told(trials)}", trials=tuple(trials)
        )

    def _trial(self, base: EnginePlan, precision: Precision, waiting: str | None) -> tuple[EnginePlan, Verdict | None]:
        """Describe building one precision up to the verdict on it; `waiting` says what this host lacks to compile it."""
        recipe = self.pipeline.recipe
        refused = refusal(base.runtime, base.gpu, precision, base.runtime_version or None)
        if refused is None and precision in INT8 and recipe.precision.int8 == "calibrator":
            refused = calibrator_refusal(base.options, base.runtime, base.runtime_version or None)
        if refused is not None:
            return base, Verdict(passed=False, reasons=(refused,))
        # The graph that is compiled; what a weakly typed compiler makes of it is judged when it is executed.
        source = self._typed(base, precision)
        typed = self.pipeline.typed(source)
        graph = self.pipeline.verify(self.pipeline.id("verify", source), "graph", typed, tf32=source == "tf32")
        verdict = self._verdict(graph, source)
        wanted = replace(base, given=precision, typed=source, verify=graph)
        if waiting is not None and (verdict is None or verdict.passed):
            return replace(base, state="waiting", why=waiting), verdict
        reasons: list[str] = []
        for made, origin in self._ways(wanted, precision, graph, verdict, reasons):
            engine = replace(wanted, compile=made, refitted_from=origin)
            engine = replace(engine, engine_verify=self._execute(engine, precision, again=bool(reasons)))
            verdict = self._verdict(graph, source) and self._judged(engine.engine_verify or graph, precision)
            if verdict is None or verdict.passed:
                return engine, verdict
            reasons.append(f"compiled: what was refitted does not pass: {', '.join(verdict.reasons)}")
        return wanted, verdict

    def _fastest(self, base: EnginePlan, target: Target, waiting: str | None) -> EnginePlan:
        """Plan the fastest candidate that passes: one candidate at a time, so that each is alone on its device.

        When the budget is spent and one has passed, candidates that would have to be made are left for another build.
        """
        precision, steps = self.pipeline.recipe.precision, self.pipeline.steps
        levels: tuple[int | None, ...] = (None,)
        if precision.optimization_levels is not None and base.runtime != "onnxruntime":
            levels = tuple(precision.optimization_levels)
        search = Search(steps, self.spent, precision.budget, measured=base.runtime != "tensorrt-rtx")
        for level, one in itertools.product(levels, candidates_of(self.pipeline.recipe, target)):
            candidate, mark = Candidate(one, level), steps.mark()
            if search.skips(candidate):
                continue
            engine, verdict = self._trial(_at_level(base, level), one, waiting)
            if engine.state == "waiting":
                return engine
            timed = self._timed(engine) if verdict is not None and verdict.passed else None
            if not search.weighs(candidate, mark, engine, verdict, timed):
                return search.noted(base)
        engine = search.best(base)
        if engine.chosen is None:
            return engine
        asked = self.pipeline.recipe.benchmark
        if engine.benchmark is not None and asked is not None and asked.compare:
            engine = replace(engine, benchmark=self._timed(engine, compare=asked.compare))
        return engine

    def _typed(self, engine: EnginePlan, precision: Precision) -> Precision:
        """Return the precision of the graph that the compiler gets: a higher one where it is to lower the graph itself."""
        if uses_calibrator(self.pipeline.recipe, engine.runtime, precision):
            return "fp32"
        weak = engine.runtime == "tensorrt" and engine.options.typing == "weak"
        if precision == "int8-fp16":
            # Half Q/DQ pairs begin with opset 19, of which 8.6 reads 17: it gets the int8 graph, and lowers the rest of it.
            return "int8" if weak or lowers_beside_pairs(engine.runtime, engine.runtime_version) else precision
        return "fp32" if weak and precision not in ("int8", "tf32", *FP8) else precision

    def _portable_gates(self) -> list[Step]:
        """Measure the untyped graphs: where they differ from the source, no precision can be right."""
        export, simplify = self.pipeline.export, self.pipeline.simplify
        return [
            self.pipeline.verify(self.pipeline.id("verify", "export"), "graph", export),
            self.pipeline.verify(self.pipeline.id("verify", "simplify"), "graph", simplify),
        ]

    def _verdict(self, step: Step, precision: Precision) -> Verdict | None:
        """Judge a graph; one that only plugins can run passes so far: its engines are judged when they are executed."""
        if step.facts is not None and step.facts.get("plugin"):
            return Verdict(passed=True, reasons=())
        return self._judged(step, precision)

    def _judged(self, step: Step, precision: Precision) -> Verdict | None:
        if step.facts is None:
            return None
        return judge(step.facts, self.pipeline.recipe.acceptance, precision)

    def _waits(self, target: Target, gpu: str) -> str | None:
        """Say what a host needs to compile this, or None if this host can."""
        needed = f"{target.runtime} {target.version}" if target.version is not None else target.runtime
        device = f" and an {gpu} GPU" if target.runtime == "tensorrt" else ""
        installed = self.host.runtimes.get(target.runtime)
        if installed is None:
            return f"needs a host with {needed}{device}; {target.runtime} is not installed here"
        if target.version not in (None, installed):
            return f"needs a host with {needed}{device}; {installed} is installed here"
        if device and not self.host.has_gpu(gpu):
            return f"needs a host with {needed}{device}; no such GPU is here"
        return None

    def _ways(
        self, engine: EnginePlan, precision: Precision, gate: Step, verdict: Verdict | None, reasons: Sequence[str]
    ) -> Iterator[tuple[Step, Base | None]]:
        """Yield the steps that can make a plan, the cheapest first, unless the graph has failed its gates."""
        if verdict is None or verdict.passed:
            wanted = self._compile(engine, precision, gate)
            yield from self.refits.ways(wanted, self.pipeline.typed(engine.typed or precision), reasons)

    def _compile(self, engine: EnginePlan, precision: Precision, gate: Step) -> Compilation:
        """Describe compiling for one GPU; nothing of other targets, and no name or path, enters the key."""
        params: dict[str, Any] = {"runtime": engine.runtime, "gpu": engine.gpu}
        if engine.runtime != "onnxruntime":  # which takes any shape, and none of the options
            params |= {
                "tf32": precision == "tf32",
                "profiles": self.pipeline.profiles,
                **compile_params(engine.options, engine.runtime),
            }
        inputs = graph_files(self.pipeline.typed(engine.typed or precision))
        gates = [*self._portable_gates(), gate]
        if engine.runtime == "tensorrt":
            # Which of a graph's types a weakly typed builder may use is a flag of it; the tactics are those of the device.
            params["precision"] = precision
            inputs += [*self.pipeline.plugins(engine.options), *self.pipeline.pins(engine.options)]
            calibrator = uses_calibrator(self.pipeline.recipe, engine.runtime, precision)
            if precision == "int8-fp16" and engine.typed == "int8":
                params |= {"keep": self.pipeline.recipe.precision.keep} if self.pipeline.recipe.precision.keep else {}
            if calibrator or engine.options.typing == "weak":
                keep = self.pipeline.recipe.precision.keep
                params |= {"typing": "weak", **({"keep": keep} if keep and precision not in ("fp32", "tf32") else {})}
            calibration = self.pipeline.recipe.precision.calibration
            if calibrator and calibration is not None:
                params["calibrator"] = calibration.method
                inputs.append(self._calibrate(engine, gates))
        return Compilation(
            ":".join(filter(None, (self.pipeline.part, engine.runtime, engine.gpu, f"{precision}{engine.variant}"))),
            params=params,
            inputs=inputs,
            toolchain=self._compiler(engine),
            gates=gates,
        )

    def _calibrate(self, engine: EnginePlan, gates: list[Step]) -> Output:
        """Let TensorRT find int8 ranges on the device; its cache serves every later compilation of the graph."""
        spec, files = self.pipeline.recipe.precision.calibration, self.pipeline.files.calibration
        if spec is None or files is None:
            raise ValueError(f"{engine.target}: there is no calibration data")
        step = self.pipeline.steps.add(
            self.pipeline.id("calibrate", f"{engine.runtime}:{engine.gpu}"),
            params={
                "runtime": engine.runtime,
                "gpu": engine.gpu,
                "method": spec.method,
                "batch": spec.batch,
                "tensors": self.pipeline.interface,
            },
            inputs=[
                *graph_files(self.pipeline.typed("fp32")),
                *self.pipeline.plugins(engine.options),
                self.pipeline.calibration_data(spec, files),
            ],
            toolchain=self._compiler(engine),
            gates=gates,
        )
        return Output(step, "calibration.cache")

    def _compiler(self, engine: EnginePlan) -> dict[str, Any]:
        """Return what a compilation depends on besides its parameters and inputs."""
        package = RUNTIME_PACKAGES[engine.runtime]
        toolchain = {package: engine.runtime_version, "os": self.host.os, "arch": self.host.arch}
        if engine.runtime != "onnxruntime":
            # One version is released for several major versions of CUDA, as packages of that name.
            found = [flavour for flavour in CUDA_FLAVOURS if self.pipeline.version(f"{package}_{flavour}") is not None]
            toolchain["cuda"] = ",".join(found)
        return toolchain | (self._device(engine) if engine.runtime == "tensorrt" else {})

    def _device(self, engine: EnginePlan) -> dict[str, Any]:
        """Return what of this host an engine that is compiled (or executed) on it depends on."""
        recipe = self.pipeline.recipe
        gpu = self.host.gpu(engine.gpu)
        portable = engine.options.hardware_compatibility != "none"
        driver = {"exact": self.host.driver, "branch": self.host.driver_branch, "ignore": None}[recipe.driver]
        return {"device": gpu.device() if gpu is not None and not portable else None, "driver": driver}

    def _execute(self, engine: EnginePlan, precision: Precision, *, again: bool = False) -> Step | None:
        """Verify the compiled engine itself, where this host can execute it; `again`, where a refitted one failed."""
        if engine.compile is None or engine.runtime == "tensorrt-rtx":
            return None
        subject = f"{engine.runtime}:{engine.gpu}:{precision}{engine.variant}" + (":compiled" if again else "")
        step_id = self.pipeline.id("verify", subject)
        if engine.runtime == "onnxruntime":
            return self.pipeline.verify(step_id, "engine", engine.compile)
        return self.pipeline.verify(
            step_id,
            "engine",
            engine.compile,
            plan_name=PLAN_NAMES[engine.runtime],
            executor=self._executor(engine),
            plugins=self.pipeline.plugins(engine.options),
            device={RUNTIME_PACKAGES[engine.runtime]: engine.runtime_version, **self._device(engine)},
        )

    def _benchmark(self, engine: EnginePlan) -> Step | None:
        """Time an engine that was executed here, where the recipe asks for it."""
        asked = self.pipeline.recipe.benchmark
        return self._timed(engine, compare=asked.compare) if asked is not None else None

    def _timed(self, engine: EnginePlan, *, compare: Sequence[str] = ()) -> Step | None:
        """Time an engine that was executed here, beside what it is compared with."""
        if engine.compile is None or engine.engine_verify is None:
            return None
        gpu = self.host.gpu(engine.gpu)  # also where the engine may run on others: a time is that of one device
        on_gpu = {**self._device(engine), "device": gpu.device() if gpu is not None else None}
        device = on_gpu if engine.runtime == "tensorrt" else {"cpu": self.host.cpu, "os": self.host.os}
        return self.pipeline.benchmark(
            self.pipeline.id(
                "benchmark",
                f"{engine.runtime}:{engine.gpu}:{engine.given}{engine.variant}"
                + (":compared" if engine.chosen is not None else ""),
            ),
            self._engine_files(engine, engine.compile),
            engine.engine_verify,
            executor=self._executor(engine),
            device={RUNTIME_PACKAGES[engine.runtime]: engine.runtime_version, **device},
            compare=compare,
        )

    def _engine_files(self, engine: EnginePlan, compiled: Step) -> list[Output]:
        """Return what a runtime loads: the plan, and its libraries of plugins."""
        plugins = self.pipeline.plugins(engine.options) if engine.runtime == "tensorrt" else ()
        return [*graph_files(compiled, PLAN_NAMES[engine.runtime]), *plugins]

    def _executor(self, engine: EnginePlan) -> dict[str, Any]:
        """Return the parameters of what runs an engine itself."""
        if engine.runtime == "onnxruntime":
            return {"executor": "onnxruntime", "gpu": "cpu"}
        return {
            "executor": engine.runtime,
            "gpu": engine.gpu,
            "version_compatible": engine.options.version_compatible,
            **({"dla_core": engine.options.dla.core} if engine.options.dla is not None else {}),
        }

    def published(self, engine: EnginePlan, target: Target) -> EnginePlan:
        """Publish a compiled engine; everything that its manifest states enters the key, but for times and names."""
        params, measured, inputs, gates = self._stated(engine)
        return self._publish(engine, target, params, measured, inputs, gates)

    def published_in_parts(self, engine: EnginePlan, target: Target) -> EnginePlan:
        """Publish the engines of all parts as one: in one step, so that a reader sees all of them or none."""
        stated: dict[str, Any] = {}
        measured: dict[str, Mapping[str, Any] | None] = {}
        inputs: list[Output] = []
        gates: list[Step] = []
        for name, part in engine.parts.items():
            owner = self.parts[name]
            stated[name], found, files, before = owner._stated(part)  # noqa: SLF001  of the same class
            stated[name] |= {"asked": part.asked, "given": part.given}
            measured |= {f"{name}/{what}": facts for what, facts in found.items()}
            # Libraries of plugins are the whole engine's; every other file is named as other parts' files are.
            shared = {id(output) for output in files if output.name.startswith("plugin-")}
            inputs += [output if id(output) in shared else replace(output, folder=name) for output in files]
            gates += before
        params = {"parts": stated, "tried": _refused(engine)}
        return self._publish(
            engine, target, params, measured, list({output.placed: output for output in inputs}.values()), gates
        )

    def _stated(
        self, engine: EnginePlan
    ) -> tuple[dict[str, Any], dict[str, Mapping[str, Any] | None], list[Output], list[Step]]:
        """Return what is stated of a compiled graph: parameters, what was measured, its files and what has to pass."""
        if engine.given is None or engine.compile is None or engine.verify is None:
            raise ValueError(f"{engine.target}: nothing to publish")
        recipe = self.pipeline.recipe
        executed = engine.engine_verify
        params: dict[str, Any] = {
            "tried": _refused(engine),
            "inputs": self.pipeline.interface,
            "profiles": self.pipeline.profiles,
            "gates": {
                "parity": dict(parity_bounds(recipe.acceptance, engine.given)),
                "metric": _metric_gate(recipe),
            },
            "calibration": self.pipeline.calibration_digest() if engine.given in QUANTIZED else None,
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
        measured: dict[str, Mapping[str, Any] | None] = {
            "typed": self.pipeline.typed(engine.typed or engine.given).facts,
            "graph": engine.verify.facts,
            "engine": executed.facts if executed is not None else not_executed,
        }
        inputs, timed = self._engine_files(engine, engine.compile), engine.benchmark
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

    def _publish(
        self,
        engine: EnginePlan,
        target: Target,
        stated: Mapping[str, Any],
        measured: Mapping[str, Mapping[str, Any] | None],
        inputs: Sequence[Output],
        gates: Sequence[Step],
    ) -> EnginePlan:
        recipe = self.pipeline.recipe
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
        step = self.pipeline.steps.add(
            f"publish:{engine.runtime}:{engine.gpu}:{engine.asked}",
            params=params,
            inputs=inputs,
            gates=gates,
            measured=measured,
        )
        state: Literal["cached", "run", "failed"] = "run"
        if step.state == "cached":
            state = "cached"
        elif step.state in ("failed", "blocked"):
            state = "failed"
        return replace(engine, state=state, why="; ".join(step.why), publish=step)


def _in_parts(whole: _Engines, parts: Mapping[str, _Engines], target: Target, gpu: str, asked: Asked) -> EnginePlan:
    """Plan one engine of several parts: each gives way by its own chain, and what one cannot have the whole has not.

    Where a part has no precision that passes, the whole gives way by the recipe's chain: every part is asked for the next.
    """
    base, trials = whole.base(target, gpu, asked), list[Trial]()
    if asked == "auto":
        return replace(base, state="failed", why="auto chooses for models of one graph")
    for precision in (asked, *whole.pipeline.recipe.precision.fallback.get(asked, ())):
        made = {
            name: engines.passing(target, gpu, built_in(whole.pipeline.recipe.parts[name], precision))
            for name, engines in parts.items()
        }
        waiting = next((one.why for one in made.values() if one.state == "waiting"), None)
        reasons = tuple(f"{name}: {one.why}" for name, one in made.items() if one.state == "failed")
        if reasons:
            trials.append(Trial(precision, Verdict(passed=False, reasons=reasons)))
            continue
        engine = replace(base, parts=made, trials=tuple(trials))
        if waiting is not None:
            return replace(engine, state="waiting", why=waiting)
        # What people call it by: the least exact that any part was given.
        given = min((one.given for one in made.values() if one.given is not None), key=EXACTNESS.__getitem__)
        return replace(whole, parts=parts).published_in_parts(replace(engine, given=given), target)
    return replace(base, state="failed", why=f"no precision passed its gates: {_told(trials)}", trials=tuple(trials))


def _refused(engine: EnginePlan) -> list[dict[str, Any]]:
    return [
        {"precision": trial.precision, "reasons": list(trial.verdict.reasons)}
        for trial in engine.trials
        if trial.verdict is not None and not trial.verdict.passed
    ]


def _at_level(base: EnginePlan, level: int | None) -> EnginePlan:
    if level is None:
        return base
    options = base.options.model_copy(update={"optimization_level": level})
    return replace(base, options=options, variant=f"-o{level}")


def _told(trials: Sequence[Trial]) -> str:
    return "; ".join(f"{trial.precision}: {', '.join(trial.verdict.reasons)}" for trial in trials if trial.verdict)


def _listings(compiled: Step, timed: Step) -> list[Output]:
    """Return what is published beside a plan that was timed: its layers, and how long each of them took."""
    listings = [Output(compiled, "layers.json"), Output(timed, "profile.json")]
    return [listing for listing in listings if listing.ref is not None]


def _metric_gate(recipe: Recipe) -> dict[str, Any] | None:
    metric = recipe.acceptance.metric
    if metric is None:
        return None
    lower = {"ceiling": metric.ceiling, "lower_is_better": True} if metric.lower_is_better else {}
    return {"name": metric.name, "floor": metric.floor, "max_drop": metric.max_drop, **lower}
