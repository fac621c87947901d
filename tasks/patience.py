"""Try again, after longer and longer waits, what failed because the store does not answer: nothing else is tried again.

A recipe's own errors, a compiler's refusals, missing permissions and full disks fail at once: trying again costs hours there
and mends nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final, TypeVar

from artifacts.errors import UnavailableError

T = TypeVar("T")

_FIRST_SECONDS: Final = 2.0
_FACTOR: Final = 4.0


def delays(retries: int) -> list[float]:
    """Return how long to wait before each new try, in seconds: 2, 8, 32, 128."""
    return [_FIRST_SECONDS * _FACTOR**attempt for attempt in range(retries)]


def _sleep(seconds: float) -> bool:
    time.sleep(seconds)
    return False


def patiently(
    call: Callable[[], T],
    retries: int,
    *,
    warn: Callable[[str], None] = lambda _message: None,
    wait: Callable[[float], bool] = _sleep,
) -> T:
    """Call, and again up to `retries` times where the store does not answer; `wait` returns True where that is to end.

    Raises what the last call raised.
    """
    for seconds in delays(retries):
        try:
            return call()
        except UnavailableError as err:
            warn(f"{err}; tried again in {seconds:.0f} s")
            if wait(seconds):
                raise
    return call()
