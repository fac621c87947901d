"""References name bytes, in one spelling only."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from artifacts.errors import IntegrityError
from artifacts.refs import CHUNK_BYTES, ArtifactRef, digest_bytes, digest_file, is_digest, require_match

EMPTY = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"  # FIPS 180-4, of no bytes


def test_digest_is_sha256() -> None:
    assert digest_bytes(b"") == EMPTY
    assert is_digest(EMPTY)


@pytest.mark.parametrize("size", [0, 1, CHUNK_BYTES - 1, CHUNK_BYTES, 2 * CHUNK_BYTES + 1])
def test_digest_file_reads_all_of_it(tmp_path: Path, size: int) -> None:
    data = bytes(range(256)) * (size // 256) + b"x" * (size % 256)
    (tmp_path / "file").write_bytes(data)
    assert digest_file(tmp_path / "file") == hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize(
    "text", [EMPTY.upper(), EMPTY[:-1], EMPTY + "0", EMPTY + "\n", " " + EMPTY[1:], "", None, 5, b"a" * 64]
)
def test_what_is_no_digest(text: object) -> None:
    assert not is_digest(text)
    with pytest.raises(IntegrityError, match="not a SHA-256 digest"):
        ArtifactRef(text, 0, "text/plain")


@pytest.mark.parametrize("size", [-1, 1.0, "1", True, None])
def test_what_is_no_size(size: object) -> None:
    with pytest.raises(IntegrityError, match="size must be a number of bytes"):
        ArtifactRef(EMPTY, size, "text/plain")


@given(st.binary(max_size=20), st.text())
def test_json_round_trip(data: bytes, media_type: str) -> None:
    ref = ArtifactRef(digest_bytes(data), len(data), media_type)
    assert ArtifactRef.from_json(ref.to_json()) == ref


@pytest.mark.parametrize(
    "value",
    [
        None, [], "x", {}, {"digest": EMPTY, "size": 0}, {"digest": EMPTY, "size": 0, "media_type": "x", "more": 1},
        {"digest": EMPTY, "size": 0, "media_type": None}, {"digest": 1, "size": 0, "media_type": "x"},
        {"digest": EMPTY, "size": "0", "media_type": "x"}, {"digest": "x", "size": 0, "media_type": "x"},
    ],
)  # fmt: skip
def test_from_json_refuses(value: object) -> None:
    with pytest.raises(IntegrityError):
        ArtifactRef.from_json(value)


def test_require_match() -> None:
    ref = ArtifactRef(EMPTY, 0, "text/plain")
    require_match("it", ref, EMPTY, 0)
    with pytest.raises(IntegrityError, match="it: 1 bytes, expected 0"):
        require_match("it", ref, EMPTY, 1)
    with pytest.raises(IntegrityError, match="it: its SHA-256 is ffffffffffff, expected e3b0c44298fc"):
        require_match("it", ref, "f" * 64, 0)
