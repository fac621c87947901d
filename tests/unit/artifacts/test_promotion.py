"""Which engines may be promoted, and how two are compared."""

from __future__ import annotations

from typing import Any

import pytest

from artifacts.channels import Speed
from artifacts.manifest import Manifest
from artifacts.manifest_gates import Verification
from artifacts.promotion import compare_speed, objections
from tests.engines import make_manifest, manifest_document

RAN = {"executed": True, "parity": {"relative_l2": 1e-4, "max_abs": 1e-3, "cosine": 1.0, "non_finite": 0}}
NOT_RUN = {"executed": False, "reason": "no such GPU here"}


def verification(*, passed: bool = True, engine: dict[str, Any] = RAN) -> Verification:
    import json

    document = manifest_document()["verification"]
    return Verification.model_validate_json(json.dumps(document | {"passed": passed, "engine": engine}))


def speed(new: float, old: float) -> Speed:
    return Speed(device="H200", case="online", p50_ms=new, replaced_p50_ms=old)


@pytest.mark.parametrize(
    ("judged", "measured", "limit", "waivers"),
    [
        (verification(), None, 0.05, []),
        (verification(), speed(1.0, 1.0), 0.0, []),
        (verification(), speed(1.05, 1.0), 0.0501, []),
        (verification(), speed(1.06, 1.0), 0.05, ["slower"]),
        (verification(), speed(0.5, 1.0), 0.0, []),
        (verification(engine=NOT_RUN), None, 0.05, ["unexecuted"]),
        (verification(passed=False), speed(2.0, 1.0), 0.05, [None, "slower"]),
        (verification(passed=False, engine=NOT_RUN), None, 0.05, [None, "unexecuted"]),
    ],
)
def test_objections(judged: Verification, measured: Speed | None, limit: float, waivers: list[str | None]) -> None:
    found = objections(judged, measured, max_slower=limit)
    assert [objection.waiver for objection in found] == waivers


def test_objections_say_what_was_measured() -> None:
    (slower,) = objections(verification(), speed(1.25, 1.0))
    assert "25.0% slower" in slower.text
    assert "1.250 ms instead of 1.000 ms" in slower.text
    assert "H200" in slower.text
    (unexecuted,) = objections(verification(engine=NOT_RUN), None)
    assert "no such GPU here" in unexecuted.text


def timed(device: str | None = "H200", **cases: float) -> Manifest:
    """An engine whose cases took these median milliseconds; a name that ends in `_graph` was replayed as a CUDA graph."""
    percentiles = {"p90": 9.0, "p99": 9.0, "mean": 9.0, "runs": 10}
    listed = [
        {
            "name": name.removesuffix("_graph"), "profile": "online", "batch": 1, "graph": name.endswith("_graph"),
            "steady": True, "warm_up_runs": 3, "latency_ms": percentiles | {"p50": p50},
            "end_to_end_ms": percentiles | {"p50": 99.0}, "device_ms": None, "throughput": 1.0, "copy_share": None,
            "gpu_memory_bytes": None,
        }
        for name, p50 in cases.items()
    ]  # fmt: skip
    rule = {
        "seconds": 1.0, "window_seconds": 0.1, "window_runs": 5, "windows": 3, "tolerance": 0.02, "most_samples": 100,
        "least_samples": 10,
    }  # fmt: skip
    return make_manifest({"benchmark": {"key": "0" * 64, "rule": rule, "device": device, "cases": listed}})


def test_engines_are_compared_in_the_case_in_which_the_new_one_does_worst() -> None:
    old = timed(one=1.0, two=2.0, two_graph=1.0, gone=1.0)
    found = compare_speed(timed(one=0.5, two=2.2, two_graph=1.2, new=9.0), old)
    assert (found.case, found.p50_ms, found.replaced_p50_ms, found.device) == ("two (CUDA graph)", 1.2, 1.0, "H200")
    assert found.slower_by == pytest.approx(0.2)


def test_what_cannot_be_compared_is_not() -> None:
    engine = timed(one=1.0)
    for other in (None, make_manifest(), timed("L4", one=1.0), timed(two=1.0), timed(one=0.0), timed()):
        assert compare_speed(engine, other) is None
    assert compare_speed(make_manifest(), engine) is None
    assert compare_speed(timed(None, one=1.0), timed(None, one=1.0)) is None
