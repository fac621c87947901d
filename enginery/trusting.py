"""Which trust policy holds: what was given, else the file that `ENGINERY_TRUST` names, else none."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeVar

from artifacts.errors import PolicyError

if TYPE_CHECKING:
    from artifacts.trust import Trust

CheckT = TypeVar("CheckT")

TRUST: Final = "ENGINERY_TRUST"


class Unchecked:
    """Says aloud that no signature is to be checked, whatever the environment says; see `UNCHECKED`."""

    def __repr__(self) -> str:
        return "UNCHECKED"


UNCHECKED: Final = Unchecked()


def trust_of(given: CheckT | Unchecked | None) -> CheckT | Trust | None:
    """Return the policy that holds; None where there is none, or where checks were switched off aloud.

    Raises PolicyError where the file of `ENGINERY_TRUST` cannot be used.
    """
    if isinstance(given, Unchecked):
        return None
    if given is not None:
        return given
    path = os.environ.get(TRUST)
    return load_trust(Path(path)) if path else None


def load_trust(path: Path) -> Trust:
    """Read a trust policy; key files are beside it. Raises PolicyError, naming file and line."""
    from artifacts.trust import Trust, TrustPolicy
    from recipes.yaml_text import read

    document, faults = read(path)
    if document is None or faults:
        raise PolicyError("; ".join(f"{fault.file}:{fault.line}: {fault.what}" for fault in faults))

    def read_key(name: str) -> bytes:
        try:
            return (path.parent / name).read_bytes()
        except (OSError, ValueError) as err:
            raise PolicyError(f"{path}: key file {name}: {getattr(err, 'strerror', None) or err}") from err

    try:
        return Trust(TrustPolicy.from_document(document.root.plain(), str(path), read_key))
    except PolicyError as err:
        if not err.path:
            raise
        raise PolicyError(
            str(err).replace(str(path), f"{path}:{document.root.at(err.path).line}", 1), err.path
        ) from err
