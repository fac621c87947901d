"""Which files hold an ONNX graph's external data, found without importing onnx here."""

from __future__ import annotations

import json
import mmap
import os
import posixpath
import subprocess
import sys
from pathlib import Path
from typing import Final

from recipes.digests import Digests

_TIMEOUT_S: Final = 300

# Runs in a child process: importing onnx costs half a second, and reading a graph may take memory. The working folder is
# taken off sys.path first, so that no file there can pass for onnx.
_ASK: Final = """
import sys
sys.path[:] = [entry for entry in sys.path if entry]
import json
import onnx
from onnx.external_data_helper import _get_all_tensors, uses_external_data
model = onnx.load(sys.argv[1], load_external_data=False)
names = {entry.value for tensor in _get_all_tensors(model) if uses_external_data(tensor)
         for entry in tensor.external_data if entry.key == "location"}
print(json.dumps(sorted(names)))
"""


class NotOnnxError(Exception):
    """The file cannot be read as an ONNX graph; the message says why."""


def external_locations(path: Path, digest: str, digests: Digests) -> tuple[str, ...]:
    """Return the names of a graph's external data files as the graph states them, sorted.

    A graph that has any holds the word `location` (onnx.proto, StringStringEntryProto of TensorProto.external_data);
    only then is onnx asked, and its answer is remembered by the graph's digest. Raises NotOnnxError.
    """
    if not _holds(path, b"location"):
        return ()
    names = _names(digests.noted("onnx", digest))
    if names is None:
        answer = _ask(path)
        names = _names(answer)
        if names is None:
            raise NotOnnxError(f"onnx did not say where its data is: {answer[:100]!r}")
        digests.note("onnx", digest, answer)
    return names


def location_fault(name: str) -> str | None:
    """Say why a location cannot be followed, or None: it has to stay inside the graph's folder."""
    inside = posixpath.normpath(name)
    if name.startswith("/") or "\\" in name or ":" in name[:2] or inside == ".." or inside.startswith("../"):
        return f"its external data {name!r} leads out of the graph's folder; save the graph with data beside it"
    if name in ("", ".", "model.onnx") or inside != name:
        return f"its external data cannot be called {name!r}; save the graph with data in 'model.onnx.data'"
    return None


def leads_out(graph: Path, name: str) -> bool:
    """Tell whether a graph's external data lies elsewhere by symbolic links: neither in its folder nor beside its real file."""
    data = os.path.realpath(graph.parent / name)
    homes = {os.path.realpath(graph.parent), os.path.dirname(os.path.realpath(graph))}  # noqa: PTH120 - of texts
    return not any(os.path.commonpath((data, home)) == home for home in homes)


def _names(text: str | None) -> tuple[str, ...] | None:
    """Read a JSON list of strings; None for anything else, such as a damaged memory."""
    try:
        found = json.loads(text or "")
    except ValueError:
        return None
    return tuple(found) if isinstance(found, list) and all(isinstance(name, str) for name in found) else None


def _holds(path: Path, word: bytes) -> bool:
    with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as view:
        return view.find(word) >= 0


def _ask(path: Path) -> str:
    command = [sys.executable, "-c", _ASK, str(path.absolute())]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired as err:
        raise NotOnnxError(f"onnx did not read it within {_TIMEOUT_S} s") from err
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or [f"onnx ended with status {done.returncode}"])[-1]
        raise NotOnnxError(f"onnx cannot read it: {last[:300]}")
    return done.stdout.strip()
