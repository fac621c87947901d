"""Channels: what they name, their whole history, and documents that are none."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from artifacts.channels import (
    Channel,
    channel_path,
    channels_of,
    check_name,
    move_channel,
    read_channel,
)
from artifacts.errors import ChannelError, IntegrityError, StoreError
from artifacts.folder import FolderStore
from artifacts.keys import canonical_json
from artifacts.refs import digest_bytes
from artifacts.store import Store

AT = ("digits", "t", "production")
PATH = "channels/digits/t/production.json"


@pytest.fixture
def store(tmp_path: Path) -> FolderStore:
    return FolderStore(tmp_path / "store")


def promoted(build: str, **more: Any) -> dict[str, Any]:
    return {
        "action": "promote",
        "build": build,
        "manifest": digest_bytes(build.encode()),
        "time": "2026-01-02T03:04:05Z",
        "by": "me",
        **more,
    }


def move(store: Store, build: str, **more: Any) -> None:
    move_channel(store, *AT, lambda _found: promoted(build, **more))


def back(store: Store) -> str | None:
    """Roll back, and return the build that the channel names then; None where there is nothing to go back to."""
    goal = read_channel(store, *AT).before()
    if goal is None:
        return None
    move(store, goal.build, action="rollback", restores=goal.sequence)
    return read_channel(store, *AT).head.move.build


def test_moves_are_kept_in_a_chain(store: FolderStore) -> None:
    assert read_channel(store, *AT) is None
    assert list(channels_of(store, "digits")) == []
    signed = move_channel(
        store, *AT, lambda found: promoted("a", reason="first") if found is None else None, lambda text, _name: text
    )
    move(store, "b")
    found = read_channel(store, *AT)
    assert [(one.move.sequence, one.move.build) for one in found.moves] == [(1, "a"), (2, "b")]
    assert found.head.move.previous == digest_bytes(found.moves[0].statement)
    assert found.moves[0] == signed
    # A signature is over the statement alone, in its canonical spelling.
    assert json.loads(signed.statement)["build"] == "a"
    assert signed.signature == signed.statement == canonical_json(json.loads(signed.statement))
    assert move_channel(store, *AT, lambda _found: None) is None
    assert read_channel(store, *AT) == found


def test_what_is_checked_before_it_is_written_is_what_would_be(store: FolderStore) -> None:
    def refuse(signed: Any) -> None:
        assert (signed.move.sequence, signed.move.at) == (1, AT)
        raise ChannelError("no")

    with pytest.raises(ChannelError):
        move_channel(store, *AT, lambda _found: promoted("a"), check=refuse)
    assert store.info(PATH) is None


def test_channels_of_a_recipe_by_name(store: FolderStore) -> None:
    for at in (
        ("digits", "t", "production"),
        ("digits", "u", "production"),
        ("digits", "t", "staging"),
        ("swin", "t", "x"),
    ):
        move_channel(store, *at, lambda _found: promoted("a"))
    store.write("channels/digits/t/notes.txt", b"not a channel")
    assert [found.head.move.at for found in channels_of(store, "digits", "production")] == [
        ("digits", "t", "production"),
        ("digits", "u", "production"),
    ]
    assert len(list(channels_of(store, "digits"))) == 3


def test_rollbacks_go_further_back_each_time(store: FolderStore) -> None:
    for build in ("a", "b", "b", "c"):
        move(store, build)
    assert back(store) == "b"
    assert back(store) == "a"
    assert back(store) is None
    # A promotion begins anew from where the channel is.
    move(store, "d")
    assert back(store) == "c"
    assert [one.move.sequence for one in read_channel(store, *AT).moves] == list(range(1, 9))


@settings(max_examples=20)
@given(st.lists(st.sampled_from(["a", "b", "c", None]), max_size=10))
def test_a_rollback_never_stays_and_never_invents(steps: list[str | None]) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        store = FolderStore(Path(folder))
        promoted_builds = set()
        for step in steps:
            found = read_channel(store, *AT)
            if step is not None:
                move(store, step)
                promoted_builds.add(step)
            elif found is not None:
                before, after = found.head.move.build, back(store)
                assert after is None or (after != before and after in promoted_builds)


def test_version_1_is_read_and_moved_on(store: FolderStore) -> None:
    store.write(PATH, b'{"schema": 1, "build": "fp16-a"}')
    found = read_channel(store, *AT)
    assert (found.head.move.build, found.head.move.action, found.head.signature) == ("fp16-a", "adopted", None)
    move(store, "fp16-b")
    again = read_channel(store, *AT)
    assert [(one.move.sequence, one.move.build) for one in again.moves] == [(1, "fp16-a"), (2, "fp16-b")]
    assert again.before().build == "fp16-a"
    assert json.loads(store.read(PATH))["schema"] == 2


def _drop(document: dict[str, Any]) -> None:
    del document["moves"][1]


def _swap(document: dict[str, Any]) -> None:
    document["moves"][0], document["moves"][1] = document["moves"][1], document["moves"][0]


def _change(document: dict[str, Any]) -> None:
    document["moves"][0]["statement"]["reason"] = "another"


def _repeat(document: dict[str, Any]) -> None:
    document["moves"].append(document["moves"][-1])


def _move_away(document: dict[str, Any]) -> None:
    document["moves"][-1]["statement"]["target"] = "u"


def _empty(document: dict[str, Any]) -> None:
    document["moves"] = []


def _jump(document: dict[str, Any]) -> None:
    document["moves"][-1]["statement"]["sequence"] = 99


def _strange_build(document: dict[str, Any]) -> None:
    document["moves"][-1]["statement"]["build"] = "../../x"


@pytest.mark.parametrize("harm", [_drop, _swap, _change, _repeat, _move_away, _empty, _jump, _strange_build])
def test_a_history_that_was_tampered_with_is_damage(store: FolderStore, harm: Any) -> None:
    for build in ("a", "b", "c"):
        move(store, build)
    document = json.loads(store.read(PATH))
    harm(document)
    store.write(PATH, json.dumps(document).encode())
    with pytest.raises(IntegrityError, match=f"{PATH}: not a channel"):
        read_channel(store, *AT)
    with pytest.raises(IntegrityError):
        move(store, "d")


def test_a_channel_of_another_recipe_is_damage(store: FolderStore) -> None:
    move(store, "a")
    store.copy(PATH, channel_path("swin", "t", "production"))
    with pytest.raises(IntegrityError, match="is of digits/t/production"):
        read_channel(store, "swin", "t", "production")


@settings(max_examples=60)
@given(st.binary(max_size=300) | st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(["schema", "moves", "statement", "build"]), inner),
).map(lambda value: json.dumps(value).encode()))  # fmt: skip
def test_what_is_no_channel_is_damage_and_never_a_crash(data: bytes) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        store = FolderStore(Path(folder))
        for text in (
            data,
            b"[" * 100_000,
            b'{"schema": 3}',
            b'{"schema": 2, "moves": [{"statement": {}}]}',
            b"1" * 9999,
        ):
            store.write(PATH, text)
            with suppress(IntegrityError):
                found = read_channel(store, *AT)
                assert isinstance(found, Channel)
                assert found.head.move.action == "adopted"


def test_names() -> None:
    for name in ("production", "a", "2026.1", "x" * 127):
        assert check_name(name) == name
    for name in ("", "a/b", "..", ".x", "a b", "x" * 128, "é"):
        with pytest.raises(ChannelError, match="is not a channel's name"):
            check_name(name)


class Rival(FolderStore):
    """A store in which somebody else is always faster."""

    def write(self, path: str, data: bytes, *, if_absent: bool = False, if_version: str | None = None) -> bool:
        if path == PATH and if_version is not None:
            return False
        return super().write(path, data, if_absent=if_absent, if_version=if_version)


def test_who_never_wins_gives_up_in_the_end(tmp_path: Path) -> None:
    store = Rival(tmp_path / "store")
    move(store, "a")
    with pytest.raises(StoreError, match="others moved the channel 40 times"):
        move(store, "b")


class Forgetful(FolderStore):
    """A store that does what it is asked, and whose answer is lost."""

    def write(self, path: str, data: bytes, *, if_absent: bool = False, if_version: str | None = None) -> bool:
        super().write(path, data, if_absent=if_absent, if_version=if_version)
        return path != PATH


def test_a_move_whose_answer_was_lost_is_made_once(tmp_path: Path) -> None:
    store = Forgetful(tmp_path / "store")
    move(store, "a")
    move(store, "b")
    assert [one.move.build for one in read_channel(store, *AT).moves] == ["a", "b"]


class Torn:
    """A store that shows the parts of a channel that is being written, one at each read, and then all of it."""

    uri = "torn:"

    def __init__(self, *parts: bytes) -> None:
        self.parts = list(parts)
        self.reads = 0

    def read_versioned(self, _path: str) -> tuple[bytes, str]:
        self.reads += 1
        return (self.parts.pop(0) if len(self.parts) > 1 else self.parts[0]), "1"


def test_a_channel_that_is_being_written_is_read_again_and_a_damaged_one_is_not_believed(store: FolderStore):
    move(store, "a-0000000000000001")
    whole = store.read(PATH)
    torn = Torn(b"", whole[:100], whole)
    found = read_channel(torn, *AT)  # type: ignore[arg-type]
    assert found is not None
    assert (found.head.move.build, torn.reads) == ("a-0000000000000001", 3)
    damaged = Torn(whole[:100])
    with pytest.raises(IntegrityError, match="not a channel"):
        read_channel(damaged, *AT)  # type: ignore[arg-type]
    assert damaged.reads == 2
    endless = Torn(*[whole[:count] for count in range(100, 200)])
    with pytest.raises(IntegrityError, match="not a channel"):
        read_channel(endless, *AT)  # type: ignore[arg-type]
    assert endless.reads == 5
