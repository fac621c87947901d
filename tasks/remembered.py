"""Fresh plans, remembered on this machine, so that to plan a thousand unchanged recipes takes seconds.

What is remembered is a plan's report, with everything that the plan was made from: the bytes of the recipe and of what it
names, where code was looked for, the host, the versions that were asked for, the code of the planner itself, and every
object of the store that was read. It is given back where all of that is the same. A hit still means that every record and
every blob is there, of its size: what is spared is reading and parsing them again.

Only plans in which nothing has to run are remembered, in files below `$XDG_CACHE_HOME/enginery/plans` (or `~/.cache`).
That memory is a help and never needed: what cannot be read or written there is planned again. What a build has found fresh
it leaves in the store as well, for other machines (`shared_plans`).
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from artifacts.errors import ArtifactError
from artifacts.gathered import Pack, gather, keep_packs
from artifacts.host import Host
from artifacts.observed import Sight
from artifacts.refs import digest_bytes
from artifacts.store import ObjectInfo, Store, open_store
from recipes.digests import Digests, cache_path
from recipes.errors import RecipeError
from recipes.traces import FileTrace, trace_of
from tasks.shared_plans import CODE, SharedPlans
from tasks.toolchain import probe_host, version

if TYPE_CHECKING:
    from recipes.plan import Plan
    from tasks.session import BuildSession

MAX_PLANS: Final = 20_000
_LAYOUT: Final = 3
# What changed so shortly before it was looked at may change again without a trace (Git calls that racy). A folder tells
# fractions of seconds by this machine's clock; S3 tells seconds, by its own.
_RACY_FOLDER_S: Final = 2.0
_RACY_S: Final = 60.0
# Size in bytes, and version or else the time of the last write; None where there is no such object.
Stamp = list[Any] | None


@dataclass(frozen=True)
class Remembered:
    """A fresh plan's report. `is_latest`: what a build keeps to explain the next misses with is of this plan already."""

    report: dict[str, Any]
    is_latest: bool

    def build_report(self, store: str) -> dict[str, Any]:
        """Return the report of a build, which has nothing to do."""
        steps = [
            {name: step[name] for name in ("id", "stage", "subject", "state")}
            | {"seconds": 0.0, "key": step["key"], "why": step["why"]}
            for step in self.report["steps"]
        ]
        kept = {name: self.report[name] for name in ("recipe", "status", "engines")}
        return {
            "recipe": kept["recipe"],
            "store": store,
            "status": kept["status"],
            "steps": steps,
            "engines": kept["engines"],
        }


def leave_plan(session: BuildSession) -> None:
    """Leave in the store the plan of a recipe that was just built, from what is there now. Raises nothing.

    What it takes to plan the same for another host, or with other targets, is left too (`artifacts.gathered`). In a folder store that takes until what was built there is two seconds old, and another build: after one that has just built
    something, nothing is planned. In S3 versions tell at once.
    """
    built = any(outcome.state == "built" for outcome in session.outcomes.values())
    if built and not _is_versioned(session.store.uri):
        return
    memory, again = PlanMemory(session.store, session.selection.targets, session.host), session.anew()
    if _is_versioned(session.store.uri):  # what another target's build has packed need not be read again
        again.see(gather(session.store, {session.recipe_name}))
    try:
        planned = again.plan()
        again.finish(planned)
    except (ArtifactError, RecipeError):
        return
    memory.keep([(again, planned)], latest=True)
    memory.share(plans=not session.selection.targets)  # nobody looks for a plan of some targets


def plans_folder() -> Path | None:
    """Return where fresh plans are remembered, or None where there is no place for them."""
    path = cache_path()
    return path.with_name("plans") if path is not None else None


@dataclass
class PlanMemory:
    """The fresh plans of one store, for these targets (none: all that the recipes have), on one host. Make one before planning."""

    store: Store
    targets: tuple[str, ...] = ()
    host: Host = field(default_factory=probe_host)
    folder: Path | None = field(default_factory=plans_folder)
    began: float = field(default_factory=time.time)
    most: int = MAX_PLANS
    warn: Callable[[str], None] = lambda _message: None
    _digests: Digests = field(default_factory=Digests)
    _packs: dict[str, Pack] = field(default_factory=dict)
    _has_room: bool = False

    def recall(self, recipes: Iterable[Path]) -> dict[Path, Remembered]:
        """Return the reports of those recipes whose plan is known to be fresh still, here or to the store. Raises nothing."""
        recipes = list(recipes)
        found = self._fresh({recipe: entry for recipe in recipes if (entry := self._entry(recipe)) is not None})
        shared = self._shared.recall([recipe for recipe in recipes if recipe not in found], self._digests)
        return found | self._fresh(
            {recipe: entry | {"objects": {self.store.uri: entry["objects"]}} for recipe, entry in shared.items()}
        )

    def keep(self, planned: Collection[tuple[BuildSession, Plan]], *, latest: bool = False) -> None:
        """Remember those of these plans that are fresh, each made since this memory was; `latest` after a build. Raises nothing.

        What a build has found fresh, others may know too: `share`.
        """
        fresh = [(session, plan) for session, plan in planned if plan.fresh]
        asked: dict[str, set[str]] = {}
        for session, _plan in fresh:
            for uri, sights in session.objects_read().items():
                asked.setdefault(uri, set()).update(path for path in sights if not _is_versioned(uri))
            asked.setdefault(self.store.uri, set()).add(session.latest_path)
        stamps = {uri: self._stamps(uri, paths) for uri, paths in asked.items()}
        for session, plan in fresh:
            objects = {uri: self._kept(uri, sights, stamps[uri]) for uri, sights in session.objects_read().items()}
            known = {uri: kept for uri, kept in objects.items() if kept is not None}
            if len(known) < len(objects):
                continue
            left = {session.latest_path: (stamps[self.store.uri] or {}).get(session.latest_path)} if latest else {}
            if not self._settled(self.store.uri, left.values()):
                left = {}
            if latest and _is_versioned(self.store.uri) and (pack := session.pack(plan)):
                self._packs[session.recipe_name] = pack
            self._write(session, plan, known, left)
            if latest and list(known) == [self.store.uri]:
                self._shared.offer(session, plan, known[self.store.uri], left)

    def share(self, *, plans: bool = True) -> None:
        """Leave in the store what builds have found fresh, and what it takes to plan the same elsewhere. Raises nothing."""
        if plans:
            self._shared.share()
        packs, self._packs = self._packs, {}
        try:
            if packs:
                keep_packs(self.store, packs)
        except ArtifactError:
            return

    def _fresh(self, entries: Mapping[Path, dict[str, Any]]) -> dict[Path, Remembered]:
        """Return the reports of those entries of which every object is as it was."""
        asked: dict[str, set[str]] = {}
        for entry in entries.values():
            for uri, objects in (*entry["objects"].items(), (self.store.uri, entry["latest"])):
                asked.setdefault(uri, set()).update(objects)
        stamps = {uri: self._stamps(uri, paths) for uri, paths in asked.items()}

        def same(uri: str, objects: dict[str, Stamp]) -> bool:
            there = stamps[uri]
            return there is not None and all(there.get(path) == stamp for path, stamp in objects.items())

        return {
            recipe: Remembered(entry["report"], bool(entry["latest"]) and same(self.store.uri, entry["latest"]))
            for recipe, entry in entries.items()
            if all(same(uri, objects) for uri, objects in entry["objects"].items())
        }

    def _kept(self, uri: str, sights: Mapping[str, Sight], stamps: dict[str, Stamp] | None) -> dict[str, Stamp] | None:
        """Return the stamps of what a plan was made from, or None where it cannot be told that they are of those bytes."""
        if _is_versioned(uri):
            known = all(not sight.there or sight.version for sight in sights.values())
            kept = {path: [sight.size, sight.version] if sight.there else None for path, sight in sights.items()}
        else:
            known = stamps is not None and self._settled(uri, (stamps.get(path) for path in sights))
            kept = {path: (stamps or {}).get(path) for path in sights}
        agreed = all(sight.there == (kept[path] is not None) for path, sight in sights.items())
        return kept if known and agreed else None

    def _entry(self, recipe: Path) -> dict[str, Any] | None:
        """Return what is remembered of a recipe, where all but the store's objects is as it was."""
        if self.folder is None:
            return None
        try:
            entry: dict[str, Any] = json.loads(self._place(recipe).read_bytes())
            known = (
                entry["made_by"] == self._made_by
                and entry["path"] == os.path.realpath(recipe)
                and all(version(package) == found for package, found in entry["versions"].items())
                and FileTrace.from_json(entry["trace"]).holds(self._digests)
            )
            # Looked at here, so that what damages the memory does no harm later.
            whole = isinstance(entry["report"]["steps"], list) and all(
                isinstance(objects, dict) for objects in (*entry["objects"].values(), entry["latest"])
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return None
        return entry if known and whole else None

    def _write(
        self, session: BuildSession, plan: Plan, objects: dict[str, dict[str, Stamp]], latest: dict[str, Stamp]
    ) -> None:
        from tasks.report import plan_report

        trace = trace_of(session.loaded, session.files)
        if (
            trace is None
            or self.folder is None
            or session.selection.targets != self.targets
            or session.host != self.host
        ):
            return
        entry = {
            "made_by": self._made_by,
            "path": os.path.realpath(session.loaded.path),
            "versions": session.versions_read(),
            "trace": trace.to_json(),
            "objects": objects,
            "latest": latest,
            "report": plan_report(plan),
        }
        try:
            self._make_room()
            handle, name = tempfile.mkstemp(prefix=".plan-", dir=self.folder)
            try:
                with os.fdopen(handle, "w", encoding="utf-8") as stream:
                    # Not json.dump, which goes without the encoder in C, and takes six times as long.
                    stream.write(json.dumps(entry, ensure_ascii=False, separators=(",", ":")))
                Path(name).replace(self._place(session.loaded.path))
            finally:
                Path(name).unlink(missing_ok=True)
        except OSError:
            return

    def _make_room(self) -> None:
        """Make the folder; where it has grown large, forget everything: most of that is of stores long gone."""
        if self.folder is None or self._has_room:
            return
        if self.folder.is_dir() and sum(1 for _entry in os.scandir(self.folder)) > self.most:
            shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._has_room = True

    def _place(self, recipe: Path) -> Path:
        # Not resolved: messages and reports name a recipe as it was asked for, and another working directory is another.
        of = [self.store.uri, os.path.abspath(recipe), *self.targets]  # noqa: PTH100  links stay
        return (self.folder or Path()) / f"{digest_bytes(json.dumps(of).encode())}.json"

    @cached_property
    def _shared(self) -> SharedPlans:
        return SharedPlans(self.store, self.targets, self.host, self.warn)

    @cached_property
    def _made_by(self) -> dict[str, Any]:
        """Return what besides files and objects decides a plan: the host, and the code that plans."""
        return {"layout": _LAYOUT, "host": json.loads(json.dumps(self.host.to_json())), "code": _code()}

    def _stamps(self, uri: str, paths: Collection[str]) -> dict[str, Stamp] | None:
        """Return what is there of these objects, or None where the store cannot be asked."""
        try:
            store = self.store if uri == self.store.uri else open_store(uri)
            return {path: _stamp(info) for path, info in store.infos(paths).items()}
        except ArtifactError:
            return None

    def _settled(self, uri: str, stamps: Iterable[Stamp]) -> bool:
        """Tell whether everything was written well before it was read, so that a later change shows."""
        before = self.began - (_RACY_FOLDER_S if uri.startswith("file:") else _RACY_S)
        return all(stamp is None or isinstance(stamp[1], str) or stamp[1] < before for stamp in stamps)


def _stamp(info: ObjectInfo) -> Stamp:
    return [info.size, info.version or info.modified]


def _is_versioned(uri: str) -> bool:
    """Tell whether looking at an object of such a store tells its version, which other bytes do not have."""
    return uri.startswith("s3:")


def _code() -> str:
    """Return a digest of the planner's code, by when and how large its files are, and of what it is executed by."""
    top = Path(__file__).resolve().parents[1]
    found = [sys.version, version("pydantic"), version("pyyaml")]
    for package in CODE:
        with os.scandir(top / package) as entries:
            files = [(entry.name, entry.stat()) for entry in entries if entry.name.endswith(".py")]
        found += [f"{package}/{name} {stat.st_size} {stat.st_mtime_ns}" for name, stat in sorted(files)]
    return digest_bytes(json.dumps(found).encode())
