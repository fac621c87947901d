"""The schema: strict and frozen, described for people, and as JSON Schema for editors."""

from __future__ import annotations

from pathlib import Path

import jsonschema
import pytest
from pydantic import BaseModel, ValidationError

from recipes import schema
from recipes.includes import PATH_FIELDS
from recipes.schema import Recipe, duration_seconds, json_schema, size_bytes
from recipes.wording import annotation_at
from recipes.yaml_text import parse
from tests.unit.recipes.recipe_text import TEXT, changed, document, recipe

RECIPES = Path(__file__).parents[3] / "recipes"
MODELS = [
    model
    for model in vars(schema).values()
    if isinstance(model, type) and issubclass(model, BaseModel) and model not in (BaseModel, schema.Model)
]


@pytest.fixture(scope="module")
def validator():
    made = json_schema()
    jsonschema.Draft202012Validator.check_schema(made)
    return jsonschema.Draft202012Validator(made)


def errors(validator, tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return [error.json_path for error in validator.iter_errors(parse(path).root.plain())]


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.name)
def test_every_shipped_recipe_is_valid_for_editors(validator, path):
    assert list(validator.iter_errors(parse(path).root.plain())) == []


@pytest.mark.parametrize(
    ("old", "new", "path"),
    [
        ("opset: 18", "opsett: 18", "$.export"),
        ("opset: 18", "opset: 9", "$.export.opset"),
        ("opset: 18", "opset: '18'", "$.export.opset"),
        ("enginery: 1", "enginery: 2", "$.enginery"),
        ("enginery: 1", "enginery: true", "$.enginery"),
        ("name: tiny", "name: Tiny", "$.name"),
        ("framework: torch", "framework: tf", "$.source"),
        ("[1, 64, 256]", "[1, 64]", "$.profiles.bulk.batch"),
        ("[int8, fp16]", "[int8, fp17]", "$.precision.build[1]"),
        ("runtime: onnxruntime", "runtime: ort", "$.targets[1].runtime"),
        ("int8: [fp16", "int9: [fp16", "$.precision.fallback"),
        ("name: tiny", "name: tiny\nincluded: base.yaml", "$"),
    ],
)
def test_editors_find_what_the_loader_finds(validator, tmp_path, old, new, path):
    assert errors(validator, tmp_path, TEXT) == []
    assert path in errors(validator, tmp_path, changed(old, new))


@pytest.mark.parametrize("include", ["base.yaml", "[base.yaml, ../other.yaml]"])
def test_editors_know_include(validator, tmp_path, include):
    assert errors(validator, tmp_path, f"include: {include}\n{TEXT}") == []
    assert errors(validator, tmp_path, f"include: 3\n{TEXT}") == ["$.include"]


def test_the_json_schema_has_a_name_and_describes_every_key():
    made = json_schema()
    assert made["$id"] == "urn:enginery:recipe:1"
    assert made["title"] == "Enginery recipe, version 1"
    assert made["$schema"].endswith("2020-12/schema")
    for name, definition in {"": made, **made["$defs"]}.items():
        assert definition["additionalProperties"] is False
        for key, described in definition["properties"].items():
            assert described.get("description"), f"{name}.{key} has no description"


def test_unknown_keys_coercion_and_changes_are_refused(tmp_path):
    made = recipe(tmp_path)
    with pytest.raises(ValidationError, match="frozen"):
        made.name = "other"
    for change in ({"export": {"opset": "18"}}, {"extra": 1}, {"export": {"opset": 18.0}}):
        with pytest.raises(ValidationError):
            Recipe.model_validate(document(tmp_path) | change)


def test_axes_in_the_order_of_the_inputs(tmp_path):
    made = recipe(tmp_path, lambda d: d["inputs"].update(mask={"shape": ["batch", "tokens"]}))
    assert made.axes == ("batch", "height", "tokens")


@pytest.mark.parametrize(("text", "size"), [("1MiB", 1 << 20), ("512MiB", 512 << 20), ("4GiB", 4 << 30)])
def test_sizes(text, size):
    assert size_bytes(text) == size


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("30m", 1800), ("2h", 7200)])
def test_durations(text, seconds):
    assert duration_seconds(text) == seconds


@pytest.mark.parametrize("text", ["", "4", "4GB", "-1GiB", "1.5GiB", "4GiB "])
def test_what_is_no_size(text):
    with pytest.raises(ValueError, match="is not a size"):
        size_bytes(text)


@pytest.mark.parametrize("text", ["", "4", "4d", "-1s", "1.5h"])
def test_what_is_no_duration(text):
    with pytest.raises(ValueError, match="is not a duration"):
        duration_seconds(text)


def test_every_path_of_the_schema_is_known_to_includes():
    """A field that holds a path and is not in PATH_FIELDS would change its meaning when it is stated in a base."""
    found = set()

    def walk(model, path):
        for name, field in model.model_fields.items():
            here = (*path, name)
            text = str(field.annotation) + str(field.metadata)
            inner = next(
                (each for each in MODELS if f".{each.__name__}" in str(field.annotation) or field.annotation is each),
                None,
            )
            if name == "source":
                for one in (schema.TorchSource, schema.PaddleSource, schema.OnnxSource):
                    walk(one, here)
            elif inner is not None and name not in ("inputs", "parity"):
                walk(inner, (*here, "*") if str(field.annotation).startswith(("list[", "dict[")) else here)
            elif "max_length=400" in text or "py:" in text or here == ("publish", "to"):
                found.add((*here, "*") if "list" in text else here)

    walk(Recipe, ())
    named = {
        ("acceptance", "metric", "name"),
        ("acceptance", "together", "name"),
        ("parts", "*", "acceptance", "metric", "name"),
    }
    # What the parts do together is asked of them all: a part that names it is refused (recipes/rules.py).
    refused = {path for path in found if path[:1] == ("parts",) and "together" in path}
    assert (found - refused) | named == set(PATH_FIELDS)


def test_types_at_paths(tmp_path):
    from recipes.nodes import Node

    (tmp_path / "r.yaml").write_text(TEXT)
    root: Node = parse(tmp_path / "r.yaml").root
    assert annotation_at(("source",), root) is schema.TorchSource
    assert annotation_at(("source", "weights"), root) is schema.FileReference
    assert annotation_at(("acceptance", "metric", "data", "images"), root) is schema.ImageFolder
    assert annotation_at(("targets", 1), root) is schema.Target
    assert annotation_at(("inputs", "image"), root) is schema.Tensor
