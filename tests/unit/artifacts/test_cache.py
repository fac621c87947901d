"""Blobs and records: a hit is whole or it is a miss, said aloud; of two builders the first one counts."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from artifacts.cache import ActionCache, blob_path, record_path
from artifacts.errors import IntegrityError, NotFoundError
from artifacts.keys import Action
from artifacts.records import ActionRecord
from artifacts.refs import BYTES, ArtifactRef, digest_bytes
from artifacts.store import Store, open_store

DATA = b"a graph"
REF = ArtifactRef(digest_bytes(DATA), len(DATA), BYTES)
ACTION = Action("export", 1, {"opset": 18})
PATH = record_path("export", ACTION.key)


@pytest.fixture(params=["folder", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    uri = str(tmp_path / "store") if request.param == "folder" else request.getfixturevalue("s3_store_uri")
    return open_store(uri)


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def cache(store: Store, said: list[str]) -> ActionCache:
    return ActionCache(store, warn=said.append)


@pytest.fixture
def put(cache: ActionCache, tmp_path: Path) -> Callable[[], ActionRecord]:
    """Store the blob and the record of ACTION, as a stage does."""

    def build(producer: str = "first") -> ActionRecord:
        source = tmp_path / f"made-by-{producer}"
        source.write_bytes(DATA)
        cache.put_blob(source, REF)
        return cache.put_record(ActionRecord(ACTION.preimage(), {"model.onnx": REF}, producer={"host": producer}))

    return build


def test_where_things_lie() -> None:
    assert blob_path("ab" + "c" * 62) == "cache/blobs/sha256/ab/ab" + "c" * 62
    assert record_path("export", "f" * 64) == f"cache/actions/export/{'f' * 64}.json"


def test_a_hit(cache: ActionCache, put: Callable[[], ActionRecord], said: list[str], tmp_path: Path) -> None:
    assert cache.lookup("export", ACTION.key) is None
    record = put()
    assert cache.lookup("export", ACTION.key) == record
    cache.get_blob(REF, tmp_path / "model.onnx")
    assert (tmp_path / "model.onnx").read_bytes() == DATA
    assert cache.lookup("simplify", ACTION.key) is None
    assert cache.lookup("export", "f" * 64) is None
    assert said == []


def test_a_hit_without_its_blob_is_a_miss(
    cache: ActionCache, put: Callable[[], ActionRecord], said: list[str], tmp_path: Path
) -> None:
    put()
    cache.store.delete(blob_path(REF.digest))
    assert cache.lookup("export", ACTION.key) is None
    assert said == [f"export {ACTION.key[:12]}: its output model.onnx ({REF.digest[:12]}) is gone; treated as a miss"]
    with pytest.raises(NotFoundError):
        cache.get_blob(REF, tmp_path / "model.onnx")
    put()
    assert cache.lookup("export", ACTION.key) is not None


def test_a_hit_whose_blob_was_cut_is_a_miss(
    cache: ActionCache, put: Callable[[], ActionRecord], said: list[str], tmp_path: Path
) -> None:
    put()
    cache.store.write(blob_path(REF.digest), DATA[:-1])
    assert cache.lookup("export", ACTION.key) is None
    assert said[0].endswith("has 6 bytes instead of 7; treated as a miss")
    put()
    cache.get_blob(REF, tmp_path / "model.onnx")
    assert cache.lookup("export", ACTION.key) is not None


def test_a_hit_whose_blob_has_a_flipped_bit_becomes_a_miss_when_it_is_read(
    cache: ActionCache, put: Callable[[], ActionRecord], said: list[str], tmp_path: Path
) -> None:
    put()
    cache.store.write(blob_path(REF.digest), bytes([DATA[0] ^ 1]) + DATA[1:])
    assert cache.lookup("export", ACTION.key) is not None  # a look-up reads no blob
    with pytest.raises(IntegrityError, match="removed it, so that the stage that made it runs again"):
        cache.get_blob(REF, tmp_path / "model.onnx")
    assert not (tmp_path / "model.onnx").exists()
    assert cache.lookup("export", ACTION.key) is None
    assert said[0].endswith("is gone; treated as a miss")
    put()
    cache.get_blob(REF, tmp_path / "model.onnx")
    assert (tmp_path / "model.onnx").read_bytes() == DATA


@pytest.mark.parametrize(
    "damage",
    [
        lambda _good: b"",
        lambda good: good[: len(good) // 2],
        lambda good: good.replace(b'"opset": 18', b'"opset": 19'),
        lambda good: good.replace(b'"schema": 1', b'"schema": 9'),
        lambda _good: b"\xff" * 100,
        lambda _good: ActionRecord(Action("export", 1, {"opset": 17}).preimage(), {}).to_bytes(),
        lambda _good: ActionRecord(Action("type", 1, {"opset": 18}).preimage(), {}).to_bytes(),
    ],
    ids=["empty", "cut", "flipped", "later schema", "noise", "another key", "another stage"],
)
def test_a_damaged_record_is_a_miss_and_is_replaced(
    cache: ActionCache, put: Callable[[str], ActionRecord], said: list[str], damage: Callable[[bytes], bytes]
) -> None:
    put("first")
    cache.store.write(PATH, damage(cache.store.read(PATH)))
    assert cache.lookup("export", ACTION.key) is None
    assert len(said) == 1
    assert said[0].startswith(PATH)
    assert said[0].endswith("treated as a miss")
    record = put("second")
    assert record.producer == {"host": "second"}
    assert cache.lookup("export", ACTION.key) == record
    assert len(said) == 1


def test_of_two_builders_the_first_record_counts(cache: ActionCache, put: Callable[[str], ActionRecord]) -> None:
    first = put("first")
    assert put("second") == first
    assert cache.lookup("export", ACTION.key) == first


def test_builders_at_once_agree(cache: ActionCache, store: Store) -> None:
    cache.store.write(PATH, b"damaged")  # so that both the new and the replaced record are raced for
    for path in (PATH, record_path("export", Action("export", 2).key)):
        action = ACTION if path == PATH else Action("export", 2)
        agreed: list[ActionRecord] = []
        start = threading.Barrier(6)

        def build(number: int, action: Action, start: threading.Barrier, agreed: list[ActionRecord]) -> None:
            start.wait()
            agreed.append(cache.put_record(ActionRecord(action.preimage(), {}, producer={"host": number})))

        threads = [threading.Thread(target=build, args=(number, action, start, agreed)) for number in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        kept = cache.lookup("export", action.key)
        # S3 has no lock: of those who replace a damaged record at once, the last one's stays.
        if path != PATH or store.uri.startswith("file://"):
            assert agreed == [kept] * 6
        assert kept in agreed


def test_put_blob_checks(cache: ActionCache, tmp_path: Path) -> None:
    (tmp_path / "other").write_bytes(DATA.upper())
    with pytest.raises(IntegrityError):
        cache.put_blob(tmp_path / "other", REF)
    assert cache.store.info(blob_path(REF.digest)) is None


def test_looking_up_creates_nothing(tmp_path: Path) -> None:
    assert ActionCache(open_store(str(tmp_path / "store"))).lookup("export", ACTION.key) is None
    assert list(tmp_path.iterdir()) == []
