"""What is sent where a service refuses ETags in their quotes: by a client that stands in for services that are not to be had."""

from __future__ import annotations

from typing import Any

import pytest
from botocore.exceptions import ClientError

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


def refusal(code: str) -> ClientError:
    return ClientError({"Error": {"Code": code}, "ResponseMetadata": {"RetryAttempts": 0}}, "PutObject")  # type: ignore[typeddict-item]


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
