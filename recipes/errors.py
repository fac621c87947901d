"""What can be wrong with a recipe: the author's fault, always with file and line.

RecipeError    one or many `Fault`s, all reported at once
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing wrong in a recipe: `file:line: path: what` (line counts from 1; 0 where no line applies)."""

    file: str
    line: int
    path: str
    what: str

    def __str__(self) -> str:
        where = f"{self.file}:{self.line}" if self.line else self.file
        return f"{where}: {self.path}: {self.what}" if self.path else f"{where}: {self.what}"


class RecipeError(Exception):
    """A recipe cannot be used; `faults` holds everything that was found wrong with it."""

    def __init__(self, faults: Sequence[Fault]) -> None:
        self.faults = tuple(faults)
        super().__init__("\n".join(str(fault) for fault in self.faults))
