"""PyTorch: a module of the recipe's own code to ONNX, by either of PyTorch's exporters.

dynamo (torch.export) is the newer one: opset 18 and later, and a module must export for every size of its dynamic axes
or not at all. torchscript traces one run: opset 11 and later, and what the trace froze has to be found here.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from artifacts.refs import BYTES, JSON
from tasks.code import plain_words
from tasks.errors import BackendError, TaskError
from tasks.exporter_words import Noise, first_sentence, quiet, summary
from tasks.onnx_axes import FixedAxis, compare_inputs, rename_axes
from tasks.onnx_files import (
    GRAPH,
    INLINE_LIMIT,
    check_graph,
    dims_of,
    graph_facts,
    infer_shapes,
    opset_of,
    save_graph,
    strip_notes,
)
from tasks.onnx_weights import load_streamed
from tasks.references import Run, write_reference
from tasks.seeded import SAMPLE_SEED, Array, seeded_inputs
from tasks.stage import StageRequest, StageResult
from tasks.support.nodes import PLACES, modules_of
from tasks.torch_module import ByName, call_order, check_output_count, load_module, run_module
from tasks.torch_program import save_program
from tasks.tracing import Place, decisions_by_value

Shapes = Mapping[str, Sequence[int]]

_OTHER: Final = {"dynamo": "torchscript", "torchscript": "dynamo"}


def reference(request: StageRequest) -> StageResult:
    """Run the fp32 module and write its outputs (see `tasks.references`).

    Raises ModelCodeError, naming the case, where the module does not run at a shape of the recipe's profiles.
    """
    run = runner(request)
    threads = torch.get_num_threads()
    # Sums split over threads round differently; parity runs are few, so they take one thread everywhere.
    torch.set_num_threads(1 if request.params["kind"] == "parity" else threads)
    try:
        with quiet("torch", "onnxscript"):
            return write_reference(request, run)
    finally:
        torch.set_num_threads(threads)


def runner(request: StageRequest) -> Run:
    """Load the fp32 module, to be run on arrays."""
    with quiet():
        module = load_module(request)
    names = request.params["outputs"]

    def run(arrays: Mapping[str, Array], what: str) -> dict[str, Array]:
        with quiet("torch", "onnxscript"):
            found = run_module(module, _tensors(arrays), f"running the module at {what}")
        check_output_count(found, names)
        return {name: _array(tensor) for name, tensor in zip(names, found, strict=True)}

    return run


def export(request: StageRequest) -> StageResult:
    """Export the module with the recipe's opset, names and dynamic axes, and check that the graph has them.

    Raises ModelCodeError for the recipe's code; BackendError("wrong result") for a frozen axis or a decision by value,
    "rejected setting" for an opset that the exporter did not keep, "unsupported operator" in the exporter's words.
    """
    with quiet():
        job = _Export(request, load_module(request))
    request.report(0.2, "tracing the module")
    with quiet("torch", "onnxscript") as noise, tempfile.TemporaryDirectory(dir=request.output_dir) as scratch:
        job.run_eagerly()
        model = job.exported(Path(scratch) / GRAPH, noise)
        request.report(0.8, "checking the graph")
        job.check_inputs(model)
        places = modules_of(model)
        strip_notes(model)
        outputs = save_graph(model, request.output_dir)
        if places:
            text = json.dumps(places, indent=0, sort_keys=True)
            (request.output_dir / PLACES).write_text(f"{text}\n", "utf-8")
            outputs[PLACES] = JSON
    graph = infer_shapes(request.output_dir)
    with quiet("torch", "onnxscript"):
        if job.check_outputs(graph):
            (request.output_dir / GRAPH).write_bytes(graph.SerializeToString(deterministic=True))
    check_graph(request.output_dir / GRAPH)
    # The graph's own count includes what the exporter folded.
    facts = graph_facts(graph) | {"parameters": sum(parameter.numel() for parameter in job.module.parameters())}
    return StageResult(outputs, facts | ({"warnings": job.notes} if job.notes else {}))


def save(request: StageRequest) -> StageResult:
    """Write the module as a program that loads without its code (see `tasks.torch_program`).

    Raises ModelCodeError for the recipe's code, BackendError("unsupported operator") where no form of PyTorch's holds it.
    """
    params = request.params
    with quiet():
        module = load_module(request)
    request.report(0.2, "exporting the module")

    def seeded(shapes: Shapes) -> dict[str, torch.Tensor]:
        return _tensors(seeded_inputs(params["tensors"], shapes, SAMPLE_SEED, 0))

    with quiet("torch") as noise:
        sample, cases = seeded(params["trace"]), [(case["name"], seeded(case["shapes"])) for case in params["cases"]]
        check_output_count(run_module(module, sample, "running the module"), params["outputs"])
        facts = save_program(module, params["tensors"], sample, cases, request.output_dir, noise)
    return StageResult({facts["plan"]: BYTES}, {**facts, "outputs": params["outputs"]})


@dataclass
class _Export:
    """One export: the request, the module, and what was noticed on the way."""

    request: StageRequest
    module: torch.nn.Module
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        params = self.request.params
        self.tensors: Mapping[str, Mapping[str, Any]] = params["tensors"]
        self.trace: Shapes = params["trace"]
        self.exporter: str = params["exporter"]
        self.outputs: list[str] = params["outputs"]
        order = call_order(self.module, list(self.tensors))
        self.names = sorted(self.tensors) if order is None else order
        self.by_keyword = order is None
        self.shapes: list[tuple[int, ...]] = []

    def run_eagerly(self) -> None:
        """Run the module once at the trace shape: its own faults are its author's, not the exporter's."""
        found = run_module(self.module, self._inputs(self.trace), f"running the module at {_spell(self.trace)}")
        check_output_count(found, self.outputs)
        self.shapes = [tuple(tensor.shape) for tensor in found]
        # Wrapped only where needed: the wrapper shows in the names of parameters and nodes.
        self.arguments = tuple(self._inputs(self.trace)[name] for name in self.names)
        self.wrapped = self.by_keyword or not self._returns_tensors(self.arguments)
        self.given = ByName(self.module, self.names) if self.wrapped else self.module

    def exported(self, path: Path, noise: Noise) -> Any:
        """Run the exporter and return its graph as written, with the opset asked for."""
        try:
            self._call_exporter(path)
        except TaskError:
            raise
        except Exception as err:
            raise self._failure(err) from err
        model = load_streamed(path)
        asked, found = self.request.params["opset"], opset_of(model)
        if found != asked:
            advice = "ask for export.opset 18 or later, or use export.exporter: torchscript"
            words = noise.line_with("Failed to convert", "version conver")
            raise BackendError(
                "rejected setting",
                f"opset {asked} was asked for, the {self.exporter} exporter wrote opset {found}{words}",
                advice if self.exporter == "dynamo" else "ask for an opset that the exporter knows",
            )
        if self.exporter == "torchscript":
            self._check_decisions(noise)
        return model

    def check_inputs(self, model: Any) -> None:
        """Compare the graph's inputs with the recipe's, and give its axes the recipe's names."""
        found = [value.name for value in model.graph.output]
        if found != self.outputs:
            raise _wrong(f"the graph's outputs are {', '.join(found)}; expected {', '.join(self.outputs)}", "")
        unused = [name for name in self.names if name not in {value.name for value in model.graph.input}]
        if unused:
            raise _wrong(
                f"the exported graph has no input {', '.join(unused)}: the module does not use it",
                "remove it from the recipe's inputs",
            )
        agreement = compare_inputs(model, self.tensors)
        if agreement.fixed:
            raise self._frozen(agreement.fixed)
        if agreement.faults:
            raise _wrong("; ".join(agreement.faults), "correct the recipe's inputs, or the module")
        rename_axes(model, self.tensors, agreement.names)

    def check_outputs(self, graph: Any) -> bool:
        """Raise where an output's extent is a constant in the graph but follows a dynamic axis in the module.

        The module runs with each axis one larger (or twice as large, where it refuses that); a module that refuses both
        says nothing here, and the stages after this one run the graph at every shape of the profiles. What was seen also
        gives the recipe's axis names to extents that an exporter named itself; returns whether any was renamed.
        """
        names: dict[str, int | str] = {}
        axes = self._axis_names()
        for axis in axes:
            extents, shapes = self._run_enlarged(axis)
            for value, before, after in zip(graph.graph.output, self.shapes, shapes, strict=False):
                for position, (dim, *sizes) in enumerate(zip(dims_of(value), before, after, strict=False)):
                    if isinstance(dim, int) and dim != sizes[1]:
                        raise _wrong(
                            f"axis {axis!r} is frozen: output {value.name!r} axis {position} is the constant {dim} in the "
                            f"graph of the {self.exporter} exporter; the module gives {sizes[1]} at another {axis}",
                            f"use sizes from tensor shapes in the module instead of Python numbers or loops, try "
                            f"export.exporter: {_OTHER[self.exporter]}, or make {axis!r} a fixed size",
                        )
                    if isinstance(dim, str) and dim not in axes and tuple(sizes) == extents:
                        names.setdefault(dim, axis)
        rename_axes(graph, self.tensors, names)
        return bool(names)

    # ---- the exporters ------------------------------------------------------------------------------------------

    def _call_exporter(self, path: Path) -> None:
        named: dict[str, Any] = {
            "input_names": self.names,
            "output_names": self.outputs,
            "opset_version": self.request.params["opset"],
        }
        if self.exporter == "dynamo":
            dims = {axis: torch.export.Dim(axis) for axis in self._axis_names()}
            named |= {
                "dynamo": True,
                "dynamic_shapes": self._dynamic(lambda axis: dims[axis]),
                "external_data": _weight_bytes(self.module) > INLINE_LIMIT,
                "optimize": True,
                "verbose": False,
            }
        else:
            named |= {
                "dynamo": False,
                "dynamic_axes": {
                    name: {i: axis for i, axis in enumerate(self.tensors[name]["shape"]) if isinstance(axis, str)}
                    for name in self.names
                },
            }
        with torch.no_grad():
            torch.onnx.export(self.given, self.arguments, str(path), **named)

    def _dynamic(self, dim: Callable[[str], Any]) -> tuple[Any, ...]:
        shapes = tuple(
            {i: dim(axis) for i, axis in enumerate(self.tensors[name]["shape"]) if isinstance(axis, str)}
            for name in self.names
        )
        return (shapes,) if self.wrapped else shapes

    def _axis_names(self) -> list[str]:
        return sorted({axis for tensor in self.tensors.values() for axis in tensor["shape"] if isinstance(axis, str)})

    def _returns_tensors(self, arguments: tuple[torch.Tensor, ...]) -> bool:
        """Tell whether exporters understand the result as it is: a tensor or a tuple of tensors."""
        with torch.inference_mode():
            result = self.module(*arguments)
        return isinstance(result, torch.Tensor) or (
            type(result) is tuple and all(isinstance(item, torch.Tensor) for item in result)
        )

    # ---- what exporters get wrong -------------------------------------------------------------------------------

    def _failure(self, error: Exception) -> BackendError:
        text, words = f"{error}\n{error.__cause__ or ''}", summary(error)
        if "data-dependent" in text:
            return BackendError(
                "unsupported operator",
                f"the module decides by the values of a tensor: {words}",
                "choose with torch.where (or torch.cond) instead of a Python `if`, and keep sizes free of values",
            )
        if "static shape" in text or "Constraints violated" in text or "specialized" in text:
            return self._axis_error(words)
        other = f"export.exporter: {_OTHER[self.exporter]}"
        if type(error).__name__ == "UnsupportedOperatorError" or "is not supported" in text:
            return BackendError("unsupported operator", words, f"ask for a higher export.opset, or try {other}")
        why = self._why_static() if self.exporter == "dynamo" else ""
        if why:
            return self._axis_error(why)
        return BackendError(
            "unsupported operator",
            f"the {self.exporter} exporter failed: {words}",
            f"try {other}, or change the module",
        )

    def _frozen(self, fixed: Sequence[FixedAxis]) -> BackendError:
        places = ", ".join(f"{at.axis!r} (input {at.input!r} axis {at.position}) became {at.extent}" for at in fixed)
        why = self._why_static() if self.exporter == "dynamo" else ""
        return self._axis_error(f"{places}; {why}" if why else places)

    def _axis_error(self, words: str) -> BackendError:
        return _wrong(
            f"the {self.exporter} exporter froze a dynamic axis: {words}",
            f"write the module so that it does not depend on the size, try export.exporter: {_OTHER[self.exporter]}, "
            "or give the axis a fixed size in the recipe's inputs",
        )

    def _why_static(self) -> str:
        """Export once more with axes that must stay dynamic, since only then the tracer says what froze one."""
        shapes = self._dynamic(lambda _axis: torch.export.Dim.DYNAMIC)
        try:
            torch.export.export(self.given, self.arguments, dynamic_shapes=shapes, strict=False)
        except Exception as err:  # noqa: BLE001 - whatever it says is the explanation
            lines = [
                line.strip("- ") for line in str(err).splitlines() if "static shape" in line or "specialized" in line
            ]
            return plain_words("; ".join(line.partition(". If you")[0] for line in lines), 600)
        return ""

    def _check_decisions(self, noise: Noise) -> None:
        suspects: dict[Place, str] = {
            (caught.filename, caught.lineno): str(caught.message)
            for caught in noise.caught
            if caught.category.__name__ == "TracerWarning"
        }
        self.notes += [f"{_place(place)}: {first_sentence(words)}" for place, words in suspects.items()][:20]
        if not suspects:
            return
        probes = [self._inputs(self.trace, fill) for fill in (None, "low", "high")]
        decided = decisions_by_value(
            lambda index: run_module(self.module, probes[index], "running the module on probe inputs"),
            len(probes),
            suspects,
        )
        if decided:
            places = "; ".join(f"{_place(place)}: {first_sentence(suspects[place])}" for place in decided)
            raise _wrong(
                f"the module decides by the values of its inputs, and tracing kept only what one sample led to: {places}",
                "choose with torch.where instead of a Python `if`, or remove the decision from the exported module",
            )

    def _run_enlarged(self, axis: str) -> tuple[tuple[int, int], list[tuple[int, ...]]]:
        """Return the axis's extent before and after, and the output shapes after (none where the module refuses it)."""
        at = next(
            self.trace[name][position]
            for name, tensor in self.tensors.items()
            for position, wanted in enumerate(tensor["shape"])
            if wanted == axis
        )
        for larger in (at + 1, 2 * at):
            shapes = {
                name: [
                    larger if wanted == axis else extent
                    for extent, wanted in zip(self.trace[name], tensor["shape"], strict=True)
                ]
                for name, tensor in self.tensors.items()
            }
            with contextlib.suppress(TaskError):
                found = run_module(self.module, self._inputs(shapes), f"running the module at {_spell(shapes)}")
                return (at, larger), [tuple(tensor.shape) for tensor in found]
        return (at, at), []

    def _inputs(self, shapes: Shapes, fill: str | None = None) -> dict[str, torch.Tensor]:
        arrays = seeded_inputs(self.tensors, shapes, SAMPLE_SEED, self.request.params.get("sample", 0))
        if fill is not None:
            edge = np.min if fill == "low" else np.max
            arrays = {name: np.full_like(array, edge(array)) if array.size else array for name, array in arrays.items()}
        return _tensors(arrays)


def _tensors(arrays: Mapping[str, Array]) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(np.array(array, order="C")) for name, array in arrays.items()}


def _array(tensor: torch.Tensor) -> Array:
    tensor = tensor.detach().cpu()
    return np.asarray((tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy())


def _weight_bytes(module: torch.nn.Module) -> int:
    return sum(t.numel() * t.element_size() for t in [*module.parameters(), *module.buffers()])


def _spell(shapes: Shapes) -> str:
    return ", ".join(f"{name} {list(shape)}" for name, shape in sorted(shapes.items()))


def _place(place: Place) -> str:
    return f"{plain_words(place[0])}:{place[1]}"


def _wrong(message: str, advice: str) -> BackendError:
    return BackendError("wrong result", message, advice)
