"""S3 as it is met: a mirror that is killed in the middle of an upload, uploads that nobody completes, a public store."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from artifacts.cache import blob_path
from artifacts.catalog import EngineCatalog
from artifacts.refs import digest_bytes, digest_file
from artifacts.s3_multipart import PART_BYTES
from artifacts.store import open_store
from tests.conftest import BUCKET
from tests.engines import make_engine
from tests.integration.building import enginery, environment
from tests.servers import Faults

pytestmark = pytest.mark.slow


@pytest.fixture
def s3(s3_store_uri: str) -> Iterator[Any]:
    """A client of the server."""
    import boto3

    client = boto3.session.Session().client("s3")
    yield client
    client.close()


@pytest.mark.long
def test_a_mirror_killed_in_an_upload_sends_what_is_missing_and_gc_ends_what_nobody_completes(
    tmp_path: Path, s3_store_uri: str, s3: Any, faults: Faults
):
    folder, plan = open_store(str(tmp_path / "store")), random.Random(4).randbytes(3 * PART_BYTES + 5)
    EngineCatalog(folder).publish(make_engine(folder, tmp_path, plan, recipe="digits", target="t", build="a"))
    key = f"{s3_store_uri.removeprefix(f's3://{BUCKET}/')}/{blob_path(digest_bytes(plan))}"
    faults.delays = {"partNumber=3": 600}  # it is stored, and whoever sent it is not told
    command = [sys.executable, "-m", "enginery", "mirror", folder.uri, s3_store_uri]
    with subprocess.Popen(command, cwd=tmp_path, env=environment()) as mirror:
        until = time.monotonic() + 240
        while not faults.delayed and time.monotonic() < until:
            time.sleep(0.02)
        assert mirror.poll() is None
        mirror.kill()
    (upload,) = s3.list_multipart_uploads(Bucket=BUCKET, Prefix=key)["Uploads"]
    parts = s3.list_parts(Bucket=BUCKET, Key=key, UploadId=upload["UploadId"])["Parts"]
    there = {part["PartNumber"] for part in parts}
    assert 3 in there
    assert there & {1, 2}
    assert not list(open_store(s3_store_uri).list("engines/"))

    faults.delays, faults.requests[:] = {}, []
    done = enginery(*command[3:], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    sent = {int(match[1]) for line in faults.requests if (match := re.search(r"partNumber=(\d+)", line))}
    assert sent == {1, 2, 3, 4} - there
    # The engine's own file is a copy that the server makes: else its parts would be among them.
    assert [line for line in faults.requests if line.startswith("PUT") and line.endswith("/model.plan")]
    left = s3.create_multipart_upload(Bucket=BUCKET, Key=f"{key}-left")["UploadId"]
    collected = enginery("gc", "--store", s3_store_uri, cwd=tmp_path)
    assert "aborted 1 uploads" in collected.stderr, collected.stderr  # moto says of every one that it was begun in 2010
    assert left not in {upload["UploadId"] for upload in s3.list_multipart_uploads(Bucket=BUCKET).get("Uploads", [])}
    assert EngineCatalog(open_store(s3_store_uri)).engines("digits")


def test_a_public_store_is_read_without_credentials(
    tmp_path: Path, s3_store_uri: str, s3: Any, monkeypatch: pytest.MonkeyPatch
):
    store = open_store(s3_store_uri)
    manifest = make_engine(store, tmp_path, b"plan", recipe="digits", target="t", build="a")
    EngineCatalog(store).publish(manifest)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    anonymous = {"ENGINERY_S3_ANONYMOUS": "1"}
    compatibility = manifest.compatibility
    host = [
        "--gpu", compatibility.gpus[0], "--runtime", f"{compatibility.runtime}=={compatibility.runtime_version}",
        "--store", s3_store_uri, "--json",
    ]  # fmt: skip
    refused = enginery("resolve", "digits", *host, cwd=tmp_path, env=anonymous)
    assert refused.returncode
    assert "access denied" in refused.stderr
    prefix = s3_store_uri.removeprefix(f"s3://{BUCKET}/")
    s3.put_bucket_policy(Bucket=BUCKET, Policy=_public(prefix))
    try:
        found = enginery("resolve", "digits", *host, cwd=tmp_path, env=anonymous)
        assert found.returncode == 0, found.stderr
        assert json.loads(found.stdout)["best"]["engine"] == "digits/t/a"
        pulled = enginery("pull", "digits", *host, "--to", "engines", cwd=tmp_path, env=anonymous)
        assert pulled.returncode == 0, pulled.stderr
    finally:
        s3.delete_bucket_policy(Bucket=BUCKET)
    assert digest_file(tmp_path / "engines" / "digits" / "t" / "a" / "model.plan") == digest_bytes(b"plan")


def _public(prefix: str) -> str:
    anyone = {"Effect": "Allow", "Principal": "*"}
    objects = {**anyone, "Action": ["s3:GetObject"], "Resource": f"arn:aws:s3:::{BUCKET}/{prefix}/*"}
    listing = {**anyone, "Action": ["s3:ListBucket"], "Resource": f"arn:aws:s3:::{BUCKET}"}
    return json.dumps({"Version": "2012-10-17", "Statement": [objects, listing]})
