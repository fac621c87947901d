"""Many processes on one store at once: the short form of bench/faults/crowd.py."""

from __future__ import annotations

import os
import random
from pathlib import Path
from unittest.mock import patch

import pytest

from bench.faults.checker import Report, State
from bench.faults.crowd import Grouped, Told, contradictions, crowd
from bench.faults.kills import STORES, places_of
from bench.faults.world import RECIPES, Place, engine, make_place, promote, publish

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("store", STORES)
def test_what_eight_processes_do_at_once_leaves_a_sound_store(store: str, tmp_path: Path):
    if store == "s3":
        pytest.importorskip("moto", reason="moto is not installed (pip install 'enginery[dev]')")
    seed = random.randrange(1 << 32)
    # Entering a place changes the environment, which is put back.
    with patch.dict(os.environ), places_of(store, tmp_path / "places", 1000) as places:
        tally = crowd(next(places), 3, 8, seed, builds=False)
    assert tally.violations == [], seed
    assert tally.operations["publish"] > 0, seed
    assert tally.checks > 0


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A store with one engine, which is promoted."""
    folder = tmp_path_factory.mktemp("told")
    made = make_place(folder, str(folder / "store"), signed=False)
    publish(made, RECIPES[0], 1)
    promote(made, RECIPES[0], 1)
    return made


UNTRUE = {
    "a move that is not there": (Told("promote", 1, "why", "0" * 32), "told"),
    "an engine of other bytes": (Told("publish", 1, "why", "0" * 64), "published"),
    "a pin of what is gone": (Told("pin", 2, "why", "digits/x/fp16-000002"), "pinned"),
    "a record that is a miss": (Told("keep", 1, "why", value=False), "used"),
    "engines that appeared one by one": (
        Told("group", 1, "why", Grouped(dict.fromkeys("ab", "0" * 64), [frozenset(), frozenset("a"), frozenset("ab")])),
        "together",
    ),
    "engines of which one never appeared": (
        Told("group", 1, "why", Grouped(dict.fromkeys("ab", "0" * 64), [frozenset(), frozenset("a")])),
        "together",
    ),
    "a promotion that was refused": (Told("promote", 1, "why", error="ChannelError: another"), "used"),
    "a publication that was refused": (Told("publish", 1, "why", error="NotFoundError: a blob"), "used"),
    "a collection that was refused": (Told("collect", 1, "why", error="StoreError: somebody"), "used"),
}


@pytest.mark.parametrize("case", UNTRUE)
def test_what_was_told_and_is_not_so_is_found(place: Place, case: str):
    told, invariant = UNTRUE[case]
    manifest = f"{engine(RECIPES[0], 1).path}/manifest.json"
    right = Report(state=State({manifest: publish(place, RECIPES[0], 1)}))
    honest = Told("publish", 1, "why", right.state.manifests[manifest])
    assert contradictions(place.store, [honest], right) == []
    others = [] if invariant == "published" else [honest]
    found = contradictions(place.store, [*others, told], right)
    assert [name for name, _words in found] == [invariant]


def test_what_was_promoted_last_and_is_gone_is_found(place: Place):
    assert [name for name, _words in contradictions(place.store, [], Report())] == ["pinned"]
