"""Conditional writes to S3, and what to do where a service ignores their conditions.

Some services take `If-None-Match` and `If-Match` and ignore them in silence (measured: s3rver 3.7.1
and `rclone serve s3` 1.75.2; moto 5.2.5 honours both, as Amazon S3 is documented to: User Guide, "How
to prevent object overwrites with conditional writes"). So each condition is tried out once for each
endpoint and bucket of a process, on an object of its own under `tmp/`. Where it is ignored, a write
is refused, unless `ENGINERY_S3_LOCKS` names a folder that all writers of the store share. There the kernel drops the lock of a
writer that was killed, while what it had sent may still be on its way, and would overwrite what the next one writes. So a writer
leaves a mark while its request is under way, and the next one waits until that has arrived, or cannot any more.

Ceph's radosgw 16.2 compares the ETag of `If-Match`, with its quotes, with one that has none, so that it refuses every write:
what is refused although the object is still of this version is sent without quotes, which RFC 9110 (8.8.3) does not know.
"""

from __future__ import annotations

import hashlib
import os
import random
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

from artifacts.errors import StoreError
from artifacts.files import make_folders, os_faults
from artifacts.refs import digest_bytes
from artifacts.s3_faults import Place, error_code, is_absent
from artifacts.s3_limit import limit_seconds

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client
    from mypy_boto3_s3.type_defs import HeadObjectOutputTypeDef

Condition = Literal["IfNoneMatch", "IfMatch"]
TRIES: Final = 5
LOCKS: Final = "ENGINERY_S3_LOCKS"
# A request that a killed process had sent may be carried out after its end; none of a small document takes so long.
UNDER_WAY_SECONDS: Final = 120.0
_LOOK_SECONDS: Final = 0.5
_HEADERS: Final[Mapping[Condition, str]] = {"IfNoneMatch": "If-None-Match", "IfMatch": "If-Match"}
# The ETag of no object: they are digests or end in the number of parts.
_NO_ETAG: Final = '"enginery-no-such-version"'
_REFUSED: Final = ("PreconditionFailed", "412")
_CONFLICT: Final = ("ConditionalRequestConflict", "409")
_UNKNOWN: Final = ("NotImplemented", "501")
_REFUSING: Final = 4  # hundred and so much: HTTP's statuses of what was not carried out

_found: dict[tuple[str, str, Condition], bool] = {}
# Endpoints that want ETags without their quotes.
_without_quotes: Final[set[str]] = set()
_finding: Final = threading.Lock()


@dataclass(frozen=True)
class ConditionalWriter:
    """Writes objects of one bucket under a condition. `probe_key` is an object that belongs to nobody else."""

    client: S3Client
    place: Place
    probe_key: str

    def put_new(self, key: str, data: bytes) -> bool:
        """Write an object that must not exist, and tell whether it was written. Raises StoreError, boto3's errors."""
        if self._honours("IfNoneMatch"):
            return self._put(key, data, "IfNoneMatch", "*")
        with self._locked(key, "IfNoneMatch") as mark:
            self._wait_for(mark, key)
            if self._etag(key) is not None:
                return False
            self._put_marked(mark, key, data)
            return True

    def put_over(self, key: str, data: bytes, etag: str) -> bool:
        """Write over the object of this ETag, and tell whether it was written. Raises StoreError, boto3's errors."""
        if self._honours("IfMatch"):
            return self._put(key, data, "IfMatch", etag)
        with self._locked(key, "IfMatch") as mark:
            self._wait_for(mark, key)
            if self._etag(key) != etag:
                return False
            self._put_marked(mark, key, data)
            return True

    def _put_marked(self, mark: Path, key: str, data: bytes) -> None:
        """Write under a lock; the mark says what is under way, and stays where it is not known whether that was carried out."""
        from botocore.exceptions import ClientError

        _leave(mark, f"{hashlib.md5(data, usedforsecurity=False).hexdigest()} {limit_seconds():g}")
        try:
            self.client.put_object(Bucket=self.place.bucket, Key=key, Body=data)
        except ClientError as err:
            answer = err.response.get("ResponseMetadata", {})
            # What was sent before another try may still arrive.
            if answer.get("HTTPStatusCode", 0) // 100 == _REFUSING and not answer.get("RetryAttempts"):
                _forget(mark)
            raise
        _forget(mark)

    def _wait_for(self, mark: Path, key: str) -> None:
        """Wait until what a killed writer had sent is there, or it was so long ago that it will not come any more."""
        began = time.monotonic()
        with os_faults(str(mark)), suppress(FileNotFoundError):
            sent, _space, limit = mark.read_text().partition(" ")
            # The mark is older than what was sent last by as much as all tries of a request may take.
            longest = UNDER_WAY_SECONDS + (float(limit) if limit else limit_seconds())
            clock = mark.with_suffix(".now")
            while (self._etag(key) or "").strip('"') != sent:
                clock.unlink(missing_ok=True)  # of a process that was killed, maybe another user's
                clock.touch()  # ages are told by the folder's clock, which somebody may set back
                age = clock.stat().st_mtime - mark.stat().st_mtime
                clock.unlink()
                if max(age, time.monotonic() - began) > longest:
                    break
                time.sleep(_LOOK_SECONDS)
            _forget(mark)

    def _put(self, key: str, data: bytes, condition: Condition, value: str) -> bool:
        from botocore.exceptions import ClientError

        writer, endpoint = uuid.uuid4().hex, self.place.endpoint
        bare = condition == "IfMatch" and endpoint in _without_quotes
        for attempt in range(TRIES):
            sent = value.strip('"') if bare else value
            try:
                self._put_if(key, data, condition, sent, writer)
            except ClientError as err:
                code = error_code(err)
                if code in _REFUSED or is_absent(code):
                    # botocore sends a request again whose answer was lost; then what is in the way may be our own.
                    if err.response["ResponseMetadata"]["RetryAttempts"] and self._wrote(key, writer):
                        return True
                    left = attempt + 1 < TRIES
                    if condition == "IfMatch" and not bare and left and self._etag(key) == value:
                        # In this form, too, the condition has to be heeded.
                        bare = self._refuses(condition, _NO_ETAG.strip('"'))
                        if bare:
                            continue
                    return False
                # Two conditional writes at once: S3 asks for another try.
                if code not in _CONFLICT or attempt + 1 == TRIES:
                    raise
                back_off(attempt)
            else:
                if bare:
                    _without_quotes.add(endpoint)
                return True
        raise AssertionError("the last try returns or raises")

    def _put_if(self, key: str, data: bytes, condition: Condition, value: str, writer: str) -> None:
        bucket, marks = self.place.bucket, {"writer": writer}
        if condition == "IfNoneMatch":
            self.client.put_object(Bucket=bucket, Key=key, Body=data, Metadata=marks, IfNoneMatch=value)
        else:
            self.client.put_object(Bucket=bucket, Key=key, Body=data, Metadata=marks, IfMatch=value)

    def _wrote(self, key: str, writer: str) -> bool:
        head = self._head(key)
        return head is not None and writer in head["Metadata"].values()

    def _etag(self, key: str) -> str | None:
        head = self._head(key)
        return None if head is None else head["ETag"]

    def _head(self, key: str) -> HeadObjectOutputTypeDef | None:
        from botocore.exceptions import ClientError

        try:
            return self.client.head_object(Bucket=self.place.bucket, Key=key)
        except ClientError as err:
            if is_absent(error_code(err)):
                return None
            raise

    def _honours(self, condition: Condition) -> bool:
        """Tell whether the service heeds a condition; it is asked once in the life of a process."""
        known = (self.place.endpoint, self.place.bucket, condition)
        with _finding:
            if known not in _found:
                # The first write of the probe may rightly succeed, where nobody has left the object yet; not the second.
                _found[known] = any(self._refuses(condition) for _ in range(2))
            return _found[known]

    def _refuses(self, condition: Condition, value: str | None = None) -> bool:
        """Send a write that has to be refused where the probe object is there, and tell whether it was."""
        from botocore.exceptions import ClientError

        value = value or ("*" if condition == "IfNoneMatch" else _NO_ETAG)
        try:
            self._put_if(self.probe_key, b"Does this service heed conditions?\n", condition, value, "probe")
        except ClientError as err:
            code = error_code(err)
            if code in _REFUSED or code in _CONFLICT or (condition == "IfMatch" and code == "NoSuchKey"):
                return True
            if code in _UNKNOWN:
                return False
            raise
        return False

    @contextmanager
    def _locked(self, key: str, condition: Condition) -> Iterator[Path]:
        """Hold a lock that all writers share, where the user has named a folder for it; yield where its mark is. Raises StoreError."""
        from filelock import FileLock

        folder = os.environ.get(LOCKS, "")
        if not folder:
            raise StoreError(
                f"{self.place.uri}: {self.place.endpoint} ignores conditional writes ({_HEADERS[condition]}), so builders "
                "would overwrite each other's results; use a service that honours them (Amazon S3 does), a folder "
                f"as --store, or set {LOCKS} to a folder that every writer of this store shares"
            )
        name = digest_bytes(f"{self.place.endpoint}/{self.place.bucket}/{key}".encode())
        with ExitStack() as stack:
            with os_faults(f"{LOCKS}={folder}"):
                make_folders(Path(folder).absolute())
                stack.enter_context(FileLock(Path(folder).absolute() / f"{name}.lock", mode=0o666))
            yield Path(folder).absolute() / f"{name}.sent"


def _leave(mark: Path, text: str) -> None:
    """Write a mark whole or not at all, for every user that the folder is shared with. Raises StoreError."""
    fresh = mark.with_suffix(".new")
    with os_faults(str(mark)):
        fresh.unlink(missing_ok=True)
        try:
            fresh.write_text(text)
            fresh.chmod(0o666)
            fresh.replace(mark)
        except OSError:
            with suppress(OSError):
                fresh.unlink(missing_ok=True)
            raise


def _forget(mark: Path) -> None:
    # One that cannot be removed costs who comes next a look or a wait; what was written is written.
    with suppress(OSError):
        mark.unlink(missing_ok=True)


def back_off(attempt: int) -> None:
    """Wait before another try, with full jitter: up to 0.1, 0.2, 0.4... seconds."""
    time.sleep(random.uniform(0, 0.1 * 2**attempt))
