"""What a plan is: every step of a recipe with its state, and every engine that it asks for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from artifacts.refits import Base
from recipes.choosing import Candidate
from recipes.gates import Verdict
from recipes.schema import Asked, Options, Precision
from recipes.steps import Step


@dataclass(frozen=True)
class Trial:
    """One precision that was tried for an engine, and what its gates said (None: not measured yet)."""

    precision: Precision
    verdict: Verdict | None


@dataclass(frozen=True)
class EnginePlan:
    """One engine that the recipe asks for: what it takes, or why it cannot be had.

    `state`: cached (published), run (something has to run first), waiting (needs a host that is not here),
    failed (no precision passed its gates, or a step failed). `compile` makes the plan: it is a step of the stage
    refit where `refitted_from` names the compilation whose plan gets new weights. `typed` is the precision of the graph
    that is compiled: fp32 where a weakly typed compiler lowers it itself. `support` asks the target which nodes it refuses.

    Of one asked for as `auto`, `candidates` says what became of each, `chosen` which it is, `variant` how its steps are told
    from those of its precision at another level, and `tolerated` which steps may fail, as another candidate takes their place.

    `fallback` is the kind of what is no engine, but served where one cannot be built.

    An engine of several graphs has one of these for each in `parts`, and of its own only what it takes to publish them;
    `together` measures what they do together, as graphs and as engines.
    """

    target: str
    runtime: str
    runtime_version: str
    gpu: str
    asked: Asked
    given: Precision | None
    state: Literal["cached", "run", "waiting", "failed"]
    why: str = ""
    options: Options = field(default_factory=Options)
    typed: Precision | None = None
    trials: tuple[Trial, ...] = ()
    support: Step | None = None
    compile: Step | None = None
    verify: Step | None = None
    engine_verify: Step | None = None
    benchmark: Step | None = None
    publish: Step | None = None
    refitted_from: Base | None = None
    variant: str = ""
    candidates: tuple[Candidate, ...] = ()
    chosen: Candidate | None = None
    tolerated: tuple[str, ...] = ()
    fallback: str = ""
    parts: Mapping[str, EnginePlan] = field(default_factory=dict)
    together: Mapping[str, Step] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """Every step of a recipe with its state, and every engine that it asks for."""

    recipe: str
    steps: tuple[Step, ...]
    engines: tuple[EnginePlan, ...]

    @property
    def ready(self) -> tuple[Step, ...]:
        """The steps that can run now. Engines are published together, when all else that can be made is made or failed."""
        ready = tuple(step for step in self.steps if step.ready)
        return tuple(step for step in ready if step.stage != "publish") or ready

    @property
    def fresh(self) -> bool:
        """Whether nothing has to run."""
        return all(step.state == "cached" for step in self.steps)

    @property
    def status(self) -> int:
        """The exit status that the plan stands for: 1 something failed, 3 something waits for another host, 0 else."""
        tolerated = {name for engine in self.engines for name in engine.tolerated}
        if any(step.state in ("failed", "blocked") and step.id not in tolerated for step in self.steps) or any(
            engine.state == "failed" for engine in self.engines
        ):
            return 1
        return 3 if any(engine.state == "waiting" for engine in self.engines) else 0


@dataclass(frozen=True)
class Selection:
    """Which of a recipe's targets are meant: `RUNTIME` or `RUNTIME:GPU`; empty means all."""

    targets: tuple[str, ...] = ()

    def includes(self, runtime: str, gpu: str) -> bool:
        """Tell whether engines of this runtime for this GPU are meant."""
        return not self.targets or runtime in self.targets or f"{runtime}:{gpu}" in self.targets
