"""Channels: movable names for engines, each with its whole history, moved by compare and swap.

channels/<recipe>/<target>/<channel>.json
    {"schema": 2, "moves": [{"statement": {...}, "signature": {...} | null}, ...]}     oldest first

A move's statement names recipe, target, channel, build and the SHA-256 of its manifest; its `sequence`
counts up by one and `previous` is the SHA-256 of the statement before it, so that no move can be taken
out, changed or put in without breaking the chain. A signature covers one statement, as canonical JSON.
Schema 1, {"schema": 1, "build": ...}, is read as one move that nobody signed.
"""

from __future__ import annotations

import json
import re
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import uniform
from typing import Annotated, Any, Final, Literal

from pydantic import Field, ValidationError

from artifacts.errors import ChannelError, IntegrityError, NotFoundError, StaleError, StoreError
from artifacts.keys import canonical_json
from artifacts.manifest_base import Digest, Instant, Name, Part
from artifacts.refs import digest_bytes
from artifacts.store import Store

CHANNEL_SCHEMA: Final = 2
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,126}")
# Each try that fails is a move that somebody else made.
_MOST_TRIES: Final = 40
_READS: Final = 5  # of a document that is another each time, and damaged
_MOST_WAIT_SECONDS: Final = 0.05
# Where a document grows beyond it, something is wrong; a move takes about 2 KiB.
_MOST_BYTES: Final = 64 << 20


class Speed(Part):
    """How the engine compares with the one that it replaces, by the slowest of the cases that both have."""

    device: str
    case: str
    p50_ms: float
    replaced_p50_ms: float

    @property
    def slower_by(self) -> float:
        """The share by which it is slower: 0.05 is five per cent; negative where it is faster."""
        return self.p50_ms / self.replaced_p50_ms - 1.0


class Move(Part):
    """One move of a channel: what it names since then, and who moved it when, why, and past which rule."""

    recipe: Name
    target: Name
    channel: Name
    sequence: Annotated[int, Field(ge=1, lt=2**53)]
    action: Literal["promote", "rollback", "adopted"]
    build: Name
    manifest: Digest | None = Field(description="SHA-256 of the build's manifest; null in what version 1 left.")
    previous: Digest | None = Field(description="SHA-256 of the statement before this one; null for the first.")
    restores: int | None = Field(default=None, description="Of a rollback: the sequence of the move that it repeats.")
    time: Instant | None
    by: str
    reason: str | None = None
    commit: str | None = Field(default=None, description="Commit of the recipe that the build was made from.")
    waived: tuple[Literal["unexecuted", "slower"], ...] = ()
    speed: Speed | None = Field(default=None, description="null: not compared.")
    id: str

    @property
    def at(self) -> tuple[str, str, str]:
        """Recipe, target and channel."""
        return self.recipe, self.target, self.channel


@dataclass(frozen=True)
class SignedMove:
    """A move, the bytes of its statement, and the signature over them, if any."""

    move: Move
    statement: bytes
    signature: bytes | None


@dataclass(frozen=True)
class Channel:
    """A channel as a store has it: every move, oldest first (at least one), and the version of its document."""

    moves: tuple[SignedMove, ...]
    version: str

    @property
    def head(self) -> SignedMove:
        """The last move, which says what the channel names."""
        return self.moves[-1]

    def before(self) -> Move | None:
        """Return the move that a rollback repeats: the last one before it that named another build; None where none did.

        What a rollback has left stays left: the next one goes on from there.
        """
        head = self.head.move
        limit = head.restores or head.sequence
        for signed in reversed(self.moves):
            move = signed.move
            if move.sequence < limit and move.restores is None and move.build != head.build:
                return move
        return None


def channel_path(recipe: str, target: str, name: str) -> str:
    """Return where a store keeps a channel."""
    return f"channels/{recipe}/{target}/{name}.json"


def read_channel(store: Store, recipe: str, target: str, name: str) -> Channel | None:
    """Return a channel, or None where nothing was ever promoted to it.

    Raises StoreError, and IntegrityError where the document is damaged, is another channel's, or its chain is broken, and is
    so when it is read once more.
    """
    path = channel_path(recipe, target, name)
    before: bytes | None = None
    for left in reversed(range(_READS)):
        try:
            data, version = store.read_versioned(path)
        except NotFoundError:
            return None
        try:
            return Channel(_moves(data, recipe, target, name), version)
        except (ValueError, KeyError, TypeError, RecursionError) as err:
            # Services that do not replace objects at once (rclone's) show a part of one that is being written.
            if left and data != before:
                before = data
                continue
            said = err.errors(include_url=False)[0]["msg"] if isinstance(err, ValidationError) else err
            raise IntegrityError(f"{store.uri}: {path}: not a channel: {said}") from err
    raise AssertionError


def channels_of(store: Store, recipe: str, name: str | None = None) -> Iterator[Channel]:
    """Yield a recipe's channels (those of one name), by path. Raises StoreError, IntegrityError."""
    for info in store.list(f"channels/{recipe}/"):
        parts = info.path.split("/")
        if len(parts) == 4 and parts[3].endswith(".json") and name in (None, parts[3].removesuffix(".json")):
            if info.size > _MOST_BYTES:
                raise IntegrityError(f"{store.uri}: {info.path}: not a channel: it has {info.size} bytes")
            found = read_channel(store, recipe, parts[2], parts[3].removesuffix(".json"))
            if found is not None:
                yield found


def move_channel(
    store: Store,
    recipe: str,
    target: str,
    name: str,
    decide: Callable[[Channel | None], dict[str, Any] | None],
    sign: Callable[[bytes, str], bytes] | None = None,
    check: Callable[[SignedMove], None] = lambda _move: None,
) -> SignedMove | None:
    """Move a channel by compare and swap: of movers at once each sees what those before it did; return the move.

    `decide` is given the channel as it is, as often as somebody else was faster, and returns a `Move`'s fields
    (without those that this adds: names, sequence, previous, id), or None to leave the channel as it is; it raises where
    the move is forbidden. `sign` makes the signature of a statement, given what to call it; `check` is shown the move
    before it is written, and raises where it must not be. Raises StoreError, IntegrityError.
    """
    mine = uuid.uuid4().hex
    for _try in range(_MOST_TRIES):
        channel = read_channel(store, recipe, target, name)
        moves = () if channel is None else channel.moves
        # A write whose answer was lost may have been done, and another's may stand on it by now.
        done = next((signed for signed in moves if signed.move.id == mine), None)
        if done is not None:
            return done
        try:
            fields = decide(channel)
        except StaleError:
            # Another process of this user may have seen it move on since it was read.
            now = read_channel(store, recipe, target, name)
            if now is None or channel is None or not is_newer(now, channel):
                raise
            continue
        if fields is None:
            return None
        statement = {
            **fields,
            "recipe": recipe,
            "target": target,
            "channel": name,
            "sequence": moves[-1].move.sequence + 1 if moves else 1,
            "previous": digest_bytes(moves[-1].statement) if moves else None,
            "id": mine,
        }
        signed = _signed(statement, f"channel {recipe}/{target}/{name}", sign)
        check(signed)
        data = _document((*moves, signed))
        path = channel_path(recipe, target, name)
        written = (
            store.write(path, data, if_absent=True)
            if channel is None
            else store.write(path, data, if_version=channel.version)
        )
        if written:
            return signed
        time.sleep(uniform(0, _MOST_WAIT_SECONDS))
    raise StoreError(
        f"{store.uri}: {channel_path(recipe, target, name)}: others moved the channel {_MOST_TRIES} times; try again"
    )


def is_newer(channel: Channel, other: Channel) -> bool:
    """Tell whether a channel has moved on from another state of it."""
    return channel.head.move.sequence > other.head.move.sequence


def check_name(name: str) -> str:
    """Return a channel's name if it is one, else raise ChannelError."""
    if _NAME.fullmatch(name) is None:
        raise ChannelError(f"{name!r} is not a channel's name (letters, digits, '.', '_', '+', '-'; up to 127)")
    return name


def _signed(statement: dict[str, Any], subject: str, sign: Callable[[bytes, str], bytes] | None) -> SignedMove:
    text = canonical_json(statement)
    return SignedMove(Move.model_validate_json(text), text, None if sign is None else sign(text, subject))


def _document(moves: tuple[SignedMove, ...]) -> bytes:
    document = {
        "schema": CHANNEL_SCHEMA,
        "moves": [
            {
                "statement": json.loads(signed.statement),
                "signature": None if signed.signature is None else json.loads(signed.signature),
            }
            for signed in moves
        ],
    }
    return json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False).encode() + b"\n"


def _moves(data: bytes, recipe: str, target: str, name: str) -> tuple[SignedMove, ...]:
    document = json.loads(data)
    schema = document.get("schema") if isinstance(document, dict) else None
    if schema == 1:
        return (_adopted(document["build"], recipe, target, name),)
    if schema != CHANNEL_SCHEMA:
        raise ValueError(f"schema {schema!r}, this release reads 1 and {CHANNEL_SCHEMA}")
    moves: list[SignedMove] = []
    for entry in document["moves"]:
        text, signature = canonical_json(entry["statement"]), entry["signature"]
        move = Move.model_validate_json(text)
        if move.at != (recipe, target, name):
            raise ValueError(f"move {move.sequence} is of {'/'.join(move.at)}")
        if move.sequence != len(moves) + 1 or move.previous != (digest_bytes(moves[-1].statement) if moves else None):
            raise ValueError(f"move {move.sequence} does not follow the one before it")
        moves.append(SignedMove(move, text, None if signature is None else canonical_json(signature)))
    if not moves:
        raise ValueError("it has no moves")
    return tuple(moves)


def _adopted(build: str, recipe: str, target: str, name: str) -> SignedMove:
    statement = {
        "recipe": recipe,
        "target": target,
        "channel": name,
        "sequence": 1,
        "action": "adopted",
        "build": build,
        "manifest": None,
        "previous": None,
        "time": None,
        "by": "unknown",
        "id": "version-1",
    }
    return _signed(statement, "", None)
