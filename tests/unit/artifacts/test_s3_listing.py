"""Listings that are read fast are those that botocore reads; what is no listing is left to botocore."""

from __future__ import annotations

import datetime as dt
import os
from typing import Any

import boto3
import pytest
from botocore.awsrequest import AWSResponse
from botocore.exceptions import ClientError
from hypothesis import given
from hypothesis import strategies as st

from artifacts import s3
from artifacts.s3 import S3Store, groups_of
from artifacts.s3_listing import read_listings_fast

NAMESPACE = ' xmlns="http://s3.amazonaws.com/doc/2006-03-01/"'
ENTRIES = """
<Contents><Key>a%2Fb%20c%2B</Key><LastModified>2026-01-02T03:04:05.678Z</LastModified><ETag>&quot;abc-2&quot;</ETag>
<Size>5368709121</Size><StorageClass>STANDARD</StorageClass><Owner><ID>x</ID></Owner></Contents>
<Contents><Key>\u00fc&amp;</Key><LastModified>2026-01-02T03:04:05Z</LastModified><Size>0</Size></Contents>
"""
PAGE = (
    "<?xml version='1.0' encoding='UTF-8'?><ListBucketResult{namespace}><Name>b</Name><Prefix></Prefix>"
    "<MaxKeys>1000</MaxKeys><KeyCount>2</KeyCount><IsTruncated>true</IsTruncated>{entries}"
    "<NextContinuationToken>next</NextContinuationToken><EncodingType>url</EncodingType></ListBucketResult>"
)


def listed(body: str, *, fast: bool, status: int = 200) -> dict[str, Any]:
    """Return what a client reads of an answer with this body."""
    client = boto3.client("s3", region_name="us-east-1", aws_access_key_id="a", aws_secret_access_key="b")
    if fast:
        read_listings_fast(client)

    class Raw:
        def stream(self) -> list[bytes]:
            return [body.encode()]

    client.meta.events.register(
        "before-send.s3.ListObjectsV2", lambda request, **_: AWSResponse(request.url, status, {}, Raw())
    )
    found: dict[str, Any] = client.list_objects_v2(Bucket="b")
    del found["ResponseMetadata"]
    return found


@pytest.mark.parametrize("namespace", [NAMESPACE, ""])
@pytest.mark.parametrize("entries", [ENTRIES, ""])
def test_a_page_is_read_as_botocore_reads_it(entries: str, namespace: str):
    body = PAGE.format(namespace=namespace, entries=entries)
    slow, fast = listed(body, fast=False), listed(body, fast=True)
    for entry in slow.get("Contents", ()):
        entry.setdefault("ETag", "")
        for unused in ("StorageClass", "Owner"):
            entry.pop(unused, None)
    assert fast == slow
    assert [entry["Key"] for entry in fast.get("Contents", ())] == (["a/b c+", "\u00fc&"] if entries else [])


@pytest.mark.parametrize(
    "entries",
    [
        "<Contents><Key>a</Key><LastModified>Fri, 02 Jan 2026 03:04:05 GMT</LastModified><Size>1</Size></Contents>",
        "<Contents><Key>a</Key><Size>1</Size></Contents>",
    ],
    ids=["another time", "no time"],
)
def test_what_is_not_known_is_left_to_botocore(entries: str):
    body = PAGE.format(namespace=NAMESPACE, entries=entries)
    assert listed(body, fast=True) == listed(body, fast=False)


def test_an_error_is_an_error():
    with pytest.raises(ClientError, match="NoSuchBucket"):
        listed("<Error><Code>NoSuchBucket</Code><Message>none</Message></Error>", fast=True, status=404)


@given(st.lists(st.text("ab/", min_size=1, max_size=9), min_size=1, unique=True), st.integers(1, 5))
def test_every_path_is_in_one_group_that_a_listing_finds_and_has_room_for(paths: list[str], most: int):
    paths.sort()
    groups = [list(group) for group in groups_of(paths, most)]
    assert [path for group in groups for path in group] == paths
    assert all(len(group) <= most for group in groups)
    for group in groups:  # and what begins as all of a group do is of the group, or lies beside it
        alike = os.path.commonprefix(group)  # noqa: RUF071  characters are meant
        within = [path for path in paths if path.startswith(alike) and group[0] <= path <= group[-1]]
        assert within == group


class Listed(S3Store):
    """A store of which a page has three objects, and that counts pages."""

    def __init__(self, paths: list[str]) -> None:
        super().__init__("bucket")
        self.paths, self.pages = sorted(paths), 0

    def _page(self, prefix: str, after: str) -> Any:
        self.pages += 1
        there = [path for path in self.paths if path.startswith(prefix) and path > after]
        entry = {"LastModified": dt.datetime.now(dt.timezone.utc), "Size": 1}
        return [(path, entry) for path in there[:3]], len(there) > 3


PATHS = st.lists(st.text("ab/", min_size=1, max_size=5), min_size=1, unique=True)


@given(PATHS, PATHS)
def test_what_is_there_is_listed_or_asked_for_and_no_page_is_for_nothing(there: list[str], wanted: list[str]):
    wanted.sort()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(s3, "_WORTH", 2)
        patch.setattr(s3, "_LEAP", 1)
        store = Listed(there)
        found, alone = store._among(wanted)
    assert set(found) | (set(alone) & set(there)) == set(wanted) & set(there)
    assert set(alone) <= set(wanted)
    assert store.pages <= 1 + len([path for path in there if wanted[0][:-1] < path <= wanted[-1]]) // 3


def test_few_among_many_are_asked_for_and_many_are_listed():
    there = [f"cache/{number:05}" for number in range(6000)]
    few = Listed(there)
    _found, alone = few._among(there[::300])
    assert (few.pages, len(alone)) == (1, 19)
    most = Listed(there[:300])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(s3, "_WORTH", 2)
        found, alone = most._among(there[:300])
    assert (most.pages, len(found), len(alone)) == (100, 300, 0)
