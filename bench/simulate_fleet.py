"""Simulate a thousand recipes over a mixed fleet through a driver upgrade: time to fresh, busy share of GPUs, what helps.

    python bench/simulate_fleet.py [RESULT.json] [--chart docs/fleet.svg]

A discrete-event model (simpy) of what docs/scale.md describes. Stage times are those measured (`measured`, of bench/results);
what is assumed stands in ASSUMED, goes into the result, and is varied by the scenarios. The same seed gives the same result.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import simpy

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from artifacts.rollouts import CANARY_ENGINES  # noqa: E402  of this checkout

RESULTS = ROOT / "bench" / "results"

ASSUMED: dict[str, Any] = {
    "gpus": {"T4": 40, "A10": 30, "L4": 40, "A100": 30, "H100": 40, "H200": 20},
    # How much longer a compilation takes than on the H100, where alone all of them were measured.
    "slower": {"T4": 2.5, "A10": 1.6, "L4": 1.8, "A100": 1.3, "H100": 1.0, "H200": 1.0},
    "recipes": 1000,
    "engines_of_a_recipe": 8,
    "families": 150,  # recipes of one architecture, with other weights, share what a timing cache knows
    "warm_share": 0.5,  # of a compilation's time, with a timing cache that knows its layers (measured: 0.26 and 0.84)
    "benchmark_seconds": 20.0,
    "start_seconds": 8.0,  # a flow run: its process, Prefect's import, inputs from the store; without the GPU
    "upgrade_seconds": 600.0,  # drain, driver, reboot
    "canary_engines": CANARY_ENGINES,  # how many of a kind have to pass before its other hosts follow: the default
}


@dataclass(frozen=True)
class Engine:
    """One engine to be built anew: its GPU kind, what its timing cache is shared with, and seconds on the GPU."""

    number: int
    kind: str
    family: str
    cold: float
    warm: float
    rest: float  # verification and benchmark, which need the GPU too


@dataclass(frozen=True)
class Scenario:
    """What is varied. `slots` flow runs of a worker share its GPU: one computes, another starts."""

    name: str
    timing_caches: bool = True
    waves: bool = True
    slots: int = 2
    longest_first: bool = True  # once the others follow, as artifacts.rollouts has it
    canary_engines: int = ASSUMED["canary_engines"]
    same_speed: bool = False
    bad_driver: bool = False


@dataclass(frozen=True)
class Interval:
    """A GPU at work on one engine, from `begin` to `end` in seconds since the upgrade began."""

    gpu: str
    engine: int
    begin: float
    end: float


@dataclass
class Run:
    """What a simulation did: every interval of work, when each GPU could first work, and what was left unbuilt."""

    gpus: dict[str, list[str]]
    intervals: list[Interval] = field(default_factory=list)
    ready: dict[str, float] = field(default_factory=dict)
    stopped: set[str] = field(default_factory=set)

    @property
    def makespan(self) -> float:
        """When the last engine was built."""
        return max((one.end for one in self.intervals), default=0.0)

    def kind_end(self, kind: str) -> float:
        """When the last engine of a kind of GPU was built."""
        mine = set(self.gpus[kind])
        return max((one.end for one in self.intervals if one.gpu in mine), default=0.0)

    def busy_share(self, kind: str) -> float:
        """Return the share of time in which GPUs of a kind compute, from when each may work until the kind is fresh."""
        mine, end = set(self.gpus[kind]), self.kind_end(kind)
        worked = sum(one.end - one.begin for one in self.intervals if one.gpu in mine)
        had = sum(max(0.0, end - self.ready.get(gpu, end)) for gpu in mine)
        return worked / had if had else 0.0

    def fresh_after(self, share: float) -> float:
        """When this share of all engines was built."""
        ends = sorted(one.end for one in self.intervals)
        return ends[min(len(ends) - 1, int(share * len(ends)))] if ends else 0.0


def measured() -> dict[str, Any]:
    """Return the seconds that stages took on GPUs: compilations of each network (TensorRT 8.6, H100), a verification (H200)."""
    compiled: dict[str, list[float]] = {}
    for run in json.loads((RESULTS / "models_h100.json").read_text())["runs"][:2]:  # later ones try variants
        for model, found in run["models"].items():
            compiled.setdefault(model, []).extend(one["seconds"]["compile"] for one in found["engines"].values())
    verified = json.loads((RESULTS / "digits_gpu_h200.json").read_text())["seconds_of_stages_built"]
    return {"compile_seconds": compiled, "verify_seconds": verified["verify:tensorrt:sm90:fp16"]}


def engines_of(
    assumed: dict[str, Any], seconds: dict[str, Any], *, same_speed: bool = False, seed: int = 0
) -> list[Engine]:
    """Draw the engines of all recipes: each recipe is of a family, each engine of a kind, by how many GPUs there are."""
    draw = random.Random(seed)
    kinds, counts = zip(*assumed["gpus"].items(), strict=True)
    models = [draw.choice(list(seconds["compile_seconds"])) for _ in range(assumed["families"])]
    rest = seconds["verify_seconds"] + assumed["benchmark_seconds"]
    found: list[Engine] = []
    for _recipe in range(assumed["recipes"]):
        family = draw.randrange(assumed["families"])
        # The share of a kind follows its GPUs and their speed, as whoever sizes a fleet would have it.
        weights = [count / assumed["slower"][kind] for kind, count in zip(kinds, counts, strict=True)]
        for place in range(assumed["engines_of_a_recipe"]):
            kind = draw.choices(kinds, weights)[0]
            cold = draw.choice(seconds["compile_seconds"][models[family]])
            cold *= 1.0 if same_speed else assumed["slower"][kind]
            name = f"{family}/{place % 2}"  # two precisions
            found.append(Engine(len(found), kind, name, cold, cold * assumed["warm_share"], rest))
    return found


def simulate(engines: list[Engine], gpus: dict[str, int], scenario: Scenario, assumed: dict[str, Any]) -> Run:
    """Upgrade every host, and build every engine anew; with waves, a kind's first host builds alone until some have passed."""
    env = simpy.Environment()
    run = Run({kind: [f"{kind}-{index}" for index in range(count)] for kind, count in gpus.items()})
    known: set[tuple[str, str]] = set()
    for kind, names in run.gpus.items():
        queue = [one for one in engines if one.kind == kind]
        passed = env.event()
        pool = _Pool(env, run, queue, passed, scenario, assumed, known)
        if not scenario.waves:
            pool.follow()
        for index, name in enumerate(names):
            env.process(pool.host(name, first=index == 0))
    env.run()
    return run


@dataclass
class _Pool:
    """The work pool of one kind of GPU."""

    env: simpy.Environment
    run: Run
    queue: list[Engine]
    passed: simpy.Event
    scenario: Scenario
    assumed: dict[str, Any]
    known: set[tuple[str, str]]
    done: int = 0

    def follow(self) -> None:
        """Let the other hosts build too: from now on what takes long begins first."""
        if self.scenario.longest_first:
            self.queue.sort(key=lambda one: -(one.cold + one.rest))
        self.passed.succeed()

    def host(self, name: str, *, first: bool) -> Iterator[simpy.Event]:
        """Upgrade a host when its wave comes, then let its worker take from the queue until that is empty."""
        if not first:
            yield self.passed
        yield self.env.timeout(self.assumed["upgrade_seconds"])
        self.run.ready[name] = self.env.now
        gpu = simpy.Resource(self.env, capacity=1)
        for _slot in range(self.scenario.slots):
            self.env.process(self._slot(name, gpu))

    def _slot(self, name: str, gpu: simpy.Resource) -> Iterator[simpy.Event]:
        kind = name.rpartition("-")[0]
        while self.queue and kind not in self.run.stopped:
            engine = self.queue.pop(0)
            yield self.env.timeout(self.assumed["start_seconds"])
            with gpu.request() as turn:
                yield turn
                begin = self.env.now
                warm = self.scenario.timing_caches and (kind, engine.family) in self.known
                yield self.env.timeout((engine.warm if warm else engine.cold) + engine.rest)
                self.known.add((kind, engine.family))
            self.run.intervals.append(Interval(name, engine.number, begin, self.env.now))
            self.done += 1
            if self.scenario.bad_driver:
                if self.done >= self.scenario.canary_engines:
                    self.run.stopped.add(kind)  # gates fail: whoever watches stops the rollout
            elif not self.passed.triggered and (self.done >= self.scenario.canary_engines or not self.queue):
                self.follow()


def summary(run: Run, engines: list[Engine]) -> dict[str, Any]:
    """Return a run's figures: minutes to fresh, busy share by kind and weighted by GPUs, engines built."""
    shares = {kind: run.busy_share(kind) for kind in run.gpus}
    total = sum(len(names) for names in run.gpus.values())
    return {
        "engines": len(engines),
        "built": len(run.intervals),
        "gpu_hours": round(sum(one.end - one.begin for one in run.intervals) / 3600, 1),
        "minutes_to_fresh": {
            "half": round(run.fresh_after(0.5) / 60, 1),
            "95 %": round(run.fresh_after(0.95) / 60, 1),
            "all": round(run.makespan / 60, 1),
        },
        "minutes_by_kind": {kind: round(run.kind_end(kind) / 60, 1) for kind in run.gpus},
        "busy_share_by_kind": {kind: round(share, 3) for kind, share in shares.items()},
        "busy_share": round(sum(shares[kind] * len(names) for kind, names in run.gpus.items()) / total, 3),
    }


SCENARIOS = (
    Scenario("waves, two flow runs a worker, no timing caches", timing_caches=False),
    Scenario("timing caches that halve a compilation"),
    Scenario("first come, first served", timing_caches=False, longest_first=False),
    Scenario("no waves", timing_caches=False, waves=False),
    Scenario("five engines have to pass, not twenty", timing_caches=False, canary_engines=5),
    Scenario("all engines of a kind have to pass on its first host", timing_caches=False, canary_engines=10**9),
    Scenario("one flow run a worker", timing_caches=False, slots=1),
    Scenario("every GPU as fast as the H100", timing_caches=False, same_speed=True),
    Scenario("a driver whose engines fail their gates, with waves", timing_caches=False, bad_driver=True),
    Scenario(
        "a driver whose engines fail their gates, without waves", timing_caches=False, bad_driver=True, waves=False
    ),
)


def chart(runs: dict[str, Run], path: Path) -> None:
    """Draw how the share of fresh engines grows, as SVG."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "enginery"  # the same bytes every time
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4))
    for name, run in runs.items():
        ends = sorted(one.end / 60 for one in run.intervals)
        step = max(1, len(ends) // 200)
        axes.plot(
            [0.0, *ends[::step], ends[-1]],
            [0.0, *(100 * at / len(ends) for at in range(0, len(ends), step)), 100.0],
            label=name,
        )
    axes.set_xlabel("minutes since the driver upgrade began")
    axes.set_ylabel("engines that are fresh, %")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, format="svg", metadata={"Date": None})


def main() -> None:
    """Simulate every scenario, print, write the result and the chart."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument("result", nargs="?", type=Path, default=RESULTS / "simulate_fleet.json")
    parser.add_argument("--chart", type=Path, default=ROOT / "docs" / "fleet.svg")
    asked = parser.parse_args()
    seconds = measured()
    rows, runs = [], {}
    for scenario in SCENARIOS:
        engines = engines_of(ASSUMED, seconds, same_speed=scenario.same_speed)
        run = simulate(engines, ASSUMED["gpus"], scenario, ASSUMED)
        rows.append({"scenario": asdict(scenario), **summary(run, engines)})
        if not scenario.bad_driver and scenario.canary_engines <= len(engines):
            runs[scenario.name] = run
        print(scenario.name, rows[-1]["minutes_to_fresh"], rows[-1]["busy_share"], rows[-1]["built"], flush=True)
    document = {
        "command": "python bench/simulate_fleet.py",
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "simpy": version("simpy"),
        "measured": seconds,
        "assumed": ASSUMED,
        "scenarios": rows,
    }
    asked.result.write_text(json.dumps(document, indent=2) + "\n")
    chart(runs, asked.chart)


if __name__ == "__main__":
    main()
