"""Optimisation profiles of a plan: which shapes they admit, and which of them was tuned nearest to a shape."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tasks.errors import BackendError


@dataclass(frozen=True)
class Profile:
    """One optimisation profile: {input: [min, opt, max]}; `name` is the recipe's, empty where it is not known."""

    index: int
    ranges: Mapping[str, Sequence[Sequence[int]]]
    name: str = ""

    def __str__(self) -> str:
        spans = ", ".join(f"{name} {list(span[0])} to {list(span[2])}" for name, span in self.ranges.items())
        return f"profile {self.name or self.index}: {spans}"

    def admits(self, shapes: Mapping[str, Sequence[int]]) -> bool:
        """Tell whether every extent lies between min and max."""
        return all(
            len(shape) == len(self.ranges[name][0])
            and all(low <= extent <= high for low, extent, high in zip(least, shape, most, strict=True))
            for name, shape in shapes.items()
            for least, _opt, most in [self.ranges[name]]
        )

    def distance(self, shapes: Mapping[str, Sequence[int]]) -> float:
        """Say how far shapes are from what the profile was tuned for: the sum of |log(extent / opt)|."""
        pairs = [
            (extent, best)
            for name, shape in shapes.items()
            for extent, best in zip(shape, self.ranges[name][1], strict=True)
        ]
        return sum(abs(math.log(max(extent, 1) / max(best, 1))) for extent, best in pairs)


def nearest(profiles: Sequence[Profile], shapes: Mapping[str, Sequence[int]]) -> Profile | None:
    """Return the profile that admits the shapes and was tuned nearest to them; None where none admits them."""
    fitting = [profile for profile in profiles if profile.admits(shapes)]
    return min(fitting, key=lambda profile: (profile.distance(shapes), profile.index)) if fitting else None


def not_admitted(profiles: Sequence[Profile], shapes: Mapping[str, Sequence[int]], where: str) -> str:
    """Say that no profile admits these shapes, and what each admits."""
    asked = ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
    return f"{where}: no profile of the plan admits {asked} ({'; '.join(map(str, profiles))})"


def choose_profile(profiles: Sequence[Profile], shapes: Mapping[str, Sequence[int]], where: str) -> Profile:
    """Return the profile tuned nearest to the shapes. Raises BackendError("bad profile") listing what is admitted."""
    found = nearest(profiles, shapes)
    if found is None:
        raise BackendError("bad profile", not_admitted(profiles, shapes, where), "widen a profile")
    return found
