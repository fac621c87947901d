"""What TensorRT says while it works: kept, counted, turned into progress, and into one of our kinds of failure.

TensorRT's setters do not raise; what they refuse is an ERROR in the log, and so is the reason of a failed build.
"""

from __future__ import annotations

import re
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, Final

from tasks.errors import BackendError

Report = Callable[[float | None, str], None]

_REPORT_SECONDS: Final = 1.0
_KEPT: Final = 200
_MESSAGE_CHARS: Final = 1000
# What the 8.6 builder says in VERBOSE lines before it times a layer's kernels; later versions have IProgressMonitor.
_TIMED: Final = re.compile(r"^-+ Timing Runner: (.+?) \(|^\*+ Autotuning format combination")

# What TensorRT says where cuBLAS or cuDNN is not there, or is another library of that name.
_CUDA_LIBRARY: Final = (
    r"SymbolAddress for cu(?:blas|dnn)\w* could not be loaded|Unable to load library: libcu(?:blas|dnn)"
    r"|could not initialize cu(?:blas|dnn)"
)
_INSTALL_CUDA_LIBRARY: Final = (
    "install the cuBLAS and cuDNN of this version (8.6: cuBLAS 12 and cuDNN 8), which it starts for plugins and for tactic "
    "sources of their names; or name other build.tactic_sources: [jit-convolutions, edge-mask-convolutions]"
)

# The first pattern that matches decides, so specific ones come first. Wordings: TensorRT 8.6 on an H200, strings of the
# libraries of 10.16 and 11.4, and TensorRT-RTX 1.7 on a CPU.
_KINDS: Final = (
    ("missing plugin", r"Plugin not found|could not find plugin|getPluginCreator|IPluginCreator not found"),
    (
        "version mismatch",
        (
            r"plan file is not compatible|version tag does not match|generated on an incompatible device|magicTag"
            r"|serialization.*version|incompatible with this version|expecting compute"
        ),
    ),
    (
        "no device",
        (
            r"no CUDA-capable device|CUDA initialization failure|driver version is insufficient|CUDA_ERROR_NO_DEVICE"
            r"|unable to determine GPU|Unable to load library: libcuda"
        ),
    ),
    ("missing package", rf"Unable to load library: libnvinfer|{_CUDA_LIBRARY}"),
    ("unsupported operator", r"No importer registered|UNSUPPORTED_\w+|INVALID_NODE|unsupported operator"),
    (
        # Before "no kernel": where memory runs out while kernels are timed, both are said, and this one is the cause.
        "out of memory",
        (
            r"out of memory|OutOfMemory|insufficient memory|bad_alloc|could not be allocated|could not allocate"
            r"|unable to allocate|memory allocation fail|failed to allocate"
        ),
    ),
    (
        "no kernel",
        r"insufficient workspace|Could not find any implementation|no implementation|Cannot compile for target",
    ),
    (
        "bad profile",
        (
            r"optimization profile|\bprofile \d|kMIN|kOPT|kMAX|dynamic (?:shape|input)|volume mismatch"
            r"|would change volume|(?:min|opt|max)imum dimensions in profile|tensor volume exceeds"
        ),
    ),
    ("disk full", r"No space left on device"),
    ("not reproducible", r"new entry to timing cache|ERROR_ON_TIMING_CACHE_MISS|one key should map to"),
)
_ADVICE: Final = {
    "version mismatch": "build the engine again with this TensorRT on this kind of GPU",
    "no device": "use a host with an NVIDIA GPU and a driver that this TensorRT supports",
    "missing package": "this installation of TensorRT lacks that library; install a whole one, or leave the option out",
    "missing plugin": "name the operator's plugin library, with its digest, under build.plugins; or use operators of the ONNX standard",
    "unsupported operator": "replace the operator in the model, or build with a newer TensorRT",
    "no kernel": "raise build.workspace, ask for another precision, or put the node on precision.keep",
    "out of memory": "lower the profiles' maxima or build.workspace, or free memory on the GPU",
    "bad profile": "correct the profiles in the recipe: the network must accept every shape between min and max",
    "bad data": "the graph is damaged, or uses ONNX in a way that this version does not read: export it anew",
    "disk full": "free some space",
    "not reproducible": "pin the timing cache of a build of this very graph, by this version, on such a device",
    "crash": "this is a fault of the compiler; try another version of it, or report it with these lines",
}


class Log:
    """Collects messages; safe to write to from several threads.

    `errors` and `warnings` hold distinct messages in order, at most 200 of each; `lines` counts all.
    """

    def __init__(self, report: Report, *, folder: str = "") -> None:
        """`folder` is left out of messages: it names a temporary place of this machine."""
        self._folder = f"{folder}/"
        self.errors: list[str] = []
        self.warnings: list[str] = []
        self.lines = 0
        self.silent = False  # whether something better than the log reports progress
        self._timed = 0
        self._report = report
        self._spoke = 0.0
        self._lock = threading.Lock()

    def write(self, severity: str, message: str) -> None:
        """Take one message; INFO and above are printed to stderr."""
        with self._lock:
            self.lines += 1
            kept = {"ERROR": self.errors, "INTERNAL_ERROR": self.errors, "WARNING": self.warnings}.get(severity)
            message = message.strip()
            if self._folder != "/":
                message = message.replace(self._folder, "")
            if kept is not None and message not in kept and len(kept) < _KEPT:
                kept.append(message[:_MESSAGE_CHARS])
            if severity != "VERBOSE":
                sys.stderr.write(f"[{severity}] {message}\n")
            self._beat(message)

    def _beat(self, message: str) -> None:
        self._timed += 1 if (timed := _TIMED.match(message)) else 0
        now = time.monotonic()
        if self.silent or not self._timed or now - self._spoke < _REPORT_SECONDS:
            return
        self._spoke = now
        what = f": {timed[1][:80]}" if timed and timed[1] else ""
        self._report(None, f"compiling, {self._timed} layers and formats timed{what}")

    def for_runtime(self, trt: Any) -> Any:
        """Return a logger of that TensorRT's own type that writes here."""
        log = self

        class Logger(trt.ILogger):  # type: ignore[misc]  # its type is known only at run time
            def __init__(self) -> None:
                trt.ILogger.__init__(self)

            def log(self, severity: Any, message: str) -> None:
                log.write(severity.name, message)

        return Logger()

    def take_errors(self, since: int) -> list[str]:
        """Return the errors after the first `since`, and forget them: the caller has dealt with them."""
        taken, self.errors[since:] = self.errors[since:], []
        return taken

    def failure(
        self, what: str, *, otherwise: str = "crash", extra: str = "", since: int = 0, kind: str | None = None
    ) -> BackendError:
        """Return what the errors after the first `since` amount to; `otherwise` is the kind where no wording is known.

        Earlier errors may have been harmless: the compiler went on after them. `kind` is given where the call that
        failed leaves only one.
        """
        words = "\n    ".join([*([extra] if extra else []), *(self.errors[since:] or self.errors)[-8:]])
        kind = kind or kind_of(words, otherwise)
        advice = _ADVICE.get(kind, "")
        if kind == "missing package" and re.search(_CUDA_LIBRARY, words, re.IGNORECASE):
            advice = _INSTALL_CUDA_LIBRARY
        return BackendError(kind, f"{what}:\n    {words or 'TensorRT gave no reason'}", advice)


def kind_of(words: str, otherwise: str = "crash") -> str:
    """Return the kind of failure that TensorRT's words describe."""
    return next((kind for kind, pattern in _KINDS if re.search(pattern, words, re.IGNORECASE)), otherwise)


def progress_monitor(trt: Any, log: Log, report: Report) -> Any | None:
    """Return an IProgressMonitor that reports, or None where the version has none (8.6: the log reports instead)."""
    if not hasattr(trt, "IProgressMonitor"):
        return None
    log.silent = True
    phases = Phases(report)

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]  # its type is known only at run time
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            phases.start(phase_name, parent_phase, num_steps)

        def phase_finish(self, phase_name: str) -> None:
            phases.finish(phase_name)

        def step_complete(self, phase_name: str, step: int) -> bool:
            phases.step(phase_name, step)
            return True  # go on

    return Monitor()


class Phases:
    """Turns nested phases into one fraction: a phase's steps share its extent evenly; phases may run in several threads."""

    def __init__(self, report: Report) -> None:
        self._open: dict[str, list[Any]] = {}  # name -> [parent, steps, steps done]
        self._report = report
        self._spoke = 0.0
        self._reached = 0.0
        self._lock = threading.Lock()

    def start(self, name: str, parent: str | None, steps: int) -> None:
        """Open a phase."""
        with self._lock:
            self._open[name] = [parent, max(steps, 1), 0]
            self._say(name)

    def step(self, name: str, step: int) -> None:
        """Count a step: `step` is its index, from 0."""
        with self._lock:
            if name in self._open:
                self._open[name][2] = step + 1
                self._say(name)

    def finish(self, name: str) -> None:
        """Close a phase."""
        with self._lock:
            self._open.pop(name, None)

    def _say(self, name: str) -> None:
        share, inner = 0.0, name
        phase: str | None = name
        while phase in self._open:
            phase, steps, done = self._open[phase]
            share = min((done + share) / steps, 1.0)
        self._reached = max(self._reached, share)  # one phase follows another: a bar that runs backwards says nothing
        now = time.monotonic()
        if now - self._spoke >= _REPORT_SECONDS:
            self._spoke = now
            self._report(self._reached, inner[:100])
