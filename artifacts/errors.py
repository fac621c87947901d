"""What can go wrong in the store, by whose fault.

ArtifactError
├── StoreError             the store cannot be used (network, permission, disk, layout)
│   ├── NotFoundError      nothing is stored at this path
│   └── AddressError       what was given is no store's address
├── IntegrityError         bytes are there but are not what their name or record says
└── RefusedError           an engine is whole, but the rules forbid loading it here
"""

from __future__ import annotations

from collections.abc import Sequence


class ArtifactError(Exception):
    """Base of every error of this package."""


class StoreError(ArtifactError):
    """The store could not be read or written; the message names the store, the path and what to do."""


class NotFoundError(StoreError):
    """Nothing is stored at the path that was asked for."""

    def __init__(self, store: str, path: str) -> None:
        self.store = store
        self.path = path
        super().__init__(f"{store}: nothing at {path}")


class AddressError(StoreError):
    """What was given is no address of a store."""


class IntegrityError(ArtifactError):
    """Stored bytes do not match the digest, size or schema that their reference promises."""


class RefusedError(ArtifactError):
    """An engine may not be loaded here; `reasons` has each rule that it breaks, in words."""

    def __init__(self, engine: str, reasons: Sequence[str], advice: str = "") -> None:
        self.reasons = tuple(reasons)
        super().__init__(f"{engine} is not loaded: {'; '.join(reasons)}" + (f" ({advice})" if advice else ""))
