"""Look at this host: record what it is, find out which engines a change made stale, and take part in rollouts.

Which engines are stale is the planner's word: of an engine that is fresh when planned for the host as it was, and is not when
planned for the host as it is, the change is the reason. All else is taken as the recipe's last build recorded it, so that
a host needs none of the packages that only portable stages use.
"""

from __future__ import annotations

import datetime as dt
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from artifacts.cache import ActionCache
from artifacts.catalog import host_path
from artifacts.errors import NotFoundError
from artifacts.host import Host
from artifacts.hosts import VANISHED_SECONDS, Drift, HostRecord, change_host, changes, host_ages, see_host
from artifacts.records import ActionRecord
from artifacts.rollouts import CANARY_ENGINES, Rebuild, Rollout, change_rollout, read_rollout, rollout_id
from artifacts.store import Store
from recipes.errors import RecipeError
from recipes.files import gather
from recipes.loader import load
from recipes.plan import EnginePlan
from recipes.planner import plan
from recipes.pools import has_pool
from tasks.git import in_checkout
from tasks.latest import read_latest
from tasks.publish import is_published
from tasks.toolchain import BACKENDS, probe_host, version

Warn = Callable[[str], None]
# What toolchains state besides packages.
_NO_PACKAGES: Final = ("os", "arch", "cuda", "driver", "device", "cpu")
_SECOND: Final = "%Y-%m-%dT%H:%M:%SZ"


@dataclass(frozen=True)
class Judgement:
    """What a change of a host made of engines: stale ones, to be rebuilt, and those that can be built here no more."""

    stale: tuple[Rebuild, ...]
    lost: tuple[str, ...]

    def also(self, earlier: Judgement) -> Judgement:
        """Return this with what is stale since an earlier time too."""
        known = {one.key for one in self.stale}
        return Judgement((*self.stale, *(one for one in earlier.stale if one.key not in known)), self.lost)


@dataclass(frozen=True)
class Look:
    """What one look found: the record of the host, changes that were judged now, and by rollout what is due."""

    record: HostRecord
    drifts: tuple[Drift, ...]
    judgement: Judgement
    due: Mapping[str, tuple[Rebuild, ...]]

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return {
            "host": self.record.host.name,
            "changes": [str(change) for drift in self.drifts for change in drift.changes],
            "stale": [
                {"recipe": one.recipe, "target": one.target, "asked": one.asked, "engine": one.replaces, "why": one.why}
                for one in self.judgement.stale
            ],
            "lost": list(self.judgement.lost),
            "due": {rollout: [list(one.key) for one in rebuilds] for rollout, rebuilds in self.due.items()},
        }


def instant() -> str:
    """Return the time of this host's clock, RFC 3339 in UTC."""
    return dt.datetime.now(dt.timezone.utc).strftime(_SECOND)


def look(
    store: Store,
    recipes: Sequence[Path],
    *,
    host: Host | None = None,
    warn: Warn = lambda _text: None,
    pools: bool = False,
    enough: int = CANARY_ENGINES,
) -> Look:
    """Record this host in the store, judge what changed by the recipes (files, or folders of them), and say what is due.

    Nothing is planned where nothing changed. With `pools` the fleet's work pools rebuild: of targets without a
    pool of their own nothing is judged, and files are named as in every checkout. A rollout that begins here goes on to other hosts
    when `enough` engines have passed (0: all). `host` is for tests. Raises StoreError, IntegrityError.
    """
    found = host if host is not None else probe_host()
    path = host_path(found.name)
    record = see_host(store, path, found, instant())
    drifts, judgement = record.pending, Judgement((), ())
    if drifts:
        # Also what an earlier change made stale and no rollout has finished: it is judged from before that one.
        unfinished = next(one for one in record.history if one.pending or one.rollout in record.open)
        judgement = judge(recipes, store, unfinished.before, found, warn, pools=pools)
        before, owed = unfinished.before, None
        if record.owed is not None:  # a card may be back whose engines nobody here could rebuild
            earlier = judge(recipes, store, record.owed, found, warn, pools=pools)
            both = judgement.also(earlier)
            # Where that added nothing (the card is gone for good), the rollout is named by this change, as other hosts name it.
            before, judgement = (record.owed if both != judgement else before), both
            owed = record.owed if earlier.lost else None
        owed = (owed or record.owed or unfinished.before) if judgement.lost else owed
        joined = _join(store, before, found, judgement, enough) if judgement.stale else None
        for other in record.open:
            if other != joined:
                change_rollout(store, other, _leaves(other, found.name))
        settled = {drift.id: joined for drift in drifts}

        def settle(there: HostRecord | None) -> HostRecord | None:
            kept = there
            for other in record.open:
                kept = kept.finished(other) if kept is not None and other != joined else kept
            return kept.settled(settled, owed) if kept is not None else None

        record = change_host(store, path, settle) or record
    due = {}
    for rollout in record.open:
        advanced = _advance(store, rollout, found.name, path)
        if advanced.members[found.name].passed:
            record = change_host(store, path, _finishes(rollout)) or record
        elif rebuilds := advanced.due(found.name, time.time()):
            due[rollout] = rebuilds
    return Look(record, drifts, judgement, due)


def judge(
    recipes: Sequence[Path],
    store: Store,
    old: Host,
    new: Host,
    warn: Warn = lambda _text: None,
    pools: bool = False,
) -> Judgement:
    """Return which engines of these recipes the change from one host to the other made stale, by planning for both."""
    stale: list[Rebuild] = []
    lost: list[str] = []
    for path in recipe_files(recipes):
        try:
            before, after = _plans(path, store, old, new, warn, pools=pools)
        except RecipeError as err:
            warn(f"{err}; what the change made of its engines is not known")
            continue
        now = {(engine.runtime, engine.gpu, engine.asked): engine for engine in after}
        for engine in before:
            if engine.state != "cached" or (pools and not has_pool(engine.runtime)):
                continue
            then = now[engine.runtime, engine.gpu, engine.asked]
            published = engine.publish.facts if engine.publish is not None else None
            name = str(published["path"]).removeprefix("engines/") if published else engine.target
            if then.state == "waiting":
                lost.append(f"{name}: {then.why}")
            elif then.state != "cached":
                why = _why(then)
                target = f"{engine.runtime}:{engine.gpu}"
                stale.append(
                    Rebuild(
                        name.partition("/")[0],
                        in_checkout(path) if pools else str(path),
                        target,
                        engine.asked,
                        why,
                        replaces=name,
                        seconds=_seconds(engine),
                    )
                )
    return Judgement(tuple(stale), tuple(lost))


def recipe_files(paths: Iterable[Path]) -> list[Path]:
    """Return the recipes that are meant: files as they are, and of a folder every *.yaml that states a version."""
    found: list[Path] = []
    for path in paths:
        inside = sorted(path.glob("*.yaml")) if path.is_dir() else [path]
        found += [one for one in inside if not path.is_dir() or b"\nenginery:" in b"\n" + one.read_bytes()]
    return list(dict.fromkeys(found))


def request(store: Store, rollout: str, host: str, rebuilds: Iterable[Rebuild]) -> None:
    """Note that rebuilds are asked for, before they are: who dies in between, or is not heard, leaves them to a later look."""
    keys = {one.key for one in rebuilds}
    change_there(store, rollout, lambda found: found.requested(host, keys, time.time()))


def _join(store: Store, old: Host, new: Host, judgement: Judgement, enough: int) -> str:
    changed = changes(old, new)
    name = rollout_id(changed, new.gpus)

    def join(found: Rollout | None) -> Rollout:
        rollout = found or Rollout(name, tuple(map(str, changed)), enough=enough)
        return rollout.joined(new.name, judgement.stale, instant())

    change_rollout(store, name, join)
    return name


def _leaves(rollout: str, host: str) -> Callable[[Rollout | None], Rollout]:
    def leave(found: Rollout | None) -> Rollout:
        return (found or Rollout(rollout, ())).without(host, "it has changed again", instant())

    return leave


def _finishes(rollout: str) -> Callable[[HostRecord | None], HostRecord | None]:
    return lambda found: found.finished(rollout) if found is not None else None


def _advance(store: Store, name: str, host: str, path: str) -> Rollout:
    """Take this host up again if it had left, and let go whom nobody has seen for long."""
    rollout = read_rollout(store, name)
    others = [one for one, member in rollout.members.items() if one != host and not (member.left or member.passed)]
    ages = host_ages(store, path) if others and rollout.state in ("canary", "rolling") else {}
    gone = [one for one in others if ages and ages.get(host_path(one), VANISHED_SECONDS + 1) > VANISHED_SECONDS]
    if not gone and not rollout.members[host].left:
        return rollout

    def advance(found: Rollout | None) -> Rollout:
        kept = (found or rollout).back(host, instant())
        for one in gone:
            kept = kept.without(one, f"not seen for {VANISHED_SECONDS / 60:.0f} minutes", instant())
        return kept

    return change_rollout(store, name, advance)


def change_there(store: Store, rollout: str, change: Callable[[Rollout], Rollout]) -> Rollout:
    """Change a rollout that is there. Raises NotFoundError, StoreError, IntegrityError."""

    def changed(found: Rollout | None) -> Rollout:
        if found is None:
            raise NotFoundError(store.uri, f"rollouts/{rollout}.json")
        return change(found)

    return change_rollout(store, rollout, changed)


def _plans(path: Path, store: Store, old: Host, new: Host, warn: Warn, *, pools: bool) -> list[tuple[EnginePlan, ...]]:
    """Plan a recipe for both hosts; records are looked up once."""
    loaded = load(path)
    files = gather(loaded)
    latest = read_latest(store, loaded.recipe.name)
    recorded = _recorded(latest)
    cache, known = ActionCache(store, warn), dict[tuple[str, str], ActionRecord | None]()

    def lookup(stage: str, key: str) -> ActionRecord | None:
        if (stage, key) not in known:
            record = cache.lookup(stage, key)
            known[stage, key] = record if record is None or stage != "publish" or is_published(record, store) else None
        return known[stage, key]

    def versions(host: Host) -> Callable[[str], str | None]:
        # Where the last build used the version that this host had, it is taken to be this host's package.
        became = {
            package: host.runtimes.get(runtime)
            for runtime, package in BACKENDS.items()
            if (has_pool(runtime) if pools else recorded.get(package) == old.runtimes.get(runtime))
        }
        return lambda package: became[package] if package in became else recorded.get(package) or version(package)

    return [
        plan(loaded.recipe, files, host, version=versions(host), lookup=lookup, previous=lambda: latest).engines
        for host in (old, new)
    ]


def missing_versions(store: Store, recipe: str) -> dict[str, str | None]:
    """Return the versions of packages that a recipe's last build used and that are not installed here. Raises StoreError.

    With them a host plans portable stages as whoever made them did, and finds them made.
    """
    recorded = _recorded(read_latest(store, recipe))
    return {package: found for package, found in recorded.items() if version(package) is None}


def _recorded(latest: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Return the versions in the toolchains of a build; of several of one package, that of the first stage."""
    recorded: dict[str, str] = {}
    for preimage in latest.values():
        for package, found in preimage.get("toolchain", {}).items():
            if isinstance(found, str) and package not in _NO_PACKAGES:
                recorded.setdefault(package, found)
    return recorded


def _seconds(engine: EnginePlan) -> float:
    """Return how long the compilation of an engine that is there took."""
    compiled = engine.compile.record if engine.compile is not None else None
    return round(compiled.seconds, 1) if compiled is not None else 0.0


def _why(engine: EnginePlan) -> str:
    """Say why an engine is stale: by its first stage that would run, which says what changed."""
    steps = (engine.compile, engine.engine_verify, engine.benchmark, engine.publish)
    told = [why for step in steps if step is not None and step.state == "run" for why in step.why]
    return told[0] if told else engine.why
