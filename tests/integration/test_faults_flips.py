"""No object with a flipped bit, or cut short, is used or lost in silence: the short form of bench/faults/flips.py."""

from __future__ import annotations

import os
import random
from pathlib import Path
from unittest.mock import patch

import pytest

from bench.faults.flips import damage_all

pytestmark = pytest.mark.slow


def test_whatever_is_damaged_is_refused_or_missed_aloud(tmp_path: Path):
    with patch.dict(os.environ):  # entering a place changes the environment
        tallies = damage_all(tmp_path, 3, random.Random(5))
    assert {kind: tally.findings for kind, tally in tallies.items() if tally.findings} == {}
    assert {
        "blob",
        "record",
        "manifest",
        "engine's file",
        "provenance",
        "signature",
        "channel",
        "pin",
        "host",
        "rollout",
        "attestation",
        "publication",
        "mark",
        "claim",
        "plans",
        "timing cache",
        "refit",
        "latest",
    } <= set(tallies)
    for kind in ("plans", "timing cache"):
        assert tallies[kind].answers == {"missed": tallies[kind].damages}
    for kind in ("blob", "manifest", "engine's file", "provenance", "signature"):
        assert tallies[kind].answers == {"refused": tallies[kind].damages}
    assert tallies["attestation's signature"].answers == {"missed": tallies["attestation's signature"].damages}
    assert tallies["attestation"].answers["missed"] > 0.4 * tallies["attestation"].damages  # but for blanks
    assert tallies["record"].answers["missed"] > 0.8 * tallies["record"].damages  # but for blanks
