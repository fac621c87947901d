"""Rollouts: a change of hosts goes through a fleet in waves. Pure rules, and the document that a store keeps.

rollouts/<id>.json      one change (a runtime's version, a driver), the hosts that have it, and what each has to rebuild

Hosts with one kind of GPU that became the same share a rollout. The first with something to rebuild is the canary: it rebuilds
alone. When all of its engines have passed their gates, or `enough` of them, the others follow, and none begins what another builds
while it has anything else to do; then it waits for that one. What takes long begins first, so that no GPU waits for another's last one. An engine that fails, of any host, halts the rollout with the reason: nothing more begins until a person
resumes it (what failed is tried again, or accepted as it is) or abandons it. A host that vanishes leaves, so that nobody
waits for it, and is in again when it is back; if it was the canary, another host becomes it.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from operator import attrgetter
from random import uniform
from typing import Any, Final, Literal

from artifacts.checked import dump_checked, parse_checked
from artifacts.errors import ArtifactError, IntegrityError, NotFoundError, StoreError
from artifacts.host import Gpu
from artifacts.hosts import Change
from artifacts.store import Store

ROLLOUTS: Final = "rollouts/"
# A rebuild that was asked for and did not begin is asked for again after so many seconds; one that began, when it has shown
# no sign of life for as long as a lease lives.
ASK_AGAIN_SECONDS: Final = 120.0
LOST_SECONDS: Final = 600.0
CANARY_ENGINES: Final = 20
_SCHEMA: Final = 1
_STORED: Final = 2  # as `to_stored` has it; releases that know version 1 alone refuse it
_MOST_TRIES: Final = 40
_LONGEST_PAUSE: Final = 1.0  # seconds
_MOST_LOG: Final = 200

RebuildState = Literal["pending", "requested", "building", "passed", "failed"]
State = Literal["canary", "rolling", "done", "halted", "abandoned"]


class RolloutError(ArtifactError):
    """What was asked of a rollout cannot be done with it as it is."""


@dataclass(frozen=True)
class Rebuild:
    """One engine that a change made stale on a host: of which recipe (name and file), what replaces it, and what became of it.

    `target` is RUNTIME:GPU; `since` (seconds, UTC) is when the state began, or the last sign of life of one that is building;
    `seconds` is how long the compilation took that made what it replaces.
    """

    recipe: str
    file: str
    target: str
    asked: str
    why: str
    replaces: str | None = None
    state: RebuildState = "pending"
    since: float = 0.0
    engine: str | None = None
    reason: str = ""
    seconds: float = 0.0

    @property
    def key(self) -> tuple[str, str, str]:
        """What tells it from the others of its host."""
        return self.recipe, self.target, self.asked

    @property
    def is_untouched(self) -> bool:
        """Whether nothing has become of it yet."""
        return (self.state, self.since, self.engine, self.reason) == ("pending", 0.0, None, "")


_SHARED: Final = ("recipe", "file", "target", "asked", "why", "replaces", "seconds")
_shared: Final = attrgetter(*_SHARED)


@dataclass(frozen=True)
class Member:
    """A host of a rollout; `left` says why it does not count for now."""

    rebuilds: tuple[Rebuild, ...] = ()
    left: str = ""

    @property
    def passed(self) -> bool:
        """Whether all that it had to rebuild passed."""
        return all(one.state == "passed" for one in self.rebuilds)


@dataclass(frozen=True)
class Rollout:
    """One change on its way through the hosts; every method returns it as it is afterwards.

    `enough` of the canary's engines have to pass before the others follow; 0: all.
    """

    id: str
    changes: tuple[str, ...]
    canary: str | None = None
    halted: str = ""
    abandoned: str = ""
    proven: bool = False
    members: Mapping[str, Member] = field(default_factory=dict)
    log: tuple[str, ...] = ()
    enough: int = CANARY_ENGINES

    @property
    def state(self) -> State:
        """Where it stands; hosts that left do not count."""
        if self.abandoned:
            return "abandoned"
        if self.halted:
            return "halted"
        if all(member.passed for member in self.members.values() if not member.left):
            return "done"
        return "rolling" if self.proven else "canary"

    def due(self, host: str, now: float) -> tuple[Rebuild, ...]:
        """Return what a host is to be asked to rebuild now: what it may, and was not asked for or got lost."""
        member = self.members.get(host)
        if member is None or member.left or self.halted or self.abandoned or not (self.proven or host == self.canary):
            return ()
        return tuple(one for one in member.rebuilds if _is_due(one, now))

    def may_build(self, host: str) -> bool:
        """Tell whether a rebuild of a host may begin, or go on to its next engine."""
        member = self.members.get(host)
        allowed = self.proven or host == self.canary
        return member is not None and not (member.left or self.halted or self.abandoned) and allowed

    def turn(self, host: str, now: float, done: Collection[tuple[str, str, str]] = ()) -> tuple[Rebuild, ...]:
        """Return what a host begins next: what one recipe has to rebuild there, of what is due or asked for, and not `done`.

        The canary goes by the digest of a name, which makes what it proves first a sample. Later what took longest is first. What
        another host has built comes after that: it is found made. What one builds now comes last: whoever begins it then waits for it.
        """
        member = self.members.get(host)
        if member is None or not self.may_build(host):
            return ()
        wanted = [one for one in member.rebuilds if one.state == "requested" or _is_due(one, now)]
        wanted = [one for one in wanted if one.key not in done]
        others = [one for name, other in self.members.items() if name != host for one in other.rebuilds]
        busy = {one.key for one in others if one.state == "building" and abs(now - one.since) < LOST_SECONDS}
        made = {one.key for one in others if one.state == "passed"}

        def order(one: Rebuild) -> tuple[int, float, str]:
            sample = hashlib.sha256(repr(one.key).encode()).hexdigest()
            return (2 if one.key in busy else 1 if one.key in made else 0, -one.seconds if self.proven else 0.0, sample)

        if not wanted:
            return ()
        first = min(wanted, key=order)
        return tuple(one for one in wanted if one.file == first.file and order(one)[0] == order(first)[0])

    def alive(self, host: str, keys: Collection[tuple[str, str, str]], now: float) -> Rollout:
        """Say that a host builds these, and that whoever does it has not forgotten what else was asked of it.

        A verdict stays: a sign of life may come late.
        """
        member = self.members[host]

        def sign(one: Rebuild) -> Rebuild:
            if one.key in keys and one.state not in ("passed", "failed"):
                return replace(one, state="building", since=now)
            return replace(one, since=now) if one.state == "requested" else one

        return self.with_member(host, replace(member, rebuilds=tuple(map(sign, member.rebuilds))))

    def requested(self, host: str, keys: Collection[tuple[str, str, str]], now: float) -> Rollout:
        """Say that these are asked of a host; what passed stays so."""
        member = self.members[host]
        rebuilds = tuple(
            replace(one, state="requested", since=now) if one.key in keys and one.state != "passed" else one
            for one in member.rebuilds
        )
        return self.with_member(host, replace(member, rebuilds=rebuilds))

    def joined(self, host: str, rebuilds: Iterable[Rebuild], at: str) -> Rollout:
        """Take up a host, or what else it has to rebuild; what it has rebuilt already stays as it is."""
        there = {one.key: one for one in self.members.get(host, Member()).rebuilds}
        new = [one for one in rebuilds if one.key not in there]
        member = Member((*there.values(), *new))
        if self.members.get(host) == member:
            return self
        words = f"{host} has the change; {len(new)} engine{'' if len(new) == 1 else 's'} to rebuild"
        return self.with_member(host, member).said(at, words).elected(at)

    def marked(self, host: str, key: tuple[str, str, str], at: str, **fields: Any) -> Rollout:
        """Say what became of one rebuild; what passed stays passed, and what fails halts the rollout."""
        member = self.members[host]
        old = next(one for one in member.rebuilds if one.key == key)
        if old.state == "passed":
            return self
        new = replace(old, **fields)
        rebuilds = tuple(new if one.key == key else one for one in member.rebuilds)
        after = self.with_member(host, replace(member, rebuilds=rebuilds))
        if new.state in ("passed", "failed") and new != old:
            after = after.said(at, f"{host}: {_named(new)} {new.state}{f': {new.reason}' if new.reason else ''}")
        if new.state == "failed":
            role = "the canary " if host == self.canary and not self.proven else ""
            return replace(after, halted=self.halted or f"{role}{host}: {_named(new)}: {new.reason}")
        return after.proved(at)

    def without(self, host: str, why: str, at: str) -> Rollout:
        """Let a host leave; if it was the canary, the next one that has something to rebuild becomes it."""
        member = self.members.get(host)
        if member is None or member.left or member.passed:
            return self
        return self.with_member(host, replace(member, left=why)).said(at, f"{host} left: {why}").elected(at)

    def back(self, host: str, at: str) -> Rollout:
        """Take a host that left up again."""
        member = self.members.get(host)
        if member is None or not member.left:
            return self
        return self.with_member(host, replace(member, left="")).said(at, f"{host} is back").elected(at)

    def resumed(self, by: str, at: str, *, accept: bool = False) -> Rollout:
        """Go on: what failed is tried again, or with `accept` counts as passed. Raises RolloutError where nothing is stopped."""
        if not (self.halted or self.abandoned):
            raise RolloutError(f"rollout {self.id} is {self.state}: there is nothing to resume")
        how = {"state": "passed", "reason": f"accepted by {by}"} if accept else {"state": "pending", "reason": ""}
        members = {
            host: replace(
                member,
                rebuilds=tuple(replace(one, **how) if one.state == "failed" else one for one in member.rebuilds),  # type: ignore[arg-type]
            )
            for host, member in self.members.items()
        }
        words = f"resumed by {by}{', what failed accepted' if accept else ''}"
        after = replace(self, halted="", abandoned="", members=members)
        return after.said(at, words).elected(at).proved(at)

    def abandon(self, by: str, why: str, at: str) -> Rollout:
        """Stop for good: no host rebuilds anything because of this change. Raises RolloutError where all is done."""
        if self.state == "done" or self.abandoned:
            raise RolloutError(f"rollout {self.id} is {self.state}: there is nothing to abandon")
        return replace(self, abandoned=f"by {by}{f': {why}' if why else ''}").said(at, f"abandoned by {by}: {why}")

    def to_json(self) -> dict[str, Any]:
        """Return the rollout as JSON values."""
        members = {host: asdict(member) for host, member in self.members.items()}
        return {"schema": _SCHEMA, **asdict(replace(self, members={})), "members": members, "state": self.state}

    def to_stored(self) -> dict[str, Any]:
        """Return the rollout as a store keeps it: hosts of one kind rebuild the same engines, and each of these stands there once.

        A host has a word for each of its engines: its place in `rebuilds`, and of one that somebody asked for
        PLACE:SINCE:STATE:ENGINE:REASON, the last three by their places in `words`. Forty hosts of 1,900 engines are 1 MB then, not 30.
        """
        places: dict[tuple[Any, ...], int] = {}
        words: dict[str | None, int] = {}  # hosts that find one engine made say the same of it
        members: dict[str, Any] = {}
        for host, member in self.members.items():
            rows: list[str] = []
            for one in member.rebuilds:
                row = str(places.setdefault(_shared(one), len(places)))
                if not one.is_untouched:
                    told = [words.setdefault(text, len(words)) for text in (one.state, one.engine, one.reason)]
                    row = ":".join((row, repr(float(one.since)), *map(str, told)))
                rows.append(row)
            members[host] = {"left": member.left, "rebuilds": " ".join(rows)}
        own = asdict(replace(self, members={}))
        return {
            "schema": _STORED,
            **own,
            "members": members,
            "rebuilds": list(places),
            "words": list(words),
            "state": self.state,
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Rollout:
        """Read back what `to_stored` wrote, or `to_json`. Raises LookupError, TypeError, ValueError or AttributeError else."""
        if value["schema"] not in (_SCHEMA, _STORED):
            raise ValueError(f"schema {value['schema']!r}, this release reads {_SCHEMA} and {_STORED}")
        words = value.get("words", ())
        shared = [Rebuild(**dict(zip(_SHARED, row, strict=True))) for row in value.get("rebuilds", ())]

        def rebuild(row: str) -> Rebuild:
            place, *told = row.split(":")
            one = shared[_place(place)]
            if not told:
                return one
            since, *places = told
            state, engine, reason = (words[_place(index)] for index in places)
            recipe, file, target, asked, why, replaces, seconds = _shared(one)
            return Rebuild(recipe, file, target, asked, why, replaces, state, float(since), engine, reason, seconds)

        def member(document: Mapping[str, Any]) -> Member:
            rows = document["rebuilds"]
            found = map(rebuild, rows.split()) if isinstance(rows, str) else (Rebuild(**row) for row in rows)
            return Member(tuple(found), document["left"])

        members = {host: member(document) for host, document in value["members"].items()}
        return cls(
            value["id"],
            tuple(value["changes"]),
            value["canary"],
            value["halted"],
            value["abandoned"],
            value["proven"],
            members,
            tuple(value["log"]),
            value.get("enough", 0),  # of releases in which all had to pass
        )

    def with_member(self, host: str, member: Member) -> Rollout:
        """Put a host's part in the place of what it was."""
        return replace(self, members={**self.members, host: member})

    def said(self, at: str, words: str) -> Rollout:
        """Note something in the log, with its time."""
        return replace(self, log=(*self.log, f"{at}  {words}")[-_MOST_LOG:])

    def elected(self, at: str) -> Rollout:
        """Choose a canary where there is none that can prove anything: the first host that has something to rebuild."""
        if self.proven:
            return self
        now = self.members.get(self.canary) if self.canary is not None else None
        if now is not None and not now.left:
            return self
        able = (host for host, member in self.members.items() if not member.left and not member.passed)
        chosen = next(able, None)
        after = replace(self, canary=chosen)
        return after.said(at, f"{chosen} is the canary") if chosen is not None else after

    def proved(self, at: str) -> Rollout:
        """Let the other hosts follow if the canary has passed."""
        member = self.members.get(self.canary) if self.canary is not None else None
        if self.proven or self.halted or self.abandoned or member is None or not member.rebuilds:
            return self
        passed = sum(one.state == "passed" for one in member.rebuilds)
        if passed < min(self.enough or len(member.rebuilds), len(member.rebuilds)):
            return self
        told = "passed" if member.passed else f"passed with {passed} of {len(member.rebuilds)} engines"
        return replace(self, proven=True).said(at, f"the canary {self.canary} {told}; the other hosts follow")


def _place(text: str) -> int:
    place = int(text)
    if place < 0:
        raise ValueError(f"{text} is no place")
    return place


def _is_due(one: Rebuild, now: float) -> bool:
    limits = {"pending": 0.0, "requested": ASK_AGAIN_SECONDS, "building": LOST_SECONDS}
    # A clock that was put back must not make a host wait for it to catch up.
    return one.state in limits and (one.state == "pending" or abs(now - one.since) >= limits[one.state])


def _named(one: Rebuild) -> str:
    return f"{one.recipe} {one.target} {one.asked}"


def rollout_id(changes: Iterable[Change], gpus: Iterable[Gpu] = ()) -> str:
    """Return the name of the rollout of a change: what hosts that became the same have in common, whatever they were.

    GPUs count by model and capability and not by which one of them it is. What one kind of GPU proves holds for no other: `gpus`
    are those of the host.
    """
    became = sorted(
        {
            f"{one.what} {' '.join((one.new or 'none').split()[:-1]) if one.what == 'gpu' else one.new}"
            for one in changes
        }
    )
    first = re.sub(r"[^A-Za-z0-9.]+", "-", became[0]).strip("-") if became else "nothing"
    became += sorted({f"on {gpu.name} {gpu.compute_capability}" for gpu in gpus})
    return f"{first[:60]}-{hashlib.sha256(json.dumps(became).encode()).hexdigest()[:8]}"


def rollout_path(rollout: str) -> str:
    """Return where a store keeps a rollout."""
    return f"{ROLLOUTS}{rollout}.json"


def read_rollout(store: Store, rollout: str) -> Rollout:
    """Return a rollout. Raises NotFoundError, StoreError, IntegrityError."""
    return _read(store, rollout_path(rollout))[0]


def rollouts(store: Store) -> list[Rollout]:
    """Return all rollouts, by name. Raises StoreError, IntegrityError."""
    return [_read(store, info.path)[0] for info in store.list(ROLLOUTS) if info.path.endswith(".json")]


def change_rollout(store: Store, rollout: str, change: Callable[[Rollout | None], Rollout]) -> Rollout:
    """Change a rollout by compare and swap and return it; `change` gets it as it is (None: there is none), as often as needed.

    Raises StoreError, IntegrityError, and what `change` raises.
    """
    path = rollout_path(rollout)
    for attempt in range(_MOST_TRIES):
        found: Rollout | None
        try:
            found, version = _read(store, path)
        except NotFoundError:
            found, version = None, ""
        wanted = change(found)
        if wanted == found:
            return wanted
        data = dump_checked(wanted.to_stored())
        if store.write(path, data, if_absent=True) if found is None else store.write(path, data, if_version=version):
            return wanted
        time.sleep(uniform(0, min(0.05 * (attempt + 1), _LONGEST_PAUSE)))
    raise StoreError(f"{store.uri}: {path}: others changed it {_MOST_TRIES} times; try again")


def _read(store: Store, path: str) -> tuple[Rollout, str]:
    data, version = store.read_versioned(path)
    try:
        return Rollout.from_json(parse_checked(data)), version
    except (LookupError, TypeError, ValueError, AttributeError, RecursionError) as err:
        raise IntegrityError(f"{store.uri}: {path}: not a rollout: {type(err).__name__}: {err}") from err
