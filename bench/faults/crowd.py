"""Many processes use one store at once, for minutes, and every invariant holds at every instant and at the end.

    python -m bench.faults.crowd RESULT.json [--seconds 200] [--members 8] [--seed N] [--stores folder,s3,radosgw,cephfs] [--no-builds]

Each member publishes engines (the same ones as others, and its own; alone and several together, watching that these become visible at
once), promotes, rolls back, pins, keeps records, pulls, follows
a channel, builds a tiny recipe with its real stages, and collects garbage with no grace, in an order drawn from a seed. Meanwhile
the store is checked again and again (`bench.faults.checker`); at the end, what every member was told is compared with what is there.
Whoever holds a lease may be refused nothing; others may be refused what a collector took (REFUSALS), in words.
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import re
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final

from artifacts import garbage, leases
from artifacts.catalog import EngineCatalog, EngineId
from artifacts.channels import read_channel
from artifacts.errors import ArtifactError, StoreError
from artifacts.leases import leased
from artifacts.pins import pin
from artifacts.store import Store, open_store
from bench.faults import world
from bench.faults.checker import Report, State, check, lost
from bench.faults.kills import STORES, places_of
from bench.faults.recipe import write_tiny
from bench.faults.world import CHANNEL, PRELOADED, RECIPES, TARGET, Place, engine, write_json
from enginery.moving import Mover

MEMBERS: Final = 8
# How often a member does what; builds, which take seconds, are left to two of them.
_SHARES: Final[Mapping[str, int]] = {
    "publish": 8, "group": 4, "promote": 6, "rollback": 2, "pin": 1, "keep": 4, "pull": 3, "follow": 3, "listed": 2, "collect": 2,
}  # fmt: skip
_BUILDERS: Final = 2
_BUILD_SHARE: Final = 3
_NEW: Final = 6
_MOST_PINS: Final = 4
_PAGE: Final = 1000
_PAUSE_SECONDS: Final = 1.0
# How often a reader looks at what becomes visible. On S3 each look is requests, which others then wait for.
_WATCH_SECONDS: Final[Mapping[str, float]] = {"file": 0.002, "s3": 0.1}
# S3 tells times in whole seconds.
_FRESH_SECONDS: Final = 2.0
# Who may be refused, with which errors, or how these begin and go on: an engine that nothing names may be gone, one that somebody
# is publishing is not complete yet, and a rollback may have nothing to go back to.
REFUSALS: Final[Mapping[str, frozenset[str]]] = {
    "promote": frozenset({"NotFoundError", "ChannelError.*published together with is not complete"}),
    "rollback": frozenset({"NotFoundError", "ChannelError", "IntegrityError"}),
    "pin": frozenset({"NotFoundError"}),
    "pull": frozenset({"NotFoundError", "IntegrityError", "TrustError"}),
    "follow": frozenset({"NotFoundError", "IntegrityError", "TrustError"}),
}


@dataclass(frozen=True)
class Told:
    """What a member did, and what it was told: a value, or an error of the product; `why` is its own and in no other move."""

    name: str
    number: int
    why: str
    value: Any = None
    error: str | None = None


@dataclass(frozen=True)
class Grouped:
    """Engines that a member published together, with the digests of their manifests, and which of them were seen, one after the other."""

    digests: Mapping[str, str]
    states: list[frozenset[str]]

    def apart(self) -> list[frozenset[str]]:
        """Return every state in which some of what was not there before was seen, and not all; all at the end."""
        first, *rest = self.states
        whole = frozenset(self.digests)
        return [state for state in rest if state not in (first, whole)] or ([rest[-1]] if rest[-1] != whole else [])


@dataclass
class Tally:
    """What a crowd came to."""

    operations: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    said: dict[str, str] = field(default_factory=dict)
    checks: int = 0
    removed: int = 0
    moves: int = 0
    engines_at_the_end: int = 0
    violations: list[str] = field(default_factory=list)
    seconds: float = 0.0


@dataclass(frozen=True)
class _Held(Place):
    """A place whose store is opened once by a process."""

    @cached_property
    def store(self) -> Store:
        """The store."""
        return open_store(self.uri)


@contextmanager
def watching(store: Store, names: Collection[EngineId]) -> Iterator[list[frozenset[str]]]:
    """Look again and again which of these engines a reader sees, and gather what was seen: at first, in between, at last."""
    catalog, states, done = EngineCatalog(store), list[frozenset[str]](), threading.Event()
    pause = _WATCH_SECONDS[store.uri.partition(":")[0]]

    def look() -> None:
        listed = catalog.engines(next(iter(names)).recipe)
        states.append(frozenset(str(name) for name in listed if name in names))

    def go_on() -> None:
        while not done.wait(pause):
            with suppress(StoreError):  # of no concern here: others look for what may be refused
                look()

    look()
    thread = threading.Thread(target=go_on, daemon=True)
    thread.start()
    try:
        yield states
    finally:
        done.set()
        thread.join()
    look()


class Member:
    """One of the processes: draws what it does next, does it, and remembers what it was told."""

    def __init__(self, place: Place, name: str, seed: int, *, builds: bool) -> None:
        self.place = _Held(place.uri, place.folder, place.environment)
        self.name, self.chance = name, random.Random(f"{seed} {name}")
        self.shares = {**_SHARES, **({"build": _BUILD_SHARE} if builds else {})}
        self.told: list[Told] = []
        self.pins = self.published = 0

    def step(self) -> None:
        """Do one thing."""
        name = self.chance.choices(list(self.shares), list(self.shares.values()))[0]
        if name == "pin":
            self.pins += 1
            name = "pin" if self.pins <= _MOST_PINS else "keep"
        # The newest are what all publish, promote and pull; numbers go up with time, so that the members meet.
        number = int(time.time() / 5) % 100_000 - self.chance.randrange(_NEW)
        if name in ("promote", "pull", "pin") and self.published and self.chance.random() < 0.7:
            number = self.published
        why = f"{self.name}-{len(self.told)}"
        try:
            value = getattr(self, f"_{name}")(number, why)
        except ArtifactError as err:
            self.told.append(Told(name, number, why, error=f"{type(err).__name__}: {err}"))
        else:
            self.told.append(Told(name, number, why, value))
            self.published = number if name == "publish" else self.published

    def _publish(self, number: int, _why: str) -> str:
        # As a build does, whose lease begins before its first blob.
        with leased(self.place.store, "crowd") as lease:
            return world.publish(self.place, RECIPES[0], number, f"builder {self.chance.randrange(3)}", lease)

    def _group(self, number: int, _why: str) -> Grouped:
        names = world.group(RECIPES[1], number)
        # Named, so that none is collected meanwhile: what is seen to appear appears by a publication.
        with (
            leased(self.place.store, "crowd", [str(name) for name in names]) as lease,
            watching(self.place.store, names) as states,
        ):
            writer = f"builder {self.chance.randrange(3)}"
            digests = world.publish_group(self.place, RECIPES[1], number, writer, lease)
        return Grouped(digests, states)

    def _mover(self, why: str) -> Mover:
        return Mover(EngineCatalog(self.place.store), self.name, why, self.place.signer, self.place.judge)

    def _promote(self, number: int, why: str) -> str | None:
        move = self._mover(why).promote(engine(RECIPES[0], number), CHANNEL, waived=("slower", "unexecuted"))
        return move.move.id if move is not None else None

    def _rollback(self, _number: int, why: str) -> str:
        return self._mover(why).rollback(RECIPES[0], TARGET, CHANNEL).move.id

    def _pin(self, number: int, why: str) -> str:
        pin(EngineCatalog(self.place.store), engine(RECIPES[0], number), self.name, why)
        return str(engine(RECIPES[0], number))

    def _keep(self, number: int, _why: str) -> bool:
        with leased(self.place.store, "crowd") as lease:
            return world.keep(self.place, number % 20, lease)

    def _pull(self, number: int, _why: str) -> str:
        return world.pull(self.place, RECIPES[0], number, str(self.place.folder / "pulled"))

    def _follow(self, _number: int, _why: str) -> str | None:
        return world.follow(self.place, RECIPES[0], str(self.place.folder / "pulled"))

    def _listed(self, _number: int, _why: str) -> int:
        return len(world.listed(self.place, RECIPES[0]))

    def _collect(self, _number: int, _why: str) -> int:
        return len(world.collect(self.place))

    def _build(self, _number: int, _why: str) -> int:
        return len(world.build(self.place, str(self.place.folder / "recipe" / "tiny.yaml")))


def contradictions(store: Store, told: Iterable[Told], report: Report) -> list[tuple[str, str]]:
    """Return what the store shows that members were told otherwise: violations as in `Report`. Raises StoreError."""
    found: list[tuple[str, str]] = []
    channel = read_channel(store, RECIPES[0], TARGET, CHANNEL)
    moves = [signed.move for signed in channel.moves] if channel is not None else []
    reasons, ids = Counter(move.reason for move in moves), {move.id for move in moves}
    digests: dict[str, set[str]] = {}
    for one in told:
        if one.name in ("promote", "rollback"):
            if one.value is not None and (one.value not in ids or reasons[one.why] != 1):
                found.append(
                    ("told", f"{one.why}: a {one.name} that was done is {reasons[one.why]} times in the history")
                )
            elif reasons[one.why] > 1:
                found.append(("told", f"{one.why}: a {one.name} is {reasons[one.why]} times in the history"))
        elif one.name == "group" and one.value is not None:
            for name, digest in one.value.digests.items():
                digests.setdefault(f"engines/{name}/manifest.json", set()).add(digest)
            found += [
                (
                    "together",
                    f"{one.why}: of {len(one.value.digests)} engines that it published were seen {sorted(state)}",
                )
                for state in one.value.apart()
            ]
        elif one.name == "publish" and one.value is not None:
            digests.setdefault(f"{engine(RECIPES[0], one.number).path}/manifest.json", set()).add(one.value)
        elif one.name == "pin" and one.value is not None:
            path = f"{engine(RECIPES[0], one.number).path}/manifest.json"
            if path not in report.state.manifests:
                found.append(("pinned", f"{one.value} was pinned, and is gone"))
        elif one.name == "keep" and one.value is False:
            found.append(("used", f"{one.why}: a record that was just kept is a miss"))
        if one.error is not None and not any(re.match(words, one.error) for words in REFUSALS.get(one.name, ())):
            found.append(("used", f"{one.why}: {one.name} was refused: {one.error}"))
    found += [
        ("published", f"{path} is no manifest that a publisher was told of")
        for path, digest in report.state.manifests.items()
        if path.split("/")[1] in RECIPES and digest not in digests.get(path, ())
    ]
    if moves:
        head = f"{engine(RECIPES[0], int(moves[-1].build[-6:])).path}/manifest.json"
        if moves[-1].manifest != report.state.manifests.get(head):
            found.append(("pinned", f"{head} was promoted last, and is gone or another"))
    return found


def crowd(place: Place, seconds: float, members: int, seed: int, *, builds: bool) -> Tally:
    """Let so many members use a new store for so long; return what it came to."""
    tally, begin = Tally(), time.perf_counter()
    write_tiny(place.folder / "recipe")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    running = []
    for number in range(members):
        ours, theirs = context.Pipe()
        arguments = (place.seen_by(number), f"m{number}", seed, seconds, builds and number < _BUILDERS, theirs)
        process = context.Process(target=_live, args=arguments)
        process.start()
        theirs.close()
        running.append((process, ours))
    for process, ours in running:
        if not ours.poll(120) or ours.recv() != "begin":
            tally.violations.append(f"{process.name} did not begin")
    started = time.perf_counter()
    store, judge, known, before = place.store, place.judge, set[str](), State()
    while time.perf_counter() - started < seconds:
        report = check(store, judge, collected=True, known=known)
        found = report.violations + lost(before, report.state, engines=False, records=False)
        tally.violations += [f"meanwhile: {name}: {words}" for name, words in found]
        tally.checks, before = tally.checks + 1, report.state
        time.sleep(_PAUSE_SECONDS)
    told: list[Told] = []
    for process, ours in running:
        if not ours.poll(300):
            tally.violations.append(f"{process.name} did not end")
            process.kill()
        else:
            answer = ours.recv()
            told += answer["told"]
            tally.violations += answer["crashes"]
        process.join()
    _judge(place, told, before, tally, known)
    tally.seconds = round(time.perf_counter() - begin, 1)
    return tally


def _judge(place: Place, told: list[Told], before: State, tally: Tally, known: set[str]) -> None:
    """Compare what the members were told with what is there; then collect what is left over, and look again."""
    store = place.store
    for one in told:
        tally.operations[one.name] += 1
        if one.error is not None:
            kind = f"{one.name}: {one.error.partition(':')[0]}"
            tally.refused[kind] += 1
            tally.said.setdefault(kind, one.error[:300])
        if one.name == "collect" and one.value is not None:
            tally.removed += one.value
    report = check(store, place.judge, collected=True, known=known)
    found = report.violations + lost(before, report.state, engines=False, records=False)
    found += contradictions(store, told, report)
    tally.violations += [f"at the end: {name}: {words}" for name, words in found]
    try:
        for _twice in range(2):
            world.collect(place)
    except StoreError as err:
        tally.violations.append(f"gc after all: {err}")
    after = check(store, place.judge, collected=True, known=known)
    left = [info.path for prefix in ("leases/", "sweeps/") for info in store.list(prefix)]
    tally.violations += [f"after gc: {name}: {words}" for name, words in after.violations]
    tally.violations += [
        f"after gc: pinned: {words}" for name, words in contradictions(store, told, after) if name == "pinned"
    ]
    tally.violations += [f"left by nobody: {path}" for path in left]
    tally.engines_at_the_end = len(after.state.manifests)
    tally.moves = sum(len(moves) for moves in after.state.channels.values())
    tally.violations = list(dict.fromkeys(tally.violations))


def _live(place: Place, name: str, seed: int, seconds: float, builds: bool, answers: Connection) -> None:
    place.enter()
    # Else nothing would be old enough to be collected within the first hour.
    for module in (garbage, leases):
        vars(module)["FRESH_SECONDS"] = _FRESH_SECONDS
    answers.send("begin")
    member, until, crashes = Member(place, name, seed, builds=builds), time.monotonic() + seconds, list[str]()
    while time.monotonic() < until and len(crashes) < 5:
        try:
            member.step()
        except BaseException:  # noqa: BLE001 - whatever is no error of the product is a finding
            crashes.append(f"{name}: {traceback.format_exc()}")
    answers.send({"told": member.told, "crashes": crashes})


def main() -> None:
    """Gather the crowds that the command line asks for; write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path)
    parser.add_argument("--seconds", type=float, default=200.0, help="for each store")
    parser.add_argument("--members", type=int, default=MEMBERS)
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32))
    parser.add_argument("--stores", default=",".join(STORES))
    parser.add_argument("--no-builds", action="store_true")
    given = parser.parse_args()
    tallies: dict[str, Any] = {}
    for kind in given.stores.split(","):
        with tempfile.TemporaryDirectory() as base, places_of(kind, Path(base) / "places", _PAGE) as places:
            tally = crowd(next(places), given.seconds, given.members, given.seed, builds=not given.no_builds)
        tallies[kind] = vars(tally)
        print(f"{kind}: {tallies[kind]}", flush=True)
        command = f"python -m bench.faults.crowd RESULT.json --seconds {given.seconds:g} --members {given.members}"
        command += f" --stores {given.stores}{' --no-builds' * given.no_builds}"
        date = time.strftime("%Y-%m-%d", time.gmtime())
        write_json(given.result, {"command": f"{command} --seed {given.seed}", "date": date, "by_store": tallies})
    if any(tally["violations"] for tally in tallies.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
