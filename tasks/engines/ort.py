"""ONNX Runtime on CPUs: the graph, optimised ahead of time and saved as ONNX.

Optimisation stops at the level `extended`. The level `all` adds layouts that depend on the CPU it runs on (NCHWc
blocks are 8 or 16 channels wide with AVX2 or AVX-512), and ONNX Runtime warns that such a file "should only be used in
the same environment" (https://onnxruntime.ai/docs/performance/model-optimizations/graph-optimizations.html, "Offline
mode"). A server that loads the file gets the layouts of its own CPU then.
"""

from __future__ import annotations

import faulthandler
import os
import re
import resource
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from artifacts.refs import ONNX, ONNX_DATA
from tasks.errors import BackendError
from tasks.onnx_files import DATA, EXTERNAL_THRESHOLD, GRAPH, INLINE_LIMIT
from tasks.stage import StageRequest, StageResult

_LEVEL: Final = "extended"
_MAX_WARNINGS: Final = 50
# A line of ONNX Runtime's log: time, [W:onnxruntime:logger, file.cc:line function] text.
_LOG_LINE: Final = re.compile(r"\[([WEF]):onnxruntime:[^\]]*\] ?(.*)")
_ADVICE: Final = {
    "unsupported operator": "export with a lower opset, or drop the onnxruntime target",
    "no kernel": "use fp32 for the onnxruntime target, or keep this node in fp32 (precision.keep)",
    "version mismatch": "ask for a lower export.opset in the recipe, or install a newer onnxruntime",
    "bad data": "the graph is damaged or is not valid ONNX: export it anew",
    "out of memory": "use a host with more memory",
    "disk full": "free some space, or use another --store",
    "crash": "look at the log of the stage; report it with these words",
}


def compile_plan(request: StageRequest) -> StageResult:
    """Optimise `model.onnx` for CPUs, and load the result once.

    ONNX Runtime takes any shape, so its parameters are `runtime` and `gpu` alone. Raises BackendError with ONNX
    Runtime's own words; "wrong result" where inputs or outputs are not what they were.
    """
    import onnxruntime as ort

    source, target = request.inputs[GRAPH], request.output_dir / GRAPH
    if request.params["gpu"] != "cpu":
        raise BackendError(
            "rejected setting",
            f"onnxruntime compiles for cpu, not {request.params['gpu']}",
            "use targets[].gpus: [cpu]",
        )
    size = sum(path.stat().st_size for path in request.inputs.values())
    options = _options(ort)
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(target)
    if DATA in request.inputs or size > INLINE_LIMIT:
        key = "session.optimized_model_external_initializers"
        options.add_session_config_entry(f"{key}_file_name", DATA)
        options.add_session_config_entry(f"{key}_min_size_in_bytes", str(EXTERNAL_THRESHOLD))
    request.report(0.0, "optimising")
    with _native_log() as lines:
        before = _signature(_load(ort, source, options))
        request.report(0.7, "loading the optimised graph")
        after = _signature(_load(ort, target, _options(ort)))
    if _interface(before) != _interface(after):
        raise BackendError(
            "wrong result",
            f"optimisation changed the graph's inputs or outputs: {before} became {after}",
            "report it to ONNX Runtime with this model",
        )
    outputs = {GRAPH: ONNX, **({DATA: ONNX_DATA} if (request.output_dir / DATA).exists() else {})}
    facts = {
        "runtime_version": ort.__version__,
        "optimization": _LEVEL,
        "inputs": before["inputs"],
        "outputs": before["outputs"],
        "size": sum((request.output_dir / name).stat().st_size for name in outputs),
        "warnings": [text for text in map(_warning, lines) if text is not None][:_MAX_WARNINGS],
        "log_lines": len(lines),
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    return StageResult(outputs, facts)


def _options(ort: Any) -> Any:
    options = ort.SessionOptions()
    # Constants are folded by one thread, so that the bytes do not depend on how many CPUs there are.
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    return options


def _load(ort: Any, path: Path, options: Any) -> Any:
    try:
        return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as err:
        if not type(err).__module__.startswith("onnxruntime"):
            raise
        words = " ".join(str(err).split()).replace(f"{path.parent}/", "")[:1000]
        kind = _kind(type(err).__name__, words)
        raise BackendError(kind, f"onnxruntime {ort.__version__}: {words}", _ADVICE[kind]) from err


def _kind(name: str, words: str) -> str:
    """Classify by the exception's type (ONNX Runtime's status codes) and by words where a code has several causes."""
    if "No Op registered" in words or "is not a registered function/op" in words:
        return "unsupported operator"
    if "bad_alloc" in words or "Failed to allocate memory" in words:
        return "out of memory"
    if "No space left on device" in words:
        return "disk full"
    if ("opset" in words and "official" in words) or "Unsupported model IR version" in words:
        return "version mismatch"
    if name == "NotImplemented":
        return "no kernel"
    return (
        "bad data" if name in ("InvalidGraph", "InvalidProtobuf", "NoSuchFile", "InvalidArgument", "Fail") else "crash"
    )


def _signature(session: Any) -> dict[str, Any]:
    """Return names, types and shapes of inputs and outputs; unnamed dynamic extents are None."""
    return {
        part: {value.name: {"type": value.type, "shape": list(value.shape)} for value in values}
        for part, values in (("inputs", session.get_inputs()), ("outputs", session.get_outputs()))
    }


def _interface(signature: dict[str, Any]) -> dict[str, Any]:
    """Return what must not change: inputs with their shapes, outputs with their rank (an extent may become known)."""
    outputs = {name: (value["type"], len(value["shape"])) for name, value in signature["outputs"].items()}
    return {"inputs": signature["inputs"], "outputs": outputs}


@contextmanager
def _native_log() -> Iterator[list[str]]:
    """Collect the lines that native code writes to stderr, and pass them on; crash dumps go straight through."""
    lines: list[str] = []
    real = os.dup(2)
    faulthandler.enable(real)
    try:
        with tempfile.TemporaryFile() as held:
            sys.stderr.flush()
            os.dup2(held.fileno(), 2)
            try:
                yield lines
            finally:
                os.dup2(real, 2)
                held.seek(0)
                text = held.read().decode("utf-8", "replace")
                lines += text.splitlines()
                sys.stderr.write(text)
    finally:
        faulthandler.enable(2)
        os.close(real)


def _warning(line: str) -> str | None:
    found = _LOG_LINE.search(line)
    return found[2] if found is not None else None
