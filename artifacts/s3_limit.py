"""How long a request to S3 may take, with all its tries: ENGINERY_S3_TIMEOUT, in seconds (default 300).

botocore bounds the silence between two bytes and how often it tries, with jitter between tries, and never the whole: an answer
that comes in drops may take for ever. So each call is made in a thread of its own, which is left behind when its time
is over. A download is bounded by each step of it, an upload by each part, so that what goes on may take as long as it is large.
"""

from __future__ import annotations

import math
import os
import queue
from collections.abc import Callable
from functools import partial
from threading import Thread
from typing import TYPE_CHECKING, Any, Final, TypeVar, cast

from artifacts.errors import StoreError

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

LIMIT: Final = "ENGINERY_S3_TIMEOUT"
_DEFAULT_SECONDS: Final = 300.0
# A connection may say nothing for this part of it, so that there is time for other tries: 60 s by default, as botocore has
# it. A service that copies a large object is silent meanwhile, which a longer limit leaves time for.
_SILENCE: Final = 0.2
T = TypeVar("T")


class OutOfTimeError(Exception):
    """A request that was not answered in time; whether the service carries it out is not known."""

    def __init__(self, seconds: float) -> None:
        """Say how long it was waited for."""
        super().__init__(f"no whole answer within {seconds:g} s, with all tries")


def limit_seconds() -> float:
    """Return how long a request may take. Raises StoreError for a setting that is no time."""
    text = os.environ.get(LIMIT, "")
    try:
        seconds = float(text) if text else _DEFAULT_SECONDS
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise StoreError(f"{LIMIT} is {text!r} (expected seconds, more than 0; default {_DEFAULT_SECONDS:g})")
    return seconds


def silence_seconds(limit: float) -> float:
    """Return for how long a connection may say nothing, where a request may take `limit` seconds."""
    return max(limit * _SILENCE, 0.1)


def within(seconds: float, limit: float, call: Callable[[], T]) -> T:
    """Return what a call returns, or raise what it raises; OutOfTimeError, which tells `limit`, where it takes longer."""
    box = queue.SimpleQueue[tuple[Any, BaseException | None]]()

    def run() -> None:
        try:
            box.put((call(), None))
        except BaseException as err:  # noqa: BLE001  which is raised where it is waited for
            box.put((None, err))

    Thread(target=run, name="S3", daemon=True).start()
    try:
        value, error = box.get(timeout=max(seconds, 0.0))
    except queue.Empty:
        raise OutOfTimeError(limit) from None
    if error is not None:
        raise error
    return cast("T", value)


def bound(client: S3Client, limit: float) -> None:
    """Make every call of a client, pages and parts of transfers included, end after `limit` seconds."""
    # All calls go through it, and botocore has no event that could end one.
    call = client._make_api_call  # type: ignore[attr-defined]  # noqa: SLF001

    def bounded(operation: str, params: dict[str, Any]) -> Any:
        return within(limit, limit, partial(call, operation, params))

    client._make_api_call = bounded  # type: ignore[attr-defined]  # noqa: SLF001
