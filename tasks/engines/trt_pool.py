"""Which execution context runs which shape: one for each profile, and more for shapes that come back often.

All contexts of a plan work in one scratch memory, since they never run at once.

Where a plan's profiles cannot be shared (8.6), a second context on a profile must not even be asked for: 8.6's
`set_optimization_profile_async` has released Python's lock when it raises what TensorRT refuses, which ends the process.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from typing import Any, Final

from tasks.engines.trt_adapter import device_memory
from tasks.engines.trt_slots import CAPTURE_AFTER, Loaded, Slot
from tasks.errors import BackendError

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

    def slot(self, profile: int, shapes: tuple[Any, ...]) -> tuple[Slot, bool]:
        """Return the slot for a run at these shapes, and whether it may replay a graph.

        A graph holds for one shape, so shapes that come back get a slot of their own; where contexts cannot share a profile,
        the one there is replays as long as the same shape comes again and again. Raises BackendError.
        """
        self._calls += 1
        key = (profile, *shapes)
        own = self._own.get(key)
        if own is not None:
            own.used = self._calls
            return own, True
        base = self.base(profile)
        if not self._graphs or self._one_shape or not self.loaded.shares_profiles:
            return base, self._graphs
        self._seen[key] += 1
        if self._seen[key] <= CAPTURE_AFTER or not self._has_room():
            if len(self._seen) > _REMEMBERED:
                self._seen.clear()
            return base, False
        own = self._new(profile)
        own.used = self._calls
        self._own[key] = own
        return own, True

    def base(self, profile: int) -> Slot:
        """Return the slot of a profile that any shape may use. Raises BackendError."""
        base = self._base.get(profile)
        if base is None:
            # The first context takes profile 0 by itself. Where that could keep another from it, it is the one that has it.
            if profile and not self.loaded.shares_profiles:
                self.base(0)
            base = self._base[profile] = self._new(profile)
        return base

    def close(self) -> None:
        """Free graphs, buffers and contexts, in this order; nothing may be running, and nothing runs after."""
        for slot in (*self._own.values(), *self._base.values()):
            with contextlib.suppress(BackendError):  # after a kernel's fault nothing can be freed one by one
                slot.close()
        self._own, self._base = {}, {}

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

    def _new(self, profile: int) -> Slot:
        """Return a slot on a profile, which no context has yet where profiles cannot be shared. Raises BackendError."""
        loaded = self.loaded
        if self._scratch is None:
            size = device_memory(loaded.engine)
            self._scratch = loaded.cuda.allocate(size), size
        # A device that failed before would refuse the profile too: it is found out here, where that is an error like others.
        loaded.cuda.synchronize()
        context = loaded.context(*self._scratch)
        # The first context takes profile 0 by itself; of several profiles, and in every later context, one has to be set.
        if loaded.engine.num_optimization_profiles > 1 or self._base:
            before = len(loaded.log.errors)
            try:
                taken = context.set_optimization_profile_async(profile, loaded.cuda.stream)
            except RuntimeError:  # what 10 and later make of a refusal
                taken = False
            if not taken:
                raise loaded.log.failure(f"profile {profile} cannot be used", otherwise="bad profile", since=before)
            loaded.cuda.synchronize()
        return Slot(loaded, context)
