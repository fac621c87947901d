"""Secrets are planted in everything that a build is told, and searched for in everything that it leaves."""

from __future__ import annotations

import base64
import sqlite3
import subprocess
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import pytest

from artifacts.store import open_store
from bench.faults.recipe import write_tiny
from tests.integration.building import enginery
from tests.keys import make_key
from tests.servers import bad_network

pytestmark = pytest.mark.slow

ENDPOINT_USER, ENDPOINT_PASSWORD, PIN = "planted-endpoint-user", "planted-endpoint-word", "planted-token-pin"
PLANTED = {
    "AWS_ACCESS_KEY_ID": "AKIAPLANTEDKEYIDENT0",
    "AWS_SECRET_ACCESS_KEY": "planted/secret+access0key9",
    "AWS_SESSION_TOKEN": "planted-session-token/with+signs==",
    "ENGINERY_SIGN_PASSWORD": "planted-key-password",
}


@dataclass(frozen=True)
class Planted:
    """A folder with a recipe and a key, the environment that names the secrets, and the secrets themselves."""

    folder: Path
    key: Path
    env: dict[str, str]
    secrets: dict[str, bytes]

    def run(self, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
        """Run the command, and find no secret in what it says."""
        done = enginery(*arguments, cwd=self.folder, env=self.env | env)
        said = f"{done.stdout}\n{done.stderr}"
        assert self.found([("the output", said.encode())]) == [], said
        return done

    def found(self, places: Iterator[tuple[str, bytes]] | list[tuple[str, bytes]]) -> list[tuple[str, str]]:
        """Return where a secret lies, as it is or within base64."""
        spelled = [(name, form) for name, secret in self.secrets.items() for form in (secret, *_base64(secret))]
        return [(place, name) for place, data in places for name, form in spelled if form in data]

    def left(self) -> Iterator[tuple[str, bytes]]:
        """Yield every file below the folder but the key, and what Prefect's database says in rows."""
        for path in self.folder.rglob("*"):
            if path.is_file() and path != self.key:
                yield str(path), path.read_bytes()
        with closing(sqlite3.connect(self.folder / "prefect" / "prefect.db")) as database:
            yield "Prefect's database", "\n".join(database.iterdump()).encode()


@pytest.fixture
def planted(tmp_path: Path, s3_environ: str) -> Planted:
    pytest.importorskip("model_signing", reason="model-signing is not installed (pip install 'enginery[sign]')")
    write_tiny(tmp_path)
    key = make_key(tmp_path, "planted-key-file", password=PLANTED["ENGINERY_SIGN_PASSWORD"].encode())
    (tmp_path / "tmp").mkdir()
    env = {
        **PLANTED,
        "AWS_ENDPOINT_URL_S3": _with_user(s3_environ),
        "AWS_MAX_ATTEMPTS": "1",
        "ENGINERY_SIGN_KEY": str(key.private),
        "ENGINERY_STATE": str(tmp_path / "state"),
        "PREFECT_HOME": str(tmp_path / "prefect"),
        "PREFECT_LOGGING_LEVEL": "DEBUG",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "TMPDIR": str(tmp_path / "tmp"),
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
    }
    secrets = {name: value.encode() for name, value in PLANTED.items()}
    secrets |= {"endpoint's user": ENDPOINT_USER.encode(), "endpoint's password": ENDPOINT_PASSWORD.encode()}
    secrets |= {"PIN": PIN.encode(), "key file's path": key.private.name.encode()}
    lines = key.private.read_bytes().splitlines()
    secrets |= {f"key file's line {number}": line for number, line in enumerate(lines[1:-2])}
    return Planted(tmp_path, key.private, env, secrets)


def test_no_secret_is_said_or_kept(planted: Planted, s3_store_uri: str, s3_environ: str):
    """A build, its repetition, and builds that fail: at once, at S3 within a stage, and at the token that signs."""
    build = ("build", "tiny.yaml", "--store", s3_store_uri)

    token = planted.run(*build, ENGINERY_SIGN_KEY=f"pkcs11:object=planted?pin-value={PIN}")
    assert (token.returncode, "the signing key cannot be used" in token.stderr) == (1, True), token.stderr
    with bad_network(s3_environ) as (address, faults):
        faults.refused["/engines/"] = (501, "NotImplemented")
        stage = planted.run(*build, AWS_ENDPOINT_URL_S3=_with_user(address))
    assert stage.returncode == 1
    assert f"{address} does not offer this" in stage.stderr
    unreachable = planted.run(*build, AWS_ENDPOINT_URL_S3=_with_user("http://127.0.0.1:9"))
    assert unreachable.returncode != 0
    assert "cannot reach http://127.0.0.1:9" in unreachable.stderr
    nonsense = planted.run(*build, AWS_ENDPOINT_URL_S3=_with_user("http://bad host"))
    assert "check AWS_ENDPOINT_URL_S3" in nonsense.stderr

    done = planted.run(*build)
    assert done.returncode == 0, done.stderr
    again = planted.run(*build, "--json")
    assert '"state": "cached"' in again.stdout

    store = open_store(s3_store_uri)
    kept = [(info.path, store.read(info.path)) for info in store.list("")]
    names = [path for path, _data in kept]
    for part in ("/manifest.json", "/signatures/", "cache/actions/", "cache/blobs/"):
        assert any(part in path for path in names), (part, names)
    left = list(planted.left())
    assert planted.found(kept) == []
    assert planted.found(left) == []
    # The search does find: what was built is named in Prefect's database, which the failures reached, too.
    assert b"publish:onnxruntime:cpu:fp32" in left[-1][1]
    assert b"does not offer this" in left[-1][1]


def test_the_search_finds(planted: Planted):
    secret = PLANTED["AWS_SESSION_TOKEN"].encode()
    for lead in (b"", b"x", b"xy"):
        said = base64.b64encode(lead + secret + b"and more")
        assert planted.found([("here", said)]) == [("here", "AWS_SESSION_TOKEN")]
    (planted.folder / "tmp" / "log").write_bytes(b"of " + secret)
    (planted.folder / "prefect").mkdir()
    assert [name for _place, name in planted.found(planted.left())] == ["AWS_SESSION_TOKEN"]


def _with_user(endpoint: str) -> str:
    return endpoint.replace("://", f"://{ENDPOINT_USER}:{ENDPOINT_PASSWORD}@")


def _base64(secret: bytes) -> list[bytes]:
    """Return what base64 makes of it wherever it begins, less the ends that depend on what is beside it."""
    spelled = [base64.b64encode(bytes(shift) + secret)[4 if shift else 0 :] for shift in range(3)]
    return [text[: (len(text) // 4 - 1) * 4] for text in spelled]
