"""A server that is away for a while: what is asked again, what is an answer, and that an outage is known even where nobody told of it."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer

import httpx
import pytest

from tasks.server import Line, asked


class Answers(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(self.server.statuses.pop(0) if self.server.statuses else 200)
        self.end_headers()

    def log_message(self, *_words):
        pass


@contextmanager
def serving(port: int, *statuses: int) -> Iterator[HTTPServer]:
    with HTTPServer(("127.0.0.1", port), Answers) as server:
        server.statuses = list(statuses)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def question(port: int):
    async def ask() -> int:
        async with httpx.AsyncClient(trust_env=False, verify=False) as client:
            answer = await client.get(f"http://127.0.0.1:{port}/")
            answer.raise_for_status()
            return answer.status_code

    return ask


def test_a_server_that_is_gone_or_fails_is_asked_until_it_answers(port):
    said: list[str] = []
    line = Line(said.append)

    async def away_and_back() -> int:
        asking = asyncio.ensure_future(line.ask(question(port), first=0.02))
        await asyncio.sleep(0.15)
        assert not asking.done()
        assert said == []
        with serving(port, 503, 500):
            return await asking

    assert asyncio.run(away_and_back()) == 200
    assert [text.partition(" (")[0] for text in said] == ["the Prefect server does not answer"]
    assert not line.steady(0.5)
    assert line.steady(0.0)


def test_an_answer_is_not_asked_for_again_and_who_is_away_too_long_is_given_up(port):
    with serving(port, 404), pytest.raises(httpx.HTTPStatusError, match="404"):
        asyncio.run(asked(question(port), warn=pytest.fail))
    with pytest.raises(httpx.ConnectError):
        asyncio.run(asked(question(port), warn=lambda _text: None, away=0.1, first=0.02))


def test_an_answer_that_took_long_is_an_outage_as_well():
    """Prefect's client tries again by itself, and says nothing of it."""
    line = Line(pytest.fail, silent=0.2)

    async def answer(seconds: float) -> float:
        await asyncio.sleep(seconds)
        return seconds

    asyncio.run(line.ask(lambda: answer(0.0)))
    assert line.steady(60)
    asyncio.run(line.ask(lambda: answer(0.25)))
    assert not line.steady(60)
