"""Refit instead of compile: where an earlier plan differs in weights alone, new weights are put into it.

Only planning happens here. Which plans there are is a hint (`artifacts.refits`); a hint counts where the record that it
names is there, with its plan, and says what is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from artifacts.refits import Base, refit_identity
from recipes.steps import Output, Step, Steps

# What a compilation with build.refit leaves for a refit, besides its graph.
PLAN: Final = "model.plan"
WEIGHTS: Final = "refit.safetensors"
LAYERS: Final = "layers.json"  # the plan's listing, which stays as it is

Bases = Callable[[str], Sequence[Base]]


@dataclass(frozen=True)
class Compilation:
    """A compile step before it is added: `subject` is what it is for, the rest what `Steps.add` takes."""

    subject: str
    params: Mapping[str, Any]
    inputs: Sequence[Output]
    toolchain: Mapping[str, Any]
    gates: Sequence[Step]

    def add(self, steps: Steps, because: Sequence[str] = ()) -> Step:
        """Add it as it is."""
        return steps.add(
            f"compile:{self.subject}",
            params=self.params,
            inputs=self.inputs,
            toolchain=self.toolchain,
            gates=self.gates,
            because=because,
        )

    def refit(self, base: Step) -> list[Output]:
        """Return the inputs of a refit of what `base` compiled."""
        listed = base.record is not None and LAYERS in base.record.outputs
        return [*self.inputs, Output(base, PLAN), Output(base, WEIGHTS), *([Output(base, LAYERS)] if listed else [])]

    def add_refit(self, steps: Steps, base: Step, because: Sequence[str] = ()) -> Step:
        """Add the refit of what `base` compiled: an engine of this graph, as this compilation would make it."""
        return steps.add(
            f"refit:{self.subject}",
            params=self.params,
            inputs=self.refit(base),
            toolchain=self.toolchain,
            gates=self.gates,
            because=because,
        )


@dataclass(frozen=True)
class Refits:
    """Finds plans to refit; `bases` gives what a store lists under an identity, the newest first."""

    steps: Steps
    bases: Bases

    def ways(self, wanted: Compilation, graph: Step, reasons: Sequence[str]) -> Iterator[tuple[Step, Base | None]]:
        """Yield the steps that can make an engine, the cheapest first, each with what it is refitted from.

        `graph` is the step whose graph is compiled. A second one is asked for where the engine of the first does not
        pass its gates; `reasons` then says so. A stripped plan is filled in any case.
        """
        how = wanted.params.get("refit", "none")
        structure = (graph.facts or {}).get("structure")
        found = self.steps.peek("compile", params=wanted.params, inputs=wanted.inputs, toolchain=wanted.toolchain)
        because: list[str] = []
        if how != "none" and found is not None and structure is not None and found[1] is None:
            refit = self._refit(wanted, refit_identity(found[0].preimage(), structure), because)
            if refit is not None:
                yield refit
        compiled = wanted.add(self.steps, (*because, *reasons))
        if how == "stripped":
            own = Base(compiled.action.key) if compiled.action is not None else None
            yield wanted.add_refit(self.steps, compiled), own
        else:
            yield compiled, None

    def _refit(self, wanted: Compilation, identity: str, because: list[str]) -> tuple[Step, Base] | None:
        """Return the refit that was made before, else the one of the newest base; `because` gets what failed."""
        newest: tuple[Step, Base] | None = None
        for base in self.bases(identity):
            step = self._base(wanted.subject, base, identity)
            if step is None:
                continue
            seen = self.steps.peek("refit", params=wanted.params, inputs=wanted.refit(step), toolchain=wanted.toolchain)
            if seen is not None and seen[1] is not None:
                return wanted.add_refit(self.steps, step), base
            if seen is not None and seen[2] is not None:
                because.append(f"compiled: the refit of {_name(step, base)} failed: {seen[2].splitlines()[0]}")
            newest = newest or (step, base)
        if newest is None or because:  # one refit that fails is enough: the next would take its time too
            return None
        step, base = newest
        return wanted.add_refit(self.steps, step, [f"refit: only weights changed since {_name(step, base)}"]), base

    def _base(self, subject: str, base: Base, identity: str) -> Step | None:
        """Return the compilation that a hint names, as a step, if it is there and says what the hint says."""
        record = self.steps.record("compile", base.key)
        facts = record.facts.get("refit") if record is not None else None
        if record is None or not isinstance(facts, dict) or not {PLAN, WEIGHTS} <= set(record.outputs):
            return None
        if refit_identity(record.preimage, str(facts.get("structure"))) != identity:
            return None
        return Step(f"compile:{subject}", "compile", "cached", record=record)


def _name(step: Step, base: Base) -> str:
    plan = step.record.outputs[PLAN].digest if step.record is not None else base.key
    return base.engine or f"plan {plan[:12]}"
