"""Sources: a model as its author has it, to one fp32 ONNX graph and the outputs that it must keep.

Enters: model files, and for PyTorch and PaddlePaddle the recipe's own code. Leaves: `model.onnx` (`export`), or the
source framework's outputs as safetensors (`reference`), or the model as the framework runs it without that code (`save`).
Each source is a module with the functions `export`, `reference`, `save` and `runner` (the loaded source, to be called); it imports
its framework inside of them, and no sibling.
"""

from __future__ import annotations

import importlib
from typing import Any, Final

from tasks.errors import BackendError
from tasks.stage import StageRequest, StageResult

# Framework -> (module, package that it needs, extra that installs it).
_SOURCES: Final = {
    "torch": ("tasks.sources.torch_source", "torch", "enginery[torch]"),
    "paddle": ("tasks.sources.paddle_source", "paddle", "enginery[paddle]"),
    "onnx": ("tasks.sources.onnx_source", "onnx", "enginery"),
}


def run_export(request: StageRequest) -> StageResult:
    """Write the source as `model.onnx`; facts are those of `tasks.onnx_files.graph_facts`, and warnings."""
    return _run(request, "export")


def run_reference(request: StageRequest) -> StageResult:
    """Write the source's own outputs at seeded inputs or on a data set (see `tasks.references`)."""
    if request.params["kind"] == "together":
        from tasks.together import reference

        return reference(request, lambda part: source_module(part).runner(part))
    return _run(request, "reference")


def run_save(request: StageRequest) -> StageResult:
    """Write the source as its framework loads it without the recipe's code.

    Facts, as `tasks.served` reads them: `plan` (the file that is loaded), `form`, `inputs` and `outputs` (names, in the order in
    which it takes and gives them), and `refused` (forms that are wanted more, with what was wrong).
    """
    return _run(request, "save")


def source_module(request: StageRequest) -> Any:
    """Return the module that reads a request's kind of source. Raises BackendError where its framework is missing."""
    framework = request.params["framework"]
    if framework not in _SOURCES:
        raise BackendError("rejected setting", f"no source {framework!r} (allowed: {', '.join(_SOURCES)})")
    module, package, extra = _SOURCES[framework]
    try:
        importlib.import_module(package)
    except ImportError as err:
        raise BackendError(
            "missing package", f"{package} cannot be imported: {err}", f"install it: pip install '{extra}'"
        ) from err
    return importlib.import_module(module)


def _run(request: StageRequest, function: str) -> StageResult:
    module = source_module(request)
    result = getattr(module, function)(request)
    if not isinstance(result, StageResult):
        raise TypeError(f"{module.__name__}.{function} returned {type(result).__name__}")
    return result
