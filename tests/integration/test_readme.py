"""Every command of the README, run in its order in a copy of what a clone holds, with the exit statuses that it states.

`make demo` finds an environment there that borrows the packages of this one; in the case marked long it makes its own and
installs into it, as on a fresh machine (`make test` itself does that with more packages). All that follows runs with it.
`make test` is what runs this, so here it is only asked what it would do.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit.test_product import ROOT, fenced, tracked

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

_COMMAND = re.compile(r"^\$ (?P<command>.+?)(?:\s+# exit status (?P<status>[0-9]+))?$", re.MULTILINE)
_NAME = re.compile(r"-[0-9a-f]{16}\b")  # the build ids that follow from keys


def blocks() -> list[list[tuple[str, int, list[str]]]]:
    """Return the console blocks: each a list of (command, exit status, lines that follow it)."""
    found = []
    for text in fenced("README.md", "console"):
        _before, *pieces = re.split(r"^(?=\$ )", text, flags=re.MULTILINE)
        matches = [(_COMMAND.match(piece.splitlines()[0]), piece.splitlines()[1:]) for piece in pieces]
        found.append([(match["command"], int(match["status"] or 0), lines) for match, lines in matches if match])
    return found


@pytest.fixture(scope="module", params=["borrowed", pytest.param("installed", marks=pytest.mark.long)])
def clone(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clone")
    for path in tracked():
        target = folder / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, target)
    if request.param == "borrowed":
        borrow(folder)
    return folder


def borrow(folder: Path) -> None:
    """Make the environment that `make demo` would, of the clone's own code and this environment's packages."""
    venv = folder / ".venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True, timeout=120)
    (site,) = venv.glob("lib/python*/site-packages")
    packages = [path for path in sys.path if Path(path).name == "site-packages"]
    (site / "borrowed.pth").write_text("\n".join([str(folder), *packages]) + "\n")
    command = venv / "bin" / "enginery"
    command.write_text(f"#!{venv}/bin/python\nimport sys\nfrom enginery.__main__ import main\nsys.exit(main())\n")
    command.chmod(0o755)
    (venv / ".demo").touch()


def run(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    if command == "make test":  # which is what runs this
        command = "make --dry-run test"
    ours = ("ENGINERY_STORE", "MAKEFLAGS", "MAKELEVEL", "PYTHONPATH", "VIRTUAL_ENV", "VENV", "RECIPE")
    environment = {name: value for name, value in os.environ.items() if name not in ours}
    return subprocess.run(
        ["bash", "-c", command],
        cwd=folder,
        env=environment | {"PATH": f"{folder}/.venv/bin:{os.environ['PATH']}", "NO_COLOR": "1"},
        capture_output=True,
        text=True,
        timeout=900 if command == "make demo" else 300,
        check=False,
    )


def test_every_command_of_the_readme_runs_and_says_what_it_says(clone: Path):
    commands = [entry for block in blocks() for entry in block]
    assert len(commands) > 15
    for command, status, lines in commands:
        done = run(command, clone)
        assert done.returncode == status, f"{command}\n{done.stdout}\n{done.stderr}"
        said = {_shape(line) for line in done.stdout.splitlines()}
        missing = [line for line in lines if line.strip(" ─…") and not _said(_shape(line), said)]
        assert missing == [], f"{command}\n{done.stdout}"
    assert (clone / ".enginery" / "engines" / "digits").is_dir()
    assert (clone / "report.json").stat().st_size > 1000
    again = run("enginery plan recipes/digits.yaml", clone)
    assert again.stdout == "digits: 0 to run, 0 more if their input changes, 41 cached\n"


def _said(line: str, said: set[str]) -> bool:
    """Tell whether a line of the README was said; one that begins with … is the end of a path."""
    return line in said or (line.startswith("…") and any(other.endswith(line[1:]) for other in said))


def _shape(line: str) -> str:
    """Leave out what differs between hosts: build ids, and how wide a column is."""
    return " ".join(_NAME.sub("-ID", line).split())
