"""PaddlePaddle: a layer of the recipe's own code, or a saved static graph, to ONNX through paddle2onnx.

Facts: toolchain.md sections 0.4 and 2: the API's default opset is 7, its default optimiser installs a package at run time,
and it names every dynamic axis anew.
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from artifacts.refs import BYTES
from tasks.code import plain_words
from tasks.errors import BackendError, ModelCodeError, TaskError
from tasks.exporter_words import quiet
from tasks.onnx_axes import compare_inputs, rename_axes
from tasks.onnx_files import (
    GRAPH,
    check_graph,
    dims_of,
    graph_facts,
    graphs_of,
    infer_shapes,
    load_graph,
    opset_of,
    save_graph,
    strip_notes,
)
from tasks.paddle_model import PaddleModel, load_model
from tasks.paddle_nodes import unknown_operators
from tasks.references import Run, write_reference
from tasks.seeded import SAMPLE_SEED, Array, seeded_inputs
from tasks.stage import StageRequest, StageResult

# Two runs of one layer on one input differ by less, relative to the largest output, unless something is drawn at random.
_SAME: Final = 1e-4
_MOST_TOLD: Final = 20


def reference(request: StageRequest) -> StageResult:
    """Run the layer, or the saved graph in paddle.inference, and write its outputs (see `tasks.references`)."""
    with quiet("paddle"):
        return write_reference(request, runner(request))


def runner(request: StageRequest) -> Run:
    """Load the layer or the saved graph, to be run on arrays."""
    with quiet("paddle"):
        model = load_model(request)
    names = request.params["outputs"]

    def run(arrays: Mapping[str, Array], what: str) -> dict[str, Array]:
        with quiet("paddle"):
            return dict(zip(names, _outputs(model, arrays, what, names), strict=True))

    return run


def export(request: StageRequest) -> StageResult:
    """Export with the recipe's opset, names and dynamic axes, and check that the graph has them.

    Raises ModelCodeError for the recipe's code, a layer in training mode, or one whose outputs are random;
    BackendError("wrong result") for a frozen axis, "rejected setting" for an opset that was not kept, "bad data" for files
    that are no Paddle graph.
    """
    params = request.params
    with quiet("paddle", "paddle2onnx"), tempfile.TemporaryDirectory(dir=request.output_dir) as scratch:
        model = load_model(request)
        shapes = _run_twice(model, params)
        request.report(0.2, "tracing the model")
        written = _converted(model, Path(scratch), params["opset"])
        graph = load_graph(written)
        if opset_of(graph) != params["opset"]:
            raise BackendError(
                "rejected setting",
                f"opset {params['opset']} was asked for, paddle2onnx wrote opset {opset_of(graph)}",
                "ask for the opset that it wrote: some operator has no older form",
            )
        request.report(0.8, "checking the graph")
        _name(graph, model, params)
        strip_notes(graph)
        outputs = save_graph(graph, request.output_dir)
        graph = infer_shapes(request.output_dir)
        names = _axes_of_outputs(graph, model, params, shapes)
        if names:
            rename_axes(graph, params["tensors"], names)
            (request.output_dir / GRAPH).write_bytes(graph.SerializeToString(deterministic=True))
    check_graph(request.output_dir / GRAPH)
    facts = graph_facts(graph)
    return StageResult(outputs, facts | ({} if model.parameters is None else {"parameters": model.parameters}))


def save(request: StageRequest) -> StageResult:
    """Write the two files of an inference model: traced from the layer, or the saved graph as its author gave it.

    Raises ModelCodeError for the recipe's code, as `export` does.
    """
    with quiet("paddle"):
        model = load_model(request)
        _run_twice(model, request.params)
        request.report(0.3, "saving the model")
        graph, weights = model.save(request.output_dir)
    facts = {
        "plan": graph.name,
        "form": f"Paddle inference model ({graph.suffix})",
        "inputs": list(model.feeds()),
        "outputs": request.params["outputs"],
    }
    return StageResult({graph.name: BYTES, weights.name: BYTES}, facts)


def _outputs(model: PaddleModel, arrays: Mapping[str, Array], what: str, names: Sequence[str]) -> list[Array]:
    found = model.run(arrays, what)
    if len(found) != len(names):
        shapes = ", ".join(str(list(array.shape)) for array in found) or "nothing"
        raise ModelCodeError(
            f"the model returns {len(found)} tensors ({shapes}), the recipe names {len(names)} outputs "
            f"({', '.join(names)}): name each of them, in order"
        )
    return found


def _run_twice(model: PaddleModel, params: Mapping[str, Any]) -> list[tuple[int, ...]]:
    """Run the model twice at the trace shape and return its outputs' shapes; two results are one, or it is refused."""
    arrays = seeded_inputs(params["tensors"], params["trace"], SAMPLE_SEED, params.get("sample", 0))
    what = _spell(params["trace"])
    first, second = (_outputs(model, arrays, what, params["outputs"]) for _ in range(2))
    for name, one, other in zip(params["outputs"], first, second, strict=True):
        scale = float(np.abs(one).max(initial=0.0)) or 1.0
        if one.shape != other.shape or not np.allclose(one, other, rtol=0.0, atol=_SAME * scale, equal_nan=True):
            raise ModelCodeError(
                f"output {name!r} is random: two runs on one input differ, though every layer is in evaluation mode; "
                "paddle.nn.functional.dropout drops unless it is called with training=self.training"
            )
    return [tuple(array.shape) for array in first]


def _converted(model: PaddleModel, folder: Path, opset: int) -> Path:
    import paddle2onnx
    from paddle2onnx import paddle2onnx_cpp2py_export

    graph, weights = model.save(folder)
    written = folder / GRAPH
    unknown = unknown_operators(graph, paddle2onnx_cpp2py_export.get_all_supported_operators_pir())
    if unknown:
        # Last words: over an operator that it does not know paddle2onnx aborts, and this is what the error is made of.
        sys.stderr.write(f"paddle2onnx may not know: {'; '.join(unknown[:_MOST_TOLD])}\n")
        sys.stderr.flush()
    try:
        paddle2onnx.export(
            str(graph),
            str(weights),
            str(written),
            opset_version=opset,
            enable_onnx_checker=True,
            optimize_tool=None,
        )
    except Exception as err:
        raise BackendError(
            "unsupported operator",
            f"paddle2onnx failed: {plain_words(str(err), 1000)}",
            "ask for another export.opset, or write the model without that operator",
        ) from err
    if not written.is_file():
        raise BackendError(
            "unsupported operator", "paddle2onnx wrote no graph", "see the stage's log for the operator that it names"
        )
    return written


def _name(graph: Any, model: PaddleModel, params: Mapping[str, Any]) -> None:
    """Give inputs, outputs and axes the recipe's names; refuse a graph that lost an input or froze an axis."""
    found = [value.name for value in graph.graph.output]
    if len(found) != len(params["outputs"]):
        raise _wrong(
            f"the graph has the outputs {', '.join(found)}; the recipe names {', '.join(params['outputs'])}", ""
        )
    renamed = {own: name for name, own in model.feeds().items()} | dict(zip(found, params["outputs"], strict=True))
    _rename_values(graph, {old: new for old, new in renamed.items() if old != new})
    unused = [name for name in params["tensors"] if name not in {value.name for value in graph.graph.input}]
    if unused:
        raise _wrong(
            f"the exported graph has no input {', '.join(unused)}: the model does not use it",
            "remove it from the recipe's inputs",
        )
    agreement = compare_inputs(graph, params["tensors"])
    if agreement.fixed:
        places = ", ".join(
            f"{at.axis!r} (input {at.input!r} axis {at.position}) is {at.extent}" for at in agreement.fixed
        )
        raise _wrong(
            f"a dynamic axis is frozen in the graph: {places}",
            "save the graph with None for that axis in its InputSpec, or give it a fixed size in the recipe's inputs",
        )
    if agreement.faults:
        raise _wrong("; ".join(agreement.faults), "correct the recipe's inputs, or the model")
    rename_axes(graph, params["tensors"], agreement.names)


def _rename_values(model: Any, names: dict[str, str]) -> None:
    """Rename values everywhere in a graph; a value that has a wanted name already gets another one."""
    taken = {name for graph in graphs_of(model) for node in graph.node for name in [*node.input, *node.output]}
    names = names | {new: f"{new}.inner" for new in names.values() if new in taken and new not in names}
    for graph in graphs_of(model):
        for node in graph.node:
            for places in (node.input, node.output):
                places[:] = [names.get(name, name) for name in places]
        for value in [*graph.input, *graph.output, *graph.value_info, *graph.initializer]:
            value.name = names.get(value.name, value.name)


def _axes_of_outputs(
    graph: Any, model: PaddleModel, params: Mapping[str, Any], shapes: Sequence[tuple[int, ...]]
) -> dict[str, int | str]:
    """Run the model with each axis enlarged: refuse outputs that the graph holds constant, and name those that follow.

    A model that takes no larger size says nothing here; later stages run the graph at every shape of the profiles.
    """
    tensors: Mapping[str, Mapping[str, Any]] = params["tensors"]
    names: dict[str, int | str] = {}
    axes = sorted({axis for tensor in tensors.values() for axis in tensor["shape"] if isinstance(axis, str)})
    for axis in axes:
        before, after, grown = _enlarged(model, params, axis)
        for value, old, new in zip(graph.graph.output, shapes, grown, strict=False):
            for position, (dim, *sizes) in enumerate(zip(dims_of(value), old, new, strict=False)):
                if isinstance(dim, int) and dim != sizes[1]:
                    raise _wrong(
                        f"axis {axis!r} is frozen: output {value.name!r} axis {position} is the constant {dim} in the "
                        f"graph; the model gives {sizes[1]} at another {axis}",
                        "take sizes from paddle.shape(x) or -1 instead of Python numbers, or make the axis a fixed size",
                    )
                if isinstance(dim, str) and dim not in axes and tuple(sizes) == (before, after):
                    names.setdefault(dim, axis)
    return names


def _enlarged(model: PaddleModel, params: Mapping[str, Any], axis: str) -> tuple[int, int, list[tuple[int, ...]]]:
    tensors, trace = params["tensors"], params["trace"]
    at = next(
        trace[name][position]
        for name, tensor in tensors.items()
        for position, wanted in enumerate(tensor["shape"])
        if wanted == axis
    )
    for larger in (at + 1, 2 * at):
        shapes = {
            name: [
                larger if wanted == axis else extent
                for extent, wanted in zip(trace[name], tensor["shape"], strict=True)
            ]
            for name, tensor in tensors.items()
        }
        with contextlib.suppress(TaskError):
            found = model.run(seeded_inputs(tensors, shapes, SAMPLE_SEED, 0), _spell(shapes))
            return at, larger, [tuple(array.shape) for array in found]
    return at, at, []


def _spell(shapes: Mapping[str, Sequence[int]]) -> str:
    return ", ".join(f"{name} {list(shape)}" for name, shape in sorted(shapes.items()))


def _wrong(message: str, advice: str) -> BackendError:
    return BackendError("wrong result", message, advice)
