"""The S3 servers of the tests, with a bucket, for the long runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.ceph import radosgw_server
from tests.servers import S3_PAGE, careless_s3_server, s3_environment, s3_server


def make_bucket(endpoint: str, bucket: str) -> None:
    """Make a bucket at an endpoint that takes the credentials test, test."""
    import boto3

    client = boto3.session.Session().client(
        "s3", endpoint_url=endpoint, region_name="us-east-1", aws_access_key_id="test", aws_secret_access_key="test"
    )
    client.create_bucket(Bucket=bucket)
    client.close()


@contextmanager
def s3_with_bucket(bucket: str, page: int = S3_PAGE) -> Iterator[dict[str, str]]:
    """Run moto's S3 server with a bucket, as `s3_server`; yield the environment that leads boto3 to it."""
    with s3_server(page) as endpoint:
        make_bucket(endpoint, bucket)
        yield s3_environment(endpoint)


@contextmanager
def rclone_with_bucket(bucket: str, folder: Path) -> Iterator[dict[str, str]]:
    """Run rclone's S3 server, which ignores conditional writes, over a new folder, with a bucket; yield as `s3_with_bucket`."""
    (folder / bucket).mkdir(parents=True)
    with careless_s3_server(folder) as endpoint:
        yield s3_environment(endpoint)


@contextmanager
def radosgw_with_bucket(bucket: str, folder: Path) -> Iterator[dict[str, str]]:
    """Run Ceph's S3 server (`tests.ceph`) with all that it holds in a new folder, with a bucket; yield as `s3_with_bucket`."""
    with radosgw_server(folder) as endpoint:
        make_bucket(endpoint, bucket)
        yield s3_environment(endpoint)
