"""SIGKILL at random instants: nothing is lost, nothing is half visible, the next run completes.

    python -m bench.faults.kills RESULT.json [--kills 1000] [--seed N] [--kinds build,publish,...] [--stores folder,s3]

Of each kind of action (`bench.faults.world`) and each store, its share of the kills: start the action in a process of its own,
kill the process at a random instant between its begin and its usual end (it counts if the process still lived), check every invariant of the store
(`bench.faults.checker`) and that all that was visible before is visible still, then run the action to its end, and check that
it did what it is there for. S3 is moto's server, which honours conditional writes.
"""

from __future__ import annotations

import argparse
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from artifacts.catalog import EngineCatalog
from artifacts.channels import read_channel
from artifacts.folder import FolderStore
from artifacts.pins import pin
from bench.faults.checker import State, check, lost
from bench.faults.recipe import write_tiny
from bench.faults.world import (
    CHANNEL,
    RECIPES,
    TARGET,
    Action,
    Actors,
    Place,
    engine,
    group,
    make_place,
    manifest_of,
    write_json,
)
from bench.faults.world import keep as world_keep
from bench.faults.world import promote as world_promote
from bench.faults.world import publish as world_publish
from enginery import client
from tests.servers import S3_PAGE

KINDS: Final = ("build", "publish", "pull", "promote", "gc")
STORES: Final = ("folder", "s3")
# A store is used for so many kills, then begun anew, so that checking all of it stays cheap.
_ROUND: Final = 25
_ENGINES: Final = 4
_BUCKET: Final = "enginery-faults"


@dataclass
class Tally:
    """What the kills of one kind on one store came to."""

    kills: int = 0
    too_late: int = 0
    usual_seconds: float = 0.0
    checks: int = 0
    violations: list[str] = field(default_factory=list)
    seconds: float = 0.0


class Round:
    """One store, and what it has shown so far."""

    def __init__(self, place: Place, actors: Actors, chance: random.Random) -> None:
        self.place, self.actors, self.chance = place, actors, chance
        self.store, self.judge = place.store, place.judge
        self.known: set[str] = set()
        self.before = State()
        self.next = 0
        self.pinned: set[int] = set()
        self.to = str(place.folder / "pulled")

    def new_engine(self) -> int:
        """Return a number that no engine of this store has."""
        self.next += 1
        return self.next

    def look(self, tally: Tally, when: str, *, collected: bool = False, **may: bool) -> None:
        """Check the store, and that nothing of what it showed is gone; `collected` is as in `check`, `may` as in `lost`."""
        report = check(self.store, self.judge, collected=collected, known=self.known)
        tally.checks += 1
        found = report.violations + lost(self.before, report.state, **may)
        tally.violations += [f"{when}: {name}: {words}" for name, words in found]
        self.before = report.state

    def kill(self, action: Action, tally: Tally) -> None:
        """Start an action, and kill it at a random instant."""
        with self.actors.started(action, self.place) as running:
            begin = time.perf_counter()
            alive = running.kill_after(self.chance.uniform(0, tally.usual_seconds))
            taken = time.perf_counter() - begin
        tally.kills += alive
        tally.too_late += not alive
        if not alive:  # the machine is quicker than when that was measured
            tally.usual_seconds = round((tally.usual_seconds + taken) / 2, 4)

    def kill_and_complete(self, action: Action, tally: Tally, **may: bool) -> Any:
        """Kill an action, look, run it to its end, look again; return its value."""
        self.kill(action, tally)
        self.look(tally, f"after {action.name} was killed", **may)
        value, _seconds = self.actors.complete(action, self.place)
        self.look(tally, f"after {action.name} was run again", **may)
        return value


def _kill_publish(world: Round, tally: Tally) -> None:
    if world.chance.random() < 0.5:
        _kill_publish_group(world, tally)
        return
    name = engine(RECIPES[0], world.new_engine())
    action = Action("publish", (name.recipe, int(name.build[-6:])))
    digest = world.kill_and_complete(action, tally)
    if world.before.manifests.get(f"{name.path}/manifest.json") != digest:
        tally.violations.append(f"{name} is not what its publisher was told")


def _kill_publish_group(world: Round, tally: Tally) -> None:
    number = world.new_engine()
    names, action = group(RECIPES[1], number), Action("publish_group", (RECIPES[1], number))
    world.kill(action, tally)
    seen = EngineCatalog(world.store).engines(RECIPES[1])
    if 0 < sum(name in seen for name in names) < len(names):
        tally.violations.append(f"together: of {names} only some are visible: {seen}")
    world.look(tally, "after publish_group was killed")
    digests, _seconds = world.actors.complete(action, world.place)
    world.look(tally, "after publish_group was run again")
    found = {str(name): world.before.manifests.get(f"{name.path}/manifest.json") for name in names}
    if found != digests or not {*names} <= {*EngineCatalog(world.store).engines(RECIPES[1])}:
        tally.violations.append(f"{names} are not what their publisher was told")


def _kill_promote(world: Round, tally: Tally) -> None:
    store, number = world.store, world.chance.randint(1, _ENGINES)
    found = read_channel(store, RECIPES[0], TARGET, CHANNEL)
    moves = len(found.moves) if found is not None else 0
    build = world.kill_and_complete(Action("promote", (RECIPES[0], number)), tally)
    now = read_channel(store, RECIPES[0], TARGET, CHANNEL)
    if now is None or now.head.move.build != build or len(now.moves) > moves + 1:
        tally.violations.append(f"{build} was promoted, and the channel names {now and now.head.move.build}")


def _kill_pull(world: Round, tally: Tally) -> None:
    number = world.chance.randint(1, _ENGINES)
    folder = Path(world.to) / str(engine(RECIPES[0], number))
    # What is whole is not brought again; what is damaged is replaced, which must be no less safe.
    match world.chance.randrange(3):
        case 0:
            shutil.rmtree(folder, ignore_errors=True)
        case 1 if (folder / "report.html").exists():
            (folder / "report.html").unlink()
            (folder / "report.html").write_bytes(b"noise")
    damaged = folder.exists() and (folder / "report.html").read_bytes() == b"noise"
    action = Action("pull", (RECIPES[0], number, world.to))
    world.kill(action, tally)
    if folder.exists() and not damaged:
        client.check(folder, trust=world.judge if (folder / "manifest.json.sig").exists() else None)
    world.actors.complete(action, world.place)
    client.check(folder, trust=world.judge)
    world.look(tally, "after a pull")
    visible = {path.name for path in folder.iterdir()}
    expected = {"manifest.json", "manifest.json.sig", *manifest_of(world.place, engine(RECIPES[0], number)).files}
    if visible != expected:
        tally.violations.append(f"pulled: {sorted(visible ^ expected)} should not be there, or should")


def _kill_build(world: Round, tally: Tally) -> None:
    action = Action("build", (str(world.place.folder / "recipe" / "tiny.yaml"),))
    world.kill(action, tally)
    world.look(tally, "after build was killed")
    if world.chance.random() < 0.5:  # else the next one goes on from where this one was killed
        world.actors.complete(action, world.place)
        world.look(tally, "after build was run again")
        if world.actors.complete(action, world.place)[0]:
            tally.violations.append("a build that was run to its end left something to do")
        _forget_half(world)


def _kill_gc(world: Round, tally: Tally) -> None:
    """Half of the new engines are named by the channel or a pin; the others, their blobs and records may go."""
    store, place = world.store, world.place
    numbers = [world.new_engine() for _ in range(4)]
    for number in numbers:
        world_publish(place, RECIPES[0], number)
        world_keep(place, number)
    world_promote(place, RECIPES[0], numbers[0])
    pin(EngineCatalog(store), engine(RECIPES[0], numbers[1]), "bench", "because")
    report = check(store, world.judge, collected=True, known=world.known)
    named = [engine(RECIPES[0], number) for number in world.pinned | {numbers[0], numbers[1]}]
    world.pinned.add(numbers[1])
    stays = {f"{name.path}/manifest.json" for name in named}
    world.before = State({path: report.state.manifests[path] for path in stays}, report.state.channels)
    world.kill(Action("collect"), tally)
    world.look(tally, "after gc was killed", collected=True)
    world.before = State({path: report.state.manifests[path] for path in stays}, report.state.channels)
    for _twice in range(2):  # the files of engines go with the collection after the one that made them invisible
        world.actors.complete(Action("collect"), place)
    world.look(tally, "after gc was run again", collected=True)
    left = {info.path for info in store.list("engines/")} - {
        info.path for name in named for info in store.list(f"{name.path}/")
    }
    left |= {info.path for info in store.list("cache/actions/")}
    if set(world.before.manifests) != stays or left:
        tally.violations.append(f"gc left {sorted(left)}, and the engines {sorted(world.before.manifests)}")


def _forget_half(world: Round) -> None:
    """Remove all engines, then half of the records, so that there is more to build and to kill."""
    store = world.store
    for prefix in ("publications/", "engines/", "cache/actions/"):
        # Manifests first, as a collector does.
        for info in sorted(store.list(prefix), key=lambda info: not info.path.endswith("/manifest.json")):
            if prefix != "cache/actions/" or world.chance.random() < 0.5:
                store.delete(info.path)
    world.before = check(store, known=world.known).state


_KILLERS: Final = {
    "build": _kill_build,
    "publish": _kill_publish,
    "promote": _kill_promote,
    "pull": _kill_pull,
    "gc": _kill_gc,
}


def kill_many(
    kind: str,
    kills: int,
    seed: int,
    places: Iterator[Place],
    actors: Actors,
    tell: Callable[[Tally], None] = lambda _tally: None,
) -> Tally:
    """Kill one kind of action so often, on new stores as they are used up; return what it came to, telling it each time."""
    chance, tally, begin = random.Random(f"{kind} {seed}"), Tally(), time.perf_counter()
    world, last = None, 0
    while tally.kills < kills:
        if world is None or tally.kills >= last + _ROUND:
            world, last = _begin(kind, next(places), actors, chance, tally), tally.kills
        _KILLERS[kind](world, tally)
        left = left_in_tmp(world.place)
        if left:
            tally.violations.append(f"left in tmp after all: {left}")
        tally.seconds = round(time.perf_counter() - begin, 1)
        tell(tally)
    return tally


def _begin(kind: str, place: Place, actors: Actors, chance: random.Random, tally: Tally) -> Round:
    """Fill a new store, and measure how long the action takes when nobody kills it (the median of three)."""
    world = Round(place, actors, chance)
    write_tiny(place.folder / "recipe")
    numbers = [world.new_engine() for _ in range(_ENGINES)]
    taken = [actors.complete(Action("publish", (RECIPES[0], number)), place)[1] for number in numbers]
    if kind == "build":
        taken = [actors.complete(Action("build", (str(place.folder / "recipe" / "tiny.yaml"),)), place)[1]]
        _forget_half(world)
    elif kind == "promote":
        taken = [actors.complete(Action("promote", (RECIPES[0], number)), place)[1] for number in numbers]
    elif kind == "gc":
        taken = [actors.complete(Action("collect"), place)[1]]
        world.before = State()
    elif kind == "pull":
        taken = [actors.complete(Action("pull", (RECIPES[0], number, world.to)), place)[1] for number in numbers]
    tally.usual_seconds = round(statistics.median(taken), 4)
    world.look(tally, "at the beginning", collected=kind == "gc")
    return world


def left_in_tmp(place: Place) -> list[str]:
    """Sweep a folder store's tmp as every writer does, and return what stays but empty names of an hour's life."""
    store = place.store
    if not isinstance(store, FolderStore):
        return []
    with store.scratch():
        pass
    return [path.name for path in (store.root / "tmp").iterdir() if path.suffix != ".fresh" or path.stat().st_size]


@contextmanager
def places_of(kind: str, folder: Path, page: int = S3_PAGE) -> Iterator[Iterator[Place]]:
    """Yield an endless supply of new stores: in folders, in one S3 server, moto's (`s3`) or Ceph's (`radosgw`), in a CephFS (`cephfs`)."""
    with ExitStack() as stack:
        environment: Mapping[str, str] = {}
        mounts = list[Path]()
        if kind == "s3":
            from bench.faults.servers import s3_with_bucket

            environment = stack.enter_context(s3_with_bucket(_BUCKET, page))
        elif kind == "radosgw":
            from bench.faults.servers import radosgw_with_bucket

            # Paths of its sockets have to be short.
            short = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ceph-")))
            environment = stack.enter_context(radosgw_with_bucket(_BUCKET, short))
        elif kind == "cephfs":
            from tests.ceph import cephfs_mounts

            short = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ceph-")))
            mounts = list(stack.enter_context(cephfs_mounts(short)))

        def supply() -> Iterator[Place]:
            number = 0
            while True:
                number += 1
                here = folder / f"{kind}-{number}"
                uri = str(here / "store") if kind == "folder" else f"s3://{_BUCKET}/{folder.name}-{number}"
                uri, *others = [str(mount / f"{folder.name}-{number}") for mount in mounts] or [uri]
                place = make_place(here, uri, environment, others=others)
                place.enter()
                yield place
                shutil.rmtree(here, ignore_errors=True)

        yield supply()


def main() -> None:
    """Kill as often as the command line says; write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path)
    parser.add_argument("--kills", type=int, default=1000, help="of all kinds and stores together")
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32))
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--stores", default=",".join(STORES))
    given = parser.parse_args()
    kinds, stores, actors = given.kinds.split(","), given.stores.split(","), Actors()
    share = -(-given.kills // (len(kinds) * len(stores)))
    tallies: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as base:
        for store in stores:
            for kind in kinds:
                folder = Path(base) / f"{kind}-on-{store}"

                def tell(tally: Tally, name: str = f"{kind} on {store}") -> None:
                    # A long run that is stopped has told what it came to until then.
                    tallies[name] = vars(tally)
                    write_json(given.result, _summary(given.seed, tallies))

                with places_of(store, folder) as places:
                    tally = kill_many(kind, share, given.seed, places, actors, tell)
                print(f"{kind} on {store}: {vars(tally)}", flush=True)
    if any(tally["violations"] for tally in tallies.values()):
        raise SystemExit(1)


def _summary(seed: int, tallies: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "what": "SIGKILL at random instants (bench/faults/kills.py)",
        "seed": seed,
        "kills": sum(tally["kills"] for tally in tallies.values()),
        "too_late": sum(tally["too_late"] for tally in tallies.values()),
        "violations": sum(len(tally["violations"]) for tally in tallies.values()),
        "by_kind": tallies,
    }


if __name__ == "__main__":
    main()
