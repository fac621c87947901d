"""A failing S3 service before moto and rclone: the short form of bench/faults/proxy.py."""

from __future__ import annotations

import http.client
import os
import random
from pathlib import Path
from unittest.mock import patch
from urllib.parse import urlsplit

import pytest

from bench.faults.proxy import FAULTS, SERVERS, Weather, campaign, failing
from bench.faults.world import Actors

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("server", SERVERS)
def test_a_failing_service_gives_the_right_result_or_a_clear_error(server: str, tmp_path: Path):
    pytest.importorskip("moto", reason="moto is not installed (pip install 'enginery[dev]')")
    seed = random.randrange(1 << 32)
    # Entering a place changes the environment, which is put back.
    with patch.dict(os.environ):
        tally = campaign(server, 8, seed, 0.4, tmp_path, Actors())
    assert tally.violations == [], seed
    assert sum(tally.faults.values()) > tally.faults["none"] > 0, seed


def test_the_proxy_does_to_requests_what_it_says(s3_environ: str):
    """Each fault, alone: whether the server saw the request, and what the client is told."""
    address = urlsplit(s3_environ).netloc
    seen = {}
    for number, fault in enumerate(FAULTS):
        weather = Weather(0, 1.0)
        weather.next = lambda fault=fault: fault
        path = f"/enginery-tests/proxied-{number}"
        with failing(s3_environ, weather) as proxy:
            said = request("PUT", urlsplit(proxy).netloc, path, b"x" * 10_000)
            stored = request("GET", address, path)[0] == 200
            request("PUT", address, path, b"x" * 10_000)
            got = request("GET", urlsplit(proxy).netloc, path)
        seen[fault] = (said[0], stored, got[0], len(got[1]))
    assert seen == {
        "500": (500, False, 500, 74),
        "503": (503, False, 503, 69),
        "500 after all": (500, True, 500, 74),
        "reset": (None, False, None, 0),
        "lost": (None, True, None, 0),
        "cut": (200, True, 200, 5000),
        "slow": (200, True, 200, 10_000),
    }


def request(method: str, address: str, path: str, body: bytes = b"") -> tuple[int | None, bytes]:
    connection = http.client.HTTPConnection(address, timeout=30)
    try:
        connection.request(method, path, body, {"Authorization": "AWS test:test"})
        response = connection.getresponse()
        try:
            return response.status, response.read()
        except http.client.IncompleteRead as err:
            return response.status, err.partial
    except (ConnectionError, http.client.HTTPException):
        return None, b""
    finally:
        connection.close()
