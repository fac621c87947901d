"""A full disk, a read-only one, no permission: the short form of bench/faults/disk.py."""

from __future__ import annotations

import os
import random
import subprocess
from pathlib import Path
from unittest.mock import patch

import pytest

from bench.faults.disk import file_system, harm

pytestmark = pytest.mark.long


@pytest.mark.parametrize("action", ["publish", "gc"])
def test_what_cannot_be_written_is_told_and_is_done_afterwards(action: str, tmp_path: Path):
    try:
        with file_system(tmp_path / "disk"):
            pass
    except (subprocess.CalledProcessError, FileNotFoundError):
        pytest.skip("needs the right to mount a tmpfs (root)")
    seed = random.randrange(1 << 32)
    with patch.dict(os.environ):  # entering a place changes the environment
        tallies = harm("folder", action, ["full", "read-only", "denied"], 3, random.Random(seed))
    assert [words for tally in tallies.values() for words in tally.violations] == [], seed
    assert all(tally.refused for tally in tallies.values()), seed
