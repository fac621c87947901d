"""May an engine be promoted: rules over manifests, without I/O."""

from __future__ import annotations

from dataclasses import dataclass

from artifacts.channels import Speed
from artifacts.manifest import Manifest
from artifacts.manifest_gates import Verification

# An engine may be slower than the one that it replaces by this share: measures of one engine differ by as much.
MAX_SLOWER = 0.05


@dataclass(frozen=True)
class Objection:
    """A rule that forbids a promotion; `waiver` is what may be waived, or None where nothing may."""

    waiver: str | None
    text: str


def objections(
    verification: Verification, speed: Speed | None, *, max_slower: float = MAX_SLOWER
) -> tuple[Objection, ...]:
    """Return every rule that an engine breaks: its gates, that it ran on its device, that it is not much slower.

    `verification` is the engine's (with what was executed since it was published); `speed` None is not compared.
    """
    found = []
    if not verification.passed:
        found.append(Objection(None, "its gates did not pass"))
    if not verification.engine.executed:
        found.append(
            Objection(
                "unexecuted", f"it was not executed on its device ({verification.engine.reason or 'no reason given'})"
            )
        )
    if speed is not None and speed.slower_by > max_slower:
        found.append(
            Objection(
                "slower",
                f"it is {speed.slower_by:.1%} slower than the one that it replaces ({speed.p50_ms:.3f} ms instead of "
                f"{speed.replaced_p50_ms:.3f} ms at the median of {speed.case}, {speed.device}; allowed: {max_slower:.1%})",
            )
        )
    return tuple(found)


def compare_speed(manifest: Manifest, replaced: Manifest | None) -> Speed | None:
    """Compare two engines by their median latencies in the cases that both were timed in, on devices of one name.

    Returns the case in which the engine does worst, or None where nothing can be compared.
    """
    new, old = manifest.benchmark, replaced.benchmark if replaced is not None else None
    if new is None or old is None or new.device is None or new.device != old.device:
        return None
    before = {(case.name, case.profile, case.batch, case.graph): case.latency_ms.p50 for case in old.cases}
    common = [
        Speed(
            device=new.device,
            case=f"{case.name}{' (CUDA graph)' if case.graph else ''}",
            p50_ms=case.latency_ms.p50,
            replaced_p50_ms=before[key],
        )
        for case in new.cases
        if (key := (case.name, case.profile, case.batch, case.graph)) in before and before[key] > 0
    ]
    return max(common, key=lambda speed: speed.slower_by, default=None)
