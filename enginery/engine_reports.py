"""What `inspect` tells of an engine's folder: what was given, and what each of its ranges and weights costs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def engine_report(path: Path) -> dict[str, Any]:
    """Return what an engine's `manifest.json` says of its precision, and the calibration reports beside it, by part.

    Raises IntegrityError where the manifest or a report is damaged or gone.
    """
    from artifacts.errors import IntegrityError
    from artifacts.manifest import Manifest
    from artifacts.refs import digest_file

    manifest = Manifest.from_bytes(path.read_bytes())
    precision = manifest.precision
    reports = {}
    of_parts = {name: part.calibration for name, part in manifest.parts.items()} or {"": manifest.calibration}
    for part, one in of_parts.items():
        name = one.report if one is not None else None
        if name is None:
            continue
        file = path.parent / name
        if not file.is_file() or digest_file(file) != manifest.files[name].digest:
            raise IntegrityError(f"{file}: is not what {path.name} names; pull the engine again")
        reports[part] = json.loads(file.read_text("utf-8"))
    return {
        "engine": str(manifest.identity),
        "asked": precision.asked,
        "given": precision.given,
        "kept": dict(precision.kept_why) or dict.fromkeys(precision.kept, ""),
        "plan": {"file": manifest.plan, "bytes": manifest.files[manifest.plan].size} if manifest.plan else None,
        "reports": reports,
    }


def print_engine_report(document: dict[str, Any]) -> None:
    """Print it: the tables of `enginery show --ranges`, after a line about the engine."""
    from enginery.catalog_tables import print_ranges
    from enginery.rows import say

    say(
        f"{document['engine']}: {document['given']} given, {document['asked']} asked, {len(document['kept'])} nodes kept high"
    )
    if not document["reports"]:
        say("no calibrated ranges: nothing was quantised, or TensorRT found its own")
    print_ranges(document["reports"])
