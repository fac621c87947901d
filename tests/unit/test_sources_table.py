"""docs/sources.md says what was measured: its tables are those of bench/results/sources.json, of every shipped recipe."""

from __future__ import annotations

import copy
import math

import pytest
import yaml

from bench.sources import digest, shipped, stale
from bench.sources_table import DOCUMENT, LEFT_OUT, ROOT, entries, table, written
from recipes.steps import STAGE_VERSIONS


def test_the_tables_of_the_document_are_what_was_measured():
    text = DOCUMENT.read_text()
    assert written(text, entries()) == text, "python -m bench.sources --docs"


def test_every_shipped_recipe_is_in_a_table():
    recipes = {path.stem for path in (ROOT / "recipes").glob("*.yaml")}
    assert {path.stem for path in shipped()} == recipes - LEFT_OUT


@pytest.mark.parametrize("recipe", [path.stem for path in shipped()])
def test_each_was_built_for_both_runtimes_and_passed_its_gates(recipe: str):
    entry = entries()[recipe]
    asked = yaml.safe_load((ROOT / "recipes" / f"{recipe}.yaml").read_text())
    assert entry["status"] == 0
    for runtime in ("onnxruntime", "tensorrt-rtx"):
        engines = [one for one in entry["engines"] if one["target"].startswith(runtime)]
        assert engines
        wanted = [
            one.get("precision", asked["precision"]["build"]) for one in asked["targets"] if one["runtime"] == runtime
        ]
        assert {one["precision"]["asked"] for one in engines} == {name for names in wanted for name in names}
        for engine in engines:
            assert math.isfinite(engine["parity"]["relative_l2"])
            assert engine["executed"] == (runtime == "onnxruntime")


def test_a_figure_that_is_another_changes_the_table_and_a_recipe_without_one_says_so():
    measured = copy.deepcopy(entries())
    before = table("classification", measured)
    measured["resnet50"]["engines"][0]["parity"]["relative_l2"] = 0.123
    after = table("classification", measured)
    changed = [new for old, new in zip(before.splitlines(), after.splitlines(), strict=True) if old != new]
    assert len(changed) == 1
    assert "0.12 " in changed[0]
    del measured["resnet50"]
    assert "| not built | not built |" in table("classification", measured)
    with pytest.raises(ValueError, match="expected one '<!-- table classification -->'"):
        written("", measured)


def test_a_recipe_whose_figures_are_of_another_text_is_stale(tmp_path):
    path = ROOT / "recipes" / "digits.yaml"
    (tmp_path / "same.yaml").write_text("# a comment\n" + path.read_text())
    (tmp_path / "other.yaml").write_text(path.read_text().replace("opset: 18", "opset: 20"))
    assert digest(tmp_path / "same.yaml") == digest(path) != digest(tmp_path / "other.yaml")
    today = {
        recipe.stem: {"stage_versions": dict(STAGE_VERSIONS), "recipe_sha256": digest(ROOT / recipe)}
        for recipe in shipped()
    }
    assert stale(today) == []
    other = {"resnet50": {"stage_versions": {**STAGE_VERSIONS, "type": 0}}, "rtdetr": {"recipe_sha256": "0" * 64}}
    assert [one.stem for one in stale(today | {name: today[name] | entry for name, entry in other.items()})] == [*other]
    del today["digits-boxes"]
    assert [one.stem for one in stale(today)] == ["digits-boxes"]
