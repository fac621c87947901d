"""Which address opens which store."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from artifacts.errors import StoreError
from artifacts.folder import FolderStore
from artifacts.s3 import S3Store
from artifacts.store import check_path, is_relative_path, open_store


def test_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/someone")
    for uri, root in {
        "/a/b c/é": "/a/b c/é",
        "file:///a/b%20c": "/a/b%20c",
        "relative": f"{tmp_path}/relative",
        ".enginery": f"{tmp_path}/.enginery",
        "~/store": "/home/someone/store",
        "file:///~/store": "/~/store",
    }.items():
        store = open_store(uri)
        assert isinstance(store, FolderStore)
        assert str(store.root) == root
        assert open_store(store.uri).uri == store.uri == f"file://{root}"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        ("", "empty"),
        ("http://x/y", r"unknown kind of store 'http' \(allowed: a folder, file:///folder, s3://bucket\)"),
        ("S3://bucket", "unknown kind of store 'S3'"),
        ("://x", "unknown kind of store ''"),
        ("file://relative", "needs an absolute path"),
        ("file://", "needs an absolute path"),
        ("~no-such-user-here/x", "write the whole path"),
    ],
)
def test_addresses_that_are_none(uri: str, said: str) -> None:
    with pytest.raises(StoreError, match=said):
        open_store(uri)


def test_s3() -> None:
    for uri, bucket, prefix in (
        ("s3://bucket", "bucket", ""),
        ("s3://bucket/", "bucket", ""),
        ("s3://my.bucket-1/a/b/", "my.bucket-1", "a/b"),
    ):
        store = open_store(uri)
        assert isinstance(store, S3Store)
        assert (store.bucket, store.prefix) == (bucket, prefix)


@given(
    st.text(max_size=12)
    | st.lists(st.sampled_from(["a", "..", ".", "", "/", "\\", "\0", "é"]), max_size=6).map("/".join)
)
def test_no_path_leads_out(path: str) -> None:
    if is_relative_path(path):
        # Compared as text: pathlib drops "." and doubled slashes, which S3 would keep.
        assert str(Path("/root", path)) == f"/root/{path}"
        assert ".." not in Path(path).parts
        path.encode()
    else:
        with pytest.raises(StoreError, match="not an object path"):
            check_path(path)
