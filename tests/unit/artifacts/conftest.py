"""Fixtures of the tests of stores in S3."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from artifacts.store import Store, open_store
from tests.servers import Faults, bad_network


@pytest.fixture
def faults(s3_environ: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Faults]:
    """The faults of a network between this process and the S3 server."""
    with bad_network(s3_environ) as (address, rules):
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", address)
        yield rules


@pytest.fixture
def store(s3_store_uri: str, faults: Faults) -> Store:
    """A store that says its layout already, and was looked at."""
    open_store(s3_store_uri).write("first", b"")
    store = open_store(s3_store_uri)
    store.delete("first")
    faults.requests.clear()
    return store
