"""Steps of a plan: a stage applied to something, its key, its state and why.

A step is evaluated while the pipeline is described: where all of its inputs are known its key is
computed and looked up at once, so that what comes after can be planned from the outputs that the
record names. Where an input is unknown, because the step that makes it has to run first, it is known
to `run` if its own parameters or toolchain changed since the last build; else it `follows`: it runs
if that input turns out changed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from artifacts.keys import Action, differences
from artifacts.records import ActionRecord
from artifacts.refs import ArtifactRef
from recipes.files import CodeBundle, DatasetFiles, LocalFile

State = Literal["cached", "run", "follows", "failed", "blocked"]
Lookup = Callable[[str, str], ActionRecord | None]
Local = LocalFile | CodeBundle | DatasetFiles

# The version of each stage's own code: raised by hand whenever a change of it may change what it makes.
STAGE_VERSIONS: Mapping[str, int] = {
    "fetch": 1,
    "reference": 1,
    "export": 4,
    "explain": 1,
    "save": 2,
    "simplify": 3,
    "calibrate": 4,
    "outliers": 1,
    "sensitivity": 2,
    "check": 1,
    "type": 7,
    "compile": 1,
    "refit": 1,
    "verify": 3,
    "benchmark": 1,
    "publish": 2,
}


@dataclass(frozen=True)
class Step:
    """One stage of one plan.

    `id` is `stage` or `stage:subject`; `action` is None while an input is unknown; `inputs` maps file names to the
    references that are known; `local` is what a fetch step brings in from outside of the store; `why` explains the
    state in words; `after` names the steps that must have run before this one may.
    """

    id: str
    stage: str
    state: State
    why: tuple[str, ...] = ()
    action: Action | None = None
    inputs: Mapping[str, ArtifactRef] = field(default_factory=dict)
    local: Local | None = None
    record: ActionRecord | None = None
    after: tuple[str, ...] = ()

    @property
    def subject(self) -> str:
        """What the stage is applied to; empty for a stage that occurs once."""
        return self.id.partition(":")[2]

    @property
    def ready(self) -> bool:
        """Whether the step has to run and everything that it needs is there."""
        return self.state == "run" and not self.after

    @property
    def facts(self) -> Mapping[str, Any] | None:
        """What the step found, or None before it has run."""
        return self.record.facts if self.record is not None else None


@dataclass(frozen=True)
class Output:
    """A file that a step makes (or will make); `folder` is where the next step has it, beside files of its name."""

    step: Step
    name: str
    folder: str = ""

    @property
    def ref(self) -> ArtifactRef | None:
        """The file's reference, or None before the step has run."""
        return self.step.record.outputs.get(self.name) if self.step.record is not None else None

    @property
    def placed(self) -> str:
        """The name of the file among the inputs of the next step."""
        return f"{self.folder}/{self.name}" if self.folder else self.name


class Steps:
    """Collects the steps of one plan, each evaluated as it is added."""

    def __init__(
        self,
        lookup: Lookup,
        previous: Callable[[], Mapping[str, Mapping[str, Any]]],
        failures: Mapping[str, str],
    ) -> None:
        """Take the record lookup, what gives the last build's preimages by step id (to explain), and failures by key."""
        self._lookup = lookup
        self._previous = previous
        self._failures = failures
        self._steps: dict[str, Step] = {}

    def all(self) -> tuple[Step, ...]:
        """Return the steps in the order in which they were added: every step after those it needs."""
        return tuple(self._steps.values())

    def add(
        self,
        step_id: str,
        *,
        params: Mapping[str, Any],
        inputs: Iterable[Output] = (),
        toolchain: Mapping[str, Any] | None = None,
        local: tuple[Local, Mapping[str, str]] | None = None,
        gates: Iterable[Step] = (),
        measured: Mapping[str, Mapping[str, Any] | None] | None = None,
        because: Iterable[str] = (),
    ) -> Step:
        """Add a step (once for each id) and return it evaluated.

        `local` is what a fetch step brings in, with the digests that enter its key; `gates` are steps whose verdict
        must be known before this one runs; of what they found only `measured` (facts, by name) enters the key.
        `because` is said first of a step that has to run.
        """
        if step_id in self._steps:
            return self._steps[step_id]
        stage = step_id.partition(":")[0]
        sources = list(inputs)
        needs = [output.step for output in sources]
        waits = tuple(dict.fromkeys(source.id for source in (*needs, *gates) if source.record is None))
        failed = [source for source in (*needs, *gates) if source.state in ("failed", "blocked")]
        refs = {output.placed: ref for output in sources if (ref := output.ref) is not None}
        digests = {name: ref.digest for name, ref in refs.items()} | dict(local[1] if local else {})
        known = all(source.record is not None for source in needs)
        if measured is not None:
            known = known and all(facts is not None for facts in measured.values())
            params = {
                **params,
                "measured": {name: dict(facts) for name, facts in measured.items() if facts is not None},
            }
        action = Action(stage, STAGE_VERSIONS[stage], params, digests, toolchain or {})
        step = Step(step_id, stage, "run", inputs=refs, local=local[0] if local else None, after=waits)
        if known:
            step = replace(step, action=action, record=self._lookup(stage, action.key))
        if step.record is not None:
            step = replace(step, state="cached", after=())
        elif known and action.key in self._failures:
            step = replace(step, state="failed", why=(self._failures[action.key],), after=())
        elif failed:
            step = replace(step, state="blocked", why=_needs(failed[0]), after=())
        else:
            step = self._explained(step, action, known=known)
            step = replace(step, why=(*because, *step.why))
        self._steps[step_id] = step
        return step

    def mark(self) -> int:
        """Return where we are, for `since` and `restore`."""
        return len(self._steps)

    def since(self, mark: int) -> tuple[Step, ...]:
        """Return the steps that were added since `mark`."""
        return tuple(self._steps.values())[mark:]

    def restore(self, mark: int) -> None:
        """Take back the steps that were added since `mark`."""
        for step in self.since(mark):
            del self._steps[step.id]

    def peek(
        self, stage: str, *, params: Mapping[str, Any], inputs: Iterable[Output], toolchain: Mapping[str, Any]
    ) -> tuple[Action, ActionRecord | None, str | None] | None:
        """Evaluate a step without adding it: its action, its record if there is one, and how it failed if it did.

        None where an input is not known yet.
        """
        refs = {output.name: output.ref for output in inputs}
        digests = {name: ref.digest for name, ref in refs.items() if ref is not None}
        if len(digests) < len(refs):
            return None
        action = Action(stage, STAGE_VERSIONS[stage], params, digests, toolchain)
        return action, self._lookup(stage, action.key), self._failures.get(action.key)

    def record(self, stage: str, key: str) -> ActionRecord | None:
        """Return the record of an action of any recipe, if it and what it made are there."""
        return self._lookup(stage, key)

    def _explained(self, step: Step, action: Action, *, known: bool) -> Step:
        """Say why a step has to run; where only an unknown input could make it run, it `follows`."""
        old = self._previous().get(step.id)
        if old is None:
            return replace(step, why=("miss: never built",))
        new = action.preimage()
        if not known:
            new["inputs"] = old.get("inputs")
            if "measured" in new["params"]:
                new["params"] = {**new["params"], "measured": old.get("params", {}).get("measured")}
        changed = differences(old, new)
        if changed:
            return replace(step, why=tuple(f"miss: {difference}" for difference in changed))
        if known:
            return replace(step, why=("miss: its record or a blob is gone",))
        return replace(step, state="follows", why=(f"runs if {', '.join(step.after)} changes its output",))


def _needs(step: Step) -> tuple[str, ...]:
    """Say what a blocked step needs: the step that failed first, not the last in the chain that it blocks."""
    return step.why if step.state == "blocked" else (f"needs {step.id}, which failed",)
