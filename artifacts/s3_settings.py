"""What objects are written with, from the environment: encryption, key, storage class, tags; and reading without credentials.

ENGINERY_S3_SSE            AES256, aws:kms or aws:kms:dsse
ENGINERY_S3_KMS_KEY        id or ARN of the key, with one of the last two
ENGINERY_S3_STORAGE_CLASS  STANDARD, STANDARD_IA, INTELLIGENT_TIERING, ...
ENGINERY_S3_TAGS           name=value&name=value, as in a URL
ENGINERY_S3_ANONYMOUS      1: requests are not signed

They hold for every object that a process writes, copies inside the bucket included.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import parse_qsl, urlencode

from artifacts.errors import StoreError

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

_WRITES: Final = ("PutObject", "CreateMultipartUpload", "CopyObject")
_ENCRYPTIONS: Final = ("AES256", "aws:kms", "aws:kms:dsse")


def is_anonymous() -> bool:
    """Tell whether requests are not to be signed. Raises StoreError for a setting that says neither."""
    match os.environ.get("ENGINERY_S3_ANONYMOUS", ""):
        case "" | "0":
            return False
        case "1":
            return True
        case other:
            raise StoreError(f"ENGINERY_S3_ANONYMOUS is {other!r} (allowed: 0, 1)")


def write_settings() -> dict[str, str]:
    """Return the parameters that every write gets. Raises StoreError for settings that contradict or say nothing."""
    found: dict[str, str] = {}
    encryption, key = os.environ.get("ENGINERY_S3_SSE", ""), os.environ.get("ENGINERY_S3_KMS_KEY", "")
    if encryption:
        if encryption not in _ENCRYPTIONS:
            raise StoreError(f"ENGINERY_S3_SSE is {encryption!r} (allowed: {', '.join(_ENCRYPTIONS)})")
        found["ServerSideEncryption"] = encryption
    if key:
        if not encryption.startswith("aws:kms"):
            raise StoreError("ENGINERY_S3_KMS_KEY needs ENGINERY_S3_SSE=aws:kms (or aws:kms:dsse)")
        found["SSEKMSKeyId"] = key
    if os.environ.get("ENGINERY_S3_STORAGE_CLASS"):
        found["StorageClass"] = os.environ["ENGINERY_S3_STORAGE_CLASS"]
    tags = os.environ.get("ENGINERY_S3_TAGS", "")
    if tags:
        try:
            found["Tagging"] = urlencode(parse_qsl(tags, strict_parsing=True))
        except ValueError as err:
            raise StoreError(f"ENGINERY_S3_TAGS is {tags!r}: {err} (expected name=value&name=value)") from err
    return found


def apply_settings(client: S3Client) -> None:
    """Make a client give the settings to every write that does not say otherwise. Raises StoreError."""
    settings = write_settings()

    def give(params: dict[str, Any], model: Any, **_more: Any) -> dict[str, Any]:
        given = {**settings, **params}
        if model.name == "CopyObject" and "Tagging" in given:
            given["TaggingDirective"] = "REPLACE"
        return given

    if settings:
        for operation in _WRITES:
            client.meta.events.register(f"provide-client-params.s3.{operation}", give)  # type: ignore[arg-type]  # what it returns counts
