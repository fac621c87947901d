"""The process that one stage runs in: `python -m tasks.child REPORT_FD PARENT_PID`, started by `tasks.process`.

The request comes as JSON on stdin. Progress and the result (or the error, by type) leave as JSON lines on REPORT_FD, so
that whatever native libraries print on stdout and stderr never mixes in. Nothing heavy is imported before the stage's
own module.
"""

from __future__ import annotations

import ctypes
import errno
import importlib
import json
import math
import os
import re
import signal
import sys
import traceback
from pathlib import Path
from typing import Any, Final

from recipes.errors import RecipeError
from tasks.errors import BackendError, ModelCodeError
from tasks.stage import STAGES, StageRequest, StageResult

# Which extra installs an optional package, by the name it is imported under.
EXTRAS: Final = {
    "rapidfuzz": "metrics",
    "pycocotools": "metrics",
    "PIL": "images",
    "boto3": "s3",
    "onnxscript": "torch",
    "onnxsim": "onnxsim",
    "onnxslim": "onnxslim",
    "paddle": "paddle",
    "paddle2onnx": "paddle",
    "tensorrt": "tensorrt",
    "tensorrt_rtx": "tensorrt-rtx",
    "torch": "torch",
    "transformers": "transformers",
}
_OWN: Final = ("artifacts", "enginery", "flows", "recipes", "tasks")
_TRACEBACK_CHARS: Final = 4000
_DISK_FULL: Final = re.compile(r"no space left on device|disk quota exceeded|file too large", re.IGNORECASE)
_NO_MEMORY: Final = re.compile(r"bad_alloc|(can't|cannot|failed to) allocate memory|out of memory", re.IGNORECASE)
_PR_SET_PDEATHSIG: Final = 1  # linux/prctl.h


class Reporter:
    """Writes JSON lines for the parent; a forked copy of this process writes none."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._owner = os.getpid()

    def progress(self, fraction: float | None, text: str) -> None:
        """Send progress: a fraction that is cut to 0..1 (None or NaN: unknown), and a short text."""
        known = fraction is not None and math.isfinite(fraction)
        self.send({"progress": [min(max(float(fraction or 0.0), 0.0), 1.0) if known else None, str(text)]})

    def send(self, message: dict[str, Any]) -> None:
        """Send one message. Raises ValueError for NaN and infinities, TypeError for what is no JSON."""
        rest = memoryview(json.dumps(message, allow_nan=False).encode() + b"\n")
        while self.owned and rest:
            rest = rest[os.write(self._descriptor, rest) :]

    @property
    def owned(self) -> bool:
        """Whether this process is the one that was started, and not a fork of it."""
        return os.getpid() == self._owner


def run(message: dict[str, Any], reporter: Reporter) -> StageResult:
    """Import the stage's module and run it."""
    module, _, name = (message["entry"] or STAGES[message["stage"]]).partition(":")
    stage = getattr(importlib.import_module(module), name)
    result = stage(
        StageRequest(
            message["stage"],
            message["params"],
            {name: Path(path) for name, path in message["inputs"].items()},
            Path(message["output_dir"]),
            reporter.progress,
        )
    )
    if not isinstance(result, StageResult):
        raise TypeError(f"the stage returned a {type(result).__name__}, not a StageResult")
    return result


def describe(error: BaseException) -> dict[str, Any]:
    """Return an error as JSON that `tasks.process` turns back into the same type; what has no type becomes a kind."""
    if isinstance(error, ModelCodeError):
        return {"type": "model-code", "message": str(error)}
    if isinstance(error, RecipeError):
        return {
            "type": "recipe",
            "faults": [[fault.file, fault.line, fault.path, fault.what] for fault in error.faults],
        }
    known = error if isinstance(error, BackendError) else _classify(error)
    return {"type": "backend", "kind": known.kind, "message": known.message, "advice": known.advice}


def _classify(error: BaseException) -> BackendError:
    words = f"{type(error).__name__}: {error}"
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    if full or (isinstance(error, Exception) and _DISK_FULL.search(words)):
        return BackendError("disk full", words, "free some space, or put the store (and TMPDIR) on a larger disk")
    if isinstance(error, MemoryError) or _NO_MEMORY.search(words):
        advice = "lower calibration.batch or the profiles' maxima, or use a host with more memory"
        return BackendError("out of memory", words, advice)
    if isinstance(error, ImportError) and error.name and error.name.partition(".")[0] not in _OWN:
        return _missing(error, error.name.partition(".")[0])
    trace = "".join(traceback.format_exception(type(error), error, error.__traceback__)).rstrip()
    if len(trace) > _TRACEBACK_CHARS:
        trace = f"...{trace[-_TRACEBACK_CHARS:]}"
    return BackendError("crash", trace, "this is a fault of Enginery or of a package it uses; please report it")


def _missing(error: ImportError, package: str) -> BackendError:
    extra = EXTRAS.get(package)
    install = f"pip install 'enginery[{extra}]'" if extra is not None else f"install {package}"
    if isinstance(error, ModuleNotFoundError):
        return BackendError("missing package", f"{package} is not installed here", install)
    return BackendError("missing package", f"{package} is installed but cannot be imported: {error}", install)


def die_with(parent: int) -> None:
    """Ask the kernel to kill this process when its parent's thread that started it ends (prctl(2))."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the request to the kernel
        os._exit(1)


def main() -> None:
    """Run the requested stage; the exit status says nothing, the report does."""
    descriptor, parent = int(sys.argv[1]), int(sys.argv[2])
    die_with(parent)
    os.set_inheritable(descriptor, False)
    # `-m` puts the working folder first: there, nothing may hide a module.
    sys.path[:] = [entry for entry in sys.path if entry not in ("", str(Path.cwd()))]
    reporter = Reporter(descriptor)
    try:
        result = run(json.load(sys.stdin), reporter)
        answer = {"result": {"outputs": dict(result.outputs), "facts": dict(result.facts)}}
        reporter.send(answer)
    except BaseException as error:
        if not reporter.owned:
            raise
        reporter.send({"error": describe(error)})
    sys.stdout.flush()
    sys.stderr.flush()
    # Without the interpreter's teardown, in which native libraries crash or hang after the work is done.
    os._exit(0)


if __name__ == "__main__":
    main()
