"""Whom a host believes: which keys may sign engines and move channels, of which recipes, and until when.

A policy is one file (docs/trust.md). Its rules are pure: `TrustPolicy.from_document` reads it,
`Trust` judges what a store holds. A signature has no time that could be believed, so a key's validity
is compared with the judge's own clock: when a key expires, what it signed is refused until another
key has signed it too.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from artifacts.attestation import Attestation
from artifacts.errors import PolicyError, TrustError
from artifacts.manifest import Manifest
from artifacts.refs import digest_bytes
from artifacts.signing import (
    ATTESTATION_NAME,
    STATEMENT_NAME,
    check_signature,
    hint_of,
    public_key,
    signed_contents,
)

POLICY_VERSION: Final = 1
What = Literal["engines", "channels"]
Globs = Annotated[tuple[str, ...], Field(min_length=1)]


class _Strict(BaseModel):
    # A rule that is misspelt must not be passed over.
    model_config = ConfigDict(extra="forbid", frozen=True)


class KeyFacts(_Strict):
    """One key: its public half as PEM (or the file that holds it), and when it may be used."""

    public_key: str
    fingerprint: str | None = Field(default=None, description="Checked against the key where it is given.")
    not_before: dt.datetime | None = None
    not_after: dt.datetime | None = None


class Rule(_Strict):
    """Which keys may sign what; names are globs (`*`, `?`, `[ab]`), upper and lower case differ."""

    keys: Globs
    sign: tuple[What, ...] = ("engines", "channels")
    recipes: Globs = ("*",)
    channels: Globs = ("*",)


class _Document(_Strict):
    enginery_trust: Literal[1] = Field(alias="enginery-trust")
    keys: Annotated[dict[str, KeyFacts], Field(min_length=1)]
    allow: Annotated[tuple[Rule, ...], Field(min_length=1)]


@dataclass(frozen=True)
class TrustedKey:
    """A key of the policy: its name there, its fingerprint, its PEM, and when it may be used."""

    name: str
    fingerprint: str
    pem: bytes
    not_before: dt.datetime | None = None
    not_after: dt.datetime | None = None


@dataclass(frozen=True)
class TrustPolicy:
    """The keys, by fingerprint, and what they are allowed; `origin` is what messages call the policy."""

    origin: str
    keys: Mapping[str, TrustedKey]
    rules: tuple[Rule, ...]

    @classmethod
    def from_document(cls, document: Any, origin: str, read_key: Callable[[str], bytes]) -> TrustPolicy:
        """Read a policy from JSON values; `read_key` returns the bytes of a key file that it names.

        Raises PolicyError, whose `path` says where in the document.
        """
        try:
            read = _Document.model_validate(document)
        except ValidationError as err:
            first = err.errors(include_url=False, include_context=False)[0]
            raise policy_error(origin, first["msg"], *first["loc"]) from err
        keys: dict[str, TrustedKey] = {}
        for name, facts in read.keys.items():
            key = _key(name, facts, origin, read_key)
            if key.fingerprint in keys:
                raise policy_error(origin, f"is the key {keys[key.fingerprint].name} again", "keys", name)
            keys[key.fingerprint] = key
        for number, rule in enumerate(read.allow):
            for glob in rule.keys:
                if glob not in read.keys:
                    raise policy_error(
                        origin, f"there is no key {glob!r} (keys: {', '.join(read.keys)})", "allow", number
                    )
        return cls(origin, keys, read.allow)

    def allows(self, key: TrustedKey, what: What, recipe: str, channel: str | None) -> bool:
        """Tell whether a key may sign engines, or moves of channels, of a recipe (for this channel)."""
        return any(
            key.name in rule.keys
            and what in rule.sign
            and any(fnmatchcase(recipe, glob) for glob in rule.recipes)
            and (channel is None or any(fnmatchcase(channel, glob) for glob in rule.channels))
            for rule in self.rules
        )


@dataclass(frozen=True)
class Trust:
    """Judges what a store holds by a policy; `now` is asked for the time, in UTC."""

    policy: TrustPolicy
    now: Callable[[], dt.datetime] = field(default=lambda: dt.datetime.now(dt.timezone.utc))

    def check_engine(
        self, manifest: Manifest, data: bytes, signatures: Mapping[str, bytes], channel: str | None = None
    ) -> str:
        """Return the fingerprint of the allowed key that signed an engine, whose manifest is `data`, byte for byte.

        `signatures` is by the fingerprint that each claims, `channel` the one that the engine is asked for by. Raises
        TrustError where there is none, and SigningError where signatures cannot be checked here.
        """
        return self._check(f"engine {manifest.identity}", signed_contents(manifest, data), signatures, "engines",
                           manifest.identity.recipe, channel)  # fmt: skip

    def __call__(self, data: bytes, signature: bytes | None) -> None:
        """Check the manifest and the signature of an engine in a local folder. Raises as `check_engine`, IntegrityError."""
        hint = hint_of(signature) if signature is not None else None
        signatures = {hint: signature} if hint is not None and signature is not None else {}
        self.check_engine(Manifest.from_bytes(data), data, signatures)

    def believes(self, attestation: Attestation, signatures: Mapping[str, bytes]) -> bool:
        """Tell whether a key that may sign engines of its recipe signed what was found when an engine was executed.

        Raises SigningError where signatures cannot be checked here.
        """
        contents = {ATTESTATION_NAME: digest_bytes(attestation.to_bytes())}
        recipe = attestation.engine.partition("/")[0]
        try:
            self._check(f"attestation of {attestation.engine}", contents, signatures, "engines", recipe, None)
        except TrustError:
            return False
        return True

    def check_move(self, statement: bytes, signature: bytes | None, recipe: str, channel: str) -> str:
        """Return the fingerprint of the allowed key that signed a channel's move. Raises as `check_engine` does."""
        hint = hint_of(signature) if signature is not None else None
        found = {hint: signature} if hint is not None and signature is not None else {}
        return self._check(f"channel {channel} of {recipe}", {STATEMENT_NAME: digest_bytes(statement)}, found,
                           "channels", recipe, channel)  # fmt: skip

    def _check(
        self, name: str, contents: Mapping[str, str], signatures: Mapping[str, bytes], what: What, recipe: str,
        channel: str | None,
    ) -> str:  # fmt: skip
        if not signatures:
            raise TrustError(f"{name} is not signed, and {self.policy.origin} asks for it")
        refusals = []
        for fingerprint, signature in sorted(signatures.items()):
            key = self.policy.keys.get(fingerprint)
            refusal = f"the key {fingerprint[:16]} is not known" if key is None else None
            if key is not None:
                refusal = self._refusal(key, what, recipe, channel)
                if refusal is None:
                    try:
                        check_signature(signature, contents, key.pem)
                    except TrustError as err:
                        refusal = f"{key.name}: {err}"
                    else:
                        return key.fingerprint
            refusals.append(str(refusal))
        raise TrustError(f"{name} is not signed by a key that {self.policy.origin} allows: {'; '.join(refusals)}")

    def _refusal(self, key: TrustedKey, what: What, recipe: str, channel: str | None) -> str | None:
        now = self.now()
        if key.not_before is not None and now < key.not_before:
            return f"{key.name} is valid from {_instant(key.not_before)} on, and it is {_instant(now)}"
        if key.not_after is not None and now > key.not_after:
            return f"{key.name} expired on {_instant(key.not_after)}"
        if not self.policy.allows(key, what, recipe, channel):
            by = f" by channel {channel}" if channel is not None else ""
            return f"{key.name} may not sign {what} of {recipe}{by}"
        return None


def policy_error(origin: str, what: str, *path: str | int) -> PolicyError:
    """Return the error that says what is wrong at a path of a policy."""
    where = ".".join(str(part) for part in path)
    return PolicyError(f"{origin}: {where}: {what}" if where else f"{origin}: {what}", path)


def _key(name: str, facts: KeyFacts, origin: str, read_key: Callable[[str], bytes]) -> TrustedKey:
    text = facts.public_key.encode() if "-----BEGIN" in facts.public_key else read_key(facts.public_key)
    try:
        fingerprint, pem = public_key(text)
    except ValueError as err:
        raise policy_error(origin, str(err), "keys", name, "public_key") from err
    if facts.fingerprint is not None and facts.fingerprint != fingerprint:
        raise policy_error(origin, f"the key's is {fingerprint}, not {facts.fingerprint}", "keys", name, "fingerprint")
    for when in ("not_before", "not_after"):
        moment = getattr(facts, when)
        if moment is not None and moment.tzinfo is None:
            raise policy_error(origin, "needs a time zone (2027-01-01T00:00:00Z)", "keys", name, when)
    return TrustedKey(name, fingerprint, pem, facts.not_before, facts.not_after)


def _instant(moment: dt.datetime) -> str:
    return moment.astimezone(dt.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
