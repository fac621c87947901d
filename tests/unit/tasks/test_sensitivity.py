from __future__ import annotations

import json

import pytest

from recipes.gates import Verdict
from tasks import sensitivity
from tasks.sensitivity import Group, fewest
from tests.unit.tasks.bundles import request


@pytest.mark.parametrize("most", [0, 1, 5, 32])
@pytest.mark.parametrize("needed", [0, 1, 2, 3, 5, 6, 31, 32, 33])
def test_the_fewest_groups_that_pass_are_found_in_few_tries_and_no_more_than_half_are_kept(most, needed):
    tries = []

    def passes(count):
        tries.append(count)
        return count >= needed

    assert fewest(passes, most) == (needed if needed <= most else None)
    assert max(tries) <= most
    assert len(tries) <= 2 * max(1, most).bit_length() + 1


@pytest.mark.parametrize(("needed", "kept"), [({"c"}, ["c"]), ({"c", "a"}, ["a", "c"]), ({"c", "a", "d"}, None)])
def test_the_most_sensitive_are_kept_and_at_most_half(tmp_path, monkeypatch, needed, kept):
    """Distances and gates are made up here; tests/integration/test_fragile.py has them measured."""
    distances = {"a": 0.2, "b": 0.0, "c": 0.9, "d": 0.1}
    monkeypatch.setattr(sensitivity, "_nodes", lambda _request: (set(), list(distances)))
    monkeypatch.setattr(
        sensitivity,
        "_measured",
        lambda _request, groups, _globs: [Group(one, distances[one[0]], 1.0) for one in groups],
    )
    monkeypatch.setattr(sensitivity, "_verdict", lambda _request, nodes: Verdict(passed=needed <= set(nodes)))
    asked = request("sensitivity", {"precision": "int8", "keep": []}, {}, tmp_path)
    facts = sensitivity.run(asked).facts
    assert (facts["groups"], facts["kept_groups"]) == (4, None if kept is None else len(kept))
    assert facts["kept"] == (kept or [])
    assert max(tried["kept_groups"] for tried in facts["tried"]) <= 2
    assert sorted(json.loads((asked.output_dir / "keep.json").read_text())) == (kept or [])
    groups = json.loads((asked.output_dir / "sensitivity.json").read_text())["groups"]
    assert [group["nodes"] for group in groups] == [["c"], ["a"], ["d"], ["b"]]
