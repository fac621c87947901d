"""What a newcomer gets wrong: each ends with words that say what to do, the right exit status, and no traceback."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from typer.testing import CliRunner, Result

from enginery.__main__ import command_line
from tests.integration.building import RECIPES, ROOT, enginery


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the digits recipe, and caches and a store of its own."""
    shutil.copytree(RECIPES / "digits", tmp_path / "digits", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(RECIPES / "digits.yaml", tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("ENGINERY_STORE", raising=False)
    return tmp_path


def ask(*arguments: str, status: int) -> Result:
    """Run a command in this process: whatever is no exit status is raised here."""
    result = CliRunner().invoke(command_line(), arguments, catch_exceptions=False, prog_name="enginery")
    assert result.exit_code == status, result.output
    return result


def edit(folder: Path, right: str, wrong: str) -> None:
    path = folder / "digits.yaml"
    text = path.read_text()
    assert right in text
    path.write_text(text.replace(right, wrong, 1))


COMMANDS = {
    "a recipe that is not there": ("build nosuch.yaml", 2, "nosuch.yaml: no such file"),
    "a near miss of one": ("plan digit.yaml", 2, "did you mean 'digits.yaml'?"),
    "a folder without recipes": ("validate digits", 2, "no recipe in this folder"),
    "a binary file": ("validate digits/weights.safetensors", 2, "not UTF-8"),
    "a target of no recipe": ("build digits.yaml --target tensorrt-rtx:sm98", 2, "allowed: onnxruntime, onnxruntime:cpu"),
    "a command that is none": ("bild digits.yaml", 2, "Did you mean 'build'?"),
    "an option that is none": ("build digits.yaml --stroe x", 2, "--store"),
    "no jobs": ("build digits.yaml --jobs 0", 2, "--jobs"),
    "an address of no store": ("plan digits.yaml --store gs://x/y", 2, "allowed: a folder, file:///folder, s3://bucket"),
    "a bucket without a name": ("list --store s3://", 2, "expected s3://bucket/prefix"),
    "a file as store": ("plan digits.yaml --store digits.yaml", 1, "is a file, not a folder; give another --store"),
    "an engine that is not there": ("show digits/x", 1, "no engine 'digits/x'"),
    "a recipe without engines": ("resolve digits", 1, "build some: enginery build RECIPE"),
    "half a host": ("resolve digits --gpu sm89", 2, "both --gpu and --runtime are needed"),
    "a GPU by number": ("resolve digits --gpu 8.9 --runtime onnxruntime==1", 2, "did you mean sm89?"),
    "half a version": ("resolve digits --gpu sm89 --runtime tensorrt-rtx", 2, "is not NAME==VERSION"),
    "a shape with commas": ("pull digits --to x --shape image=1,8", 2, "write image=1x3x224x224"),
    "a host that nobody recorded": ("resolve digits --host far", 1, "enginery host --record"),
    "a schema of nothing": ("schema engine", 2, "recipe"),
}  # fmt: skip


@pytest.mark.parametrize("case", COMMANDS)
def test_a_wrong_command_line_is_told(folder: Path, case: str):
    command, status, words = COMMANDS[case]
    assert words in ask(*command.split(), status=status).stderr


def test_no_command_at_all_shows_what_there_is():
    result = ask(status=2)
    assert "enginery validate RECIPE" in result.output
    assert "Traceback" not in result.output


def test_all_faults_of_a_recipe_are_told_at_once_by_every_command(folder: Path):
    edit(folder, "simplifier:", "simplifer:")
    edit(folder, "batch: [1, 1, 4]", "batch: [1, 4]")
    edit(folder, "runtime: onnxruntime", "runtime: onnx-runtime")
    for command in ("validate", "plan", "build"):
        lines = ask(command, "digits.yaml", status=2).stderr.splitlines()
        assert [line.partition(": ")[0] for line in lines] == ["digits.yaml:11", "digits.yaml:18", "digits.yaml:35"]


def test_code_that_does_not_parse_is_told_before_anything_runs(folder: Path):
    (folder / "digits" / "layers.py").write_text("class ConvBlock(:\n")
    assert "digits/layers.py:1: syntax error" in ask("build", "digits.yaml", status=2).stderr
    assert not (folder / ".enginery").exists()


def test_two_recipes_of_one_name_are_refused(folder: Path):
    shutil.copy(folder / "digits.yaml", folder / "two.yaml")
    for command in ("validate", "plan", "build"):
        stderr = ask(command, "digits.yaml", "two.yaml", status=2).stderr
        assert "two.yaml: name: 'digits' is the name of digits.yaml too; names are unique" in stderr
    ask("plan", "digits.yaml", "digits.yaml", status=0)


def test_json_is_one_document_whatever_goes_wrong(folder: Path):
    edit(folder, "precision:\n", "precison:\n")
    fault = {"file": "digits.yaml", "line": 21, "path": "precison"}
    for command in ("validate", "plan", "build"):
        document = json.loads(ask(command, "digits.yaml", "--json", status=2).stdout)
        assert fault.items() <= document["faults"][0].items()
    for command, status in (("list --store gs://x", 2), ("show x", 1), ("resolve x --host far", 1)):
        result = ask(*command.split(), "--json", status=status)
        assert result.stderr == f"error: {json.loads(result.stdout)['error']}\n"


def test_a_folder_with_strange_files_is_validated(folder: Path):
    (folder / "folder.yaml").mkdir()
    (folder / "base.yaml").write_text("export: {opset: 18}\n")
    assert ask("validate", ".", status=0).stdout == "digits.yaml: ok (digits)\n"


def test_s3_without_credentials_or_a_server_says_what_to_set(folder: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("boto3", reason="boto3 is not installed (pip install 'enginery[s3]')")
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    assert "set AWS_PROFILE" in ask("plan", "digits.yaml", "--store", "s3://bucket/x", status=1).stderr
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
    assert "cannot reach http://127.0.0.1:9" in ask("list", "--store", "s3://bucket/x", status=1).stderr


def test_a_recipe_in_another_folder_is_found_from_anywhere(folder: Path, tmp_path_factory: pytest.TempPathFactory):
    os.chdir(tmp_path_factory.mktemp("elsewhere"))  # the fixture goes back
    assert "41 to run" in ask("plan", os.path.relpath(folder / "digits.yaml"), status=0).stdout


@pytest.mark.parametrize("columns", [20, 60, 80, 300])
def test_no_word_is_cut_on_any_terminal(folder: Path, columns: int):
    done = on_terminal("plan digits.yaml --explain", folder, columns=columns)
    words = re.sub(r"\x1b\[[0-9;]*m", "", done).replace(",", " ").split()
    for word in ("reference", "labelled", "miss:", "never", "built"):
        assert word in words


def test_a_pipe_and_no_color_get_plain_lines(folder: Path):
    assert "\x1b" not in enginery("plan", "digits.yaml", cwd=folder).stdout
    assert "\x1b[" in on_terminal("plan digits.yaml", folder)
    assert "\x1b[3" not in on_terminal("plan digits.yaml", folder, NO_COLOR="1")


def test_a_reader_that_leaves_early_is_no_fault(folder: Path):
    command = f"'{sys.executable}' -m enginery schema | head -c 10; exit ${{PIPESTATUS[0]}}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(["bash", "-c", command], env=environment, capture_output=True, text=True, check=False)
    assert (done.stderr, done.returncode in (0, 1)) == ("", True)


@pytest.mark.slow
def test_faults_of_code_and_data_are_told_whole_with_the_steps_that_they_block(folder: Path):
    import numpy as np

    with np.load(folder / "digits" / "heldout.npz") as data:
        np.savez(folder / "digits" / "heldout.npz", image=data["image"])
    model = folder / "digits" / "model.py"
    model.write_text(
        model.read_text().replace("return DigitsNet(", 'raise ValueError("no such width")\n    return DigitsNet(')
    )

    def built() -> subprocess.CompletedProcess[str]:
        home = {"PREFECT_HOME": str(folder / "prefect")}
        return enginery("build", "digits.yaml", "--target", "onnxruntime", cwd=folder, env=home)

    done = built()
    assert done.returncode == 1
    assert "bad data: data.npz has no array 'label' (it has: image)" in done.stderr
    assert re.search(r"publish +onnxruntime:cpu:int8 +blocked +needs fetch:labelled, which failed", done.stdout)
    assert "no such width" not in done.stderr  # data is looked at before any code of the recipe runs
    shutil.copy2(ROOT / "recipes" / "digits" / "heldout.npz", folder / "digits" / "heldout.npz")
    done = built()
    assert done.returncode == 1
    assert (
        'File "model.py", line 31, in build\n    raise ValueError("no such width")\nValueError: no such width'
        in done.stderr
    )
    assert "child.py" not in done.stderr
    assert "calling model:build: ValueError: no such width" in done.stdout
    assert re.search(r"publish +onnxruntime:cpu:int8 +blocked +needs export, which failed", done.stdout)
    assert "failed: needs export, which failed" in done.stdout


@pytest.mark.slow
def test_ctrl_c_ends_a_build_at_once_and_keeps_what_is_finished(folder: Path):
    said = on_terminal(
        "build digits.yaml", folder, interrupt_at="export", PREFECT_HOME=str(folder / "prefect"), status=130
    )
    assert "interrupted; what was finished is kept" in said
    assert "Traceback" not in said
    running = [process for process in psutil.process_iter(["cwd"]) if str(folder) in (process.info["cwd"] or "")]
    assert [process for process in running if process.pid != os.getpid()] == []
    assert not list((folder / ".enginery" / "engines").glob("*/*"))
    again = ask("plan", "digits.yaml", status=0).stdout
    assert not re.search(r"^ fetch +(code|weights) ", again, re.MULTILINE)  # only what runs is listed


def on_terminal(
    command: str, folder: Path, *, columns: int = 200, interrupt_at: str = "", status: int = 0, **environment: str
) -> str:
    """Run a command on a pseudo-terminal; press Ctrl-C when a word is shown; return everything that was said."""
    kept = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "FORCE_COLOR", "CI")}
    leader, follower = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-m", "enginery", *command.split()],
        cwd=folder,
        env={**kept, "PYTHONPATH": str(ROOT), "TERM": "xterm", "COLUMNS": str(columns), **environment},
        stdin=follower,
        stdout=follower,
        stderr=follower,
        start_new_session=True,
    ) as process:
        os.close(follower)
        said, deadline = b"", time.monotonic() + 120
        while time.monotonic() < deadline:
            if select.select([leader], [], [], 0.1)[0]:
                try:
                    said += os.read(leader, 65536)
                except OSError:  # the other end is closed
                    break
            if interrupt_at and interrupt_at.encode() in said:
                os.killpg(process.pid, 2)  # as a terminal does, to the whole group
                interrupt_at = ""
        assert process.wait(20) == status, said.decode()
    os.close(leader)
    return said.decode()
