"""Start, bound and classify the process of one stage: nothing that a stage does can harm its parent.

A stage runs in a fresh `python -m tasks.child` in a process group of its own. It is stopped, with everything it
started, when its time or memory is used up, when the build is cancelled, or when this process dies. Native crashes
end that process alone and become a BackendError with the last lines it said.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NoReturn

from recipes.errors import Fault, RecipeError
from tasks.errors import BackendError, ModelCodeError, StageCancelledError
from tasks.memory import ProcessTree
from tasks.pipes import Pipes
from tasks.stage import STAGES, StageResult

_POLL_SECONDS: Final = 0.2
_LAST_LINES: Final = 20
_GIB: Final = 1 << 30
_ROOT: Final = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Limits:
    """What one stage may use: wall time in seconds, memory of its processes in bytes, threads of its math libraries.

    `threads` None means as many as this process may run on.
    """

    timeout_s: float
    memory_bytes: int
    threads: int | None = None


def _ignore(*_said: object) -> None:
    """Listen to nothing."""


def run_stage(
    stage: str,
    params: Mapping[str, Any],
    inputs: Mapping[str, Path],
    output_dir: Path,
    *,
    limits: Limits,
    on_progress: Callable[[float | None, str], None] = _ignore,
    on_log: Callable[[str], None] = _ignore,
    cancel: threading.Event | None = None,
    entry: str | None = None,
    variables: Mapping[str, str] | None = None,
    python: str | None = None,
) -> StageResult:
    """Run a stage in a process of its own and return its result, whose output files have been checked to exist.

    `output_dir` is an empty folder; everything the stage prints goes to `on_log` line by line and to the file
    `<output_dir>.log` beside it. Both callbacks are called from this thread, which must live as long as the stage:
    the kernel ends the child when the thread that started it ends (prctl(2), PR_SET_PDEATHSIG). `entry` runs another
    function than the stage's own; `variables` are environment variables besides this process's own, `python` another interpreter than this one. Raises BackendError, ModelCodeError and RecipeError as the stage does;
    BackendError("time-out" | "out of memory" | "disk full" | "crash") for what happened to the process;
    StageCancelledError.
    """
    if entry is None and stage not in STAGES:
        raise ValueError(f"unknown stage {stage!r}")
    output_dir = output_dir.absolute()
    request = {
        "stage": stage,
        "entry": entry,
        "params": dict(params),
        "inputs": {name: str(path.absolute()) for name, path in inputs.items()},
        "output_dir": str(output_dir),
    }
    scratch = output_dir.with_name(f"{output_dir.name}.tmp")
    with contextlib.ExitStack() as held:
        held.callback(shutil.rmtree, scratch, ignore_errors=True)
        try:
            scratch.mkdir()
            pipes = Pipes(output_dir.with_name(f"{output_dir.name}.log"), on_log)
            held.callback(pipes.close)
            process = _start(request, pipes, scratch, limits, variables or {}, python or sys.executable)
        except OSError as err:
            raise _not_started(err) from err
        child = _Child(process, stage, limits, pipes)
        held.callback(child.end)
        answer = child.watch(on_progress, cancel)
    return _checked(answer, output_dir)


def _start(
    request: Mapping[str, Any],
    pipes: Pipes,
    scratch: Path,
    limits: Limits,
    variables: Mapping[str, str],
    python: str,
) -> subprocess.Popen[bytes]:
    command = [python, "-u", "-X", "faulthandler", "-m", "tasks.child", str(pipes.report_end), str(os.getpid())]
    with tempfile.TemporaryFile(dir=scratch) as message:
        message.write(json.dumps(request).encode())
        message.seek(0)
        process = subprocess.Popen(
            command,
            stdin=message,
            stdout=pipes.log_end,
            stderr=pipes.log_end,
            pass_fds=(pipes.report_end,),
            cwd=scratch,
            env={**_environment(scratch, limits.threads), **_foreign(scratch, python), **variables},
            start_new_session=True,
        )
    pipes.close_child_ends()
    return process


def _environment(scratch: Path, threads: int | None) -> dict[str, str]:
    """Return the child's environment: deterministic, offline, without this process's Prefect run and signing key."""
    withheld = ("PREFECT_", "ENGINERY_SIGN_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(withheld)}
    # The child works in its own folder, so relative entries are made absolute.
    path = [str(Path(entry).absolute()) for entry in kept.get("PYTHONPATH", "").split(os.pathsep) if entry]
    if _ROOT.name not in ("site-packages", "dist-packages"):
        path.append(str(_ROOT))
    count = str(threads or len(os.sched_getaffinity(0)))
    bounded = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), count)
    return {
        **({**bounded, **kept} if threads is None else {**kept, **bounded}),
        "PYTHONPATH": os.pathsep.join(path),
        "PYTHONHASHSEED": "0",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "TMPDIR": str(scratch),
    }


def _foreign(scratch: Path, python: str) -> dict[str, str]:
    """Return what another interpreter than this one needs: our modules, and none of the packages that lie beside them."""
    if python == sys.executable:
        return {}
    path = scratch / "modules"
    path.mkdir()
    for package in ("artifacts", "recipes", "tasks"):
        (path / package).symlink_to(_ROOT / package, target_is_directory=True)
    return {"PYTHONPATH": str(path)}


class _Child:
    """A running stage: its process group, its limits, and what it said."""

    def __init__(self, process: subprocess.Popen[bytes], stage: str, limits: Limits, pipes: Pipes) -> None:
        self._process = process
        self._stage = stage
        self._limits = limits
        self._pipes = pipes
        self._tree = ProcessTree(process.pid)

    def watch(self, on_progress: Callable[[float | None, str], None], cancel: threading.Event | None) -> dict[str, Any]:
        """Wait for the result and return it; raise what the stage raised, or why it was stopped."""
        deadline = time.monotonic() + self._limits.timeout_s
        next_look = 0.0
        answer: dict[str, Any] | None = None
        while True:
            ended = self._ended()
            for message in self._pipes.read(0.0 if ended else _POLL_SECONDS, last=ended):
                if "progress" in message:
                    on_progress(*message["progress"])
                else:
                    answer = answer or message
            if ended:
                break
            now = time.monotonic()
            if cancel is not None and cancel.is_set():
                raise StageCancelledError(f"{self._stage}: cancelled")
            if now > deadline:
                raise self._out_of_time()
            if now >= next_look:
                if self._tree.measure() > self._limits.memory_bytes:
                    raise self._out_of_memory()
                next_look = now + _POLL_SECONDS
        if answer is None:
            raise self._died()
        if "error" in answer:
            _raise(answer["error"])
        result: dict[str, Any] = answer["result"]
        return result

    def end(self) -> None:
        """Kill what is left of the stage and everything it started; safe to call when all is gone."""
        if self._process.returncode is not None:
            return
        self._tree.kill()
        # The group's number is ours until its leader is reaped, which happens only here: later it may be another's.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _ended(self) -> bool:
        return os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def _out_of_time(self) -> BackendError:
        return BackendError(
            "time-out",
            f"the stage {self._stage} was stopped after {self._limits.timeout_s:g} s{self._said()}",
            "raise build.timeout in the recipe if the work is that large",
        )

    def _out_of_memory(self) -> BackendError:
        used, allowed = self._tree.peak / _GIB, self._limits.memory_bytes / _GIB
        return BackendError(
            "out of memory",
            f"the stage {self._stage} used {used:.2f} GiB of the {allowed:.2f} GiB allowed by build.memory",
            "raise build.memory in the recipe, or lower calibration.batch or the profiles' maxima",
        )

    def _died(self) -> BackendError:
        self.end()
        status = self._process.returncode
        if status >= 0:
            what = f"the process of the stage {self._stage} ended with exit status {status} and no result"
            return BackendError("crash", what + self._said(), "look at what it said last")
        name = signal.Signals(-status).name
        if -status == signal.SIGKILL:
            return BackendError(
                "out of memory",
                f"the process of the stage {self._stage} was killed (SIGKILL) after using "
                f"{self._tree.peak / _GIB:.2f} GiB; most likely the kernel had no memory left{self._said()}",
                "run fewer stages at once, lower calibration.batch, or use a host with more memory",
            )
        said = self._said()
        if "bad_alloc" in said:
            advice = "lower calibration.batch or the profiles' maxima, or use a host with more memory"
            return BackendError("out of memory", f"the stage {self._stage} died of {name}{said}", advice)
        if "[Paddle2ONNX]" in said and name == "SIGABRT":  # which is how it refuses a model
            return BackendError(
                "unsupported operator",
                f"paddle2onnx cannot convert the model{said}",
                "write the model without that operator, or ask for another export.opset; fallback: source needs no ONNX",
            )
        return BackendError(
            "crash",
            f"the process of the stage {self._stage} died of {name}{said}",
            "this is a fault of the framework or compiler; try another version of it, or report it with these lines",
        )

    def _said(self) -> str:
        lines = self._pipes.last_lines(_LAST_LINES)
        return "; the last it said:\n    " + "\n    ".join(lines) if lines else ""


def _raise(error: Mapping[str, Any]) -> NoReturn:
    if error["type"] == "model-code":
        raise ModelCodeError(error["message"])
    if error["type"] == "recipe":
        raise RecipeError([Fault(*fault) for fault in error["faults"]])
    raise BackendError(error["kind"], error["message"], error["advice"])


def _not_started(err: OSError) -> BackendError:
    if err.errno in (errno.ENOSPC, errno.EDQUOT):
        return BackendError("disk full", str(err), "free some space, or use another --store")
    if err.errno == errno.ENOMEM:
        return BackendError("out of memory", f"cannot start a process: {err}", "run fewer stages at once")
    return BackendError("crash", f"cannot start the stage's process: {err}", "check the store's folder and its limits")


def _checked(answer: Mapping[str, Any], output_dir: Path) -> StageResult:
    """Check that every output is a plain file of `output_dir`."""
    for name in answer["outputs"]:
        path = output_dir / name
        if Path(name).name != name or path.is_symlink() or not path.is_file():
            raise BackendError(
                "crash", f"the stage names the output {name!r}, which is no file in its folder", "please report it"
            )
    return StageResult(answer["outputs"], answer["facts"])
