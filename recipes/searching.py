"""The search of `precision: auto`: candidates come one after another, and what became of each is kept in order."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from recipes.choosing import Candidate, fastest, measured
from recipes.gates import Verdict
from recipes.plan import EnginePlan, Trial
from recipes.schema import duration_seconds
from recipes.steps import Step, Steps


@dataclass
class Search:
    """One search. `spent` has the seconds that this build has spent on steps, by key; `budget` is the recipe's.

    Where nothing is `measured`, since the host that compiles cannot execute, the first that passes ends it.
    """

    steps: Steps
    spent: Mapping[str, float]
    budget: str | None
    measured: bool
    tried: list[Candidate] = field(default_factory=list)
    engines: dict[str, EnginePlan] = field(default_factory=dict)
    tolerated: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def skips(self, candidate: Candidate) -> bool:
        """Tell whether a candidate need not be tried any more, and note it."""
        if self.measured or not self._found:
            return False
        self.tried.append(replace(candidate, reasons=("not tried: nothing is measured here, so the first counts",)))
        return True

    def weighs(
        self, candidate: Candidate, mark: int, engine: EnginePlan, verdict: Verdict | None, timed: Step | None
    ) -> bool:
        """Note what is known of a candidate whose steps were added since `mark`; False where they have to run first.

        What is left to run of one that was not begun before the budget was spent is taken back, once another has passed.
        One whose steps failed is noted as such: its steps may fail, as another takes its place.
        """
        before, own = self.seconds, self.steps.since(mark)
        self.seconds += sum(self.spent.get(step.action.key, 0.0) for step in own if step.action is not None)
        needed = [step for step in (engine.verify, engine.compile, engine.engine_verify, timed) if step is not None]
        broken = next((step for step in needed if step.state in ("failed", "blocked")), None)
        if broken is not None:
            self.tolerated += [step.id for step in own if step.state in ("failed", "blocked")]
            candidate = replace(candidate, passed=False, reasons=(f"{broken.id}: {_first_line(broken.why)}",))
        elif verdict is not None and not verdict.passed:
            candidate = replace(candidate, passed=False, reasons=verdict.reasons)
        elif all(step.record is not None for step in needed):
            self.engines[candidate.name] = replace(engine, benchmark=timed)
            candidate = _measured(replace(candidate, passed=True), timed)
        elif self._found and before >= self._limit:
            self.steps.restore(mark)
            candidate = replace(candidate, reasons=(f"not tried: the budget of {self.budget} is spent",))
        else:
            return False
        self.tried.append(candidate)
        return True

    def noted(self, engine: EnginePlan, chosen: Candidate | None = None) -> EnginePlan:
        """Return an engine with what the search has found so far."""
        refused = [Trial(one.precision, Verdict(False, one.reasons)) for one in self.tried if one.passed is False]
        return replace(
            engine,
            candidates=tuple(self.tried),
            tolerated=tuple(self.tolerated),
            trials=tuple(refused),
            chosen=chosen,
        )

    def best(self, base: EnginePlan) -> EnginePlan:
        """Return the engine of the fastest candidate, or `base` as failed, with every reason, where none passed."""
        chosen = fastest(self.tried)
        if chosen is not None:
            return self.noted(self.engines[chosen.name], chosen)
        why = "; ".join(f"{one.name}: {', '.join(one.reasons)}" for one in self.tried)
        return self.noted(replace(base, state="failed", why=f"no candidate passed: {why}"))

    @property
    def _found(self) -> bool:
        return any(one.passed for one in self.tried)

    @property
    def _limit(self) -> float:
        return math.inf if self.budget is None else float(duration_seconds(self.budget))


def _measured(candidate: Candidate, timed: Step | None) -> Candidate:
    if timed is None or timed.facts is None or timed.action is None:
        return candidate
    ms, graph = measured(timed.facts)
    return replace(candidate, ms=ms, graph=graph, key=timed.action.key)


def _first_line(why: Sequence[str]) -> str:
    return why[0].partition("\n")[0] if why else "no reason known"
