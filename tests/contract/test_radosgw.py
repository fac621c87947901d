"""The contract of stores, and a build, on Ceph's S3 server: what many run who do not use Amazon's. Long: it begins with a cluster."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from artifacts.s3_conditions import _found
from artifacts.store import open_store
from bench.faults.servers import make_bucket
from tests.ceph import missing_programs, radosgw_server
from tests.conftest import BUCKET, point_at
from tests.contract import test_stores
from tests.integration import test_s3_build

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def radosgw_endpoint() -> Iterator[str]:
    """Address of a radosgw that holds the bucket `enginery-tests`."""
    missing = missing_programs()
    if missing:
        pytest.skip(f"{', '.join(missing)} not installed (Debian: ceph-mon, ceph-osd, ceph-common, radosgw)")
    folder = Path(tempfile.mkdtemp(prefix="ceph-"))  # pytest's own are too long for paths of sockets
    try:
        with radosgw_server(folder) as endpoint:
            make_bucket(endpoint, BUCKET)
            yield endpoint
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def s3_environ(radosgw_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Point this process at radosgw; whatever asks for an S3 store gets one there."""
    return point_at(radosgw_endpoint, monkeypatch)


class TestRadosgwStore(test_stores.TestS3Store):
    """Without ENGINERY_S3_LOCKS: it has to honour conditions for these to pass."""

    kills = 6


def test_both_conditions_are_honoured(s3_store_uri: str, radosgw_endpoint: str) -> None:
    store = open_store(s3_store_uri)
    assert [store.write("a", data, if_absent=True) for data in (b"1", b"2")] == [True, False]
    _data, version = store.read_versioned("a")
    assert [store.write("a", data, if_version=version) for data in (b"3", b"4")] == [True, False]
    assert store.read("a") == b"3"
    for condition in ("IfNoneMatch", "IfMatch"):
        assert _found[radosgw_endpoint, BUCKET, condition]


test_a_build = test_s3_build.test_a_build_into_s3_is_cached_listed_resolved_and_pulled
