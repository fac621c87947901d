"""ONNX Runtime on CPU as the judge of graphs: nothing optimised away, failures in words that name the shapes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np

from tasks.errors import BackendError
from tasks.onnx_files import brief, load_graph
from tasks.seeded import Array

_TOLD: Final = 10  # nodes that are named of those that are refused


class GraphRunner:
    """Runs an ONNX file in ONNX Runtime on CPU with graph optimisations disabled.

    Raises BackendError where ONNX Runtime does not load the file ("unsupported operator", "version mismatch") or does
    not run it at the given inputs ("bad profile").
    """

    def __init__(self, path: Path) -> None:
        import onnxruntime

        onnxruntime.set_default_logger_severity(3)
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.log_severity_level = 3
        try:
            self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as err:  # its exceptions share no base of their own
            words = brief(err).replace(f"{path.parent}/", "")
            newer = "IR version" in words or "opset" in words.lower()
            raise BackendError(
                "version mismatch" if newer else "unsupported operator",
                f"ONNX Runtime {onnxruntime.__version__} does not load {path.name}: {words}"
                + ("" if newer else _refused(path, words)),
                "ask for a lower export.opset in the recipe"
                if newer
                else "use operators of the ONNX standard; parity cannot be measured without running the graph",
            ) from err
        self.outputs: list[str] = [output.name for output in self._session.get_outputs()]

    def run(self, inputs: Mapping[str, Array], what: str) -> dict[str, Array]:
        """Return every output by name; `what` names the inputs' shapes in messages."""
        try:
            found: list[Any] = self._session.run(self.outputs, dict(inputs))
        except Exception as err:
            raise BackendError(
                "bad profile",
                f"the graph does not run at {what}: {brief(err)}",
                "change the profile, or the model so that it takes this shape (an exporter may have frozen a size)",
            ) from err
        return {name: np.asarray(array) for name, array in zip(self.outputs, found, strict=True)}


def _refused(path: Path, words: str) -> str:
    """Return the nodes that ONNX Runtime does not know, a line for each, with where it is."""
    from tasks.support.session_query import refused

    nodes = refused(load_graph(path, weights=False), words)
    lines = [f"{node['operator']} {node['name']!r} ({node['location']})" for node in nodes[:_TOLD]]
    more = [f"and {len(nodes) - _TOLD} more: enginery inspect tells all of a file's"] if len(nodes) > _TOLD else []
    return "".join(f"\n  {line}" for line in [*lines, *more])
