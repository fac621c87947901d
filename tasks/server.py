"""A Prefect server that is away for a while: work goes on without it, and only to say how it ended is it waited for."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import Final, TypeVar

import httpx

T = TypeVar("T")

AWAY_SECONDS: Final = 6 * 3600.0
_FIRST_SECONDS: Final = 1.0
_LONGEST_SECONDS: Final = 30.0
_SILENT_SECONDS: Final = 5.0


async def asked(
    call: Callable[[], Awaitable[T]],
    *,
    warn: Callable[[str], None],
    away: float = AWAY_SECONDS,
    first: float = _FIRST_SECONDS,
) -> T:
    """Ask the server, again and again while it is away (no connection, 5xx), for `away` seconds at most.

    Raises what the last try raised, and at once what is an answer. Only for what may be asked twice.
    """
    began, wait = time.monotonic(), first
    while True:
        try:
            return await call()
        except (httpx.TransportError, httpx.HTTPStatusError) as err:
            if _is_answer(err) or time.monotonic() - began > away:
                raise
            if wait == first:
                warn(f"the Prefect server does not answer ({type(err).__name__}: {err}); asked again until it does")
            await asyncio.sleep(wait)
            wait = min(2 * wait, _LONGEST_SECONDS)


class Line:
    """Questions to a server that may be away in between, and how long ago it was: who could not be heard then is not lost.

    Prefect's client tries again in silence for a minute: an answer that takes longer than `silent` seconds is an outage too.
    """

    def __init__(self, warn: Callable[[str], None], silent: float = _SILENT_SECONDS) -> None:
        """`warn` is told of an outage when it is over, as nobody takes it before."""
        self._warn = warn
        self._silent = silent
        self._back = float("-inf")

    async def ask(self, call: Callable[[], Awaitable[T]], *, first: float = _FIRST_SECONDS) -> T:
        """Ask, as `asked` does."""
        outages: list[str] = []
        began = time.monotonic()
        answer = await asked(call, warn=outages.append, first=first)
        if outages or time.monotonic() - began > self._silent:
            self._back = time.monotonic()
        if outages:
            self._warn(outages[0])
        return answer

    def steady(self, seconds: float) -> bool:
        """Tell whether no outage was seen for so long."""
        return time.monotonic() - self._back > seconds


async def wait_for_server(warn: Callable[[str], None]) -> None:
    """Wait until the server answers, so that how a run ended is not lost: Prefect itself gives up on the first refusal."""
    from prefect.client.orchestration import get_client

    async def ask() -> None:
        async with get_client() as client:
            failure = await client.api_healthcheck()
        if failure is not None:
            raise failure

    await asked(ask, warn=warn)


def _is_answer(err: Exception) -> bool:
    return isinstance(err, httpx.HTTPStatusError) and err.response.status_code < HTTPStatus.INTERNAL_SERVER_ERROR
