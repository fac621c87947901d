"""Uploads of large files to S3 in parts, which go on where a killed one stopped.

What is sent is what is hashed: each part is read once, and the upload is completed only where all parts together have the
digest that was promised. Parts that a killed upload left are kept where their MD5 or SHA-256, as the service tells it, is that
of the same part of the file; others are sent again. Two that send one file at once may share an upload: whoever completes
it first is right for both, since parts are compared with content.
"""

from __future__ import annotations

import base64
import hashlib
import threading
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO, Final

from artifacts.errors import IntegrityError
from artifacts.refs import ArtifactRef, require_match
from artifacts.s3_copy import Patient, patience
from artifacts.s3_faults import error_code

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client
    from mypy_boto3_s3.type_defs import CompletedPartTypeDef, PartTypeDef

PART_BYTES: Final = 16 << 20
# S3 takes 10,000 parts (Amazon S3 User Guide, "Multipart upload limits").
_MOST_PARTS: Final = 9000
# In memory at once are these, and the one that is being read.
_THREADS: Final = 2
_NO_UPLOAD: Final = ("NoSuchUpload", "404")


@dataclass(frozen=True)
class MultipartUpload:
    """Sends one file to one key of a bucket."""

    client: S3Client
    bucket: str
    key: str
    patient: Patient

    def send(self, stream: BinaryIO, ref: ArtifactRef, what: str) -> None:
        """Send a file from its beginning, or what is missing of it; returns when the object is there.

        Raises IntegrityError where the bytes are not `ref` (the upload is aborted), and boto3's errors.
        """
        from botocore.exceptions import ClientError

        found = self._interrupted()
        for upload, parts in [found] if found is not None else []:
            try:
                self._send(stream, ref, what, upload, parts)
            except ClientError as err:
                if error_code(err) not in _NO_UPLOAD:
                    raise
                # Somebody else completed or aborted it.
                if self._is_there(ref):
                    return
                stream.seek(0)
            else:
                return
        upload = self.client.create_multipart_upload(
            Bucket=self.bucket, Key=self.key, Metadata={"sha256": ref.digest}, ContentType=ref.media_type
        )["UploadId"]
        try:
            self._send(stream, ref, what, upload, {})
        except ClientError as err:
            if error_code(err) not in _NO_UPLOAD or not self._is_there(ref):
                raise

    def _send(
        self, stream: BinaryIO, ref: ArtifactRef, what: str, upload: str, there: Mapping[int, PartTypeDef]
    ) -> None:
        size = part_bytes(ref.size)
        digest, count, number = hashlib.sha256(), 0, 0
        free, sent = threading.Semaphore(_THREADS), list[Future["CompletedPartTypeDef"]]()
        kept: list[CompletedPartTypeDef] = []
        with ThreadPoolExecutor(_THREADS) as pool:
            while data := stream.read(size):
                number, count = number + 1, count + len(data)
                digest.update(data)
                known = there.get(number)
                if known is not None and _is_part(known, data):
                    kept.append({"PartNumber": number, "ETag": known["ETag"]})
                    continue
                free.acquire()
                if any(future.done() and future.exception() is not None for future in sent):
                    free.release()
                    break
                future = pool.submit(self._part, upload, number, data)
                future.add_done_callback(lambda _future: free.release())
                sent.append(future)
                del data
            parts = [*kept, *(future.result() for future in sent)]
        try:
            require_match(what, ref, digest.hexdigest(), count)
        except IntegrityError:
            self.client.abort_multipart_upload(Bucket=self.bucket, Key=self.key, UploadId=upload)
            raise
        # At which a service may put all the bytes together before it says a word.
        self.patient(patience(ref.size)).complete_multipart_upload(
            Bucket=self.bucket,
            Key=self.key,
            UploadId=upload,
            MultipartUpload={"Parts": sorted(parts, key=lambda part: part["PartNumber"])},
        )

    def _part(self, upload: str, number: int, data: bytes) -> CompletedPartTypeDef:
        # The service refuses what arrives with another MD5: botocore sends it where it is told to.
        md5 = base64.b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode()
        answer = self.client.upload_part(
            Bucket=self.bucket, Key=self.key, UploadId=upload, PartNumber=number, Body=data, ContentMD5=md5
        )
        return {"PartNumber": number, "ETag": answer["ETag"]}

    def _interrupted(self) -> tuple[str, dict[int, PartTypeDef]] | None:
        """Return the newest upload to this key that was begun and not completed, with its parts by number."""
        from botocore.exceptions import ClientError

        try:
            pages = self.client.get_paginator("list_multipart_uploads").paginate(Bucket=self.bucket, Prefix=self.key)
            uploads = [upload for page in pages for upload in page.get("Uploads", ()) if upload["Key"] == self.key]
            if not uploads:
                return None
            newest = max(uploads, key=lambda upload: upload["Initiated"])["UploadId"]
            parts = self.client.get_paginator("list_parts").paginate(Bucket=self.bucket, Key=self.key, UploadId=newest)
            return newest, {part["PartNumber"]: part for page in parts for part in page.get("Parts", ())}
        except ClientError:
            return None  # without the right to look, or where the service cannot tell, it is sent from the beginning

    def _is_there(self, ref: ArtifactRef) -> bool:
        from botocore.exceptions import ClientError

        try:
            return self.client.head_object(Bucket=self.bucket, Key=self.key)["ContentLength"] == ref.size
        except ClientError:
            return False


def part_bytes(size: int) -> int:
    """Return how large the parts of a file of this size are: the same whoever sends it, so that parts can be kept."""
    return max(PART_BYTES, -(-size // _MOST_PARTS))


def _is_part(known: PartTypeDef, data: bytes) -> bool:
    if known["Size"] != len(data):
        return False
    told = known.get("ChecksumSHA256")
    if told is not None:
        return told == base64.b64encode(hashlib.sha256(data).digest()).decode()
    return known["ETag"].strip('"') == hashlib.md5(data, usedforsecurity=False).hexdigest()
