"""The product as a stranger gets it: what it imports, what it ships, what its documents say."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest
import typer
import yaml

import enginery
from enginery.__main__ import command_line
from enginery.building import PREFECT_SETTINGS
from recipes.errors import RecipeError
from recipes.files import gather
from recipes.loader import load
from recipes.schema import Recipe, json_schema

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # comes with pytest

ROOT = Path(__file__).resolve().parents[2]
TOP = ("artifacts", "enginery", "flows", "recipes", "tasks")
EXTRAS = (
    "OpenSSL", "PIL", "boto3", "botocore", "cryptography", "cuda", "model_signing", "onnxscript", "onnxsim", "onnxslim", "paddle", "pynvml", "rapidfuzz", "sklearn", "tensorrt",
    "tensorrt_rtx", "torch", "transformers",
)  # fmt: skip
# Loaded only in the process of a stage whose source is PyTorch: subclasses of torch's classes need it at the top.
NEED_TORCH = [
    "tasks.benchmark.torch_candidate",
    "tasks.engines.torch_run",
    "tasks.sources.torch_source",
    "tasks.torch_module",
    "tasks.torch_program",
    "tasks.tracing",
]

# As above, of a source that is PaddlePaddle.
NEED_PADDLE = ["tasks.engines.paddle_run", "tasks.paddle_model", "tasks.sources.paddle_source"]

_IMPORT_WITHOUT = """
import importlib, json, sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in blocked:
            raise ModuleNotFoundError(f"{name} is blocked", name=name.partition(".")[0])

modules, blocked = json.load(sys.stdin)
sys.meta_path.insert(0, Blocked())
failed = {}
for module in modules:
    try:
        importlib.import_module(module)
    except ImportError as err:
        failed[module] = err.name
print(json.dumps(failed))
"""


def tracked(*patterns: str) -> list[Path]:
    """Return the files of the product: those that git knows of and those that it would."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout, so what belongs to the product is not known")
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", *patterns]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    return [ROOT / name for name in names if name and (ROOT / name).is_file()]


def modules() -> list[str]:
    paths = [
        path for top in TOP for path in sorted((ROOT / top).rglob("*.py")) if (path.parent / "__init__.py").exists()
    ]
    return [".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in paths]


def test_every_module_imports_without_the_extras():
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", _IMPORT_WITHOUT],
        input=json.dumps([modules(), EXTRAS]),
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == dict.fromkeys(NEED_TORCH, "torch") | dict.fromkeys(NEED_PADDLE, "paddle")


def test_top_level_packages_are_those_of_the_repository(tmp_path):
    code = "import json, importlib, sys; print(json.dumps([importlib.import_module(n).__file__ for n in sys.argv[1:]]))"
    done = subprocess.run(
        [sys.executable, "-c", code, *TOP], cwd=tmp_path, capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert [Path(file).parent for file in json.loads(done.stdout)] == [ROOT / top for top in TOP]


def test_pyproject_lists_every_package_and_the_version_is_said_once():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = {
        ".".join(path.parent.relative_to(ROOT).parts) for top in TOP for path in (ROOT / top).rglob("__init__.py")
    }
    assert set(project["tool"]["setuptools"]["packages"]) == packages
    assert project["project"]["version"] == enginery.__version__
    assert f"## {enginery.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_every_directory_of_tests_is_a_package():
    folders = {path.parent for path in tracked("tests/*.py")}
    assert [folder for folder in folders if not (folder / "__init__.py").exists()] == []


def test_no_path_of_one_machine_is_in_the_product():
    machine = re.compile(rf"{re.escape(str(ROOT))}\b|/(home|Users|mnt)/[a-z]\w+|/root/[.\w]|[A-Z]:\\\\Users")
    found = [
        f"{path.relative_to(ROOT)}: {match[0]}"
        for path in tracked()
        if path.suffix in {".py", ".md", ".yaml", ".yml", ".toml", ".json", ".txt", ""} and "tests" not in path.parts
        for match in [machine.search(path.read_text(errors="ignore"))]
        if match
    ]
    assert found == []


# ---- recipes


def enginery_cli(*arguments: str, cwd: Path, cache: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "enginery", *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(cache)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_every_shipped_recipe_validates_and_plans_and_nothing_is_written(tmp_path):
    recipes = tmp_path / "recipes"
    shutil.copytree(ROOT / "recipes", recipes, ignore=shutil.ignore_patterns("__pycache__", "*.py[co]"))
    before = {path: path.stat().st_mtime_ns for path in recipes.rglob("*")}
    names = [path.name for path in sorted(recipes.glob("*.yaml"))]
    checked = enginery_cli("validate", "recipes", "--json", cwd=tmp_path, cache=tmp_path / "cache")
    assert checked.returncode == 0, checked.stderr
    assert [valid["name"] for valid in json.loads(checked.stdout)["valid"]] == [Path(name).stem for name in names]
    for name in names:
        planned = enginery_cli("plan", f"recipes/{name}", "--json", cwd=tmp_path, cache=tmp_path / "cache")
        document = json.loads(planned.stdout)
        assert planned.returncode == document["status"] in (0, 3), planned.stderr  # 3: a runtime is not installed here
        assert {step["state"] for step in document["steps"]} == {"run"}
        assert {engine["state"] for engine in document["engines"]} <= {"run", "waiting"}
    assert {path: path.stat().st_mtime_ns for path in recipes.rglob("*")} == before
    assert {path.name for path in tmp_path.iterdir()} <= {"recipes", "cache"}


def test_the_recipe_of_the_readme_is_a_recipe(tmp_path):
    (text,) = fenced("README.md", "yaml")
    shutil.copytree(ROOT / "recipes" / "digits", tmp_path / "digits")
    (tmp_path / "recipe.yaml").write_text(text)
    loaded = load(tmp_path / "recipe.yaml")
    assert gather(loaded).labelled is not None
    assert len(text.splitlines()) <= 12


# ---- documents


def fenced(document: str, language: str) -> list[str]:
    """Return the contents of a document's fenced blocks in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", (ROOT / document).read_text(), re.MULTILINE | re.DOTALL)


def anchors(path: Path) -> set[str]:
    """Return the anchors that GitHub gives to a document's headings."""
    text = re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^#{1,6} (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_links_in_documents_lead_somewhere():
    dead = []
    for document in tracked("*.md"):
        text = re.sub(r"^```.*?^```$", "", document.read_text(), flags=re.MULTILINE | re.DOTALL)
        text = re.sub(r"`[^`]*`", "", text)  # code in a line has brackets that are no links
        for link in re.findall(r"\]\(([^)\s]+)\)", text):
            file, _, anchor = link.partition("#")
            if re.match(r"[a-z]+:", link):
                continue
            target = (document.parent / file).resolve() if file else document
            if not target.exists() or (anchor and anchor not in anchors(target)):
                dead.append(f"{document.relative_to(ROOT)}: {link}")
    assert dead == []


def test_every_decision_has_a_number_of_its_own():
    numbers = []
    for record in sorted((ROOT / "docs" / "adr").glob("*.md")):
        numbers.append(int(record.name[:4]))
        assert record.read_text().startswith(f"# {numbers[-1]}. ")
    assert numbers == list(range(1, len(numbers) + 1))


def test_the_published_schema_of_recipes_is_up_to_date():
    published = json.loads((ROOT / "docs" / "recipe-v1.schema.json").read_text())
    assert published == json_schema(), "make docs"


def test_the_document_on_recipes_names_every_field():
    text = (ROOT / "docs" / "recipe.md").read_text()
    fields = {name for part in json_schema()["$defs"].values() for name in part.get("properties", {})}
    assert {name for name in fields | set(Recipe.model_fields) if not re.search(rf"\b{name}\b", text)} == set()


def test_the_examples_in_the_document_on_recipes_are_parts_of_recipes(tmp_path):
    """Every block that shows a part of a recipe takes that part's place in the digits recipe."""
    digits = yaml.safe_load((ROOT / "recipes" / "digits.yaml").read_text())
    parts = yaml.safe_load((ROOT / "recipes" / "digits-parts.yaml").read_text())
    seen: set[str] = set()
    for text in fenced("docs/recipe.md", "yaml"):
        part = yaml.safe_load(text)
        if "images" in part:  # a part of a data set
            part = {"precision": digits["precision"] | {"calibration": {"data": "folder", **part}}}
            part["inputs"] = {"image": {"shape": ["batch", 3, "height", "width"]}}
        seen |= set(part)
        path = tmp_path / "recipe.yaml"
        whole = digits
        if "parts" in part:  # each with a source of its own
            whole = {key: value for key, value in parts.items() if key not in ("source", "acceptance")}
        elif "together" in part.get("acceptance", {}):
            whole = parts
        path.write_text(yaml.safe_dump(whole | {key: value for key, value in part.items() if key != "include"}))
        load(path)
    assert seen >= set(digits) - {"name", "description"}


def mistakes() -> list[tuple[str, str, str]]:
    text = (ROOT / "docs" / "recipe.md").read_text().partition("## What is said about mistakes")[2]
    return re.findall(r"^\| `(.+?)` \| `(.+?)` \| `(.+?)` \|$", text, re.MULTILINE)


@pytest.mark.parametrize(("right", "wrong", "message"), mistakes(), ids=lambda text: text[:24])
def test_mistakes_are_told_as_the_document_on_recipes_says(tmp_path, monkeypatch, right, wrong, message):
    shutil.copytree(ROOT / "recipes" / "digits", tmp_path / "digits")
    text = (ROOT / "recipes" / "digits.yaml").read_text()
    assert right in text
    (tmp_path / "digits.yaml").write_text(text.replace(right, wrong, 1))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError) as caught:
        gather(load(Path("digits.yaml")))
    assert message in {f"{fault.path}: {fault.what}" for fault in caught.value.faults}


def test_the_document_on_operations_names_what_is_set_for_prefect():
    rows = re.findall(
        r"^\| (`PREFECT_.*?|`DO_NOT_TRACK`) \| `(\w+)` \|", (ROOT / "docs" / "operations.md").read_text(), re.MULTILINE
    )
    assert {name: value for names, value in rows for name in re.findall(r"`(\w+)`", names)} == PREFECT_SETTINGS


# ---- the command line


COMMANDS = typer.main.get_command(command_line())


def test_every_command_has_help_with_an_example():
    assert isinstance(COMMANDS, click.Group | typer.core.TyperGroup)
    lacking = [
        name
        for name, command in COMMANDS.commands.items()
        if not re.search(rf"^ *Example: enginery {name}\b", command.help or "", re.MULTILINE)
    ]
    assert lacking == []
    undescribed = [
        f"{name} {option.name}"
        for name, command in COMMANDS.commands.items()
        for option in command.params
        if not getattr(option, "help", None)
    ]
    assert undescribed == []


def test_the_readme_names_every_command():
    text = (ROOT / "README.md").read_text()
    assert [name for name in COMMANDS.commands if f"enginery {name}" not in text] == []


def test_shell_completion_completes_commands():
    script = Path(sys.executable).with_name("enginery")
    if not script.exists():
        pytest.skip("enginery is not installed as a command beside this Python (pip install --editable .)")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}

    def run(**more: str) -> str:
        return subprocess.run(
            [script], env=environment | more, capture_output=True, text=True, check=True, timeout=60
        ).stdout

    assert "complete -o default -F _enginery_completion enginery" in run(_ENGINERY_COMPLETE="source_bash")
    offered = run(_ENGINERY_COMPLETE="complete_bash", COMP_WORDS="enginery va", COMP_CWORD="1")
    assert offered.split() == ["validate"]
    shown = subprocess.run(
        ["bash", "-c", f"'{script}' --show-completion; exit $?"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert shown.returncode == 0, shown.stderr
    assert "_enginery_completion" in shown.stdout


def test_the_tests_that_the_threat_model_names_are_there():
    named = set(re.findall(r"`(test_[a-z0-9_]+)`", (ROOT / "docs" / "security.md").read_text()))
    there = {
        name
        for path in (ROOT / "tests").rglob("test_*.py")
        for name in re.findall(r"def (test_\w+)\(", path.read_text())
    }
    assert len(named) > 20
    assert named - there == set()
