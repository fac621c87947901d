"""Copies inside a bucket, which the service makes: no byte of them comes here.

A copy of up to 5 GB is one request, at which the service may be silent until it is done; as may the one that completes an upload in
parts. How long that may take grows with the bytes: a second more for every 10 MB (`patience`). What is larger goes by parts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final

from artifacts.errors import StoreError

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client
    from mypy_boto3_s3.type_defs import CopySourceTypeDef

# CopyObject takes up to 5 GB (Amazon S3 User Guide, "Copying, moving, and renaming objects"); more goes by parts.
COPY_BYTES: Final = 5_000_000_000
COPY_PART_BYTES: Final = 512 << 20
_THREADS: Final = 4
# What a service does with bytes of its own may be as slow as this and is waited for: a slow disk that is read and written.
_BYTES_PER_SECOND: Final = 10_000_000
# Up to so many, what the limit leaves anyway is enough, and no other connection is made.
_LARGE_BYTES: Final = 256 << 20

# Makes a client whose connections may be silent, and whose requests may take, so many seconds longer than others.
Patient = Callable[[float], "S3Client"]


def patience(size: int) -> float:
    """Return how many seconds longer a request may take, at which a service handles so many bytes by itself."""
    return size / _BYTES_PER_SECOND if size > _LARGE_BYTES else 0.0


def copy_object(
    patient: Patient, bucket: str, source: str, target: str, size: int, changes: Mapping[str, Any] | None = None
) -> None:
    """Copy an object of this size from one key to another, with changes of what it is kept with.

    Raises boto3's errors, and StoreError where a service without copies by parts is asked for one.
    """
    origin: CopySourceTypeDef = {"Bucket": bucket, "Key": source}
    given = dict(changes or {})
    if size <= COPY_BYTES:
        patient(patience(size)).copy_object(CopySource=origin, Bucket=bucket, Key=target, **given)
        return
    from boto3.s3.transfer import TransferConfig

    parts = TransferConfig(
        multipart_threshold=COPY_BYTES, multipart_chunksize=COPY_PART_BYTES, max_concurrency=_THREADS
    )
    try:
        # One request completes it, whose service may put all the parts together meanwhile.
        patient(patience(size)).copy(origin, bucket, target, ExtraArgs=given, Config=parts)
    except KeyError as err:
        # rclone's `serve s3` (1.75.2) takes the copy of a part for an empty part, and tells no ETag of it.
        raise StoreError(
            f"s3://{bucket}/{source}: this service does not copy by parts (UploadPartCopy), which an object of {size} bytes "
            f"needs (more than {COPY_BYTES}); use a service that does (Amazon S3, Ceph), or a folder as --store"
        ) from err
