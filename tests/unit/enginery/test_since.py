"""`--since`: exactly the recipes that a change in Git touches, by whatever they read now or read before."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from enginery import recipe_commands
from enginery.since import touched_since
from tasks.git import GitError

CODED = """
enginery: 1
name: coded
include: shared/base.inc
source: {framework: torch, model: 'code/model.py:build', include: ['code/extra/*.txt'], weights: {file: link.pt}}
outputs: [y]
inputs: {x: {shape: [1, 4]}}
precision: {build: [int8], calibration: {data: samples}}
acceptance: {metric: {name: top1, floor: 0.5, data: {data: 'code/data.py:labelled'}}}
targets: [{runtime: onnxruntime}]
"""
PLAIN = """
enginery: 1
name: plain
source: {framework: onnx, model: {file: plain.onnx}}
inputs: {x: {shape: [1, 4]}}
targets: [{runtime: onnxruntime}]
"""
FILES = {
    "recipes/coded.yaml": CODED,
    "recipes/plain.yaml": PLAIN,
    "recipes/plain.onnx": "a graph",
    "recipes/shared/base.inc": "description: shared\n",
    "recipes/code/model.py": "from layers import conv\nimport gone\ndef build(): ...\n",
    "recipes/code/layers/__init__.py": "",
    "recipes/code/layers/conv.py": "",
    "recipes/code/layers/unused.py": "",
    "recipes/code/gone.py": "",
    "recipes/code/data.py": "def labelled(): ...\n",
    "recipes/code/extra/one.txt": "one",
    "recipes/code/extra/two.txt": "two",
    "recipes/samples/1.npy": "one",
    "recipes/samples/deep/2.npy": "two",
    "recipes/samples/notes.md": "nobody reads this",
    "recipes/weights.pt": "weights",
    "README.md": "words",
}


def git(folder: Path, *words: str) -> str:
    names = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "protocol.file.allow=always"]
    done = subprocess.run(["git", *names, "-C", str(folder), *words], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def commit(folder: Path) -> None:
    git(folder, "add", "-A")
    git(folder, "commit", "-qm", "a change")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    for name, text in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    (folder / "recipes" / "link.pt").symlink_to("weights.pt")
    git(folder, "init", "-q", "-b", "main")
    commit(folder)
    return folder


@pytest.fixture
def house(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "house", symlinks=True))


def taken(house: Path, revision: str = "HEAD") -> dict[str, dict[str, str]]:
    """What is touched, by the recipe's stem."""
    found = touched_since(sorted((house / "recipes").glob("*.yaml")), revision)
    return {path.stem: files for path, files in found.files.items()}


def edited(name: str) -> Callable[[Path], object]:
    return lambda house: (house / name).write_text((house / name).read_text() + "# more\n")


def removed(name: str) -> Callable[[Path], object]:
    return lambda house: (house / name).unlink()


def added(name: str, text: str = "new") -> Callable[[Path], object]:
    return lambda house: ((house / name).parent.mkdir(exist_ok=True), (house / name).write_text(text))


def relinked(house: Path) -> None:
    (house / "recipes" / "other.pt").write_text("others")
    (house / "recipes" / "link.pt").unlink()
    (house / "recipes" / "link.pt").symlink_to("other.pt")


CHANGES: dict[str, tuple[Callable[[Path], object], dict[str, dict[str, str]]]] = {
    "a recipe": (edited("recipes/plain.yaml"), {"plain": {"recipes/plain.yaml": "changed"}}),
    "a base": (edited("recipes/shared/base.inc"), {"coded": {"recipes/shared/base.inc": "changed"}}),
    "model code": (edited("recipes/code/model.py"), {"coded": {"recipes/code/model.py": "changed"}}),
    "a module it imports": (
        edited("recipes/code/layers/conv.py"),
        {"coded": {"recipes/code/layers/conv.py": "changed"}},
    ),
    "a module nobody imports": (edited("recipes/code/layers/unused.py"), {}),
    "an imported module gone": (removed("recipes/code/gone.py"), {"coded": {"recipes/code/gone.py": "deleted"}}),
    "a module beside the recipe that now is found": (
        lambda house: (removed("recipes/code/gone.py")(house), added("recipes/gone.py", "")(house)),
        {"coded": {"recipes/code/gone.py": "deleted", "recipes/gone.py": "added"}},
    ),
    "a module that hides a package": (added("recipes/torch.py"), {}),
    "code of a data set": (edited("recipes/code/data.py"), {"coded": {"recipes/code/data.py": "changed"}}),
    "a file of a glob": (edited("recipes/code/extra/one.txt"), {"coded": {"recipes/code/extra/one.txt": "changed"}}),
    "one file of a glob gone": (
        removed("recipes/code/extra/two.txt"),
        {"coded": {"recipes/code/extra/two.txt": "deleted"}},
    ),
    "a sample more": (added("recipes/samples/3.npy"), {"coded": {"recipes/samples/3.npy": "added"}}),
    "a sample less": (removed("recipes/samples/deep/2.npy"), {"coded": {"recipes/samples/deep/2.npy": "deleted"}}),
    "another sample": (edited("recipes/samples/1.npy"), {"coded": {"recipes/samples/1.npy": "changed"}}),
    "no sample": (edited("recipes/samples/notes.md"), {}),
    "weights behind a link": (edited("recipes/weights.pt"), {"coded": {"recipes/weights.pt": "changed"}}),
    "a link": (relinked, {"coded": {"recipes/link.pt": "changed", "recipes/other.pt": "added"}}),
    "a graph": (edited("recipes/plain.onnx"), {"plain": {"recipes/plain.onnx": "changed"}}),
    "a graph gone": (removed("recipes/plain.onnx"), {"plain": {}}),  # cannot be read
    "nothing that is read": (edited("README.md"), {}),
    "a new recipe": (
        added("recipes/more.yaml", PLAIN.replace("plain\n", "more\n")),
        {"more": {"recipes/more.yaml": "added"}},
    ),
    "a recipe renamed": (
        lambda house: (house / "recipes/plain.yaml").rename(house / "recipes/renamed.yaml"),
        {"renamed": {"recipes/renamed.yaml": "added"}},
    ),
}


HOW = [(change, "edited") for change in CHANGES]
HOW += [
    (change, how) for change in ("a recipe", "a recipe renamed", "a sample less") for how in ("staged", "committed")
]


@pytest.mark.parametrize(("change", "staged"), HOW)
def test_exactly_what_reads_a_changed_file_is_touched(house: Path, change: str, staged: str):
    assert taken(house) == {}
    make, expected = CHANGES[change]
    make(house)
    if staged != "edited":
        git(house, "add", "-A")
    if staged == "committed":
        git(house, "commit", "-q", "--allow-empty", "-m", "a change")
    assert taken(house, "HEAD~1" if staged == "committed" else "HEAD") == expected


def test_what_others_merged_meanwhile_does_not_count(house: Path):
    git(house, "checkout", "-qb", "work")
    edited("recipes/plain.onnx")(house)
    commit(house)
    git(house, "checkout", "-q", "main")
    edited("recipes/code/model.py")(house)
    commit(house)
    git(house, "checkout", "-q", "work")
    assert set(taken(house, "main")) == {"plain"}


def test_files_that_git_does_not_follow_are_told_unless_their_digest_is_stated(
    house: Path, capsys: pytest.CaptureFixture[str]
):
    (house / ".gitignore").write_text("*.onnx\n")
    git(house, "rm", "-q", "--cached", "recipes/plain.onnx")
    commit(house)
    assert taken(house) == {}
    assert "plain.onnx: --since sees no change of it" in capsys.readouterr().err
    digest = hashlib.sha256(b"a graph").hexdigest()
    recipe = house / "recipes" / "plain.yaml"
    recipe.write_text(recipe.read_text().replace("plain.onnx}", f"plain.onnx, sha256: {digest}}}"))
    commit(house)
    assert taken(house) == {}
    assert "warning" not in capsys.readouterr().err


def run(*words: str) -> tuple[int, str, str]:
    app = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False)
    recipe_commands.register(app)
    done = CliRunner().invoke(app, list(words))
    return done.exit_code, done.stdout, done.stderr


def test_commands_take_the_touched_recipes_alone_and_say_why(house: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(house)
    store = ["--store", "store"]
    assert run("plan", "recipes", "--since", "HEAD", "--json", *store)[:2] == (0, "[]\n")
    assert run("build", "recipes", "--since", "HEAD", "--json", *store)[:2] == (0, "[]\n")
    edited("recipes/plain.onnx")(house)
    status, out, err = run("plan", "recipes", "--since", "HEAD", "--json", *store)
    head = git(house, "rev-parse", "HEAD")
    (document,) = json.loads(out)
    assert (status, document["recipe"]) == (0, "plain")
    assert document["since"] == {"revision": "HEAD", "commit": head, "files": {"recipes/plain.onnx": "changed"}}
    assert (
        f"1 of 2 recipes touched since HEAD ({head[:12]})\n  recipes/plain.yaml: recipes/plain.onnx (changed)\n" in err
    )
    status, out, _err = run("plan", "recipes", "--since", "HEAD", "--markdown", *store)
    assert "\n| plain | " in out
    assert r"recipes/plain.onnx (changed) |" in out
    status, out, _err = run("validate", "recipes", "--since", "HEAD", "--json")
    assert [one["file"] for one in json.loads(out)["valid"]] == ["recipes/plain.yaml"]
    # A new recipe must not have the name of one that no change touches.
    commit(house)
    added("recipes/twin.yaml", PLAIN)(house)
    for command in ("validate", "plan", "build"):
        status, _out, err = run(command, "recipes", "--since", "HEAD")
        assert status == 2, command
        assert "'plain' is the name of recipes/plain.yaml too" in err


def test_what_git_cannot_tell_is_said_with_the_next_step(house: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    edited("recipes/plain.onnx")(house)
    commit(house)
    with pytest.raises(GitError, match="Git knows no such revision here; fetch it"):
        taken(house, "origin/main")
    with pytest.raises(GitError, match="no such revision"):
        taken(house, "--help")
    shallow = tmp_path / "shallow"
    git(tmp_path, "clone", "-q", "--depth", "1", f"file://{house}", str(shallow))
    with pytest.raises(GitError, match="this clone is shallow: fetch its history with git fetch --unshallow"):
        taken(shallow, "HEAD~1")
    git(house, "checkout", "-q", "--orphan", "other")
    commit(house)
    with pytest.raises(GitError, match="shares no history with HEAD"):
        taken(house, "main")
    (tmp_path / "plain").mkdir()
    for name in ("plain.yaml", "plain.onnx"):
        shutil.copy(house / "recipes" / name, tmp_path / "plain")
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    status, _out, err = run("plan", str(tmp_path / "plain"), "--since", "HEAD")
    assert (status, "is in no Git work tree" in err) == (2, True)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(GitError, match="not installed"):
        taken(house)


def test_neither_modes_nor_times_count_and_no_program_of_the_settings_is_run(house: Path):
    (house / "ran.sh").write_text("#!/bin/sh\ntouch ran\n")
    (house / "ran.sh").chmod(0o755)
    git(house, "config", "diff.external", str(house / "ran.sh"))
    (house / "recipes" / "plain.onnx").chmod(0o755)
    os.utime(house / "recipes" / "coded.yaml")
    assert taken(house) == {}
    edited("recipes/plain.onnx")(house)
    assert set(taken(house)) == {"plain"}
    assert not (house / "ran").exists()
