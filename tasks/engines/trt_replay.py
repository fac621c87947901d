"""Building the same engine again: tactics replayed from a pinned timing cache, and what was chosen compared.

TensorRT 10.8 and later can edit their timing cache: with ERROR_ON_TIMING_CACHE_MISS nothing is timed that the cache does not
hold, and the table of tactics is compared before and after, since 11.0 was seen to add entries all the same (NVIDIA's own recipe,
TensorRT-Model-Connect, timing_cache.py). Before that, what tells one engine from another is the inspector's listing of layers: it
is compared with the pinned listing of the first build. Bytes are compared nowhere: equal builds differ in them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from tasks.errors import BackendError

EXPECTED_LAYERS: Final = "expected-layers.json"
_SHOWN: Final = 8
_RECORDING: Final = ("EDITABLE_TIMING_CACHE", "DISABLE_COMPILATION_CACHE")
# In names 8.6 may print addresses (NVIDIA/TensorRT issue 3316); a tactic's value is one too by its look, and is kept.
_ADDRESS: Final = re.compile(r"0x[0-9a-fA-F]{9,}")
_ADVICE: Final = (
    "pin the timing cache (and the listing) of a build of this very graph, by this version, on such a device"
)


def is_editable(trt: Any) -> bool:
    """Tell whether this TensorRT can edit its timing cache (10.8 and later)."""
    return hasattr(trt.BuilderFlag, _RECORDING[0]) and hasattr(trt.ITimingCache, "queryKeys")


def replay_flags(trt: Any, *, pinned: bool) -> tuple[str, ...]:
    """Return the names of the BuilderFlags of a reproducible build: one that records a cache, or replays a pinned one."""
    if not is_editable(trt):
        return ()
    return (*_RECORDING, *(("ERROR_ON_TIMING_CACHE_MISS",) if pinned else ()))


def pin_tactics(cache: Any) -> dict[str, str]:
    """Make every entry of an editable cache the one that is taken, and return the table: key -> tactic.

    Raises BackendError("not reproducible") where TensorRT does not take an entry of its own.
    """
    for key in cache.queryKeys():
        if not cache.update(key, cache.query(key)):
            raise BackendError("not reproducible", f"TensorRT does not take its own timing cache entry {key}", _ADVICE)
    return tactic_table(cache)


def tactic_table(cache: Any) -> dict[str, str]:
    """Return what an editable cache holds: key -> the tactic's hash, in hexadecimal."""
    return {str(key): f"{int(cache.query(key).tacticHash) & 0xFFFFFFFFFFFFFFFF:#x}" for key in cache.queryKeys()}


def require_same_tactics(before: Mapping[str, str], after: Mapping[str, str]) -> None:
    """Raise BackendError("not reproducible") where a build changed the table that it was to replay."""
    changed = [f"{key}: {before[key]} -> {after[key]}" for key in before if after.get(key, before[key]) != before[key]]
    added = [f"{key}: + {after[key]}" for key in after if key not in before]
    gone = [f"{key}: - {before[key]}" for key in before if key not in after]
    _require_none([*changed, *added, *gone], "the table of tactics is another than that of the pinned timing cache")


def require_same_layers(expected: Path, listing: Mapping[str, Any]) -> None:
    """Raise BackendError("not reproducible") where the engine's layers are not those of the pinned listing.

    Compared of each layer: name, type, tactic, and the formats of inputs and outputs, in order.
    Raises BackendError("bad data") where the pinned file is no listing.
    """
    try:
        pinned = json.loads(expected.read_bytes())
        rows = [layer_row(layer) for layer in pinned["Layers"]]
    except (ValueError, KeyError, TypeError, AttributeError) as err:
        advice = "pin layers.json of an engine that was published with build.reproducible"
        raise BackendError("bad data", f"the pinned listing of layers cannot be read: {err!r}", advice) from err
    found = [layer_row(layer) for layer in listing.get("Layers", ())]
    if rows != found:
        import difflib

        lines = [line for line in difflib.unified_diff(rows, found, lineterm="", n=0) if line[:3] not in ("---", "+++")]
        lines = [line for line in lines if not line.startswith("@@")]
        _require_none(
            lines, f"the engine has other layers than the pinned listing ({len(rows)} there, {len(found)} here)"
        )


def layer_row(layer: Any) -> str:
    """Return what of a layer is compared, as one line; a layer is an object, or text where little is told of it."""
    if not isinstance(layer, Mapping):
        return _ADDRESS.sub("0x…", str(layer))
    tactic = " ".join(str(layer[name]) for name in ("TacticName", "TacticValue") if layer.get(name))
    formats = [
        ", ".join(str(tensor.get("Format/Datatype", tensor.get("Format", "?"))) for tensor in layer.get(side, ()))
        for side in ("Inputs", "Outputs")
    ]
    name = _ADDRESS.sub("0x…", str(layer.get("Name", "")))
    return f"{name} | {layer.get('LayerType', '')} | {tactic or 'no tactic'} | {formats[0]} -> {formats[1]}"


def _require_none(differences: list[str], what: str) -> None:
    if differences:
        more = f"\n    (and {len(differences) - _SHOWN} more)" if len(differences) > _SHOWN else ""
        shown = "\n    ".join(differences[:_SHOWN])
        raise BackendError("not reproducible", f"{what}:\n    {shown}{more}", _ADVICE)
