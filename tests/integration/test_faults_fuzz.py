"""Mutated recipes, manifests, channels, signatures and all else that a store holds as JSON are read or refused in words: the short form of bench/faults/fuzz.py."""

from __future__ import annotations

import os
import random
from unittest.mock import patch

import pytest

from bench.faults.fuzz import READERS, fuzz, readers

# Whatever a claim or a lease says that cannot be read, it is waited for, or protects, and nobody is refused.
NEVER_REFUSE = ("claim", "lease")


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory):
    with patch.dict(os.environ):  # entering a place changes the environment
        yield readers(tmp_path_factory.mktemp("fuzz"))


@pytest.mark.parametrize("reader", READERS)
def test_no_mutation_is_a_traceback(reader: str, known):
    tally = fuzz(*known[reader], 100, random.Random(f"{reader} 7"))
    assert tally.findings == []
    assert reader in NEVER_REFUSE or tally.refused.total() > 30  # most mutations break something
