"""Plans that builds leave in a store: what is put in is read, by many writers too; what is damaged is told and is none."""

from __future__ import annotations

import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from artifacts import fresh_plans
from artifacts.errors import IntegrityError
from artifacts.folder import FolderStore
from artifacts.fresh_plans import MAX_PLANS, SHARDS, FreshPlans, pack, unpack
from artifacts.refs import digest_bytes
from artifacts.s3 import S3Store
from artifacts.store import open_store
from tests.servers import careless_s3_server, s3_environment

NAMES = [digest_bytes(str(number).encode()) for number in range(200)]


def test_what_was_put_in_is_read(tmp_path: Path):
    plans = FreshPlans(FolderStore(tmp_path), "a")
    assert plans.read(NAMES) == {}
    plans.add({name: {"plan": name} for name in NAMES})
    plans.add({NAMES[0]: "later"})
    assert plans.read(NAMES[:50]) == {NAMES[0]: "later"} | {name: {"plan": name} for name in NAMES[1:50]}
    assert plans.read(["0" * 64]) == {}
    assert FreshPlans(FolderStore(tmp_path), "b").read(NAMES) == {}
    assert len(list((tmp_path / "cache" / "plans" / "a").iterdir())) <= SHARDS


@pytest.mark.parametrize("kind", ["folder", "s3"])
def test_of_many_writers_none_loses_its_plans(kind: str, tmp_path: Path, request: pytest.FixtureRequest):
    """Conditional writes: who was slower reads what the other has put in, and puts its own beside it."""
    uri = str(tmp_path) if kind == "folder" else request.getfixturevalue("s3_store_uri")
    together = [name for name in NAMES if int(name[:8], 16) % SHARDS in (1, 2)][:5]
    assert len(together) == 5

    def write(name: str) -> None:
        FreshPlans(open_store(uri), "a").add({name: 1})

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(write, together))
    assert set(FreshPlans(open_store(uri), "a").read(NAMES)) == set(together)


def test_a_service_without_conditional_writes_takes_plans_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "bucket").mkdir()
    with careless_s3_server(tmp_path) as endpoint:
        for name, value in s3_environment(endpoint).items():
            monkeypatch.setenv(name, value)
        plans = FreshPlans(S3Store("bucket"), "a")
        plans.add({NAMES[0]: 1})
        plans.add(dict.fromkeys(NAMES, 2))
        assert plans.read(NAMES) == dict.fromkeys(NAMES, 2)


def test_every_damage_is_told_and_harms_nothing(tmp_path: Path):
    said: list[str] = []
    plans = FreshPlans(FolderStore(tmp_path), "a", said.append)
    plans.add({NAMES[0]: {"a": [1]}})
    place = next(path for path in (tmp_path / "cache" / "plans").rglob("*") if path.is_file())
    whole = place.read_bytes()
    place.chmod(0o644)
    damages = [
        bytes([*whole[:at], whole[at] ^ 1 << bit, *whole[at + 1 :]]) for at in range(len(whole)) for bit in (0, 7)
    ]
    for count, data in enumerate([b"", whole[:-1], whole[:64], *damages], 1):
        place.write_bytes(data)
        assert plans.read([NAMES[0]]) == {}
        assert len(said) == count
    assert "cache/plans/a/" in said[0]
    plans.add({NAMES[0]: 2})
    assert plans.read([NAMES[0]]) == {NAMES[0]: 2}


def test_a_shard_keeps_the_newest(tmp_path: Path):
    plans = FreshPlans(FolderStore(tmp_path), "a")
    names = [f"{number * SHARDS:08x}{0:056x}" for number in range(MAX_PLANS + 1)]
    plans.add(dict.fromkeys(names[:MAX_PLANS], 1))
    plans.add({names[0]: 2, names[-1]: 2})
    assert set(plans.read(names)) == set(names) - {names[1]}


@pytest.mark.parametrize("text", [b"", b"{}", b"[]", b'{"schema": 1, "plans": []}', b"\x00"])
def test_what_is_no_shard_is_refused(text: bytes):
    data = zlib.compress(text)
    with pytest.raises(IntegrityError):
        unpack(digest_bytes(data).encode() + b"\n" + data)


def test_a_shard_has_no_more_than_can_be_read(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(fresh_plans, "_ROOM", 200)
    plans = {"a": "x" * 90, "b": "y" * 90, "c": "z" * 300, "d": "w" * 80}
    assert unpack(pack(plans)) == {"b": plans["b"], "d": plans["d"]}
