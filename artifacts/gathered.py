"""What plans of many recipes read of a store across the network, brought at once: one listing, and few packed objects.

cache/plans/records/<shard>    packed as fresh plans are; by recipe: {step: {path: [size in bytes, version, text or null]}}

Builds leave there which objects each step of a recipe was found by, with the bytes of those that are read: records and
manifests. Whoever plans lists all of them, and takes the bytes of those that have the very size and version still; whatever else is
asked for is asked of the store. So a plan is of what is there, as if each object had been asked for, and a pack that is lost,
damaged or behind costs time alone. See docs/adr/0008-fresh-plans.md.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Final

from artifacts.errors import ArtifactError
from artifacts.fresh_plans import FreshPlans
from artifacts.publications import mark_of
from artifacts.refs import digest_bytes
from artifacts.store import ObjectInfo, Store, is_relative_path

RECORDS_OF: Final = "records"  # where a profile has its name
MAX_STEPS: Final = 512  # of a recipe; beyond that those go that no build has had for longest
# Of every object that a step was found by: its size in bytes, its version, and its text where that was read.
Pack = Mapping[str, Mapping[str, list[Any]]]


@dataclass(frozen=True)
class Gathered:
    """What was there at one moment, of the objects in `asked`; the texts of those that are what they were when they were packed."""

    asked: frozenset[str] = frozenset()
    infos: Mapping[str, ObjectInfo] = field(default_factory=dict)
    texts: Mapping[str, bytes] = field(default_factory=dict)
    recipes: frozenset[str] = frozenset()  # of which something was packed

    @cached_property
    def marks(self) -> Mapping[str, Sequence[str]]:
        """Paths of marks, by the folder that they are in."""
        folders: dict[str, list[str]] = {}
        for path in sorted(path for path in self.asked if mark_of(path) is not None):
            folders.setdefault(path[: path.rfind("/") + 1], []).append(path)
        return folders


@dataclass(frozen=True)
class GatheredStore:
    """A store of which much was gathered; what was not is asked of it. It reads, and has nothing else of a store."""

    store: Store
    gathered: Gathered

    @property
    def uri(self) -> str:
        """Where it is."""
        return self.store.uri

    def read_versioned(self, path: str) -> tuple[bytes, str]:
        """Return a small object and its version. Raises NotFoundError, StoreError."""
        text = self.gathered.texts.get(path)
        return self.store.read_versioned(path) if text is None else (text, self.gathered.infos[path].version)

    def info(self, path: str) -> ObjectInfo | None:
        """Return size and time of an object, or None where there is none. Raises StoreError."""
        return self.gathered.infos.get(path) if path in self.gathered.asked else self.store.info(path)

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """Yield the marks of an engine as they were gathered, if those are there; else what the store lists below a prefix.

        A mark more than those says nothing (`artifacts.publications`) where one of them tells that the engine is published.
        """
        known = self.gathered.marks.get(prefix, ())
        found = [info for path in known if (info := self.gathered.infos.get(path)) is not None]
        yield from found if known and len(found) == len(known) else self.store.list(prefix)


def gather(store: Store, recipes: Collection[str]) -> Gathered:
    """Return what packs tell of these recipes, by name, and a listing says is there. Raises nothing: what is not known is asked for."""
    try:
        packs = FreshPlans(store, RECORDS_OF).read([_name(recipe) for recipe in recipes])
        stamps = dict(_stamps(packs.values()))
        infos = store.infos(stamps)
        texts = {
            path: text.encode()
            for path, (size, version, text) in stamps.items()
            if isinstance(text, str)
            and (info := infos.get(path)) is not None
            and version
            and _stamp(info) == (size, version)
        }
    except (ArtifactError, ValueError):  # a text of half a character is none that was read
        return Gathered()
    known = frozenset(recipe for recipe in recipes if _name(recipe) in packs)
    return Gathered(frozenset(stamps), infos, texts, known)


def keep_packs(store: Store, packs: Mapping[str, Pack]) -> None:
    """Leave packs of recipes, by name; steps that others left stay. Raises StoreError."""
    FreshPlans(store, RECORDS_OF).add({_name(recipe): pack for recipe, pack in packs.items()}, combine=_combined)


def _name(recipe: str) -> str:
    return digest_bytes(recipe.encode())


def _combined(earlier: Any, later: Any) -> Any:
    if not isinstance(earlier, dict):
        return later
    steps = {**{step: paths for step, paths in earlier.items() if step not in later}, **later}
    return dict(list(steps.items())[-MAX_STEPS:])


def _stamps(packs: Iterable[Any]) -> Iterator[tuple[str, list[Any]]]:
    """Yield path and stamp of all that packs name, whatever else they are."""
    for pack in packs:
        for paths in pack.values() if isinstance(pack, dict) else ():
            for path, stamp in paths.items() if isinstance(paths, dict) else ():
                if isinstance(stamp, list) and len(stamp) == 3 and is_relative_path(path):
                    yield path, stamp


def _stamp(info: ObjectInfo) -> tuple[int, str]:
    return info.size, info.version
