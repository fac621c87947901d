"""The list of plans that may be refitted: what they have in common, and that it survives many writers and damage."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from artifacts.folder import FolderStore
from artifacts.refits import Base, RefitIndex, refit_identity
from artifacts.refs import digest_bytes

IDENTITY = digest_bytes(b"identity")
COMPILATION = {
    "stage": "compile",
    "stage_version": 1,
    "params": {"gpu": "sm90", "refit": "weights"},
    "inputs": {"model.onnx": digest_bytes(b"graph"), "calibration.cache": digest_bytes(b"ranges")},
    "toolchain": {"tensorrt": "8.6.0", "driver": "570"},
}


def key(number: int) -> str:
    return digest_bytes(b"%d" % number)


@pytest.fixture
def index(tmp_path: Path) -> RefitIndex:
    return RefitIndex(FolderStore(tmp_path))


def test_only_the_graph_and_what_speeds_compiling_up_may_differ():
    expected = refit_identity(COMPILATION, "structure")
    inputs = COMPILATION["inputs"]
    for name in ("model.onnx", "model.onnx.data", "timing.cache"):
        assert refit_identity({**COMPILATION, "inputs": {**inputs, name: key(7)}}, "structure") == expected
    for changed in (
        {**COMPILATION, "inputs": {**inputs, "calibration.cache": key(7)}},
        {**COMPILATION, "inputs": {**inputs, "plugin.so": key(7)}},
        {**COMPILATION, "params": {"gpu": "sm90", "refit": "stripped"}},
        {**COMPILATION, "toolchain": {"tensorrt": "8.6.1", "driver": "570"}},
        {**COMPILATION, "stage_version": 2},
    ):
        assert refit_identity(changed, "structure") != expected
    assert refit_identity(COMPILATION, "another") != expected


def test_the_newest_comes_first_and_is_listed_once(index: RefitIndex):
    assert index.bases(IDENTITY) == ()
    for number in (1, 2, 1):
        index.add(IDENTITY, Base(key(number)))
    assert index.bases(IDENTITY) == (Base(key(2)), Base(key(1)))


def test_an_engine_is_noted_when_it_is_published_and_its_first_name_stays(index: RefitIndex):
    for base in (Base(key(1)), Base(key(1), "digits/a/fp16-1"), Base(key(1), "digits/a/fp16-2"), Base(key(1))):
        index.add(IDENTITY, base)
    assert index.bases(IDENTITY) == (Base(key(1), "digits/a/fp16-1"),)


def test_a_list_stays_short(index: RefitIndex):
    for number in range(20):
        index.add(IDENTITY, Base(key(number)))
    assert [base.key for base in index.bases(IDENTITY)] == [key(number) for number in range(19, 11, -1)]


def test_of_many_writers_none_is_lost(index: RefitIndex):
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: index.add(IDENTITY, Base(key(number))), range(8)))
    assert {base.key for base in index.bases(IDENTITY)} == {key(number) for number in range(8)}


@pytest.mark.parametrize(
    "damage",
    [b"", b"{", b"[]", b'{"schema": 2, "bases": []}', b'{"schema": 1}', b'{"schema": 1, "bases": [{"key": "a", "engine": 1}]}'],
)  # fmt: skip
def test_a_damaged_list_offers_nothing_and_is_written_anew(index: RefitIndex, damage: bytes):
    index.store.write(f"cache/refit/{IDENTITY}.json", damage)
    assert index.bases(IDENTITY) == ()
    index.add(IDENTITY, Base(key(1)))
    assert index.bases(IDENTITY) == (Base(key(1)),)
