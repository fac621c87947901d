"""What `enginery verify` does: every byte of an engine against its manifest, and the execution that a build could not do."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from artifacts.errors import ArtifactError, IntegrityError, NotFoundError, TrustError
from enginery.asking import require_trusted
from enginery.output import FAILED, note, print_json

if TYPE_CHECKING:
    from artifacts.attestation import Attestation
    from artifacts.catalog import EngineCatalog, EngineId
    from artifacts.host import Host
    from artifacts.manifest import Manifest
    from artifacts.trust import Trust
    from enginery.trusting import Unchecked

# state: whole | damaged | untrusted (with a policy); with --execute also passed | failed (executed now, or the execution ended in an error) | waiting.
Row = dict[str, Any]


def verify_folder(folder: Path, judge: Trust | Unchecked) -> Row:
    """Compare a pulled engine with its manifest, and who signed it with a policy."""
    from enginery.client import check

    folder = folder.parent if folder.is_file() else folder
    try:
        manifest = check(folder, trust=judge)
    except (IntegrityError, NotFoundError) as err:
        return _row(str(folder), "damaged", str(err))
    except TrustError as err:
        return _row(str(folder), "untrusted", str(err))
    return _row(str(manifest.identity), "whole", _checked(manifest), manifest)


def verify_engine(
    catalog: EngineCatalog, engine: EngineId, judge: Trust | Unchecked, *, execute: bool, again: bool
) -> Row:
    """Compare an engine of a store with its manifest, and who signed it with a policy.

    With `execute`, run it where it was not run yet.
    """
    try:
        require_trusted(catalog, engine, judge)
        data = catalog.manifest_bytes(engine)
        manifest = catalog.read_manifest(engine, data)
        with catalog.store.scratch() as folder:
            for name, entry in manifest.files.items():
                catalog.fetch(engine, name, entry, folder / name)
    except (IntegrityError, NotFoundError) as err:
        return _row(str(engine), "damaged", str(err))
    except TrustError as err:
        return _row(str(engine), "untrusted", str(err))
    manifest = catalog.effective(engine)
    row = _row(str(engine), "whole", _checked(manifest), manifest)
    if execute and (again or not manifest.verification.engine.executed):
        return row | _executed(catalog, engine, manifest)
    return row


def verify_deep(catalog: EngineCatalog, spare: str | None, judge: Trust | Unchecked, *, as_json: bool) -> None:
    """Read a whole store, move aside and repair what is damaged, and print it; ends with status 1 where damage stays."""
    from artifacts.deep import DeepCheck
    from artifacts.store import open_store
    from enginery.rows import Rows, print_rows, say

    check = DeepCheck(catalog.store, open_store(spare) if spare is not None else None)
    rows: list[Row] = [
        {"path": found.path, "state": found.state, "found": found.why, "moved": found.moved} for found in check.run()
    ]
    for engine in catalog.engines():
        try:
            require_trusted(catalog, engine, judge)
        except (TrustError, NotFoundError) as err:
            rows.append({"path": engine.path, "state": "untrusted", "found": str(err), "moved": None})
    if as_json:
        print_json({"checked": check.checked, "damaged": rows})
    else:
        table = Rows(("object", "state", "what was found"))
        for row in rows:
            table.add_row(row["path"], row["state"], row["found"])
        if rows:
            print_rows(table)
        states = [str(row["state"]) for row in rows]
        counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
        aside = f"; what was damaged lies in quarantine/{check.stamp}" if any(row["moved"] for row in rows) else ""
        say(f"read {check.checked} objects: {counts or 'all whole'}{aside}")
    if any(row["state"] != "repaired" for row in rows):
        raise typer.Exit(FAILED)


def print_verified(rows: list[Row]) -> None:
    """Print one line for each engine, and how many there are of each state."""
    from enginery.rows import Rows, print_rows, say

    table = Rows(("engine", "state", "executed", "what was found"))
    for row in rows:
        table.add_row(row["engine"], row["state"], {True: "yes", False: "no", None: "-"}[row["executed"]], row["found"])
    if rows:
        print_rows(table)
        states = [row["state"] for row in rows]
        counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
        say(f"{len(rows)} engine{'s' if len(rows) != 1 else ''}: {counts}")


def _executed(catalog: EngineCatalog, engine: EngineId, manifest: Manifest) -> Row:
    from tasks.errors import TaskError
    from tasks.executing import execute, why_not_here

    host = _this_host()
    reasons = why_not_here(manifest, host)
    if reasons:
        return {"state": "waiting", "found": f"cannot be executed here: {'; '.join(reasons)}"}
    note(f"executing {engine}")
    try:
        attestation = execute(catalog, engine, host)
    except (TaskError, ArtifactError) as err:
        return {"state": "failed", "found": str(err)}
    return {
        "state": "passed" if attestation.passed else "failed",
        "executed": True,
        "found": _words(attestation),
        "attestation": attestation.model_dump(mode="json", by_alias=True),
    }


def _this_host() -> Host:
    from tasks.toolchain import probe_host

    return probe_host()


def _words(attestation: Attestation) -> str:
    measured = attestation.measured
    parts = [] if attestation.passed else list(attestation.reasons)
    if measured.parity is not None:
        distance = measured.parity.relative_l2
        figure = "not finite" if distance is None else f"{distance:.1e}"
        parts.append(f"relative L2 {figure} over {len(measured.cases)} shapes, {measured.parity.non_finite} NaN or Inf")
    if measured.metric is not None and measured.metric.value is not None:
        parts.append(f"{measured.metric.name} {measured.metric.value:.4f}")
    return "; ".join(parts)


def _checked(manifest: Manifest) -> str:
    return f"{len(manifest.files)} file{'s' if len(manifest.files) != 1 else ''}, {manifest.size} bytes as the manifest says"


def _row(engine: str, state: str, found: str, manifest: Manifest | None = None) -> Row:
    executed = manifest.verification.engine.executed if manifest is not None else None
    return {"engine": engine, "state": state, "executed": executed, "found": found}
