"""What was found when an engine was executed after it had been published: a document beside its manifest.

engines/<recipe>/<target>/<build>/verification/<device>-<key>.json

A manifest never changes (it is signed, and its digest is what channels and records name), so what was measured later stands
beside it and names the manifest's digest: it says nothing of any other. See docs/adr/0004-executed-later.md.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any, Final, Literal

from pydantic import ConfigDict, Field, ValidationError

from artifacts.errors import IntegrityError
from artifacts.manifest import DeviceFacts, HostFacts, Manifest
from artifacts.manifest_base import Digest, Instant, Part
from artifacts.manifest_gates import Measured

ATTESTATION_SCHEMA: Final = 1
FOLDER: Final = "verification"
_UNSAFE: Final = re.compile(r"[^a-z0-9]+")


class Attestation(Part):
    """One execution of a published engine, judged by the gates that its manifest states."""

    model_config = ConfigDict(title="Enginery attestation, version 1")

    schema_version: Literal[1] = Field(alias="schema", description="Checked before anything else.")
    engine: str = Field(description="recipe/target/build.")
    manifest: Digest = Field(
        description="SHA-256 of the manifest's bytes: this very engine, and no later one of its name."
    )
    created: Instant
    key: Digest = Field(description="Key of the verify action; its record holds the whole report.")
    host: HostFacts
    device: DeviceFacts | None = Field(description="The GPU that it ran on; null: the CPU.")
    gpu: str = Field(description="Compute capability, or cpu.")
    runtime_version: str
    passed: bool = Field(description="Whether the gates that the manifest states passed.")
    reasons: tuple[str, ...] = Field(description="Each gate that failed, with its bound and what was found.")
    measured: Measured
    enginery: str = Field(description="Version of Enginery.")

    @property
    def name(self) -> str:
        """Its name beside the manifest: what it ran on, and the key of what was measured, which differs by driver."""
        device = self.device.name if self.device is not None and self.device.name is not None else ""
        words = _UNSAFE.sub("-", f"{self.gpu} {device}".lower()).strip("-")
        return f"{words}-{self.key[:16]}.json"

    def to_bytes(self) -> bytes:
        """Serialise as indented JSON."""
        document = self.model_dump(mode="json", by_alias=True)
        return json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False).encode() + b"\n"

    @classmethod
    def from_bytes(cls, data: bytes) -> Attestation:
        """Read an attestation back. Raises IntegrityError where it is none, or of a version that is not read."""
        try:
            document: Any = json.loads(data)
        except (ValueError, RecursionError) as err:
            raise IntegrityError(f"attestation is not JSON: {err}") from err
        found = document.get("schema") if isinstance(document, dict) else None
        if type(found) is not int or found != ATTESTATION_SCHEMA:
            raise IntegrityError(f"attestation: schema {found!r}, this release reads {ATTESTATION_SCHEMA}")
        try:
            return cls.model_validate_json(data)
        except ValidationError as err:
            first = err.errors(include_url=False, include_context=False)[0]
            where = ".".join(str(part) for part in first["loc"]) or "attestation"
            raise IntegrityError(f"attestation: {where}: {first['msg']}") from err


def effective(manifest: Manifest, attestations: Sequence[Attestation]) -> Manifest:
    """Return a manifest as readers take it who know what was executed later; `attestations` are about this very manifest.

    What the builder measured of the engine itself stands. Where it measured nothing, the newest attestation does, one that
    failed before one that passed; and one that failed, on any device, fails the engine.
    """
    if not attestations:
        return manifest
    own = manifest.verification
    failed = [attestation for attestation in attestations if not attestation.passed]
    telling = max(failed or attestations, key=lambda attestation: (attestation.created, attestation.name))
    verification = own.model_copy(
        update={
            "passed": own.passed and not failed,
            "engine": own.engine if own.engine.executed else telling.measured,
        }
    )
    return manifest.model_copy(update={"verification": verification})
