"""Action records: what an action produced, with its preimage, facts and timings."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Final, cast

from artifacts.errors import IntegrityError
from artifacts.keys import canonical_json, canonical_parsed
from artifacts.refs import ArtifactRef, digest_bytes
from artifacts.store import is_relative_path

RECORD_SCHEMA: Final = 1


@dataclass(frozen=True)
class ActionRecord:
    """What one action produced.

    `outputs` maps file names to references; `facts` is a small JSON object of what was measured or
    found (it is read by the planner and goes into manifests); `seconds` is wall time; `started` is
    RFC 3339 in UTC; `producer` says who ran it (host name, Enginery's version) and never enters a key.
    """

    preimage: Mapping[str, Any]
    outputs: Mapping[str, ArtifactRef]
    facts: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    started: str = ""
    producer: Mapping[str, Any] = field(default_factory=dict)

    @property
    def stage(self) -> str:
        """The stage that ran."""
        return str(self.preimage["stage"])

    @cached_property
    def key(self) -> str:
        """The action's key, computed from the preimage (never stored apart from it)."""
        return digest_bytes(canonical_json(dict(self.preimage)))

    def to_bytes(self) -> bytes:
        """Serialise the record as indented JSON, for people who read the store."""
        document = {
            "schema": RECORD_SCHEMA,
            "key": self.key,
            "preimage": dict(self.preimage),
            "outputs": {name: ref.to_json() for name, ref in self.outputs.items()},
            "facts": dict(self.facts),
            "seconds": round(self.seconds, 4),
            "started": self.started,
            "producer": dict(self.producer),
        }
        # Of what a reader will see: JSON has no tuples.
        seen = json.loads(json.dumps({**document, "preimage": None}, allow_nan=False))
        document["check"] = digest_bytes(canonical_parsed(seen))
        return json.dumps(document, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False).encode() + b"\n"

    @classmethod
    def from_bytes(cls, data: bytes) -> ActionRecord:
        """Read a record back.

        Raises IntegrityError where it is not JSON, has another schema, lacks a field, names an output outside the
        folder that outputs are brought to, where its preimage does not hash to the key that it states, or the rest not to
        its check.
        """
        try:
            document = json.loads(data)
            # Finite numbers and whole strings, so that what was read can be written again; the preimage once, below.
            inside = isinstance(document, dict)
            check = document.pop("check", None) if inside else None
            rest = canonical_parsed({**document, "preimage": None} if inside else document)
            preimage = canonical_parsed(document.get("preimage") if inside else None)
        except (ValueError, RecursionError) as err:
            raise IntegrityError(f"action record is not JSON: {err}") from err
        if not isinstance(document, dict) or document.get("schema") != RECORD_SCHEMA:
            found = document.get("schema") if isinstance(document, dict) else type(document).__name__
            raise IntegrityError(f"action record: schema {found!r}, expected {RECORD_SCHEMA}")
        try:
            record = cls(
                preimage=_preimage(document["preimage"]),
                outputs={
                    _file_name(name): ArtifactRef.from_json(ref) for name, ref in _mapping(document["outputs"]).items()
                },
                facts=_mapping(document["facts"]),
                seconds=_number(document["seconds"]),
                started=str(document["started"]),
                producer=_mapping(document["producer"]),
            )
            stated = document["key"]
        except (KeyError, TypeError, ValueError, OverflowError) as err:
            raise IntegrityError(f"action record is incomplete: {err!r}") from err
        key = digest_bytes(preimage)
        if key != stated:
            raise IntegrityError(f"action record states key {str(stated)[:12]} but its preimage hashes to {key[:12]}")
        # What the key does not cover; records of earlier releases have no check.
        if check is not None and check != digest_bytes(rest):
            raise IntegrityError("action record: its outputs, facts or times are not those that were written")
        vars(record)["key"] = key  # computed once: what was parsed has JSON types only
        return record


def _mapping(value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise TypeError(f"expected an object, got {type(value).__name__}")
    return value


def _preimage(value: object) -> dict[str, Any]:
    preimage = _mapping(value)
    if type(preimage["stage"]) is not str:
        raise TypeError(f"stage is {preimage['stage']!r}")
    return preimage


def _number(value: object) -> float:
    if type(value) not in (int, float):  # float() would also read the text "inf"
        raise TypeError(f"expected a number, got {value!r}")
    return float(cast("float", value))


def _file_name(name: str) -> str:
    if not is_relative_path(name):
        raise ValueError(f"output {name!r} is not a file name")
    return name
