"""What TensorRT says when it refuses, by kind of failure: its Python API gives None and a log, and no error codes.

The words are those of TensorRT-RTX 1.7.1 (each was provoked); TensorRT 8 to 11 share most of them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from tasks.errors import BackendError

_MAX_NODES: Final = 8
_MAX_CHARS: Final = 1500
# A build without a GPU asks for one now and then, logs an error, and goes on; the second is logged by a getter.
_NOISE: Final = re.compile(
    r"cudaError (35|100)\b|CUDA driver version is insufficient|no CUDA-capable device|Thread context has not been set"
)
_OTHER_MODEL: Final = "change the model at these nodes, export with another opset or exporter, or use another runtime"
_QUANTISED: Final = "TensorRT takes symmetric int8 Q/DQ with positive scales, and no quantised biases: type the graph with precision int8"
_DAMAGED: Final = "the graph is damaged or is not valid ONNX: export it anew"

_Rules = tuple[tuple[str, str, str], ...]
_PARSE: Final[_Rules] = (
    (r"plugin creator version|getPluginCreator", "missing plugin", _OTHER_MODEL),
    (r"Failed to open file|external weights|out of range for file|Failed to import initializer", "bad data", _DAMAGED),
    (r"Failed to parse the ONNX model|MODEL_DESERIALIZE_FAILED|cannot be found", "bad data", _DAMAGED),
    (r"zero point|must have type FP8|Scale coefficients|only allowed before DQ", "unsupported operator", _QUANTISED),
    (r"must match|mismatch", "bad data", _DAMAGED),
)
_BUILD: Final[_Rules] = (
    (
        r"within workspace limit|OutOfMemory|out of memory|Requested size was|bad_alloc",
        "out of memory",
        "raise build.workspace in the recipe (or leave it out), or lower the profiles' maxima",
    ),
    (
        r"Cannot compile operation|HW-specific datatypes|no tactics to implement|not find any implementation",
        "no kernel",
        "use another precision for this GPU, keep the node in fp32 (precision.keep), or drop the GPU from the target",
    ),
    (r"no runners that implement", "no kernel", _OTHER_MODEL),  # whatever the GPU and the precision
    (
        r"optimization profile|in profile \d|and profile \d|profile index|but profile|MIN<=OPT<=MAX|self-consistent",
        "bad profile",
        "correct profiles in the recipe: every dynamic axis needs [min, opt, max] that the model accepts",
    ),
    (r"at least one output|at least one input", "bad data", _DAMAGED),
    (r"[Pp]lugin", "missing plugin", _OTHER_MODEL),
    (r"No space left on device", "disk full", "free some space, or use another --store"),
    (r"CUDA_SUCCESS|cudaError|CUDA initialization", "no device", "run this build on a host with that GPU and a driver"),
)


@dataclass(frozen=True)
class NodeFault:
    """What the ONNX parser says of one node; name and operator are empty for a fault of the whole graph."""

    name: str
    operator: str
    words: str


def real_errors(lines: Iterable[str]) -> list[str]:
    """Return the error lines less those that any build without a GPU logs."""
    return [line for line in lines if not _NOISE.search(line)]


def parse_failure(
    compiler: str, faults: Sequence[NodeFault], lines: Sequence[str], domains: Mapping[str, str]
) -> BackendError:
    """Return the error for a graph that the parser refused, naming its nodes.

    `lines` is the error log; `domains` has the operator set of every operator in the graph that is no ONNX standard.
    """
    shown = [_node(fault) for fault in faults[:_MAX_NODES]]
    if len(faults) > _MAX_NODES:
        shown.append(f"... and {len(faults) - _MAX_NODES} more")
    words = "\n    ".join(shown) or _bounded(real_errors(lines)) or "the parser gave no reason"
    everything = "\n".join([*(fault.words for fault in faults), *lines])
    kind, advice = _match(_PARSE, everything) or ("unsupported operator", _OTHER_MODEL)
    custom = {fault.operator: domains[fault.operator] for fault in faults if fault.operator in domains}
    if "Plugin not found" in everything:
        kind, advice = "unsupported operator", _OTHER_MODEL
        if custom:
            named = ", ".join(f"{domain}::{operator}" for operator, domain in sorted(custom.items()))
            kind, advice = "missing plugin", f"{compiler} has no plugin for {named}; {_OTHER_MODEL}"
    elif kind == "bad data":
        # The parser's own words say that a tensor failed; the log says why.
        words = f"{words}\n    {_bounded(real_errors(lines)[:1])}"
    return BackendError(kind, f"{compiler} cannot read the graph: {words}", advice)


def build_failure(compiler: str, lines: Sequence[str]) -> BackendError:
    """Return the error for a network that the builder refused; `lines` is what it logged as errors or warnings."""
    real = real_errors(lines) or list(lines)
    kind, advice = _match(_BUILD, "\n".join(real)) or (
        "crash",
        "look at the log of the stage; report it to NVIDIA with these words and the model",
    )
    return BackendError(kind, f"{compiler} cannot build: {_bounded(real) or 'it gave no reason'}", advice)


def _match(rules: _Rules, words: str) -> tuple[str, str] | None:
    return next(((kind, advice) for pattern, kind, advice in rules if re.search(pattern, words)), None)


def _node(fault: NodeFault) -> str:
    words = " ".join(" ".join(real_errors(fault.words.splitlines())).split())
    # Some refusals say nothing but the assertion that failed.
    said = f": {words[:300]}" if words not in ("", "false") else " is not supported"
    return f"node {fault.name!r} ({fault.operator}){said}" if fault.operator else words[:300]


def _bounded(lines: Sequence[str]) -> str:
    text = "\n    ".join(lines)
    return text if len(text) <= _MAX_CHARS else f"{text[:_MAX_CHARS]}..."
