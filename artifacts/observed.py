"""A store seen through a reader that notes what it found of each object: what a plan was made from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Final

from artifacts.errors import NotFoundError
from artifacts.gathered import Gathered, GatheredStore
from artifacts.store import ObjectInfo, Store


@dataclass(frozen=True)
class Sight:
    """What was found of an object: its size in bytes and its version, each None where that was not told.

    `there`: whether it was there; None where one look found otherwise than another, so that a plan may be of both.
    """

    there: bool | None
    size: int | None = None
    version: str | None = None


_ABSENT: Final = Sight(there=False)


class ObservedStore:
    """Reads objects, and notes in `sights` each that was asked for, there or not, or listed. It has nothing else of a store.

    What was read across a network is kept in `texts`, until it is `directly` that objects are looked at anew.
    """

    def __init__(self, store: Store) -> None:
        self._store: Store | GatheredStore = store
        self._real = store
        self.sights: dict[str, Sight] = {}
        self.texts: dict[str, bytes] = {}

    def through(self, gathered: Gathered) -> None:
        """Look from now on at what was gathered, where that has it."""
        self._store = GatheredStore(self._real, gathered)

    def directly(self) -> None:
        """Look from now on at the store alone."""
        self._store = self._real
        self.texts.clear()

    def is_gathered(self, path: str) -> bool:
        """Tell whether an object is looked at as it was gathered."""
        return isinstance(self._store, GatheredStore) and path in self._store.gathered.asked

    @property
    def uri(self) -> str:
        """Where it is."""
        return self._store.uri

    def gathered(self, path: str) -> tuple[bytes, str] | None:
        """Return the bytes and the version of an object that was gathered with its text; nothing is noted."""
        store = self._store
        if not isinstance(store, GatheredStore) or path not in store.gathered.texts:
            return None
        return store.read_versioned(path)

    def read(self, path: str) -> bytes:
        """Return a small object. Raises NotFoundError, StoreError."""
        try:
            data, version = self._store.read_versioned(path)
        except NotFoundError:
            self._note(path, _ABSENT)
            raise
        self._note(path, Sight(there=True, size=len(data), version=version))
        if not self.uri.startswith("file:"):
            self.texts[path] = data
        return data

    def info(self, path: str) -> ObjectInfo | None:
        """Return size and time of an object, or None where there is none. Raises StoreError."""
        info = self._store.info(path)
        self._note(path, _ABSENT if info is None else Sight(there=True, size=info.size, version=info.version or None))
        return info

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """Yield every object whose path starts with `prefix`, sorted by path. Raises StoreError."""
        for info in self._store.list(prefix):
            self._note(info.path, Sight(there=True, size=info.size, version=info.version or None))
            yield info

    def _note(self, path: str, sight: Sight) -> None:
        seen = self.sights.setdefault(path, sight)
        if seen is sight or seen.there is None:
            return
        same = seen.there == sight.there and seen.size == sight.size
        if not same or (None not in (seen.version, sight.version) and seen.version != sight.version):
            self.sights[path] = replace(seen, there=None)
        elif seen.version is None:
            self.sights[path] = sight
