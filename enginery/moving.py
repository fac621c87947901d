"""Moves of channels: what is checked before one is made, and what is written down about it."""

from __future__ import annotations

import datetime as dt
import getpass
import platform
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Any

from artifacts.catalog import EngineCatalog, EngineId
from artifacts.channels import Channel, Move, SignedMove, move_channel
from artifacts.errors import ChannelError, IntegrityError, NotFoundError, TrustError
from artifacts.leases import Lease, leased
from artifacts.manifest import Manifest
from artifacts.promotion import MAX_SLOWER, compare_speed, objections
from artifacts.refs import digest_bytes
from artifacts.seen import Seen
from artifacts.signing import STATEMENT_NAME, Signer, hint_of
from artifacts.trust import Trust


@dataclass(frozen=True)
class Mover:
    """Moves channels of one store for somebody, signed where there is a `signer`, and by the rules of `trust`, if any."""

    catalog: EngineCatalog
    by: str
    reason: str | None = None
    signer: Signer | None = None
    trust: Trust | None = None
    unsigned_over_signed: bool = False

    def promote(
        self, engine: EngineId, channel: str, *, waived: Collection[str] = (), max_slower: float = MAX_SLOWER
    ) -> SignedMove | None:
        """Make a channel name an engine; return the move, or None where it names it already.

        `waived` are the objections (`unexecuted`, `slower`) that do not count. Raises ChannelError where a rule forbids it,
        TrustError, SigningError, StoreError, IntegrityError, NotFoundError.
        """
        # From here on no garbage collector removes it: what is checked is what the channel will name.
        with leased(self.catalog.store, f"promote {engine}", [str(engine)]) as lease:
            return self._promote(engine, channel, waived, max_slower, lease)

    def _promote(
        self, engine: EngineId, channel: str, waived: Collection[str], max_slower: float, lease: Lease
    ) -> SignedMove | None:
        manifest, data = self._engine(engine, channel)
        if self.trust is not None:
            self.trust.check_engine(manifest, data, self.catalog.signatures(engine, data), channel)
        believes = self.trust.believes if self.trust is not None else None
        verification = replace(self.catalog, believes=believes).effective(engine).verification

        def decide(found: Channel | None) -> dict[str, Any] | None:
            self._require_sound(found)
            head = found.head if found is not None else None
            same = head is not None and (head.move.build, head.move.manifest) == (engine.build, digest_bytes(data))
            if head is not None and same and self._signed_as_asked(head):
                return None
            speed = compare_speed(
                manifest, self._replaced(engine, head.move if head is not None and not same else None)
            )
            against = objections(verification, speed, max_slower=max_slower)
            blocking = [objection for objection in against if objection.waiver not in waived]
            if blocking:
                ways = [f"--allow-{objection.waiver} --reason WHY" for objection in blocking if objection.waiver]
                advice = f"; to promote it all the same: {' '.join(ways)}" if len(ways) == len(blocking) else ""
                why = "; ".join(objection.text for objection in blocking)
                raise ChannelError(f"{engine} is not promoted to {channel}: {why}{advice}")
            return {
                "action": "promote",
                "waived": [objection.waiver for objection in against],
                "speed": None if speed is None else speed.model_dump(mode="json"),
                **self._fields(engine.build, manifest, data, lease),
            }

        return self._move(engine.recipe, engine.target, channel, decide)

    def rollback(self, recipe: str, target: str, channel: str, *, build: str | None = None) -> SignedMove:
        """Make a channel name what it named before (or an earlier `build`), as a move of its own; return it.

        Raises as `promote`; ChannelError where there is nothing to go back to, and where somebody else moved the channel at the
        same time: of two who roll back what both see, the second would go one further back than either means.
        """
        with leased(self.catalog.store, f"rollback {channel} of {recipe}/{target}", [f"{recipe}/{target}"]) as lease:
            move = self._rollback(recipe, target, channel, build, lease)
        if move is None:
            raise AssertionError("a rollback always moves")
        return move

    def _rollback(self, recipe: str, target: str, channel: str, build: str | None, lease: Lease) -> SignedMove | None:
        first: list[Move] = []

        def decide(found: Channel | None) -> dict[str, Any]:
            self._require_sound(found)
            if found is None:
                raise ChannelError(f"nothing was ever promoted to {channel} of {recipe}/{target}")
            now = found.head.move
            first.append(now)
            if now.id != first[0].id:
                raise ChannelError(
                    f"channel {channel} of {recipe}/{target} is not rolled back: at the same time {now.by} moved it to {now.build} "
                    f"(move {now.sequence}, {now.action}); look at enginery history, and do it again if that is not right"
                )
            goal = found.before() if build is None else _last_of(found, build)
            if goal is None:
                what = "an earlier build" if build is None else f"{build}, other than now,"
                raise ChannelError(
                    f"channel {channel} of {recipe}/{target} never named {what}; enginery history tells what it did"
                )
            engine = EngineId(recipe, target, goal.build)
            manifest, data = self._engine(engine, channel)
            if goal.manifest not in (None, digest_bytes(data)):
                raise IntegrityError(f"{engine}: its manifest is not the one that was promoted in move {goal.sequence}")
            if self.trust is not None:
                self.trust.check_engine(manifest, data, self.catalog.signatures(engine, data), channel)
            return {"action": "rollback", "restores": goal.sequence, **self._fields(goal.build, manifest, data, lease)}

        return self._move(recipe, target, channel, decide)

    def _move(
        self, recipe: str, target: str, channel: str, decide: Callable[[Channel | None], dict[str, Any] | None]
    ) -> SignedMove | None:
        signer = self.signer

        def sign(statement: bytes, subject: str) -> bytes:
            if signer is None:
                raise AssertionError("asked to sign without a key")
            return signer.sign(subject, {STATEMENT_NAME: digest_bytes(statement)})

        return move_channel(
            self.catalog.store, recipe, target, channel, decide, sign if signer is not None else None, self._check
        )

    def _signed_as_asked(self, head: SignedMove) -> bool:
        # Otherwise the same build is promoted again: by another key, when keys are exchanged.
        if self.signer is None:
            return True
        return head.signature is not None and hint_of(head.signature) == self.signer.fingerprint

    def _check(self, move: SignedMove) -> None:
        # What readers would refuse is not written.
        if self.trust is not None:
            self.trust.check_move(move.statement, move.signature, move.move.recipe, move.move.channel)

    def _require_sound(self, found: Channel | None) -> None:
        """Refuse to move on from a state that readers would not believe, or to one that is less signed."""
        if found is None:
            return
        head = found.head
        if self.trust is not None and head.move.action != "adopted":
            try:
                self.trust.check_move(head.statement, head.signature, head.move.recipe, head.move.channel)
            except TrustError as err:
                advice = "if what it names is right, move it with --key and --insecure-no-trust this once"
                raise TrustError(f"{err}; {advice}") from err
            Seen.of_this_user().check(self.catalog.store.uri, head)
        if head.signature is not None and self.signer is None and not self.unsigned_over_signed:
            raise ChannelError(
                f"the last move of channel {'/'.join(head.move.at)} is signed and this one would not be: give --key or set "
                "ENGINERY_SIGN_KEY (or --insecure-no-trust)"
            )

    def _engine(self, engine: EngineId, channel: str) -> tuple[Manifest, bytes]:
        """Return an engine's manifest and its bytes, having seen that it is visible and its files there in their sizes."""
        data = self.catalog.manifest_bytes(engine)
        manifest = self.catalog.read_manifest(engine, data)
        for name, entry in manifest.files.items():
            info = self.catalog.store.info(f"{engine.path}/{name}")
            if info is None or info.size != entry.size:
                raise IntegrityError(f"{engine}: its file {name} is gone or cut; build it again, then promote it")
        if not self.catalog.is_visible(engine):
            raise ChannelError(
                f"{engine} is not promoted to {channel}: what it is published together with is not complete; wait until the "
                "build that publishes it ends, or build it again"
            )
        return manifest, data

    def _replaced(self, engine: EngineId, move: Move | None) -> Manifest | None:
        if move is None:
            return None
        try:
            return self.catalog.manifest(EngineId(engine.recipe, engine.target, move.build))
        except (NotFoundError, IntegrityError) as err:
            self.catalog.warn(f"{err}; so its speed is not compared")
            return None

    def _fields(self, build: str, manifest: Manifest, data: bytes, lease: Lease) -> dict[str, Any]:
        git = manifest.provenance.git
        # By the store's clock: a collector counts the grace period of what was replaced from here.
        now = dt.datetime.fromtimestamp(lease.now(), dt.timezone.utc)
        return {
            "build": build,
            "manifest": digest_bytes(data),
            "time": now.strftime("%Y-%m-%dT%H:%M:%SZ"),
            "by": self.by,
            "reason": self.reason,
            "commit": None if git is None else f"{git.commit}{' (changed)' if git.dirty else ''}",
        }


def this_user() -> str:
    """Return who runs this process, as user@host."""
    try:
        user = getpass.getuser()
    except (OSError, KeyError):  # no name for this number
        user = "unknown"
    return f"{user}@{platform.node()}"


def _last_of(channel: Channel, build: str) -> Move | None:
    if channel.head.move.build == build:
        return None
    moves = (signed.move for signed in reversed(channel.moves))
    return next((move for move in moves if move.build == build), None)
