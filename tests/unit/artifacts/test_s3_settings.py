"""What S3 is reached and written with: addressing, credentials, roles, limits of time, encryption, tags."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from artifacts.errors import StoreError
from artifacts.s3 import S3Store
from artifacts.store import open_store
from tests.servers import Faults
from tests.unit.artifacts.large import large_file


@pytest.mark.parametrize("value", ["0", "-1", "soon", "inf", "nan"])
def test_a_limit_that_is_no_time(s3_store_uri: str, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("ENGINERY_S3_TIMEOUT", value)
    with pytest.raises(StoreError, match=f"ENGINERY_S3_TIMEOUT is '{value}'"):
        open_store(s3_store_uri).read("a")


def test_settings_that_are_wrong(s3_store_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.delenv("AWS_ACCESS_KEY_ID")
        patch.delenv("AWS_SECRET_ACCESS_KEY")
        with pytest.raises(StoreError, match=r"no usable credentials .*AWS_PROFILE.*aws configure"):
            open_store(s3_store_uri).read("a")
    with monkeypatch.context() as patch:
        patch.setenv("AWS_PROFILE", "nobody")
        with pytest.raises(StoreError, match=r"profile \(nobody\) could not be found"):
            open_store(s3_store_uri).read("a")
    with monkeypatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL_S3", "nonsense")
        with pytest.raises(StoreError, match="nonsense; check AWS_ENDPOINT_URL_S3"):
            open_store(s3_store_uri).info("a")
    with monkeypatch.context() as patch:
        patch.setenv("ENGINERY_S3_ADDRESSING", "sideways")
        with pytest.raises(StoreError, match=r"'sideways' \(allowed: path, virtual, auto\)"):
            open_store(s3_store_uri).read("a")


@pytest.mark.parametrize(
    ("addressing", "begin"),
    [
        ("", "/enginery-tests"),
        ("path", "http://s3/enginery-tests"),
        ("auto", "http://s3/enginery-tests"),
        ("virtual", "http://enginery-tests.s3/"),
    ],
)
def test_addressing(
    s3_store_uri: str, faults: Faults, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, addressing: str, begin: str
) -> None:
    """Everything that a store does, with the bucket in the path or in the host's name, which no resolver here knows: by a proxy."""
    if addressing:
        monkeypatch.setenv("HTTP_PROXY", os.environ["AWS_ENDPOINT_URL_S3"])
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://s3")
    monkeypatch.setenv("ENGINERY_S3_ADDRESSING", addressing)
    store = open_store(s3_store_uri)
    source, ref = large_file(tmp_path, 2)
    assert [store.write("a", data, if_absent=True) for data in (b"1", b"2")] == [True, False]
    assert store.write("a", b"3", if_version=store.read_versioned("a")[1])
    store.put_file("large", source, ref)
    store.copy("large", "copy")
    assert store.touch("copy")
    store.get_file("copy", ref, tmp_path / "back")
    store.delete("large")
    assert [info.path for info in store.list("")] == ["a", "copy"]
    assert store.read("a") == b"3"
    assert {line.split()[1].startswith(begin) for line in faults.requests} == {True}


def test_what_objects_are_written_with(s3_store_uri: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ENGINERY_S3_SSE", "aws:kms")
    monkeypatch.setenv("ENGINERY_S3_KMS_KEY", "alias/engines")
    monkeypatch.setenv("ENGINERY_S3_STORAGE_CLASS", "STANDARD_IA")
    monkeypatch.setenv("ENGINERY_S3_TAGS", "team=vision&stage=prod")
    store = open_store(s3_store_uri)
    source, ref = large_file(tmp_path, 2)
    store.write("small", b"1", if_absent=True)
    store.put_file("large", source, ref)
    store.copy("small", "copy")
    store.copy("large", "large copy")
    assert store.touch("small")
    mirrored = open_store(f"{s3_store_uri}/mirrored")
    mirrored.copy_from(store, "large", ref)
    bucket, _slash, prefix = store.uri.removeprefix("s3://").partition("/")
    for path in ("small", "large", "copy", "large copy", "mirrored/large", "store.json"):
        head = store._client.head_object(Bucket=bucket, Key=f"{prefix}/{path}")
        assert (head["ServerSideEncryption"], head["StorageClass"]) == ("aws:kms", "STANDARD_IA"), path
        assert head["SSEKMSKeyId"].endswith("alias/engines")
        tags = store._client.get_object_tagging(Bucket=bucket, Key=f"{prefix}/{path}")["TagSet"]
        assert {tag["Key"]: tag["Value"] for tag in tags} == {"team": "vision", "stage": "prod"}, path


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("ENGINERY_S3_SSE", "rot13", r"'rot13' \(allowed: AES256, aws:kms"),
        ("ENGINERY_S3_KMS_KEY", "key", "needs ENGINERY_S3_SSE=aws:kms"),
        ("ENGINERY_S3_TAGS", "vision", "expected name=value"),
        ("ENGINERY_S3_ANONYMOUS", "yes", r"'yes' \(allowed: 0, 1\)"),
    ],
)
def test_settings_that_say_nothing(
    s3_store_uri: str, monkeypatch: pytest.MonkeyPatch, name: str, value: str, said: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(StoreError, match=said):
        open_store(s3_store_uri).read("a")


def test_anonymous_requests_are_not_signed(s3_store_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("ENGINERY_S3_ANONYMOUS", "1")
    store, headers = open_store(s3_store_uri), []
    store._connection.meta.events.register("before-send.s3", lambda request, **_: headers.append(dict(request.headers)))
    with pytest.raises(StoreError):
        store.read("a")
    assert headers
    assert all("Authorization" not in sent for sent in headers)


def test_a_role_of_the_profile_is_assumed(
    s3_environ: str, s3_store_uri: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "config").write_text(
        "[profile builder]\nrole_arn = arn:aws:iam::123456789012:role/engines\nsource_profile = me\nregion = us-east-1\n"
        "[profile me]\naws_access_key_id = AKIAME\naws_secret_access_key = secret\n"
    )
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_PROFILE", "builder")
    monkeypatch.setenv("AWS_ENDPOINT_URL_STS", s3_environ)
    store, headers = open_store(s3_store_uri), []
    store._connection.meta.events.register("before-send.s3", lambda request, **_: headers.append(dict(request.headers)))
    store.write("a", b"1")
    assert store.read("a") == b"1"
    for sent in headers:  # with the role's own key and token, and not with those of who assumed it
        assert b"AKIAME" not in sent["Authorization"]
        assert sent["X-Amz-Security-Token"]


@pytest.mark.parametrize(("limit", "silence"), [(300.0, 60.0), (1800.0, 360.0), (0.1, 0.1)])
def test_a_connection_may_be_silent_for_a_fifth_of_the_limit(
    monkeypatch: pytest.MonkeyPatch, limit: float, silence: float
):
    """Time is left for other tries, and more of it for services that are silent while they copy."""
    monkeypatch.setenv("ENGINERY_S3_TIMEOUT", str(limit))
    config = S3Store("s3://bucket/prefix")._connection.meta.config
    assert (config.read_timeout, config.connect_timeout) == (silence, silence)
