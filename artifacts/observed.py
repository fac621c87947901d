"""A store seen through a reader that notes which objects were asked for: what a plan was made from."""

from __future__ import annotations

from artifacts.store import ObjectInfo, Store


class ObservedStore:
    """Reads objects, and notes in `paths` each that was asked for, there or not. It has nothing else of a store."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.paths: set[str] = set()

    @property
    def uri(self) -> str:
        """Where it is."""
        return self._store.uri

    def read(self, path: str) -> bytes:
        """Return a small object. Raises NotFoundError, StoreError."""
        self.paths.add(path)
        return self._store.read(path)

    def info(self, path: str) -> ObjectInfo | None:
        """Return size and time of an object, or None where there is none. Raises StoreError."""
        self.paths.add(path)
        return self._store.info(path)
