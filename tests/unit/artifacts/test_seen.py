"""What was seen of a channel is not shown again in an older state."""

from __future__ import annotations

import multiprocessing
from dataclasses import replace
from pathlib import Path

import pytest

from artifacts.channels import Channel, SignedMove, move_channel, read_channel
from artifacts.errors import StaleError, StoreError, TrustError
from artifacts.folder import FolderStore
from artifacts.seen import Seen, believed
from artifacts.store import Store

AT = ("digits", "t", "production")
FIELDS = {"action": "promote", "manifest": "0" * 64, "time": "2026-01-02T03:04:05Z", "by": "me"}


def move(store: Store, build: str) -> SignedMove:
    return move_channel(store, *AT, lambda _found: {**FIELDS, "build": build})


def test_later_moves_are_remembered_and_earlier_ones_refused(tmp_path: Path) -> None:
    store, seen = FolderStore(tmp_path / "store"), Seen(tmp_path / "state")
    first, second = move(store, "a"), move(store, "b")
    seen.check(store.uri, first)
    seen.check(store.uri, first)
    seen.check(store.uri, second)
    with pytest.raises(TrustError, match=r"shows move 1, and move 2 was seen here before"):
        seen.check(store.uri, first)
    # Another store, or another channel, is another matter.
    seen.check("s3://other", first)
    other = move_channel(store, *AT[:2], "staging", lambda _found: {**FIELDS, "build": "a"})
    seen.check(store.uri, other)
    seen.check(store.uri, move(store, "a"))


def test_what_another_process_saw_move_on_is_read_once_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENGINERY_STATE", str(tmp_path / "state"))
    store, looked = FolderStore(tmp_path / "store"), list[int]()
    move(store, "a")
    early = read_channel(store, *AT)
    # Between reading and looking, somebody moves it, and another process of this user sees that.
    Seen.of_this_user().check(store.uri, move(store, "b"))
    now = believed(store, early, lambda head: looked.append(head.move.sequence))
    assert (now.head.move.build, looked) == ("b", [1, 2])
    # What stays as it was is an old state.
    Seen.of_this_user().check(store.uri, replace(now.head, move=now.head.move.model_copy(update={"sequence": 3})))
    with pytest.raises(StaleError):
        believed(store, now, lambda _head: None)


def test_a_mover_begins_again_where_the_channel_moved_on_since_it_was_read(tmp_path: Path) -> None:
    store, shown = FolderStore(tmp_path / "store"), list[str | None]()
    move(store, "a")

    def decide(found: Channel | None) -> dict[str, str]:
        shown.append(found.head.move.build)
        if len(shown) == 1:
            move(store, "b")
        if found.head.move.build == "a":
            raise StaleError("move 2 was seen before")
        return {**FIELDS, "build": "c"}

    assert move_channel(store, *AT, decide).move.sequence == 3
    assert shown == ["a", "b"]
    shown.append("not the first")
    with pytest.raises(StaleError):
        move_channel(FolderStore(tmp_path / "other"), *AT, lambda _found: (_ for _ in ()).throw(StaleError("old")))


def test_two_histories_of_one_channel_are_not_both_believed(tmp_path: Path) -> None:
    seen = Seen(tmp_path / "state")
    seen.check("s3://store", move(FolderStore(tmp_path / "one"), "a"))
    with pytest.raises(TrustError, match="another state"):
        seen.check("s3://store", move(FolderStore(tmp_path / "two"), "b"))


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b'{"sequence": "9", "statement": 1}', b"[" * 100_000])
def test_a_damaged_memory_begins_anew(tmp_path: Path, damage: bytes) -> None:
    store, seen = FolderStore(tmp_path / "store"), Seen(tmp_path / "state")
    head = move(store, "a")
    seen.check(store.uri, head)
    (file,) = (tmp_path / "state" / "channels").glob("*.json")
    file.write_bytes(damage)
    seen.check(store.uri, head)
    with pytest.raises(TrustError):
        seen.check(store.uri, replace(head, statement=head.statement + b" "))


def test_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ENGINERY_STATE", raising=False)
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Seen.of_this_user().folder == tmp_path / ".local/state/enginery"
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "xdg"))
    assert Seen.of_this_user().folder == tmp_path / "xdg/enginery"
    monkeypatch.setenv("ENGINERY_STATE", str(tmp_path / "file"))
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StoreError, match="set ENGINERY_STATE to a folder"):
        Seen.of_this_user().check("s3://store", move(FolderStore(tmp_path / "store"), "a"))


def _look(folder: Path, store: str, heads: list[SignedMove]) -> None:
    for head in heads:
        try:
            Seen(folder).check(store, head)
        except TrustError:
            continue


def test_many_processes_remember_the_latest(tmp_path: Path) -> None:
    store = FolderStore(tmp_path / "store")
    for number in range(12):
        move(store, f"b{number}")
    channel: Channel = read_channel(store, *AT)
    context = multiprocessing.get_context("fork")
    workers = [
        context.Process(target=_look, args=(tmp_path / "state", store.uri, list(channel.moves[start::3])))
        for start in range(3)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    with pytest.raises(TrustError, match="move 12 was seen"):
        Seen(tmp_path / "state").check(store.uri, channel.moves[10])
