"""The memory of digests: a help for large files, never trusted when it could be wrong, and never fatal."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from recipes.digests import MAX_ENTRIES, REMEMBERED_BYTES, Digests, cache_path
from tests.unit.recipes.recipe_text import sha256

LARGE = b"x" * REMEMBERED_BYTES


@pytest.fixture
def large(tmp_path):
    """A large file that last changed a while ago (its inode's time cannot be set back: it is waited for)."""
    path = tmp_path / "large.bin"
    path.write_bytes(LARGE)
    os.utime(path, ns=(0, time.time_ns() - 10_000_000_000))
    return path


def settled(path: Path) -> None:
    while time.time_ns() - path.stat().st_ctime_ns < 2_050_000_000:
        time.sleep(0.05)


def test_a_large_file_is_digested_once(tmp_path, large):
    settled(large)
    memory = tmp_path / "deep/digests.json"
    first = Digests(memory)
    assert first.file(large) == sha256(LARGE)
    assert first.hashed == REMEMBERED_BYTES
    first.save()
    again = Digests(memory)
    assert again.file(large) == sha256(LARGE)
    assert again.hashed == 0
    assert [path.name for path in memory.parent.iterdir()] == ["digests.json"]

    # Other bytes of the same size, with the old time of change set back: the inode's own time tells.
    stat = large.stat()
    large.write_bytes(b"y" * REMEMBERED_BYTES)
    os.utime(large, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert Digests(memory).file(large) == sha256(b"y" * REMEMBERED_BYTES)


def test_a_file_that_changed_just_now_is_not_remembered(tmp_path, large):
    large.write_bytes(LARGE)
    digests = Digests(tmp_path / "digests.json")
    digests.file(large)
    digests.save()
    assert not (tmp_path / "digests.json").exists()


def test_small_files_are_always_read(tmp_path):
    path = tmp_path / "small"
    path.write_bytes(b"small")
    digests = Digests(tmp_path / "digests.json")
    assert digests.file(path) == digests.file(path) == sha256(b"small")
    assert digests.hashed == 10


def test_a_large_folder_is_digested_once(tmp_path):
    named = []
    for index in range(3):
        path = tmp_path / f"{index}.npy"
        path.write_bytes(bytes([index]) * (REMEMBERED_BYTES // 2))
        named.append((path.name, path))
    settled(named[-1][1])
    digests = Digests(tmp_path / "digests.json")
    expected = sha256("".join(f"{sha256(path.read_bytes())}  {name}\n" for name, path in named).encode())
    assert digests.files(named[::-1]) == expected
    digests.save()
    again = Digests(tmp_path / "digests.json")
    assert again.files(named) == expected
    assert again.hashed == 0
    named[0][1].write_bytes(b"z" * (REMEMBERED_BYTES // 2))
    assert again.files(named) != expected


@pytest.mark.parametrize(
    "content",
    [b"", b"not json", b"[]", b'{"layout": 2, "known": {}}', b'{"layout": 1}', b'{"layout": 1, "known": {"file x": 3}}', b"[" * 100_000],
)  # fmt: skip
def test_a_damaged_memory_is_no_memory(tmp_path, content):
    memory = tmp_path / "digests.json"
    memory.write_bytes(content)
    digests = Digests(memory)
    assert digests.noted("onnx", "a" * 64) is None
    digests.note("onnx", "a" * 64, "[]")
    digests.save()
    assert Digests(memory).noted("onnx", "a" * 64) == "[]"


def test_a_remembered_value_that_is_no_digest_is_not_used(tmp_path, large):
    settled(large)
    memory = tmp_path / "digests.json"
    digests = Digests(memory)
    digests.file(large)
    digests.save()
    document = json.loads(memory.read_text())
    memory.write_text(json.dumps({"layout": 1, "known": dict.fromkeys(document["known"], "nonsense")}))
    assert Digests(memory).file(large) == sha256(LARGE)


def test_a_memory_that_cannot_be_written_is_done_without(tmp_path):
    (tmp_path / "file").write_text("in the way")
    for path in (tmp_path / "file/digests.json", None):
        digests = Digests(path)
        digests.note("onnx", "a" * 64, "[]")
        digests.save()
        assert digests.noted("onnx", "a" * 64) == "[]"


def test_the_memory_is_bounded(tmp_path):
    digests = Digests(tmp_path / "digests.json")
    for index in range(MAX_ENTRIES + 5):
        digests.note("onnx", str(index), "[]")
    digests.save()
    kept = Digests(tmp_path / "digests.json")
    assert kept.noted("onnx", "4") is None
    assert kept.noted("onnx", "5") == "[]"


def test_where_the_memory_is(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_path() == tmp_path / "enginery/digests.json"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # the XDG specification: such a path is ignored
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_path() == tmp_path / "home/.cache/enginery/digests.json"
