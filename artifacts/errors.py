"""What can go wrong in the store, by whose fault.

ArtifactError
├── StoreError             the store cannot be used (network, permission, disk, layout)
│   ├── NotFoundError      nothing is stored at this path
│   ├── AddressError       what was given is no store's address
│   └── UnavailableError   it does not answer, or not now: the same request may succeed later
├── IntegrityError         bytes are there but are not what their name or record says
├── RefusedError           an engine is whole, but the rules forbid loading it here
├── TrustError             nobody whom the trust policy names vouches for what is there
│   ├── PolicyError        the trust policy itself cannot be used
│   └── StaleError         an earlier state of a channel than was seen before
├── SigningError           something cannot be signed or checked: the key, or the library
└── ChannelError           a channel may not be moved there
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


class UnavailableError(StoreError):
    """The store does not answer, or says that it cannot now: alone of these errors, trying again may help."""


class IntegrityError(ArtifactError):
    """Stored bytes do not match the digest, size or schema that their reference promises."""


class RefusedError(ArtifactError):
    """An engine may not be loaded here, or not be what `verb` says; `reasons` has each rule that it breaks, in words."""

    def __init__(self, engine: str, reasons: Sequence[str], advice: str = "", verb: str = "loaded") -> None:
        self.reasons = tuple(reasons)
        super().__init__(f"{engine} is not {verb}: {'; '.join(reasons)}" + (f" ({advice})" if advice else ""))


class TrustError(ArtifactError):
    """What is there is not vouched for by a key that the trust policy allows; the message says why."""


class PolicyError(TrustError):
    """The trust policy cannot be read or says what has no meaning; `path` is where in the document."""

    def __init__(self, message: str, path: tuple[str | int, ...] = ()) -> None:
        self.path = path
        super().__init__(message)


class StaleError(TrustError):
    """A channel is shown in an earlier, or another, state than the one that was seen here before."""


class SigningError(ArtifactError):
    """Something cannot be signed or checked: the key cannot be used, or the library is not installed."""


class ChannelError(ArtifactError):
    """A channel may not be moved to this engine; the message says which rule forbids it."""
