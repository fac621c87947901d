"""How many stages run at once: each takes slots, in the order in which they came."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager


class Slots:
    """A number of slots. First come, first served, so that who wants all of them is not passed by for ever."""

    def __init__(self, count: int) -> None:
        self._free = count
        self._queue: deque[object] = deque()
        self._changed = threading.Condition()

    @property
    def waiting(self) -> int:
        """How many wait for slots."""
        return len(self._queue)

    @contextmanager
    def taken(self, count: int) -> Iterator[None]:
        """Hold `count` slots, waiting for them; not more than there are."""
        ticket = object()
        with self._changed:
            self._queue.append(ticket)
            try:
                self._changed.wait_for(lambda: self._queue[0] is ticket and self._free >= count)
            finally:
                self._queue.remove(ticket)
                self._changed.notify_all()
            self._free -= count
        try:
            yield
        finally:
            with self._changed:
                self._free += count
                self._changed.notify_all()
