"""Fixtures of the tests of stores in S3."""

from __future__ import annotations

import pytest

from artifacts.store import Store, open_store
from tests.servers import Faults


@pytest.fixture
def store(s3_store_uri: str, faults: Faults) -> Store:
    """A store that says its layout already, and was looked at."""
    open_store(s3_store_uri).write("first", b"")
    store = open_store(s3_store_uri)
    store.delete("first")
    faults.requests.clear()
    return store
