"""Services that refuse ETags in their quotes, or heed no conditions, by clients that stand in for what is not to be had at will."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import ClientError, ReadTimeoutError

from artifacts.s3_conditions import TRIES, ConditionalWriter, _without_quotes
from artifacts.s3_faults import Place

ETAG = '"0123"'


class Service:
    """Refuses `If-Match` in quotes, as Ceph's does; `heeds` the condition without them or not, and may fail once."""

    def __init__(self, *, heeds: bool = True, conflicts: int = 0) -> None:
        self.heeds, self.conflicts = heeds, conflicts
        self.sent: list[tuple[str, str]] = []

    def put_object(self, *, Key: str, IfMatch: str, **_rest: Any) -> None:  # noqa: N803 - boto3's names
        self.sent.append((Key, IfMatch))
        if Key == "key" and self.conflicts:
            self.conflicts -= 1
            raise refusal("ConditionalRequestConflict")
        if IfMatch.startswith('"') or (self.heeds and IfMatch != ETAG.strip('"')):
            raise refusal("PreconditionFailed")

    def head_object(self, **_rest: Any) -> dict[str, Any]:
        return {"ETag": ETAG, "Metadata": {}}


def refusal(code: str, status: int = 412, retries: int = 0) -> ClientError:
    answer: Any = {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status, "RetryAttempts": retries}}
    return ClientError(answer, "PutObject")


@pytest.mark.parametrize(
    ("service", "written"),
    [(Service(), True), (Service(heeds=False), False), (Service(conflicts=TRIES - 1), False)],
    ids=["heeds", "ignores", "conflicts"],
)
def test_etags_go_without_quotes_only_where_that_is_heeded_and_remembered_when_it_was_written(
    service: Service, written: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("artifacts.s3_conditions.back_off", lambda _attempt: None)
    endpoint = f"http://{id(service)}"
    writer = ConditionalWriter(service, Place("s3://b", "b", endpoint), "probe")  # type: ignore[arg-type]
    assert writer.put_over("key", b"1", ETAG) is written
    assert (endpoint in _without_quotes) is written
    if not written:
        assert ("key", ETAG.strip('"')) not in service.sent


class Careless:
    """Ignores conditions; `put` is what happens in each write of a key, and it may raise."""

    def __init__(self, put: Callable[[], None] = lambda: None) -> None:
        self.put, self.etags = put, dict[str, str]()

    def put_object(self, *, Key: str, Body: bytes, **_rest: Any) -> None:  # noqa: N803 - boto3's names
        if Key == "key":
            self.put()
        self.etags[Key] = f'"{hashlib.md5(Body, usedforsecurity=False).hexdigest()}"'

    def head_object(self, *, Key: str, **_rest: Any) -> dict[str, Any]:  # noqa: N803 - boto3's names
        if Key not in self.etags:
            raise refusal("404")
        return {"ETag": self.etags[Key], "Metadata": {}}


@pytest.fixture
def locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ENGINERY_S3_LOCKS", str(tmp_path))
    monkeypatch.setattr("artifacts.s3_conditions._LOOK_SECONDS", 0.01)
    return tmp_path


def careless_writer(service: Careless) -> ConditionalWriter:
    return ConditionalWriter(service, Place("s3://b", "b", f"http://{id(service)}"), "probe")  # type: ignore[arg-type]


def test_a_mark_is_for_all_users_and_left_where_the_end_of_a_request_is_not_known(locks: Path) -> None:
    modes, errors = [], list[Exception]()

    def put() -> None:
        (mark,) = locks.glob("*.sent")
        modes.append(mark.stat().st_mode & 0o777)
        if errors:
            raise errors.pop()

    writer = careless_writer(Careless(put))
    before = os.umask(0o077)
    try:
        refused, retried, down = refusal("AccessDenied", 403), refusal("AccessDenied", 403, retries=1), refusal("", 503)
        for error, marks in ((refused, 0), (retried, 1), (down, 1), (ReadTimeoutError(endpoint_url=""), 1)):
            errors.append(error)
            with pytest.raises(type(error)):
                writer.put_new("key", b"1")
            left = list(locks.glob("*.sent"))
            assert len(left) == marks, error
            for mark in left:
                mark.unlink()
        assert writer.put_new("key", b"1") is True
        assert writer.put_new("key", b"1") is False
    finally:
        os.umask(before)
    assert set(modes) == {0o666}
    assert {path.suffix for path in locks.iterdir()} == {".lock"}


def test_a_mark_is_waited_for_as_long_as_its_writer_could_send_also_where_the_clock_was_set_back(
    locks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("artifacts.s3_conditions.UNDER_WAY_SECONDS", 0.1)
    texts = []
    service = Careless(lambda: texts.append(next(locks.glob("*.sent")).read_text()))
    writer = careless_writer(service)
    assert writer.put_new("key", b"1") is True
    sent, limit = texts[0].split()
    assert (f'"{sent}"', limit) == (service.etags["key"], "300")
    (lock,) = locks.glob("*.lock")
    mark, clock = lock.with_suffix(".sent"), lock.with_suffix(".now")
    for days in (0, 2):
        mark.write_text("0123 0.2")
        later = mark.stat().st_mtime + 86400 * days
        os.utime(mark, (later, later))
        clock.symlink_to("/dev/null/another-users")  # cannot be touched
        began = time.monotonic()
        assert writer.put_over("key", b"1", '"another"') is False
        assert 0.25 < time.monotonic() - began < 20
        assert not mark.exists()
