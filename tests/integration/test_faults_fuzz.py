"""Mutated recipes, manifests, channels and signatures are read or refused in words: the short form of bench/faults/fuzz.py."""

from __future__ import annotations

import os
import random
from pathlib import Path
from unittest.mock import patch

import pytest

from bench.faults.fuzz import fuzz, readers


@pytest.mark.parametrize("reader", ["recipe", "manifest", "channel", "signature"])
def test_no_mutation_is_a_traceback(reader: str, tmp_path: Path):
    with patch.dict(os.environ):  # entering a place changes the environment
        tally = fuzz(*readers(tmp_path)[reader], 150, random.Random(f"{reader} 7"))
    assert tally.findings == []
    assert tally.refused.total() > 50  # most mutations break something
