"""Which execution context runs which shape: one for each profile, and more for shapes that come back often.

All contexts of a plan work in one scratch memory, since they never run at once.
"""

from __future__ import annotations

from collections import Counter
from typing import Any, Final

from tasks.engines.trt_adapter import device_memory
from tasks.engines.trt_slots import CAPTURE_AFTER, Loaded, Slot

# How many shapes may have a slot, and with it a CUDA graph, of their own; one that rested for so many calls gives way.
OWN_SLOTS: Final = 8
AGED: Final = 1000
_REMEMBERED: Final = 4096


class SlotPool:
    """The slots of one loaded plan."""

    def __init__(self, loaded: Loaded, *, graphs: bool, one_shape: bool, aged: int = AGED) -> None:
        """`graphs` allows CUDA graphs; `one_shape` says that every profile admits a single shape."""
        self.loaded = loaded
        self._aged = aged
        self._graphs, self._one_shape = graphs, one_shape
        self._scratch: tuple[int, int] | None = None
        self._base: dict[int, Slot] = {}
        self._own: dict[tuple[Any, ...], Slot] = {}
        self._seen: Counter[tuple[Any, ...]] = Counter()
        self._calls = 0
        # Whether two contexts may use one profile at once: 8.6 has that only as a preview feature of the builder.
        self._shares_profiles = True

    def slot(self, profile: int, shapes: tuple[Any, ...]) -> tuple[Slot, bool]:
        """Return the slot for a run at these shapes, and whether it may replay a graph.

        A graph holds for one shape, so shapes that come back get a slot of their own; where TensorRT refuses a second
        context on a profile, the one there is replays as long as the same shape comes again and again. Raises BackendError.
        """
        self._calls += 1
        key = (profile, *shapes)
        own = self._own.get(key)
        if own is not None:
            own.used = self._calls
            return own, True
        base = self.base(profile)
        if not self._graphs or self._one_shape or not self._shares_profiles:
            return base, self._graphs
        self._seen[key] += 1
        if self._seen[key] <= CAPTURE_AFTER or not self._has_room():
            if len(self._seen) > _REMEMBERED:
                self._seen.clear()
            return base, False
        before = len(self.loaded.log.errors)
        own = self._new(profile)
        if own is None:
            self.loaded.log.take_errors(before)
            self._shares_profiles = False
            return base, True
        own.used = self._calls
        self._own[key] = own
        return own, True

    def base(self, profile: int) -> Slot:
        """Return the slot of a profile that any shape may use. Raises BackendError."""
        base = self._base.get(profile)
        if base is None:
            base = self._new(profile)
            if base is None:
                raise self.loaded.log.failure(f"profile {profile} cannot be used", otherwise="bad profile")
            self._base[profile] = base
        return base

    def _has_room(self) -> bool:
        """Make room for one more slot, where the one that rested longest has rested long enough."""
        if len(self._own) < OWN_SLOTS:
            return True
        oldest = min(self._own, key=lambda key: self._own[key].used)
        if self._calls - self._own[oldest].used < self._aged:
            return False
        self._own.pop(oldest).close()
        self._seen.pop(oldest, None)
        return True

    def _new(self, profile: int) -> Slot | None:
        """Return a slot on a profile, or None where TensorRT does not let another context use it."""
        if self._scratch is None:
            size = device_memory(self.loaded.engine)
            self._scratch = self.loaded.cuda.allocate(size), size
        context = self.loaded.context(*self._scratch)
        # The first context takes profile 0 by itself; of several profiles, and in every later context, one has to be set.
        if self.loaded.engine.num_optimization_profiles > 1 or self._base:
            if not context.set_optimization_profile_async(profile, self.loaded.cuda.stream):
                return None
            self.loaded.cuda.synchronize()
        return Slot(self.loaded, context)
