"""A Prefect server that is away for a while: work goes on without it, and only to say how it ended is it waited for."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import Final, TypeVar

import httpx
from prefect.client.orchestration import get_client

T = TypeVar("T")

AWAY_SECONDS: Final = 6 * 3600.0
_FIRST_SECONDS: Final = 1.0
_LONGEST_SECONDS: Final = 30.0


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


async def wait_for_server(warn: Callable[[str], None]) -> None:
    """Wait until the server answers, so that how a run ended is not lost: Prefect itself gives up on the first refusal."""

    async def ask() -> None:
        async with get_client() as client:
            failure = await client.api_healthcheck()
        if failure is not None:
            raise failure

    await asked(ask, warn=warn)


def _is_answer(err: Exception) -> bool:
    return isinstance(err, httpx.HTTPStatusError) and err.response.status_code < HTTPStatus.INTERNAL_SERVER_ERROR
