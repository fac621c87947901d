"""Keys of a whole recipe, from real files: what must not change them, and every single thing that must."""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from recipes.files import gather
from recipes.loader import load
from tests.unit.recipes.simulated import HOST, World

SHIPPED = Path(__file__).resolve().parents[3] / "recipes"


def copy_digits(folder: Path) -> Path:
    folder.mkdir(parents=True)
    shutil.copytree(SHIPPED / "digits", folder / "digits", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copyfile(SHIPPED / "digits.yaml", folder / "digits.yaml")
    return folder / "digits.yaml"


def keys(recipe: Path, world: World | None = None) -> dict[str, str]:
    """Return the key of every step of a recipe, after a simulated build."""
    loaded = load(recipe)
    _ran, planned = (world or World()).build(loaded.recipe, gather(loaded))
    assert all(step.action is not None for step in planned.steps)
    return {step.id: step.action.key for step in planned.steps}


def shuffled(value: Any, choose: random.Random) -> Any:
    """Return the document with the keys of every mapping in another order."""
    if isinstance(value, dict):
        names = list(value)
        choose.shuffle(names)
        return {name: shuffled(value[name], choose) for name in names}
    if isinstance(value, list):
        return [shuffled(item, choose) for item in value]
    return value


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_digits(tmp_path_factory.mktemp("keys") / "recipes")


@pytest.fixture(scope="module")
def expected(digits: Path) -> dict[str, str]:
    return keys(digits)


def test_another_folder_and_working_directory_change_no_key(tmp_path: Path, monkeypatch, expected: dict[str, str]):
    elsewhere = copy_digits(tmp_path / "some where" / "else")
    assert keys(elsewhere) == expected
    monkeypatch.chdir(elsewhere.parent)
    assert keys(Path("digits.yaml")) == expected
    monkeypatch.chdir(elsewhere.parent / "digits")
    assert keys(Path("../digits.yaml")) == expected


def test_another_name_of_the_folder_of_the_model_changes_no_key(tmp_path: Path, expected: dict[str, str]):
    recipe = copy_digits(tmp_path / "recipes")
    (recipe.parent / "digits").rename(recipe.parent / "numbers")
    recipe.write_text(recipe.read_text().replace("digits/", "numbers/"))
    assert keys(recipe) == expected


def test_another_name_of_the_recipe_file_and_newer_times_change_no_key(tmp_path: Path, expected: dict[str, str]):
    recipe = copy_digits(tmp_path / "recipes").rename(tmp_path / "recipes" / "renamed.yaml")
    for file in tmp_path.rglob("*"):
        os.utime(file, (1, 2_000_000_000))
    assert keys(recipe) == expected


@given(seed=st.integers(0, 2**32), comment=st.text(st.characters(codec="ascii", categories=("L", "N", "P"))))
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_order_comments_and_layout_of_the_yaml_change_no_key(
    tmp_path_factory: pytest.TempPathFactory, expected: dict[str, str], seed: int, comment: str
):
    recipe = copy_digits(tmp_path_factory.mktemp("order") / "recipes")
    document = shuffled(yaml.safe_load(recipe.read_text()), random.Random(seed))
    text = yaml.safe_dump(document, sort_keys=False, default_flow_style=seed % 2 == 0)
    recipe.write_text(f"# {comment}\n{text}\n# {comment}\n")
    assert keys(recipe) == expected


def test_a_description_changes_no_key(tmp_path: Path, expected: dict[str, str]):
    recipe = copy_digits(tmp_path / "recipes")
    recipe.write_text(recipe.read_text().replace("description: Hand", "description: Other words. Hand"))
    assert "Other words" in load(recipe).recipe.description
    assert keys(recipe) == expected


def edited(path: str, value: Any):
    def edit(folder: Path, _world: World) -> None:
        recipe = folder / "digits.yaml"
        document = yaml.safe_load(recipe.read_text())
        *parents, last = path.split(".")
        place = document
        for name in parents:
            place = place.setdefault(name, {})
        place[last] = value
        recipe.write_text(yaml.safe_dump(document, sort_keys=False))

    return edit


def appended(name: str, data: bytes):
    def edit(folder: Path, _world: World) -> None:
        with (folder / "digits" / name).open("ab") as stream:
            stream.write(data)

    return edit


def released(package: str):
    def edit(_folder: Path, world: World) -> None:
        world.versions[package] += ".post1"

    return edit


def hosted(**changes: Any):
    def edit(_folder: Path, world: World) -> None:
        world.host = type(HOST)(**{**HOST.__dict__, **changes})

    return edit


RTX8 = "compile:tensorrt-rtx:sm89:int8"
# The key table of the design, one thing at a time: what changes, and a step whose own key must change with it.
TABLE = {
    "export: torch": (released("torch"), "export"),
    "export: exporter's version": (released("onnxscript"), "export"),
    "export: opset": (edited("export.opset", 20), "export"),
    "export: exporter": (edited("export.exporter", "torchscript"), "export"),
    "export: model code": (appended("model.py", b"\n# comment\n"), "fetch:code"),
    "export: a module that the model imports": (appended("layers.py", b"\n# comment\n"), "fetch:code"),
    "export: weights": (appended("weights.safetensors", b" "), "export"),
    "export: arguments": (edited("source.arguments", {"width": 8}), "export"),
    "export: seed": (edited("source.seed", 7), "export"),
    "export: an input's type": (edited("inputs.image.dtype", "float16"), "export"),
    "reference: an input's range": (edited("inputs.image.high", 2.0), "reference:parity"),
    "simplify: simplifier": (edited("export.simplifier", "onnxslim"), "simplify"),
    "simplify: rewrites": (edited("export.rewrites", ["drop-moves"]), "simplify"),
    "simplify: its version": (released("onnxsim"), "simplify"),
    "type: its version": (released("onnxruntime"), "type:int8"),
    "type: onnx": (released("onnx"), "type:fp16"),
    "type: kept layers": (edited("precision.keep", ["*/head/*"]), "type:int8"),
    "type: io": (edited("precision.io", "native"), "type:fp16"),
    "calibrate: content": (appended("calibration.npz", b" "), "fetch:calibration"),
    "calibrate: sample count": (edited("precision.calibration.samples", 100), "fetch:calibration"),
    "calibrate: order": (edited("precision.calibration.order", "shuffled"), "fetch:calibration"),
    "calibrate: method": (edited("precision.calibration.method", "minmax"), "calibrate"),
    "calibrate: version": (released("numpy"), "calibrate"),
    "compile: runtime version": (hosted(runtimes={**HOST.runtimes, "tensorrt-rtx": "1.8.0.1"}), RTX8),
    "compile: CUDA flavour": (lambda _f, world: world.versions.pop("tensorrt_rtx_cu13"), RTX8),
    "compile: OS": (hosted(os="windows"), RTX8),
    "compile: architecture": (hosted(arch="aarch64"), RTX8),
    "compile: workspace": (edited("build.workspace", "1GiB"), RTX8),
    "compile: optimisation level": (edited("build.optimization_level", 5), RTX8),
    "compile: profile": (edited("profiles.bulk.batch", [1, 64, 128]), RTX8),
    "verify: held-out data": (appended("heldout.npz", b" "), "fetch:labelled"),
    "verify: a label's name": (edited("acceptance.metric.data.fields", {"image": "image"}), "fetch:labelled"),
    "publish: gate": (edited("acceptance.metric.floor", 0.9), "publish:tensorrt-rtx:sm89:int8"),
    "publish: destination": (edited("publish.to", "s3://bucket/engines"), "publish:tensorrt-rtx:sm89:int8"),
    "publish: name": (edited("name", "other"), "publish:tensorrt-rtx:sm89:int8"),
}


@pytest.mark.parametrize("what", TABLE)
def test_each_thing_in_the_key_table_changes_its_key(tmp_path: Path, expected: dict[str, str], what: str):
    recipe = copy_digits(tmp_path / "recipes")
    edit, step = TABLE[what]
    world = World()
    edit(recipe.parent, world)
    changed = keys(recipe, world)
    assert changed[step] != expected[step]
    if what.startswith(("compile", "publish")):
        portable = {name for name in expected if not name.startswith(("compile", "publish"))}
        if what != "compile: profile":
            assert {name for name in portable if changed[name] != expected[name]} <= {
                name for name in portable if "onnxruntime" in name or name == "check:tensorrt-rtx"
            }


def test_every_step_has_a_key_of_its_own_but_for_equal_work(expected: dict[str, str]):
    by_key: dict[str, list[str]] = {}
    for name, key in expected.items():
        by_key.setdefault(key, []).append(name)
    shared = [sorted(names) for names in by_key.values() if len(names) > 1]
    assert shared == []
