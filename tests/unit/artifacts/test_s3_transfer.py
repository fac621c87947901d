"""Large files in S3: uploads in parts, copies that the service makes, what is not sent again."""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from artifacts.cache import blob_path
from artifacts.catalog import EngineCatalog
from artifacts.errors import IntegrityError, StoreError
from artifacts.mirror import Mirror
from artifacts.refs import digest_bytes
from artifacts.s3 import S3Store
from artifacts.s3_multipart import PART_BYTES
from artifacts.store import Store, open_store
from tests.engines import make_engine
from tests.servers import Faults
from tests.unit.artifacts.large import large_file, ref_of

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client


def sent_parts(faults: Faults) -> list[int]:
    found = [re.search(r"partNumber=(\d+)", line) for line in faults.requests if line.startswith("PUT")]
    return sorted(int(match[1]) for match in found if match)


def test_an_interrupted_upload_goes_on_from_the_parts_that_are_there(
    store: Store, faults: Faults, tmp_path: Path
) -> None:
    source, ref = large_file(tmp_path)

    def dies(params: dict[str, object], **_more: object) -> None:
        if "partNumber=3" in str(params["url"]):
            raise KeyboardInterrupt

    dying = open_store(store.uri)
    dying._client.meta.events.register("before-call.s3.UploadPart", dies)
    with pytest.raises(KeyboardInterrupt):
        dying.put_file("blob", source, ref)
    assert store.info("blob") is None
    kept = sent_parts(faults)
    assert kept[:2] == [1, 2]
    faults.requests.clear()
    store.put_file("blob", source, ref)
    assert sent_parts(faults) == sorted({1, 2, 3, 4} - set(kept))
    store.get_file("blob", ref, tmp_path / "back")
    bucket, _slash, _prefix = store.uri.removeprefix("s3://").partition("/")
    assert "Uploads" not in store._client.list_multipart_uploads(Bucket=bucket)


def test_parts_of_other_bytes_are_sent_again(store: Store, faults: Faults, tmp_path: Path) -> None:
    source, ref = large_file(tmp_path, 2)
    bucket, _slash, prefix = store.uri.removeprefix("s3://").partition("/")
    place = {"Bucket": bucket, "Key": f"{prefix}/blob"}
    upload = store._client.create_multipart_upload(**place)["UploadId"]
    store._client.upload_part(**place, UploadId=upload, PartNumber=1, Body=bytes(PART_BYTES))
    faults.requests.clear()
    store.put_file("blob", source, ref)
    assert sent_parts(faults) == [1, 2]
    store.get_file("blob", ref, tmp_path / "back")


def test_a_large_file_of_other_bytes_leaves_nothing(store: Store, tmp_path: Path) -> None:
    source, ref = large_file(tmp_path, 2)
    with source.open("r+b") as stream:
        stream.write(b"other")
    with pytest.raises(IntegrityError, match="SHA-256"):
        store.put_file("blob", source, ref)
    bucket, _slash, _prefix = store.uri.removeprefix("s3://").partition("/")
    assert store.info("blob") is None
    assert "Uploads" not in store._client.list_multipart_uploads(Bucket=bucket)


def test_unchanged_blobs_are_not_sent_again_and_a_publication_sends_no_bytes(
    store: Store, faults: Faults, tmp_path: Path
) -> None:
    plan = b"plan" * 1000
    first = make_engine(store, tmp_path, plan, recipe="digits", target="t", build="a")
    EngineCatalog(store).publish(first)
    blob = blob_path(digest_bytes(plan))
    faults.requests.clear()
    sizes: list[int] = []

    def count(params: dict[str, Any], **_more: object) -> None:
        body = params["body"]
        sizes.append(len(body) if isinstance(body, bytes) else len(body.getbuffer()))

    store._client.meta.events.register("before-call.s3.PutObject", count)
    second = make_engine(store, tmp_path, plan, recipe="digits", target="t", build="b")
    EngineCatalog(store).publish(second)
    assert not [line for line in faults.requests if line.startswith("PUT") and line.endswith(blob)]
    manifest = len(second.to_bytes())
    assert max(sizes) == manifest
    assert sum(sizes) < manifest + 1000  # a lease besides


def test_a_mirror_within_a_bucket_is_copied_by_the_service_and_what_is_damaged_is_not(
    s3_store_uri: str, faults: Faults, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = open_store(f"{s3_store_uri}/source"), open_store(f"{s3_store_uri}/target")
    plan = b"plan" * 1000
    EngineCatalog(source).publish(make_engine(source, tmp_path, plan, recipe="digits", target="t", build="a"))
    blob = blob_path(digest_bytes(plan))
    faults.requests.clear()
    bodies: list[bytes] = []

    def keep(params: dict[str, Any], **_more: object) -> None:
        bodies.append(params["body"] if isinstance(params["body"], bytes) else params["body"].getvalue())

    with monkeypatch.context() as patch:
        # With what the copy is written with, whatever the source has.
        patch.setenv("ENGINERY_S3_SSE", "aws:kms")
        patch.setenv("ENGINERY_S3_KMS_KEY", "alias/copies")
        target._client.meta.events.register("before-call.s3.PutObject", keep)
        assert Mirror(source, target).run().left == []
    assert len([line for line in faults.requests if line.startswith("PUT") and line.endswith(f"target/{blob}")]) == 1
    assert bodies
    assert not any(plan in body for body in bodies)
    assert target.read(blob) == plan
    bucket, _slash, prefix = target.uri.removeprefix("s3://").partition("/")
    head = target._client.head_object(Bucket=bucket, Key=f"{prefix}/{blob}")
    assert (head["ServerSideEncryption"], head["SSEKMSKeyId"].rpartition(":")[2]) == ("aws:kms", "alias/copies")
    assert {name.lower(): value for name, value in head["Metadata"].items()} == {"sha256": digest_bytes(plan)}
    damaged = open_store(f"{s3_store_uri}/damaged")
    source.write(blob, plan[:-1] + b"!")
    assert any("SHA-256" in said for said in Mirror(source, damaged).run().left)
    assert damaged.info(blob) is None


def test_what_is_too_large_for_one_copy_is_copied_in_parts(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("artifacts.s3_copy.COPY_BYTES", 6 << 20)
    monkeypatch.setattr("artifacts.s3_copy.COPY_PART_BYTES", 5 << 20)
    data = random.Random(1).randbytes((11 << 20) + 1)
    source = tmp_path / "source"
    source.write_bytes(data)
    store.put_file("large", source, ref_of(data))
    parts: list[str] = []

    def count(params: dict[str, Any], **_more: object) -> None:
        parts.append(params["headers"]["x-amz-copy-source-range"])

    store._client.meta.events.register("before-call.s3.UploadPartCopy", count)
    store.copy("large", "copy")
    assert sorted(parts) == ["bytes=0-5242879", "bytes=10485760-11534336", "bytes=5242880-10485759"]
    store.get_file("copy", ref_of(data), tmp_path / "copied")
    assert store.touch("copy")
    assert len(parts) == 6
    store.get_file("copy", ref_of(data), tmp_path / "touched")


def test_uploads_that_nobody_completes_are_aborted_when_they_are_old(store: Store) -> None:
    bucket, _slash, prefix = store.uri.removeprefix("s3://").partition("/")
    for key in (f"{prefix}/cache/blobs/left", "elsewhere/left"):
        store._client.create_multipart_upload(Bucket=bucket, Key=key)
    assert isinstance(store, S3Store)
    assert store.abandon_uploads(1e10) == 0
    assert store.abandon_uploads(7 * 86400.0) == 1  # moto says of every upload that it was begun in 2010
    left = store._client.list_multipart_uploads(Bucket=bucket)["Uploads"]
    assert "elsewhere/left" in {upload["Key"] for upload in left}
    assert not [upload for upload in left if upload["Key"].startswith(f"{prefix}/")]


def test_a_service_is_waited_for_longer_while_it_handles_many_bytes(
    s3_store_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of what one request makes it copy or put together: a second for every 10 MB, in each silence and in all."""
    monkeypatch.setattr("artifacts.s3_copy._LARGE_BYTES", PART_BYTES)
    store, asked = S3Store.from_uri(s3_store_uri), list[float]()
    patient, (source, ref) = store._patient, large_file(tmp_path, 2)

    def listen(seconds: float) -> S3Client:
        asked.append(seconds)
        return patient(seconds)

    store._patient = listen
    store.put_file("blob", source, ref)
    store.copy("blob", "copy")
    assert store.touch("copy")
    store.write("small", b"1")
    store.copy("small", "too")
    assert asked == [ref.size / 1e7, ref.size / 1e7, ref.size / 1e7, 0.0]
    store.get_file("copy", ref, tmp_path / "back")
    assert patient(100.0).meta.config.read_timeout == 160.0  # a fifth of 300 is usual
    assert patient(99.0) is patient(100.0)
    assert patient(0.0).meta.config.read_timeout == 60.0


def test_a_service_that_does_not_copy_by_parts_is_refused(
    careless_s3_store_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("artifacts.s3_copy.COPY_BYTES", 100)
    store, data = open_store(careless_s3_store_uri), b"x" * 1000
    (tmp_path / "source").write_bytes(data)
    store.put_file("large", tmp_path / "source", ref_of(data))
    with pytest.raises(StoreError, match=r"does not copy by parts .* 1000 bytes needs .*use a service that does"):
        store.copy("large", "copy")
    assert store.info("copy") is None
