from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from artifacts.errors import IntegrityError
from artifacts.folder import FolderStore
from artifacts.host import Gpu, Host
from artifacts.hosts import Change, HostRecord, change_host, changes, host_ages, read_host, see_host, seen_path

L4 = Gpu("L4", "GPU-1", "sm89", 24 << 30, 58, ecc=True)
H100 = Gpu("H100", "GPU-2", "sm90", 80 << 30, 132)
BOX = Host(
    "box", "linux", "x86_64", "570.1", "12.8", (L4,), {"tensorrt-rtx": "1.6.0", "onnxruntime": "1.31.1"}, "a cpu"
)
PATH = "hosts/box.json"

hosts = st.builds(
    Host,
    st.just("box"),
    st.just("linux"),
    st.just("x86_64"),
    st.sampled_from([None, "570.1", "580.2"]),
    st.sampled_from([None, "12.8", "13.0"]),
    st.sampled_from([(), (L4,), (H100,), (L4, H100), (replace(L4, ecc=False),)]),
    st.dictionaries(st.sampled_from(["tensorrt", "tensorrt-rtx"]), st.sampled_from(["1", "2"])),
    st.sampled_from(["a cpu", "another"]),
)


@pytest.mark.parametrize(
    ("new", "told"),
    [
        (replace(BOX, cpu="fewer threads"), []),
        (replace(BOX, driver="580.2"), ["driver 570.1 -> 580.2"]),
        (
            replace(BOX, runtimes={"tensorrt-rtx": "1.7.1"}),
            ["onnxruntime 1.31.1 -> none", "tensorrt-rtx 1.6.0 -> 1.7.1"],
        ),
        (replace(BOX, gpus=(H100,)), ["gpu L4 sm89 GPU-1 -> H100 sm90 GPU-2"]),
        (replace(BOX, gpus=(H100, L4)), ["gpu none -> H100 sm90 GPU-2"]),
        (replace(BOX, gpus=()), ["gpu L4 sm89 GPU-1 -> none"]),
        (replace(BOX, gpus=(replace(L4, ecc=False),)), ["gpu L4 sm89 GPU-1 (ecc True) -> L4 sm89 GPU-1 (ecc False)"]),
    ],
)
def test_what_changed_is_told(new, told):
    assert [str(change) for change in changes(BOX, new)] == told


@given(st.lists(hosts, min_size=1, max_size=6))
def test_a_record_keeps_every_change_and_forgets_nothing_that_was_there(looks):
    record = HostRecord(looks[0])
    for index, (before, now) in enumerate(pairwise(looks)):
        count = len(record.history)
        record = record.seen(now, str(index))
        assert (len(record.history) > count) == bool(changes(before, now))
        assert not changes(record.host, now)
        # What was seen at any time is known until something else takes its place.
        assert record.known.driver == next((one.driver for one in reversed(looks[: index + 2]) if one.driver), None)
        assert record.known.gpus == next((one.gpus for one in reversed(looks[: index + 2]) if one.gpus), ())
        assert set(record.known.runtimes) == {name for one in looks[: index + 2] for name in one.runtimes}
    assert HostRecord.from_json(record.to_json()) == record


def test_an_upgrade_that_is_seen_half_way_is_a_change_from_the_old_version():
    away = replace(BOX, runtimes={"onnxruntime": "1.31.1"})
    new = replace(BOX, runtimes={"onnxruntime": "1.31.1", "tensorrt-rtx": "1.7.1"})
    record = HostRecord(BOX).seen(away, "1").seen(new, "2")
    first, second = record.pending
    assert [first.changes, second.changes] == [
        (Change("tensorrt-rtx", "1.6.0", None),),
        (Change("tensorrt-rtx", None, "1.7.1"),),
    ]
    assert second.before.runtimes["tensorrt-rtx"] == "1.6.0"
    settled = record.settled({first.id: None, second.id: "a"})
    assert (settled.pending, settled.open, settled.finished("a").open) == ((), ("a",), ())


def test_records_are_kept_in_a_store_with_when_they_were_seen(tmp_path):
    store = FolderStore(tmp_path)
    assert see_host(store, PATH, BOX, "t0").history == ()
    again = see_host(store, PATH, replace(BOX, driver="580.2"), "t1")
    assert [drift.time for drift in again.history] == ["t1"]
    assert read_host(store, PATH)[0] == again
    store.write("hosts/other.json", b"x")
    assert host_ages(store, PATH)[PATH] == 0.0
    (tmp_path / seen_path(PATH)).unlink()
    assert set(host_ages(store)) == {PATH, "hosts/other.json"}


def test_two_who_change_a_record_both_count(tmp_path):
    store = FolderStore(tmp_path)
    see_host(store, PATH, BOX, "t0")
    raced = []

    def change(found):
        if not raced:
            raced.append(see_host(store, PATH, replace(BOX, driver="580.2"), "t1"))
        return found.settled({0: "mine"})

    record = change_host(store, PATH, change)
    assert (record.host.driver, record.open) == ("580.2", ("mine",))


def test_what_an_earlier_release_wrote_is_read_and_what_is_damaged_is_named(tmp_path):
    store = FolderStore(tmp_path)
    assert HostRecord.from_json({"schema": 1, **BOX.to_json()}) == HostRecord(BOX)
    for data in (b"{}", b"[]", b'{"schema": 2}', b'{"schema": 1, "name": "a"}'):
        store.write(PATH, data)
        with pytest.raises(IntegrityError, match=r"hosts/box\.json: not a host's record"):
            read_host(store, PATH)


@pytest.mark.parametrize(
    ("right", "wrong"), [(b"1.6.0", b"1.6.1"), (b'"arch": "x', b'"arch": "y'), (b'"open": []', b'"open": ["a"]')]
)
def test_a_part_that_was_changed_is_told(tmp_path, right, wrong):
    store = FolderStore(tmp_path)
    see_host(store, PATH, BOX, "t0")
    data = store.read(PATH)
    assert right in data
    store.write(PATH, data.replace(right, wrong, 1))
    with pytest.raises(IntegrityError, match=r"not what was written.*; remove it"):
        read_host(store, PATH)
