"""Hosts as a store knows them: the fingerprint that was seen last, what was there before, and when a host was last seen.

hosts/<host>.json   the fingerprint (`artifacts.host`), with
    absent          what was there once and was not when it was last looked at: driver, GPUs, runtimes
    history         every change that was seen, oldest first: when, what, and the fingerprint before it
    open            the rollouts that this host takes part in and has not finished
hosts/<host>.seen   written at each look: when the host was last seen, by the store's clock

A change is kept in the same write as the new fingerprint, and stays `pending` until it is known which engines it made
stale: whoever dies in between leaves that to the next look. What is gone is remembered, since an upgrade is first a removal:
1.6, none, 1.7 is a change from 1.6 to 1.7.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from random import uniform
from typing import Any, Final

from artifacts.checked import dump_checked, parse_checked
from artifacts.errors import IntegrityError, NotFoundError, StoreError
from artifacts.host import Gpu, Host
from artifacts.store import Store

# Longer ago a host is gone: it is listed so, and no rollout waits for it.
VANISHED_SECONDS: Final = 900.0
_SCHEMA: Final = 1
_MOST_HISTORY: Final = 100
_MOST_TRIES: Final = 40


@dataclass(frozen=True)
class Change:
    """One thing of a host that is not as it was: `driver`, `cuda`, `system`, a runtime's name, or `gpu`; None: not there."""

    what: str
    old: str | None
    new: str | None

    def __str__(self) -> str:
        return f"{self.what} {self.old or 'none'} -> {self.new or 'none'}"


@dataclass(frozen=True)
class Drift:
    """What changed between two looks: `id` counts up from 1; `before` is the host as it was known until then.

    `pending` until it was found out which engines it made stale; `rollout` names what brings these up to date.
    """

    id: int
    time: str
    changes: tuple[Change, ...]
    before: Host
    pending: bool = True
    rollout: str | None = None


@dataclass(frozen=True)
class HostRecord:
    """What a store knows of a host.

    `owed` is the host before the first change of which it could not rebuild everything, its card being gone: where that
    comes back, stale is what is so since then.
    """

    host: Host
    absent: Mapping[str, Any] = field(default_factory=dict)
    history: tuple[Drift, ...] = ()
    open: tuple[str, ...] = ()
    owed: Host | None = None

    @property
    def known(self) -> Host:
        """The host with what is absent now, as that was last seen: what a change is told from."""
        gpus = tuple(Host.from_json({"name": "", "os": "", "arch": "", "gpus": self.absent.get("gpus", ())}).gpus)
        return replace(
            self.host,
            driver=self.host.driver or self.absent.get("driver"),
            cuda=self.host.cuda or self.absent.get("cuda"),
            gpus=self.host.gpus or gpus,
            runtimes={**self.absent.get("runtimes", {}), **self.host.runtimes},
        )

    @property
    def pending(self) -> tuple[Drift, ...]:
        """The changes of which nobody has found out yet what they made stale."""
        return tuple(drift for drift in self.history if drift.pending)

    def seen(self, host: Host, now: str) -> HostRecord:
        """Return the record after a look; equal to this one where nothing changed that counts (`changes`)."""
        found = changes(self.host, host)
        if not found:
            return self
        before = self.known
        last = self.history[-1].id if self.history else 0
        absent: dict[str, Any] = {}
        if host.driver is None and before.driver is not None:
            absent["driver"] = before.driver
        if host.cuda is None and before.cuda is not None:
            absent["cuda"] = before.cuda
        if not host.gpus and before.gpus:
            absent["gpus"] = before.to_json()["gpus"]
        gone = {name: version for name, version in before.runtimes.items() if name not in host.runtimes}
        if gone:
            absent["runtimes"] = gone
        history = (*self.history, Drift(last + 1, now, found, before))
        return replace(self, host=host, absent=absent, history=history[-_MOST_HISTORY:])

    def settled(self, drifts: Mapping[int, str | None], owed: Host | None = None) -> HostRecord:
        """Return the record with these changes dealt with, each by the rollout that is named, or by none."""
        history = tuple(
            replace(drift, pending=False, rollout=drifts[drift.id]) if drift.id in drifts else drift
            for drift in self.history
        )
        joined = [rollout for rollout in drifts.values() if rollout is not None]
        return replace(self, history=history, open=tuple(dict.fromkeys((*self.open, *joined))), owed=owed)

    def finished(self, rollout: str) -> HostRecord:
        """Return the record without a rollout that this host has nothing more to do in."""
        return replace(self, open=tuple(one for one in self.open if one != rollout))

    def to_json(self) -> dict[str, Any]:
        """Return the record as JSON values."""
        history = [
            {
                "id": drift.id,
                "time": drift.time,
                "changes": [{"what": one.what, "old": one.old, "new": one.new} for one in drift.changes],
                "before": drift.before.to_json(),
                "pending": drift.pending,
                "rollout": drift.rollout,
            }
            for drift in self.history
        ]
        fields: dict[str, Any] = {"absent": dict(self.absent), "history": history, "open": list(self.open)}
        if self.owed is not None:
            fields["owed"] = self.owed.to_json()
        return {"schema": _SCHEMA, **self.host.to_json(), **fields}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> HostRecord:
        """Read back what `to_json` wrote, also of releases that kept the fingerprint alone.

        Raises KeyError, TypeError, ValueError or AttributeError for anything else.
        """
        if value["schema"] != _SCHEMA:
            raise ValueError(f"schema {value['schema']!r}, this release reads {_SCHEMA}")
        history = tuple(
            Drift(
                int(drift["id"]),
                str(drift["time"]),
                tuple(Change(one["what"], one["old"], one["new"]) for one in drift["changes"]),
                Host.from_json(drift["before"]),
                bool(drift["pending"]),
                drift["rollout"],
            )
            for drift in value.get("history", ())
        )
        owed = Host.from_json(value["owed"]) if value.get("owed") is not None else None
        return cls(Host.from_json(value), dict(value.get("absent", {})), history, tuple(value.get("open", ())), owed)


def changes(old: Host, new: Host) -> tuple[Change, ...]:
    """Return what of a host is not as it was, in what engines may depend on.

    The processor is left out: how many of its threads a process may use differs between processes of one host.
    """
    found = [
        Change(what, before, after)
        for what, before, after in (
            ("system", f"{old.os} {old.arch}", f"{new.os} {new.arch}"),
            ("driver", old.driver, new.driver),
            ("cuda", old.cuda, new.cuda),
            *(
                (name, old.runtimes.get(name), new.runtimes.get(name))
                for name in sorted({*old.runtimes, *new.runtimes})
            ),
        )
        if before != after
    ]
    return (*found, *_gpu_changes(old.gpus, new.gpus))


def _gpu_changes(old: tuple[Gpu, ...], new: tuple[Gpu, ...]) -> list[Change]:
    """Pair cards by their uuid; what is left over was put in or taken out, and pairs up as another card in its place."""
    before, after = {gpu.uuid: gpu for gpu in old}, {gpu.uuid: gpu for gpu in new}
    found = [
        Change("gpu", _card(gpu, after[uuid]), _card(after[uuid], gpu))
        for uuid, gpu in before.items()
        if uuid in after and gpu != after[uuid]
    ]
    gone = [gpu for uuid, gpu in before.items() if uuid not in after]
    come = [gpu for uuid, gpu in after.items() if uuid not in before]
    for index in range(max(len(gone), len(come))):
        was = _card(gone[index]) if index < len(gone) else None
        found.append(Change("gpu", was, _card(come[index]) if index < len(come) else None))
    return found


def _card(gpu: Gpu, other: Gpu | None = None) -> str:
    """Say which card it is, and in which facts it differs from `other`, itself at another time."""
    text = f"{gpu.name} {gpu.compute_capability} {gpu.uuid}"
    if other is None:
        return text
    facts, others = gpu.device(), other.device()
    unequal = [f"{name} {value}" for name, value in facts.items() if value != others[name] and name != "name"]
    return f"{text} ({', '.join(unequal)})" if unequal else text


def read_host(store: Store, path: str) -> tuple[HostRecord, str]:
    """Return the record at a path of the store, and its version. Raises NotFoundError, StoreError, IntegrityError."""
    data, version = store.read_versioned(path)
    try:
        return HostRecord.from_json(parse_checked(data)), version
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as err:
        what = f"{store.uri}: {path}: not a host's record: {type(err).__name__}: {err}"
        raise IntegrityError(f"{what}; remove it, and the host writes it anew when it is looked at") from err


def change_host(store: Store, path: str, change: Callable[[HostRecord | None], HostRecord | None]) -> HostRecord | None:
    """Change a host's record by compare and swap; `change` gets it as it is (None: there is none), as often as needed.

    Returns the record afterwards; where `change` returns None or what it got, nothing is written. Raises StoreError,
    IntegrityError.
    """
    for _try in range(_MOST_TRIES):
        found: HostRecord | None
        try:
            found, version = read_host(store, path)
        except NotFoundError:
            found, version = None, ""
        wanted = change(found)
        if wanted is None or wanted == found:
            return found
        data = dump_checked(wanted.to_json())
        if store.write(path, data, if_absent=True) if found is None else store.write(path, data, if_version=version):
            return wanted
        time.sleep(uniform(0, 0.05))
    raise StoreError(f"{store.uri}: {path}: others changed it {_MOST_TRIES} times; try again")


def see_host(store: Store, path: str, host: Host, now: str) -> HostRecord:
    """Record what a host is now, with what changed since it was last looked at, and that it was seen. Raises as `change_host`."""
    record = change_host(store, path, lambda found: HostRecord(host) if found is None else found.seen(host, now))
    store.write(seen_path(path), b"seen\n")
    return record if record is not None else HostRecord(host)


def seen_path(path: str) -> str:
    """Return where a store keeps when the host of a record was last seen."""
    return f"{path.removesuffix('.json')}.seen"


def host_ages(store: Store, path: str | None = None) -> dict[str, float]:
    """Return how many seconds ago each host was seen, by the path of its record.

    By the store's clock, where `path` is the record of a host that was seen just now, else by this host's. Raises StoreError.
    """
    infos = {info.path: info.modified for info in store.list("hosts/")}
    now = infos.get(seen_path(path), time.time()) if path is not None else time.time()
    return {
        one: max(0.0, now - infos.get(seen_path(one), modified))
        for one, modified in infos.items()
        if one.endswith(".json")
    }
