"""Stage requests for tests: code bundles, weights and graphs in fresh folders."""

import io
import itertools
import re
import tarfile
import textwrap
from pathlib import Path

from tasks.stage import StageRequest


def code_tar(folder: Path, files: dict[str, str]) -> Path:
    path = folder / "code.tar"
    with tarfile.open(path, "w") as archive:
        for name, text in sorted(files.items()):
            data = textwrap.dedent(text).encode()
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def fresh(folder: Path, name: str = "out") -> Path:
    for index in itertools.count():
        path = folder / f"{name}{index}"
        if not path.exists():
            path.mkdir(parents=True)
            return path
    raise AssertionError


def request(stage: str, params: dict, inputs: dict[str, Path], folder: Path) -> StageRequest:
    return StageRequest(stage, params, inputs, fresh(folder, stage))


def frames(error: BaseException) -> list[str]:
    """Return the files of the traceback that a message holds; tests expect the recipe's own and no other."""
    text = str(error)
    assert "Traceback (most recent call last):" in text
    return re.findall(r'File "([^"]+)", line', text)


def tensor(shape, dtype="float32", low=None, high=None):
    return {"dtype": dtype, "shape": shape, "low": low, "high": high}
