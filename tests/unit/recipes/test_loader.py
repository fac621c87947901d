"""Loading: the version first, then every fault of the shape and of the rules at once, in YAML's words."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from recipes.errors import Fault, RecipeError
from recipes.files import gather
from recipes.loader import dump_merged, load
from recipes.shapes import parity_cases, profile_shapes, random_cases, trace_shapes
from tests.unit.recipes.recipe_text import TEXT, changed, faults_of, load_text, told, write_project

RECIPES = Path(__file__).parents[3] / "recipes"


def test_a_good_recipe_loads(tmp_path):
    loaded = load_text(tmp_path, TEXT)
    assert loaded.recipe.name == "tiny"
    assert loaded.folder == tmp_path
    assert loaded.merged["precision"]["build"] == ["int8", "fp16"]
    assert loaded.lines[("acceptance", "metric", "floor")] == (str(tmp_path / "recipe.yaml"), 23)
    assert str(loaded.fault(("targets", 1, "gpus"), "x")) == f"{tmp_path}/recipe.yaml:26: targets[1].gpus: x"
    assert set(loaded.digests) == {str(tmp_path / "recipe.yaml")}


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.name)
def test_every_shipped_recipe_loads_with_its_files(path):
    loaded = load(path)
    files = gather(loaded)
    assert (files.code is None) == (loaded.recipe.source.framework == "onnx")


@pytest.mark.parametrize(
    ("version", "message"),
    [
        ("enginery: 2\n", "2: enginery: version 1 is what this build reads (allowed: 1), found the number 2"),
        ("enginery: '1'\n", '2: enginery: version 1 is what this build reads (allowed: 1), found the string "1"; write enginery: 1'),
        ("enginery: true\n", "2: enginery: version 1 is what this build reads (allowed: 1), found true"),
        ("enginery: 1.0\n", "2: enginery: version 1 is what this build reads (allowed: 1), found the number 1.0"),
        ("enginery:\n", "2: enginery: version 1 is what this build reads (allowed: 1), found nothing"),
        ("", "1: enginery: no version stated; begin the recipe with 'enginery: 1' (this build reads: 1)"),
    ],
)  # fmt: skip
def test_the_version_is_looked_at_first_and_alone(tmp_path, version, message):
    text = changed("enginery: 1\n", version).replace("outputs: [logits]", "nonsense: 3")
    assert told(faults_of(tmp_path, text), tmp_path) == [f"recipe.yaml:{message}"]


def test_another_version_is_told_before_faults_of_the_text(tmp_path):
    text = changed("enginery: 1\n", "enginery: 3\n") + "driver: exact\ndriver: branch\n"
    assert [fault.path for fault in faults_of(tmp_path, text)] == ["enginery"]


SHAPE_FAULTS = [
    ("export: {opset: 18}", "export: {opsett: 18}", "8: export.opsett: unknown key 'opsett' (did you mean 'opset'? allowed: opset, exporter, simplifier, rewrites)"),
    ("export: {opset: 18}", "exprot: {opset: 18}", "8: exprot: unknown key 'exprot' (did you mean 'export'? allowed: enginery, name, description, source, export, parts, inputs, outputs, profiles, precision, acceptance, targets, build, benchmark, fallback, driver, publish, include)"),
    ("export: {opset: 18}", "opset: 18", "8: opset: unknown key 'opset' (it belongs at export.opset; allowed: enginery, name, description, source, export, parts, inputs, outputs, profiles, precision, acceptance, targets, build, benchmark, fallback, driver, publish, include)"),
    ("export: {opset: 18}", "export: 18", "8: export: expected a mapping, found the number 18"),
    ("export: {opset: 18}", "export: [18]", "8: export: expected a mapping, found a list"),
    ("export: {opset: 18}", "export: {opset: '18'}", '8: export.opset: expected a whole number, found the string "18"; take away the quotes'),
    ("export: {opset: 18}", "export: {opset: 18.5}", "8: export.opset: expected a whole number, found the number 18.5"),
    ("export: {opset: 18}", "export: {opset: true}", "8: export.opset: expected a whole number, found true"),
    ("export: {opset: 18}", "export: {opset: 10}", "8: export.opset: must be at least 11, found the number 10"),
    ("export: {opset: 18}", "export: {opset: 99}", "8: export.opset: must be at most 23, found the number 99"),
    ("export: {opset: 18}", "export: {exporter: dinamo}", "8: export.exporter: found the string \"dinamo\" (did you mean 'dynamo'? allowed: dynamo, torchscript)"),
    ("export: {opset: 18}", "export: {simplifier: 3}", "8: export.simplifier: found the number 3 (allowed: onnxsim, onnxslim, none)"),
    ("name: tiny", "name: Tiny Model", "3: name: expected a name of lower-case letters, digits, '.', '_' and '-', at most 63, beginning with a letter or digit; found the string \"Tiny Model\""),
    ("name: tiny", "name: 10.10", "3: name: expected a string, found the number 10.10; put it in quotes: '10.10'"),
    ("name: tiny", "name: null", "3: name: expected a string, found nothing; put it in quotes: 'null'"),
    ("name: tiny", "description: x", "2: name: is required, and missing"),
    ("  framework: torch\n", "", "4: source: source.framework is required, and missing (allowed: torch, paddle, onnx)"),
    ("framework: torch", "framework: pytorch", "4: source: unknown framework: found the string \"pytorch\" (did you mean 'torch'? allowed: torch, paddle, onnx)"),
    ("framework: torch", "framework: [torch]", "4: source: unknown framework: found a list (allowed: torch, paddle, onnx)"),
    ("framework: torch", "framework: onnx", '6: source.model: expected a mapping, found the string "code/model.py:build"'),
    ("framework: torch", "framework: onnx", "7: source.weights: unknown key 'weights' (allowed: framework, model)"),
    ("framework: torch", "framework: torch\n  torch: {}", "6: source.torch: unknown key 'torch' (allowed: framework, model, arguments, weights, include, seed)"),
    ("  model: code/model.py:build\n", "", "4: source.model: is required, and missing"),
    ("model.py:build", "model.build", '6: source.model: expected file.py:callable; found the string "code/model.build"'),
    ("{file: code/weights.safetensors}", "code/weights.safetensors", '7: source.weights: expected a mapping, found the string "code/weights.safetensors"'),
    ("{file: code/weights.safetensors}", "{file: 's3://b/w.safetensors'}", "7: source.weights: a remote file needs its sha256 (planning reads no network)"),
    ("{file: code/weights.safetensors}", "{file: w.pt, sha256: ABC}", '7: source.weights.sha256: expected a SHA-256: 64 lower-case hex digits; found the string "ABC"'),
    ("{file: code/weights.safetensors}", "{file: ''}", "7: source.weights.file: is empty"),
    ("{file: code/weights.safetensors}", "{file: " + "x" * 401 + "}", "7: source.weights.file: is longer than 400 characters"),
    ("[batch, 1, height, 8]", "[batch, 1, Height, 8]", "10: inputs.image.shape[2]: expected a size (a whole number, at least 1) or the name of a dynamic axis: lower-case letters, digits and '_', beginning with a letter; found the string \"Height\""),
    ("[batch, 1, height, 8]", "[batch, 1, height, 0]", "10: inputs.image.shape[3]: expected a size (a whole number, at least 1) or the name of a dynamic axis: lower-case letters, digits and '_', beginning with a letter; found the number 0"),
    ("[batch, 1, height, 8]", "[batch, 1, height, {a: 1}]", "10: inputs.image.shape[3]: expected a size (a whole number, at least 1) or the name of a dynamic axis: lower-case letters, digits and '_', beginning with a letter; found a mapping"),
    ("[batch, 1, height, 8]", "batch", '10: inputs.image.shape: expected a list, found the string "batch"; write [batch]'),
    ("[batch, 1, height, 8]", "{batch: 1}", "10: inputs.image.shape: expected a list, found a mapping; begin each item with '- '"),
    ("dtype: float32", "dtype: fp32", '10: inputs.image.dtype: found the string "fp32" (allowed: float32, float16, int64, int32, bool, uint8, int8)'),
    ("dtype: float32", "low: '0'", '10: inputs.image.low: expected a number, found the string "0"; take away the quotes'),
    ("[1, 64, 256]", "[1, 64]", "14: profiles.bulk.batch: expected [min, opt, max], found 2 numbers"),
    ("[1, 64, 256]", "[1, 64, 256, 512]", "14: profiles.bulk.batch: expected [min, opt, max], found 4 numbers"),
    ("[1, 64, 256]", "64", "14: profiles.bulk.batch: expected a list, found the number 64; write [64]"),
    ("bulk: {batch", "bulk: {Batch", "14: profiles.bulk.Batch: key 'Batch': expected the name of a dynamic axis: lower-case letters, digits and '_', beginning with a letter"),
    ("[int8, fp16]", "[int8, fp61]", "16: precision.build[1]: found the string \"fp61\" (did you mean 'fp16'? allowed: fp32, tf32, fp16, bf16, fp8, fp8-fp16, int8, int8-fp16, int8-dynamic, auto)"),
    ("[int8, fp16]", "[]", "16: precision.build: expected at least 1, found 0"),
    ("[int8, fp16]", "[int8, int8]", "16: precision.build: the same precision is named twice"),
    ("{int8: [fp16", "{in8: [fp16", "17: precision.fallback.in8: unknown key 'in8' (did you mean 'int8'? allowed: fp32, tf32, fp16, bf16, fp8, fp8-fp16, int8, int8-fp16, int8-dynamic)"),
    ("samples: 16", "samples: 0", "18: precision.calibration.samples: must be at least 1, found the number 0"),
    ("samples: 16", "percentile: 50.0", "18: precision.calibration.percentile: must be greater than 50, found the number 50.0"),
    ("samples: 16", "images: {size: [8]}", "18: precision.calibration.images.size: expected [height, width], found 1 numbers"),
    ("samples: 16", "images: {siz: [8, 8]}", "18: precision.calibration.images.siz: unknown key 'siz' (did you mean 'size'? allowed: size, resize, color, scale, mean, std, input)"),
    ("samples: 16", "arguments: []", "18: precision.calibration.arguments: expected a mapping, found a list"),
    ("targets:\n", "driver: newest\ntargets:\n", '24: driver: found the string "newest" (allowed: ignore, branch, exact)'),
    ("targets:\n", "build: {version_compatible: on}\ntargets:\n", '24: build.version_compatible: expected true or false, found the string "on"; write true'),
    ("targets:\n", "build: {version_compatible: no}\ntargets:\n", '24: build.version_compatible: expected true or false, found the string "no"; write false'),
    ("targets:\n", "build: {version_compatible: 1}\ntargets:\n", "24: build.version_compatible: expected true or false, found the number 1"),
    ("targets:\n", "build: {workspace: 4GB}\ntargets:\n", '24: build.workspace: expected a size, such as 512MiB or 4GiB; found the string "4GB"'),
    ("targets:\n", "build: {timeout: 30 min}\ntargets:\n", '24: build.timeout: expected a duration, such as 90s, 30m or 2h; found the string "30 min"'),
    ("targets:\n", "workspace: 4GiB\ntargets:\n", "24: workspace: unknown key 'workspace' (it belongs at build.workspace; allowed: enginery, name, description, source, export, parts, inputs, outputs, profiles, precision, acceptance, targets, build, benchmark, fallback, driver, publish, include)"),
    ("targets:\n", "percentile: 99.9\ntargets:\n", "24: percentile: unknown key 'percentile' (it belongs at precision.calibration.percentile; allowed: enginery, name, description, source, export, parts, inputs, outputs, profiles, precision, acceptance, targets, build, benchmark, fallback, driver, publish, include)"),
    ("runtime: onnxruntime", "runtime: onnx", '26: targets[1].runtime: found the string "onnx" (allowed: tensorrt-rtx, tensorrt, onnxruntime)'),
    ("runtime: onnxruntime", "runtime: tensorrt_rtx", "26: targets[1].runtime: found the string \"tensorrt_rtx\" (did you mean 'tensorrt-rtx'? allowed: tensorrt-rtx, tensorrt, onnxruntime)"),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new", "message"), SHAPE_FAULTS)
def test_faults_of_the_shape_in_yamls_words(tmp_path, old, new, message):
    assert f"recipe.yaml:{message}" in told(faults_of(tmp_path, changed(old, new)), tmp_path)


def test_all_faults_of_the_shape_are_told_once_each_in_order(tmp_path):
    text = changed("opset: 18", "opset: x")
    text = changed("name: tiny", "nmae: tiny", text)
    text = changed("[batch, 1, height, 8]", "[BATCH, 1, height, 8]", text)
    found = faults_of(tmp_path, text)
    assert [(fault.line, fault.path) for fault in found] == [
        (2, "name"), (3, "nmae"), (8, "export.opset"), (10, "inputs.image.shape[0]"),
    ]  # fmt: skip


def test_broken_rules_are_told_with_faults_of_files(tmp_path):
    """The one edit round: rules over several values and files that are missing come together."""
    write_project(tmp_path)
    (tmp_path / "data/calibration.npz").unlink()
    found = told(faults_of(tmp_path, changed("[1, 64, 256]", "[64, 1, 256]")), tmp_path)
    assert found == [
        "recipe.yaml:14: profiles.bulk.batch: expected min <= opt <= max, found [64, 1, 256]",
        "recipe.yaml:18: precision.calibration.data: data/calibration.npz: no such file",
    ]


def test_rules_alone_are_told_where_all_files_are_there(tmp_path):
    write_project(tmp_path)
    found = faults_of(tmp_path, changed("outputs: [logits]\n", ""))
    assert [(fault.line, fault.path) for fault in found] == [(2, "")]


def test_loading_and_gathering_imports_no_framework(tmp_path):
    """Planning must stay fast: none of the heavy packages may be imported on the way."""
    code = (
        "import sys; from pathlib import Path; from recipes.loader import load; from recipes.files import gather\n"
        "gather(load(Path(sys.argv[1])))\n"
        "print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(RECIPES / "digits.yaml")], capture_output=True, text=True, check=True
    )
    heavy = {"torch", "onnx", "onnxruntime", "numpy", "prefect", "boto3", "rich", "typer", "sqlalchemy", "jsonschema"}
    assert "pydantic" in done.stdout.split()
    assert not heavy & set(done.stdout.split())


# ---- properties ------------------------------------------------------------------------------------------------------


def shuffled(value, choose):
    if isinstance(value, dict):
        keys = list(value)
        choose.shuffle(keys)
        return {key: shuffled(value[key], choose) for key in keys}
    return [shuffled(item, choose) for item in value] if isinstance(value, list) else value


@given(st.randoms(use_true_random=False), st.booleans(), st.integers(2, 7))
@settings(max_examples=40, deadline=None)
def test_key_order_comments_and_spacing_change_nothing(tmp_path_factory, choose, flow, indent):
    folder = tmp_path_factory.mktemp("order")
    plain = load_text(folder, TEXT)
    document = shuffled(yaml.safe_load(TEXT), choose)
    lines = yaml.safe_dump(document, sort_keys=False, default_flow_style=flow, indent=indent).splitlines()
    for _ in range(5 if not flow else 0):
        lines.insert(choose.randrange(len(lines)), choose.choice(["", "   ", "# comment: [", "      # another"]))
    other = load_text(folder, "\n".join(lines) + "\n")
    assert other.merged == plain.merged
    assert other.digest == plain.digest
    for derived in (profile_shapes, parity_cases, trace_shapes, lambda recipe: random_cases(recipe, 5)):
        assert derived(other.recipe) == derived(plain.recipe)


SCALARS = st.none() | st.booleans() | st.integers(-(1 << 63) + 1, (1 << 63) - 1) | st.floats(allow_nan=False, allow_infinity=False) | st.text(
    st.characters(codec="utf-8", exclude_characters="\0"), max_size=12
)  # fmt: skip
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs")), max_size=6), inner, max_size=3
        )
    ),
    max_leaves=8,
)


@given(VALUES)
@settings(max_examples=150, deadline=None)
def test_what_is_printed_reads_back(tmp_path_factory, value):
    """`--print` must not turn a string into a number or lose a character, whatever the arguments of a model are."""
    folder = tmp_path_factory.mktemp("print")
    loaded = load_text(folder, TEXT)
    loaded.merged["source"]["arguments"] = {"value": value}
    again = load_text(folder, dump_merged(loaded))
    assert again.merged == loaded.merged


MUTANTS = 2000
FRAGMENTS = [
    "\t", "\n", "  ", ": ", "- ", "[", "]", "{", "}", "&a ", "*a", "!!python/name:os.system ", "<<: ", "---\n", "'", '"', "|\n", ">",
    "#", "%", "@", "`", "\0", "\x85", "\u2028", "\ufeff", "é", "\U0001f600", "0", "-1", "1e999", ".nan", "true", "null", "99999999999999999999",
    "enginery: 1\n", "include: recipe.yaml\n", "include: [a, b]\n", "source", "torch", "onnx", "image", "batch", "../", "/etc/passwd", "s3://b/k", "fp16", "int8", "~", "? ", ", ",
]  # fmt: skip


def mutated(text: str, choose: random.Random) -> bytes:
    data = text
    for _ in range(choose.randint(1, 6)):
        at = choose.randrange(len(data) + 1)
        what = choose.randrange(6)
        if what == 0:
            data = data[:at] + choose.choice(FRAGMENTS) + data[at:]
        elif what == 1:
            data = data[:at] + data[at + choose.randint(1, 12) :]
        elif what == 2:
            other = choose.randrange(len(data) + 1)
            data = data[:at] + data[other : other + choose.randint(1, 40)] + data[at:]
        elif what == 3:
            lines = data.split("\n")
            choose.shuffle(lines)
            data = "\n".join(lines) if choose.random() < 0.1 else data
        elif what == 4:
            words = data.split(" ")
            words[choose.randrange(len(words))] = choose.choice(FRAGMENTS)
            data = " ".join(words)
        else:
            lines = data.split("\n")
            del lines[choose.randrange(len(lines))]
            data = "\n".join(lines)
    raw = data.encode("utf-8", "surrogatepass")
    if choose.random() < 0.05:
        at = choose.randrange(len(raw) + 1)
        raw = raw[:at] + bytes([choose.randrange(256)]) + raw[at:]
    return raw


def test_mutated_recipes_give_faults_or_a_recipe_and_nothing_else(tmp_path):
    """2,000 documents near a good one: load and gather end in a RecipeError with a place, or in a recipe."""
    path = write_project(tmp_path)
    choose = random.Random(20250101)
    good = 0
    found: list[tuple[Fault, ...]] = []
    for _ in range(MUTANTS):
        path.write_bytes(mutated(TEXT, choose))
        try:
            gather(load(path))
            good += 1
        except RecipeError as err:
            found.append(err.faults)
    assert all(faults and all(fault.what and fault.file for fault in faults) for faults in found)
    assert len(found) > MUTANTS / 2
    assert good > 0
