"""A store in S3, or in anything that speaks its protocol (`s3_conditions`: where conditional writes are ignored).

Credentials, profile, region and endpoint come the way they do for every AWS tool (environment,
`~/.aws`, instance role; `AWS_ENDPOINT_URL_S3` for another service). `ENGINERY_S3_ADDRESSING` is
`path`, `virtual` or `auto` (default: path-style where an endpoint is given, as botocore has it).
What objects are encrypted and tagged with: `s3_settings`. A put that dies half-way leaves no object, but parts,
with which the next put of the file goes on; they cost money: give the bucket a lifecycle rule that aborts incomplete uploads.
"""

from __future__ import annotations

import base64
import datetime as dt
import hashlib
import math
import os
import re
import threading
import time
from bisect import bisect_right
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, suppress
from functools import cached_property, partial
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

from artifacts.errors import AddressError, NotFoundError, StoreError
from artifacts.files import arriving, check_chunks, create_file, open_regular, os_faults
from artifacts.layout import LAYOUT_NAME, layout_document, require_layout
from artifacts.refs import CHUNK_BYTES, ArtifactRef, digest_bytes, require_match, require_size
from artifacts.s3_conditions import TRIES, ConditionalWriter, back_off
from artifacts.s3_copy import copy_object
from artifacts.s3_faults import Place, error_code, is_absent, s3_faults, without_user
from artifacts.s3_limit import OutOfTimeError, bound, limit_seconds, silence_seconds, within
from artifacts.s3_listing import read_listings_fast
from artifacts.s3_multipart import PART_BYTES, MultipartUpload
from artifacts.s3_settings import apply_settings, is_anonymous
from artifacts.scratch import temporary_folder
from artifacts.store import (
    RESERVED,
    ObjectInfo,
    check_path,
    check_prefix,
    is_relative_path,
    require_one_condition,
    without_secret,
)

if TYPE_CHECKING:
    from boto3.session import Session
    from mypy_boto3_s3 import S3Client

_ASKERS: Final = 16
# Up to so many objects are asked for one by one: a listing has 1000 on a page, of which few may be those that are meant.
_LISTED: Final = 1000
# What begins alike is listed together, in up to two pages of 1000.
_TOGETHER: Final = 2000
# Where a page passes fewer than so many that are meant, the next ones are asked for one by one, twice as many each time: a listing
# of Amazon's costs what a dozen of these do, and pages between them may be thousands.
_WORTH: Final = 16
_LEAP: Final = 64
# A key has at most 1024 bytes (Amazon S3 User Guide, "Naming Amazon S3 objects"); a path takes up to 900 of them.
_PREFIX_BYTES: Final = 120
# Belongs to the store itself, stays where it is, and is read by nobody.
_PROBE: Final = "tmp/conditional-writes"
# Clients that wait for longer do so in steps of so many seconds, so that they are few.
_STEP: Final = 25.0
# A session makes clients in one thread alone.
_making: Final = threading.RLock()
_BUCKET: Final = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")


class S3Store:
    """A bucket, or the part of one under a prefix. Nothing is sent before the first call."""

    def __init__(self, bucket: str, prefix: str = "") -> None:
        self.bucket = bucket
        self.prefix = prefix
        # None: not looked for yet.
        self._has_layout: bool | None = None
        # By the seconds that each waits longer.
        self._patients: dict[float, S3Client] = {}

    @classmethod
    def from_uri(cls, uri: str) -> S3Store:
        """Open `s3://bucket/prefix`. Raises AddressError for anything else, and StoreError where boto3 is not installed."""
        bucket, _slash, prefix = uri.removeprefix("s3://").partition("/")
        prefix = prefix.rstrip("/")
        if not uri.startswith("s3://") or not _BUCKET.fullmatch(bucket):
            shown = without_secret(uri)
            hint = "; credentials come from the environment or ~/.aws, never from an address" if shown != uri else ""
            raise AddressError(
                f"{shown}: not an S3 address (expected s3://bucket/prefix, a bucket of 3 to 63 of a-z0-9.-{hint})"
            )
        if prefix and not (is_relative_path(prefix) and len(prefix.encode()) <= _PREFIX_BYTES):
            raise AddressError(
                f"{without_secret(uri)}: not a prefix (expected parts joined by '/', at most {_PREFIX_BYTES} bytes)"
            )
        try:
            import boto3  # noqa: F401 - asked for here, so that the advice comes before any work
        except ImportError as err:
            raise StoreError(f"{uri}: S3 needs boto3; install it with: pip install 'enginery[s3]'") from err
        return cls(bucket, prefix)

    def __repr__(self) -> str:
        return f"S3Store({self.uri!r})"

    @property
    def uri(self) -> str:
        """Where it is: `s3://bucket/prefix`."""
        return f"s3://{self.bucket}/{self.prefix}" if self.prefix else f"s3://{self.bucket}"

    def read(self, path: str) -> bytes:
        """Return a small object. Raises NotFoundError, StoreError."""
        key = self._key(path)
        with self._faults(path):
            return b"".join(self._chunks(key))

    def read_versioned(self, path: str) -> tuple[bytes, str]:
        """Return a small object and its ETag. Raises NotFoundError, StoreError."""
        key, etags = self._key(path), [""]
        with self._faults(path):
            data = b"".join(self._chunks(key, etags.append))
        return data, etags[-1]

    def write(self, path: str, data: bytes, *, if_absent: bool = False, if_version: str | None = None) -> bool:
        """Write a small object; with a condition, return False where it does not hold.

        Raises StoreError, also where the service ignores conditions and `ENGINERY_S3_LOCKS` is not set.
        """
        require_one_condition(if_absent, if_version)
        key = self._key(path)
        with self._faults(path):
            client = self._writer()
            if if_absent:
                return self._conditional.put_new(key, data)
            if if_version is not None:
                return self._conditional.put_over(key, data, if_version)
            client.put_object(Bucket=self.bucket, Key=key, Body=data)
            return True

    def put_file(self, path: str, source: Path, ref: ArtifactRef) -> None:
        """Store a file, beyond 16 MiB in parts, hashing what is sent; an object of the same size is not sent again.

        Of an upload that was interrupted, the parts that are there are kept (`s3_multipart`). Raises IntegrityError where the
        file's bytes are not `ref`, StoreError.
        """
        key = self._key(path)
        with open_regular(source) as stream:
            require_size(str(source), ref, os.fstat(stream.fileno()).st_size)
            there = self.info(path)
            if there is not None and there.size == ref.size:
                return
            with self._faults(path), os_faults(str(source)):
                client = self._writer()
                if ref.size > PART_BYTES:
                    MultipartUpload(client, self.bucket, key, self._patient).send(stream, ref, str(source))
                    return
                data = stream.read(PART_BYTES + 1)
                require_match(str(source), ref, digest_bytes(data), len(data))
                client.put_object(
                    Bucket=self.bucket,
                    Key=key,
                    Body=data,
                    ContentMD5=base64.b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode(),
                    Metadata={"sha256": ref.digest},
                    ContentType=ref.media_type,
                )

    def get_file(self, path: str, ref: ArtifactRef, target: Path) -> None:
        """Bring an object to `target` with flat memory, hashing it on the way; a broken connection is taken up again.

        Raises NotFoundError, StoreError (also where `target` exists), and IntegrityError, leaving no `target`.
        """
        key = self._key(path)
        with arriving(target) as temporary, self._faults(path), create_file(temporary, 0o444) as copy:
            check_chunks(self._chunks(key), ref, f"{self.uri}/{path}", copy.write)

    def copy(self, source: str, target: str) -> None:
        """Copy an object inside the bucket, without bringing it here. Raises NotFoundError, StoreError."""
        origin, key = self._key(source), self._key(target)
        with self._faults(source):
            head = self._writer().head_object(Bucket=self.bucket, Key=origin)
            copy_object(self._patient, self.bucket, origin, key, head["ContentLength"])

    def copy_from(self, other: S3Store, path: str, ref: ArtifactRef) -> None:
        """Copy an object of another store in this bucket, which the service does: its bytes are read and compared, not sent.

        What is copied is what was compared: the very version (ETag). Raises NotFoundError, StoreError, IntegrityError.
        """
        origin, key, etags = other._key(path), self._key(path), list[str]()
        with other._faults(path):
            chunks = other._chunks(origin, etags.append)
            check_chunks(chunks, ref, f"{other.uri}/{path}")
            self._writer()
            changes = {"CopySourceIfMatch": etags[-1]}
            copy_object(self._patient, self.bucket, origin, key, ref.size, changes)

    def info(self, path: str) -> ObjectInfo | None:
        """Return size and time of an object, or None where there is none. Raises StoreError."""
        key = self._key(path)
        try:
            with self._faults(path):
                head = self._client.head_object(Bucket=self.bucket, Key=key)
        except NotFoundError:
            return None
        return ObjectInfo(path, head["ContentLength"], head["LastModified"].timestamp(), head.get("ETag", ""))

    def infos(self, paths: Collection[str]) -> dict[str, ObjectInfo]:
        """Return what `info` does of many objects: some are asked for one by one, thousands are found by listing.

        Raises StoreError.
        """
        from concurrent.futures import ThreadPoolExecutor

        wanted = sorted(set(paths))
        if len(wanted) <= _LISTED:  # what no store can have, no listing has
            for path in wanted:
                check_path(path)
        with self._faults("/"):
            _ = self._client  # made before there are threads: boto3 makes clients in one alone
        with ThreadPoolExecutor(_ASKERS) as pool:
            if len(wanted) <= _LISTED:
                return {info.path: info for info in pool.map(self.info, wanted) if info is not None}
            found: dict[str, ObjectInfo] = {}
            alone: Sequence[str] = ()
            for listed, rest in pool.map(self._among, list(groups_of(wanted))):
                found |= listed
                alone = [*alone, *rest]
            return found | {info.path: info for info in pool.map(self.info, alone) if info is not None}

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """Yield every object whose path starts with `prefix`, sorted by path. Raises StoreError."""
        return self._pages(check_prefix(prefix))

    def touch(self, path: str) -> bool:
        """Make an object count as written now by copying it onto itself; False where there is none. Raises StoreError."""
        key = self._key(path)
        try:
            with self._faults(path):
                head = self._client.head_object(Bucket=self.bucket, Key=key)
                # S3 refuses such a copy unless it says what is to change.
                changes = {
                    "Metadata": head["Metadata"],
                    "MetadataDirective": "REPLACE",
                    "ContentType": head["ContentType"],
                }
                copy_object(self._patient, self.bucket, key, key, head["ContentLength"], changes)
        except NotFoundError:
            return False
        return True

    def delete(self, path: str) -> None:
        """Remove an object; no error where there is none. Raises StoreError."""
        key = self._key(path)
        with self._faults(path):
            self._client.delete_object(Bucket=self.bucket, Key=key)

    def abandon_uploads(self, age: float) -> int:
        """Abort uploads in parts that were begun so many seconds ago and not completed; return how many. Raises StoreError.

        By this host's clock: an age has to leave room for clocks that differ, and for uploads that are under way.
        """
        now, prefix, count = dt.datetime.now(dt.timezone.utc), f"{self.prefix}/" if self.prefix else "", 0
        with self._faults("/"):
            pages = self._client.get_paginator("list_multipart_uploads").paginate(Bucket=self.bucket, Prefix=prefix)
            for upload in [upload for page in pages for upload in page.get("Uploads", ())]:
                if (now - upload["Initiated"]).total_seconds() > age:
                    self._client.abort_multipart_upload(
                        Bucket=self.bucket, Key=upload["Key"], UploadId=upload["UploadId"]
                    )
                    count += 1
        return count

    def lock(self, name: str, *, give_up: Callable[[], bool] | None = None) -> AbstractContextManager[None]:
        """Hold a claim (`artifacts.claims`), which others take over when its holder is not heard of any more."""
        from artifacts.claims import claimed

        return claimed(self, name, give_up)

    def scratch(self) -> AbstractContextManager[Path]:
        """Yield a new, empty folder in the system's temporary folder (`TMPDIR`). Raises StoreError."""
        return temporary_folder()

    @cached_property
    def _client(self) -> S3Client:
        client = self._connection
        self._has_layout = self._read_layout()
        return client

    def _writer(self) -> S3Client:
        """Return the client for a write, which leaves the store with a document of its layout."""
        client = self._client
        if not self._has_layout:
            self._put_layout()
        return client

    def _read_layout(self) -> bool:
        """Tell whether the store says its layout; raises StoreError where it is none that this release knows."""
        from botocore.exceptions import ClientError

        try:
            answer = self._connection.get_object(Bucket=self.bucket, Key=self._layout_key)
        except ClientError as err:
            if is_absent(error_code(err)):
                return False
            raise
        limit = limit_seconds()
        require_layout(self.uri, within(limit, limit, answer["Body"].read))
        return True

    def _put_layout(self) -> None:
        from botocore.exceptions import ClientError

        # Where the condition is ignored, another of this release would have written the same.
        with suppress(ClientError):
            self._connection.put_object(
                Bucket=self.bucket, Key=self._layout_key, Body=layout_document(), IfNoneMatch="*"
            )
        # Whoever was faster may be a newer release; where nothing could be written, the write itself will say why.
        self._has_layout = self._read_layout()

    @property
    def _layout_key(self) -> str:
        return f"{self.prefix}/{LAYOUT_NAME}" if self.prefix else LAYOUT_NAME

    @cached_property
    def _connection(self) -> S3Client:
        return self._connect()

    def _patient(self, seconds: float) -> S3Client:
        """Return a client that waits at least so many seconds longer than others do; it is kept."""
        if not seconds:
            return self._client
        longer = math.ceil(seconds / _STEP) * _STEP
        with _making:
            if longer not in self._patients:
                self._patients[longer] = self._connect(longer)
            return self._patients[longer]

    @cached_property
    def _session(self) -> Session:
        # One: credentials that have to be asked for (AssumeRole, MFA) are asked for once.
        from boto3.session import Session

        return Session()

    def _connect(self, longer: float = 0.0) -> S3Client:
        from botocore.config import Config

        addressing = _addressing()
        limit = limit_seconds()
        silence = silence_seconds(limit)
        config = Config(
            retries={"mode": "standard"},
            user_agent_extra="enginery",
            max_pool_connections=_ASKERS,
            connect_timeout=silence,
            read_timeout=silence + longer,
        )
        if addressing:
            config = config.merge(Config(s3={"addressing_style": addressing}))
        if _names_endpoint() and "AWS_REQUEST_CHECKSUM_CALCULATION" not in os.environ:
            # Since boto3 1.36 uploads carry checksums in a trailer, which many services other than AWS refuse.
            config = config.merge(Config(request_checksum_calculation="when_required"))
        if is_anonymous():
            from botocore import UNSIGNED

            config = config.merge(Config(signature_version=UNSIGNED))
        try:
            with _making:
                client: S3Client = self._session.client("s3", config=config)
            endpoint = without_user(client.meta.endpoint_url)
            if endpoint != client.meta.endpoint_url:
                # botocore repeats the address in its errors, and never sends what stands before the host.
                with _making:
                    client = self._session.client("s3", config=config, endpoint_url=endpoint)
        except ValueError as err:
            said = without_user(str(err))
            raise StoreError(f"{self.uri}: {said}; check AWS_ENDPOINT_URL_S3 and AWS_ENDPOINT_URL") from None
        apply_settings(client)
        read_listings_fast(client)
        bound(client, limit + longer)
        return client

    @cached_property
    def _conditional(self) -> ConditionalWriter:
        client = self._client
        return ConditionalWriter(client, self._place, f"{self.prefix}/{_PROBE}" if self.prefix else _PROBE)

    @property
    def _place(self) -> Place:
        client = self.__dict__.get("_connection")
        return Place(self.uri, self.bucket, client.meta.endpoint_url if client is not None else "S3")

    def _faults(self, path: str) -> AbstractContextManager[None]:
        return s3_faults(lambda: self._place, path)

    def _key(self, path: str) -> str:
        return f"{self.prefix}/{check_path(path)}" if self.prefix else check_path(path)

    def _chunks(self, key: str, tell_etag: Callable[[str], object] = lambda _etag: None) -> Iterator[bytes]:
        """Yield an object's bytes; where the connection breaks, go on from there, if the object is still the same."""
        from botocore.exceptions import HTTPClientError, IncompleteReadError

        offset, etag, limit = 0, "", limit_seconds()
        until = time.monotonic() + limit
        for attempt in range(TRIES):
            try:
                if offset:
                    answer = self._client.get_object(
                        Bucket=self.bucket, Key=key, Range=f"bytes={offset}-", IfMatch=etag
                    )
                else:
                    answer = self._client.get_object(Bucket=self.bucket, Key=key)
                etag = answer["ETag"]
                tell_etag(etag)
                body = answer["Body"]
                try:
                    while chunk := within(until - time.monotonic(), limit, partial(body.read, CHUNK_BYTES)):
                        offset += len(chunk)
                        yield chunk
                        until = time.monotonic() + limit
                except OutOfTimeError:
                    raise  # whoever reads it still would be waited for, were it closed
                except BaseException:
                    body.close()
                    raise
                body.close()
            except (HTTPClientError, IncompleteReadError):
                if attempt + 1 == TRIES or time.monotonic() >= until:
                    raise
                back_off(attempt)
            else:
                return

    def _among(self, group: Sequence[str]) -> tuple[dict[str, ObjectInfo], Sequence[str]]:
        """List what lies among sorted paths, keeping those alone; times in whole seconds, as a HEAD tells them.

        Returns also those that are to be asked for one by one, as too much lies between them.
        """
        prefix, wanted = _shared(group[0], group[-1]), frozenset(group)
        found: dict[str, ObjectInfo] = {}
        alone: Sequence[str] = ()
        at, leap, after = 0, _LEAP, ""
        while at < len(group):
            items, more = self._page(prefix, max(after, group[at][:-1]))
            for path, item in items:
                if path in wanted:
                    modified = float(int(item["LastModified"].timestamp()))
                    found[path] = ObjectInfo(path, item["Size"], modified, item.get("ETag", ""))
            if not more:
                break
            begun, after = at, items[-1][0] if items else after
            at = max(at, bisect_right(group, after))
            if at - begun >= _WORTH:
                leap = _LEAP
                continue
            alone = [*alone, *group[at : at + leap]]
            at += leap
            leap *= 2
        return found, alone

    def _page(self, prefix: str, after: str) -> tuple[Sequence[tuple[str, Any]], bool]:
        """Return path and entry of what a listing has after a path, up to a page, and whether there is more."""
        base = f"{self.prefix}/" if self.prefix else ""
        with self._faults(prefix or "/"):
            page = (
                self._client.list_objects_v2(Bucket=self.bucket, Prefix=base + prefix, StartAfter=base + after)
                if base + after
                else self._client.list_objects_v2(Bucket=self.bucket, Prefix=base + prefix)
            )
        return [(item["Key"].removeprefix(base), item) for item in page.get("Contents", ())], page["IsTruncated"]

    def _pages(self, prefix: str) -> Iterator[ObjectInfo]:
        for path, item in self._items(prefix):
            # Folder markers that consoles make, and whatever else is no object of a store.
            if is_relative_path(path) and path.split("/", 1)[0] not in RESERVED:
                yield ObjectInfo(path, item["Size"], item["LastModified"].timestamp(), item.get("ETag", ""))

    def _items(self, prefix: str) -> Iterator[tuple[str, Any]]:
        """Yield path and entry of all that a listing has, sorted by path."""
        base = f"{self.prefix}/" if self.prefix else ""
        with self._faults(prefix or "/"):
            for page in self._client.get_paginator("list_objects_v2").paginate(
                Bucket=self.bucket, Prefix=base + prefix
            ):
                for item in page.get("Contents", ()):
                    yield item["Key"].removeprefix(base), item


def groups_of(paths: Sequence[str], most: int = _TOGETHER, *, at: int = 0) -> Iterator[Sequence[str]]:
    """Split sorted, different paths into groups of so many at most, each of all those that begin alike: a listing each.

    All agree before `at`.
    """
    if len(paths) <= most:
        yield paths
        return
    while paths[0][at : at + 1] == paths[-1][at : at + 1]:
        at += 1
    for _character, group in groupby(paths, lambda path: path[at : at + 1]):
        yield from groups_of(list(group), most, at=at + 1)


def _shared(one: str, other: str) -> str:
    """Return what two paths begin with, which need not end a folder's name."""
    length = next((at for at, pair in enumerate(zip(one, other)) if pair[0] != pair[1]), min(len(one), len(other)))  # noqa: B905
    return one[:length]


def _addressing() -> Literal["path", "virtual", "auto"] | None:
    match os.environ.get("ENGINERY_S3_ADDRESSING", ""):
        case "":
            return None
        case "path" | "virtual" | "auto" as style:
            return style
        case other:
            raise StoreError(f"ENGINERY_S3_ADDRESSING is {other!r} (allowed: path, virtual, auto)")


def _names_endpoint() -> bool:
    return any(os.environ.get(name) for name in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"))
