"""SIGKILL at random instants of every kind of action, on a folder and on S3: the short form of bench/faults/kills.py."""

from __future__ import annotations

import os
import random
from pathlib import Path
from unittest.mock import patch

import pytest

from bench.faults.kills import KINDS, STORES, kill_many, places_of
from bench.faults.world import Actors

pytestmark = pytest.mark.slow

# Kills of builds on a folder: test_kill.py. After a gc that was killed, a writer to S3 waits for minutes.
LEFT_OUT = (("build", "folder"), ("gc", "s3"))
CASES = [(kind, store) for store in STORES for kind in KINDS if (kind, store) not in LEFT_OUT]


@pytest.mark.parametrize(
    ("kind", "store"),
    [pytest.param(*case, marks=[pytest.mark.long] if case == ("build", "s3") else []) for case in CASES],
)
def test_what_is_killed_leaves_nothing_half_done(kind: str, store: str, tmp_path: Path):
    if store == "s3":
        pytest.importorskip("moto", reason="moto is not installed (pip install 'enginery[dev]')")
    seed, kills = random.randrange(1 << 32), 2 if kind == "build" else 3
    # Entering a place changes the environment, which is put back.
    with patch.dict(os.environ), places_of(store, tmp_path / "places") as places:
        tally = kill_many(kind, kills, seed, places, Actors())
    assert tally.violations == [], seed
    assert tally.kills == kills
