"""Includes: one merged recipe, paths that mean the same in it, and faults at the file that states them."""

from __future__ import annotations

import pytest

from recipes.errors import RecipeError
from recipes.files import gather
from recipes.loader import dump_merged, load
from tests.unit.recipes.recipe_text import TEXT, changed, faults_of, load_text, told, write_project

BASE = """\
export: {opset: 20, simplifier: onnxslim}
build: {workspace: 1GiB, timeout: 5m}
targets:
  - {runtime: tensorrt-rtx, gpus: [sm120]}
"""


def including(names):
    return changed("name: tiny\n", f"name: tiny\ninclude: {names}\n")


def test_mappings_merge_and_everything_else_replaces(tmp_path):
    (tmp_path / "base.yaml").write_text(BASE)
    loaded = load_text(tmp_path, including("base.yaml"))
    assert loaded.recipe.export.opset == 18
    assert loaded.recipe.export.simplifier == "onnxslim"
    assert loaded.recipe.build.workspace == "1GiB"
    assert [target.runtime for target in loaded.recipe.targets] == ["tensorrt-rtx", "onnxruntime"]
    assert "include" not in loaded.merged
    assert loaded.sources == (tmp_path / "recipe.yaml", tmp_path / "base.yaml")


def test_later_bases_win_and_the_recipe_over_all(tmp_path):
    (tmp_path / "one.yaml").write_text(
        "export: {opset: 20, simplifier: onnxslim}\nbuild: {timeout: 1m, memory: 1GiB}\n"
    )
    (tmp_path / "two.yaml").write_text("export: {simplifier: none}\nbuild: {timeout: 2m}\n")
    recipe = load_text(tmp_path, including("[one.yaml, two.yaml]")).recipe
    assert (recipe.export.opset, recipe.export.simplifier) == (18, "none")
    assert (recipe.build.timeout, recipe.build.memory) == ("2m", "1GiB")


def test_null_takes_a_base_value_away(tmp_path):
    (tmp_path / "base.yaml").write_text("source: {weights: {file: gone.safetensors}}\n")
    text = changed("weights: {file: code/weights.safetensors}", "weights: null", including("base.yaml"))
    assert load_text(tmp_path, text).recipe.source.weights is None


def test_bases_include_bases_and_may_be_shared(tmp_path):
    (tmp_path / "root.yaml").write_text("build: {timeout: 7m, memory: 7GiB}\n")
    (tmp_path / "a.yaml").write_text("include: root.yaml\nbuild: {timeout: 8m}\n")
    (tmp_path / "b.yaml").write_text("include: [root.yaml]\ndriver: exact\n")
    loaded = load_text(tmp_path, including("[a.yaml, b.yaml]"))
    assert loaded.recipe.build.timeout == "7m"  # b includes root too, and b is later
    assert loaded.recipe.driver == "exact"
    assert [path.name for path in loaded.sources] == ["recipe.yaml", "a.yaml", "root.yaml", "b.yaml"]


def test_paths_of_a_base_are_relative_to_the_base(tmp_path):
    """A base in another folder names files beside itself; in the merged recipe they are relative to the recipe."""
    shared, models = tmp_path / "shared", tmp_path / "models"
    write_project(shared)
    (shared / "own.py").write_text("def score(outputs, labels):\n    return 1.0\n")
    models.mkdir()
    (shared / "base.yaml").write_text(
        """\
source:
  framework: torch
  model: code/model.py:build
  weights: {file: code/weights.safetensors}
  include: ["code/*.txt"]
precision: {calibration: {data: data/calibration.npz}}
acceptance: {metric: {name: own.py:score, floor: 0.5, data: {data: data/heldout.npz}}}
publish: {to: engines}
"""
    )
    (shared / "code/vocabulary.txt").write_text("words")
    text = """\
enginery: 1
include: ../shared/base.yaml
name: tiny
inputs: {image: {shape: [1, 1, 8, 8]}}
outputs: [logits]
precision: {build: [int8]}
targets: [{runtime: onnxruntime}]
"""
    loaded = load_text(models, text)
    recipe = loaded.recipe
    assert recipe.source.model == "../shared/code/model.py:build"
    assert recipe.source.weights.file == "../shared/code/weights.safetensors"
    assert recipe.source.include == ["../shared/code/*.txt"]
    assert recipe.precision.calibration.data == "../shared/data/calibration.npz"
    assert recipe.acceptance.metric.name == "../shared/own.py:score"
    assert recipe.acceptance.metric.data.data == "../shared/data/heldout.npz"
    assert recipe.publish.to == "../shared/engines"
    files = gather(loaded)
    assert set(files.code.members) == {"model.py", "layers.py", "vocabulary.txt"}
    assert files.metric.entry == "own:score"


def test_paths_of_bases_in_two_steps(tmp_path):
    for name in ("a", "a/b", "recipes"):
        (tmp_path / name).mkdir()
    (tmp_path / "a/b/deep.yaml").write_text("source: {framework: onnx, model: {file: model.onnx}}\n")
    (tmp_path / "a/base.yaml").write_text("include: b/deep.yaml\nacceptance: {metric: {name: top1}}\n")
    text = """\
enginery: 1
include: ../a/base.yaml
name: tiny
inputs: {image: {shape: [1, 8]}}
acceptance: {metric: {floor: 0.5, data: {data: labelled.npz}}}
targets: [{runtime: onnxruntime}]
"""
    recipe = load_text(tmp_path / "recipes", text).recipe
    assert recipe.source.model.file == "../a/b/model.onnx"
    assert recipe.acceptance.metric.name == "top1"  # a word, and not a path
    assert recipe.acceptance.metric.data.data == "labelled.npz"


def test_remote_and_refused_paths_of_a_base_are_left_alone(tmp_path):
    (tmp_path / "sub").mkdir()
    digest = "0" * 64
    (tmp_path / "sub/base.yaml").write_text(
        f"source: {{framework: torch, model: /etc/model.py:build, weights: {{file: 's3://b/w.pt', sha256: '{digest}'}}}}\n"
    )
    text = changed("  framework: torch\n  model: code/model.py:build\n  weights: {file: code/weights.safetensors}\n",
                   "  seed: 1\n", including("sub/base.yaml"))  # fmt: skip
    found = told(faults_of(tmp_path, text), tmp_path)
    assert (
        "sub/base.yaml:1: source.model: '/etc/model.py:build' is absolute, and so true on one machine only; "
        "write it relative to the recipe"
    ) in found


def test_a_fault_in_a_base_is_told_at_its_line(tmp_path):
    (tmp_path / "base.yaml").write_text("# shared\nexport:\n  simplifer: none\nbuild: {timeout: 3}\n")
    assert told(faults_of(tmp_path, including("base.yaml")), tmp_path) == [
        (
            "base.yaml:3: export.simplifer: unknown key 'simplifer' "
            "(did you mean 'simplifier'? allowed: opset, exporter, simplifier, rewrites)"
        ),
        "base.yaml:4: build.timeout: expected a string, found the number 3; put it in quotes: '3'",
    ]


def test_faults_of_the_text_of_all_files_are_told_together(tmp_path):
    (tmp_path / "base.yaml").write_text("a: 1\na: 2\n")
    text = including("base.yaml") + "driver: exact\ndriver: branch\n"
    assert [fault.file.rpartition("/")[2] for fault in faults_of(tmp_path, text)] == ["recipe.yaml", "base.yaml"]


@pytest.mark.parametrize(
    ("include", "message"),
    [
        ("/etc/base.yaml", "/etc/base.yaml: bases are named relative to the file that includes them"),
        ("~/base.yaml", "~/base.yaml: bases are named relative to the file that includes them"),
        ("s3://bucket/base.yaml", "s3://bucket/base.yaml: bases are named relative to the file that includes them"),
        ("recipe.yaml", "recipe.yaml: includes itself (recipe.yaml -> recipe.yaml)"),
        ("./sub/../recipe.yaml", "./sub/../recipe.yaml: includes itself (recipe.yaml -> sub/../recipe.yaml)"),
        ("bass.yaml", "bass.yaml: no such file (did you mean 'base.yaml'?)"),
        ("sub", "sub: is a folder; expected a YAML file"),
        ("{a: b}", "expected the path of a base file, or a list of them, found a mapping"),
        ("[base.yaml, 3]", "expected the path of a base file, or a list of them, found the number 3"),
        ("''", 'expected the path of a base file, or a list of them, found the string ""'),
    ],
)
def test_includes_that_are_refused(tmp_path, include, message):
    (tmp_path / "base.yaml").write_text(BASE)
    (tmp_path / "sub").mkdir()
    assert told(faults_of(tmp_path, including(include)), tmp_path) == [f"recipe.yaml:4: include: {message}"]


def test_no_include_at_all(tmp_path):
    assert load_text(tmp_path, including("null")).sources == (tmp_path / "recipe.yaml",)


def test_a_cycle_through_other_files_is_refused(tmp_path):
    (tmp_path / "a.yaml").write_text("include: b.yaml\n")
    (tmp_path / "b.yaml").write_text("driver: exact\ninclude: a.yaml\n")
    found = told(faults_of(tmp_path, including("a.yaml")), tmp_path)
    assert found == ["b.yaml:2: include: a.yaml: includes itself (recipe.yaml -> a.yaml -> b.yaml -> a.yaml)"]


def test_depth_and_number_are_bounded(tmp_path):
    for index in range(12):
        (tmp_path / f"{index}.yaml").write_text(f"include: {index + 1}.yaml\n")
    assert told(faults_of(tmp_path, including("0.yaml")), tmp_path) == [
        "7.yaml:1: include: 8.yaml: includes go deeper than 8 files"
    ]
    (tmp_path / "7.yaml").write_text("driver: exact\n")
    assert load_text(tmp_path, including("0.yaml")).recipe.driver == "exact"
    for index in range(5):
        (tmp_path / f"{index}.yaml").write_text(f"include: [{', '.join([f'{index + 1}.yaml'] * 10)}]\n")
    found = told(faults_of(tmp_path, including("0.yaml")), tmp_path)
    assert all(fault.endswith("more than 64 includes") for fault in found)


def test_a_base_may_state_the_version_but_no_other(tmp_path):
    (tmp_path / "base.yaml").write_text("enginery: 1\n" + BASE)
    assert load_text(tmp_path, including("base.yaml")).recipe.build.timeout == "5m"
    (tmp_path / "base.yaml").write_text("driver: exact\nenginery: 2\n")
    assert told(faults_of(tmp_path, including("base.yaml")), tmp_path) == [
        "base.yaml:2: enginery: version 1 is what this build reads (allowed: 1), found the number 2"
    ]


def test_the_version_of_the_recipe_is_not_taken_from_a_base(tmp_path):
    (tmp_path / "base.yaml").write_text("enginery: 1\n")
    text = changed("enginery: 1\n", "", including("base.yaml"))
    assert [fault.path for fault in faults_of(tmp_path, text)] == ["enginery"]


def test_the_merged_recipe_prints_as_one_that_loads_to_the_same(tmp_path):
    (tmp_path / "base.yaml").write_text(BASE + "description: 'yes'\n")
    text = changed("name: tiny\n", "name: '010'\n", including("base.yaml"))
    loaded = load_text(tmp_path, text)
    printed = dump_merged(loaded)
    assert "opset: 18" in printed
    assert "include" not in printed
    again = load_text(tmp_path, printed)
    assert again.merged == loaded.merged
    assert again.recipe == loaded.recipe
    assert again.digest == loaded.digest


def test_splitting_a_recipe_changes_nothing_but_its_files(tmp_path):
    whole = load_text(tmp_path, TEXT)
    head, separator, tail = TEXT.partition("precision:")
    (tmp_path / "base.yaml").write_text(separator + tail)
    split = load_text(tmp_path, f"include: base.yaml\n{head}")
    assert split.digest == whole.digest
    assert split.recipe == whole.recipe
    assert len(split.digests) == 2


def test_the_recipe_itself_must_be_there(tmp_path):
    with pytest.raises(RecipeError, match="no such file"):
        load(tmp_path / "nothing.yaml")
