"""What this user has seen of channels, so that a store cannot show an older state of one again.

One small file for each channel, in `ENGINERY_STATE`, else `$XDG_STATE_HOME/enginery`, else
`~/.local/state/enginery`. It knows the highest sequence and the statement of that move. Who deletes it
begins anew, as every new host does: the first state that is seen is believed if it is signed.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from artifacts.channels import Channel, SignedMove, is_newer, read_channel
from artifacts.errors import StaleError
from artifacts.files import create_file, make_folders, os_faults, sync_file
from artifacts.refs import digest_bytes, is_digest
from artifacts.store import Store

STATE: Final = "ENGINERY_STATE"


@dataclass(frozen=True)
class Seen:
    """The moves that were seen, in a folder that several processes may share."""

    folder: Path

    @classmethod
    def of_this_user(cls) -> Seen:
        """Return what this user has seen; nothing is made before something is remembered."""
        given = os.environ.get(STATE)
        if given:
            return cls(Path(given).absolute())
        base = os.environ.get("XDG_STATE_HOME")
        return cls((Path(base) if base else Path("~/.local/state").expanduser()).absolute() / "enginery")

    def check(self, store: str, head: SignedMove) -> None:
        """Remember the head of a channel of a store, whose signature was checked, and refuse one that is older.

        Raises StaleError where a later move was seen before, or another one of this sequence; StoreError where the folder
        cannot be used.
        """
        move = head.move
        name = digest_bytes("\n".join((store, *move.at)).encode())
        statement = digest_bytes(head.statement)
        with os_faults(f"{self.folder} (set {STATE} to a folder that can be written)"):
            make_folders(self.folder / "channels")
            path = self.folder / "channels" / f"{name}.json"
            with (self.folder / "channels" / f"{name}.lock").open("wb") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)  # dropped by the kernel with its holder
                sequence, known = _read(path)
                if move.sequence < sequence or (move.sequence == sequence and known != statement):
                    raise StaleError(
                        f"{store}: channel {'/'.join(move.at)} shows move {move.sequence}, and move {sequence} was seen "
                        "here before: an older or another state of the store was put in its place. If somebody who may "
                        f"has really reset the channel, remove {path}"
                    )
                if move.sequence > sequence:
                    temporary = path.with_suffix(".new")
                    temporary.unlink(missing_ok=True)
                    document = {"store": store, "channel": "/".join(move.at), "sequence": move.sequence}
                    with create_file(temporary, 0o600) as stream:
                        stream.write(json.dumps(document | {"statement": statement}).encode())
                        sync_file(stream)
                    temporary.replace(path)


def believed(store: Store, channel: Channel, check: Callable[[SignedMove], object]) -> Channel:
    """Return a channel whose head `check` lets pass, remembered; where another process here saw it move on since it was read, as it is now.

    Raises TrustError, StoreError, IntegrityError.
    """
    while True:
        check(channel.head)
        try:
            Seen.of_this_user().check(store.uri, channel.head)
        except StaleError:
            now = read_channel(store, *channel.head.move.at)
            if now is None or not is_newer(now, channel):
                raise
            channel = now
        else:
            return channel


def _read(path: Path) -> tuple[int, str]:
    """Return sequence and statement that a file remembers; a damaged one (a disk that was full) begins anew."""
    try:
        document = json.loads(path.read_bytes())
        sequence, statement = document["sequence"], document["statement"]
    except (FileNotFoundError, ValueError, KeyError, TypeError, RecursionError):
        return 0, ""
    return (sequence, statement) if type(sequence) is int and is_digest(statement) else (0, "")
