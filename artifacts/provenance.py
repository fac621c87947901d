"""Where an engine came from, in the shape of SLSA provenance 1.0, from its manifest.

An in-toto statement (https://in-toto.io/Statement/v1) whose predicate is https://slsa.dev/provenance/v1. It is
one of the engine's files, so that the manifest has its digest and the engine's signature covers it. It
holds times, so that two builders of one engine make two: its name has digits of its digest.
"""

from __future__ import annotations

import json
from typing import Any, Final
from urllib.parse import quote

from artifacts.manifest import Manifest

PROVENANCE_TYPE: Final = "application/vnd.in-toto+json"
STATEMENT: Final = "https://in-toto.io/Statement/v1"
PREDICATE: Final = "https://slsa.dev/provenance/v1"
BUILD_TYPE: Final = "urn:enginery:build:v1"
# What a toolchain states beside tools.
_NO_PACKAGE: Final = ("os", "arch")


def provenance_of(manifest: Manifest, builder: str | None = None) -> bytes:
    """Return the provenance of an engine as JSON, from its manifest without this very file.

    `builder` is a URI for who ran the build (SLSA's builder.id); default: one that names the host.
    """
    made, identity = manifest.provenance, manifest.identity
    statement = {
        "_type": STATEMENT,
        "subject": [{"name": name, "digest": {"sha256": entry.digest}} for name, entry in manifest.files.items()],
        "predicateType": PREDICATE,
        "predicate": {
            "buildDefinition": {
                "buildType": BUILD_TYPE,
                "externalParameters": {
                    "recipe": {"name": identity.recipe, "sha256": made.recipe_digest, "text": made.recipe_text},
                    "target": identity.target,
                    "precision": manifest.precision.asked,
                },
                "internalParameters": {"host": made.host.model_dump(mode="json"), "given": manifest.precision.given},
                "resolvedDependencies": _dependencies(manifest),
            },
            "runDetails": {
                "builder": {
                    "id": builder or f"urn:enginery:host:{quote(made.host.name, safe='')}",
                    "version": {"enginery": made.enginery},
                },
                "metadata": {
                    "invocationId": made.key,
                    "startedOn": min((step.started for step in made.steps), default=identity.created),
                    "finishedOn": identity.created,
                },
            },
        },
    }
    return json.dumps(statement, indent=1, ensure_ascii=False, allow_nan=False).encode() + b"\n"


def provenance_name(digest: str) -> str:
    """Return what the file of this SHA-256 is called among an engine's files."""
    return f"provenance-{digest[:12]}.intoto.json"


def _dependencies(manifest: Manifest) -> list[dict[str, Any]]:
    made = manifest.provenance
    found: list[dict[str, Any]] = [
        {"name": name, "digest": {"sha256": digest}} for name, digest in sorted(made.source.items())
    ]
    if made.git is not None:
        found.append(
            {"name": "git", "digest": {"gitCommit": made.git.commit}, "annotations": {"dirty": made.git.dirty}}
        )
    if manifest.calibration is not None:
        found.append({"name": "calibration", "digest": {"sha256": manifest.calibration.digest}})
    tools: dict[str, str] = {}
    for step in made.steps:
        tools |= {
            name: version
            for name, version in step.toolchain.items()
            if isinstance(version, str) and name not in _NO_PACKAGE
        }
    found.extend(
        {"name": name, "uri": f"pkg:generic/{quote(name, safe='')}@{quote(version, safe='')}"}
        for name, version in sorted(tools.items())
    )
    return found
