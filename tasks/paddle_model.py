"""A recipe's Paddle model, run by Paddle itself: a layer of the recipe's code, or a static graph that was saved.

Both give the same to `sources.paddle_source`: arrays in by the recipe's names, arrays out in the model's order, and the
two files (graph, weights) that paddle2onnx reads.
"""

from __future__ import annotations

import inspect
import json
import logging
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

_LEVEL = logging.getLogger().level
import paddle  # noqa: E402 - it raises the root logger's level

from tasks.code import load_callable, plain_words, recipe_code  # noqa: E402
from tasks.errors import BackendError, ModelCodeError  # noqa: E402
from tasks.paddle_weights import read_weights  # noqa: E402
from tasks.seeded import Array  # noqa: E402
from tasks.stage import StageRequest  # noqa: E402

logging.getLogger().setLevel(_LEVEL)
# Its handlers print a report of their own and hide from the parent which signal ended the process.
paddle.disable_signal_handler()

Tensors = Mapping[str, Mapping[str, Any]]


class PaddleModel(Protocol):
    """What either kind of model does."""

    parameters: int | None

    def run(self, arrays: Mapping[str, Array], what: str) -> list[Array]:
        """Return the outputs in the model's order; `what` names the inputs' shapes in messages."""

    def save(self, folder: Path) -> tuple[Path, Path]:
        """Write the static graph and its weights into a folder and return their paths."""

    def feeds(self) -> dict[str, str]:
        """Return the graph's own name of each of the recipe's inputs, by the recipe's name."""


def loaded_paddle() -> Any:
    """Return the package, imported without what it does to logging and signals."""
    return paddle


def load_model(request: StageRequest) -> PaddleModel:
    """Return the model of a request: a layer where it has code, else the saved graph."""
    if "code.tar" in request.inputs:
        return LayerModel(request)
    return SavedGraph(request)


class LayerModel:
    """A paddle.nn.Layer in evaluation mode, with its weights or its seeded initialisation."""

    def __init__(self, request: StageRequest) -> None:
        """Build it. Raises ModelCodeError for the recipe's code, or a layer in training mode; BackendError for weights."""
        params = request.params
        build = load_callable(request.inputs["code.tar"], params["entry"])
        paddle.seed(params["seed"])
        layer = build(**params["arguments"])
        if not isinstance(layer, paddle.nn.Layer):
            found = f"the class {layer.__name__} itself" if isinstance(layer, type) else f"a {type(layer).__name__}"
            raise ModelCodeError(
                f"{params['entry']} returned {found}; expected a paddle.nn.Layer with its layers built"
            )
        _require_eval(layer, params["entry"])  # of the whole: a part that is none of its sublayers is asked below
        weights = next((path for name, path in sorted(request.inputs.items()) if name.startswith("weights.")), None)
        if weights is not None:
            _load_weights(layer, read_weights(weights), weights.name, params["entry"])
        if params.get("part"):
            layer = _part(layer, params)
            _require_eval(layer, params["entry"])
        self.layer: Any = layer
        self.tensors: Tensors = params["tensors"]
        self.order = _call_order(layer, list(self.tensors))
        self.parameters: int | None = sum(int(np.prod(value.shape)) for value in layer.parameters())

    def run(self, arrays: Mapping[str, Array], what: str) -> list[Array]:
        """Run the layer without gradients. Raises ModelCodeError where it fails."""
        given = [paddle.to_tensor(arrays[name]) for name in self.order]
        with recipe_code(f"running the layer at {what}"), paddle.no_grad():
            return [np.asarray(tensor.numpy()) for tensor in _flat(self.layer(*given))]

    def save(self, folder: Path) -> tuple[Path, Path]:
        """Trace the layer into a static graph, its dynamic axes open."""
        specs = [
            paddle.static.InputSpec(
                [None if isinstance(extent, str) else extent for extent in self.tensors[name]["shape"]],
                self.tensors[name]["dtype"],
                name=name,
            )
            for name in self.order
        ]
        with recipe_code("tracing the layer (paddle.jit.save)"):
            paddle.jit.save(self.layer, str(folder / "model"), input_spec=specs)
        return folder / "model.json", folder / "model.pdiparams"

    def feeds(self) -> dict[str, str]:
        """Return the names as given to the tracer: the recipe's."""
        return {name: name for name in self.order}


class SavedGraph:
    """What paddle.jit.save wrote, run by paddle.inference without its optimisations."""

    parameters: int | None = None

    def __init__(self, request: StageRequest) -> None:
        """Load it. Raises BackendError("bad data") where the files are no Paddle graph or do not fit the recipe's inputs."""
        self.graph = next(path for name, path in request.inputs.items() if name in ("model.json", "model.pdmodel"))
        self.weights = request.inputs["model.pdiparams"]
        _require_graph(self.graph)
        config = paddle.inference.Config(str(self.graph), str(self.weights))
        config.disable_glog_info()
        config.switch_ir_optim(False)
        config.disable_gpu()
        config.disable_mkldnn()
        config.set_cpu_math_library_num_threads(1)
        try:
            self.predictor = paddle.inference.create_predictor(config)
        except Exception as err:
            raise BackendError(
                "bad data",
                f"{self.graph.name} and {self.weights.name} are not read by paddle.inference: {plain_words(str(err), 600)}",
                "give the two files that one paddle.jit.save wrote",
            ) from err
        self.names = self._agree(list(request.params["tensors"]))

    def run(self, arrays: Mapping[str, Array], what: str) -> list[Array]:
        """Run the predictor. Raises BackendError("bad profile") where it does not take a shape."""
        for name, own in self.names.items():
            self.predictor.get_input_handle(own).copy_from_cpu(np.ascontiguousarray(arrays[name]))
        try:
            self.predictor.run()
        except Exception as err:
            raise BackendError(
                "bad profile",
                f"the saved graph does not run at {what}: {plain_words(str(err), 600)}",
                "change the profile, or save the graph with None for this axis in its InputSpec",
            ) from err
        outputs = self.predictor.get_output_names()
        return [np.array(self.predictor.get_output_handle(name).copy_to_cpu()) for name in outputs]

    def save(self, folder: Path) -> tuple[Path, Path]:
        """Copy the files, since paddle2onnx writes beside a .pdmodel."""
        graph, weights = folder / f"model{self.graph.suffix}", folder / "model.pdiparams"
        shutil.copyfile(self.graph, graph)
        shutil.copyfile(self.weights, weights)
        return graph, weights

    def feeds(self) -> dict[str, str]:
        """Return the graph's own names, by the recipe's."""
        return self.names

    def _agree(self, wanted: list[str]) -> dict[str, str]:
        own = list(self.predictor.get_input_names())
        if len(own) == len(wanted) == 1:  # with one input its name is free
            return {wanted[0]: own[0]}
        if set(own) != set(wanted):
            raise BackendError(
                "bad data",
                f"the saved graph's inputs are {', '.join(own)}; the recipe names {', '.join(wanted)}",
                "write the graph's names in the recipe's inputs (they are those of the InputSpec it was saved with)",
            )
        return {name: name for name in wanted}


def _part(model: Any, params: Mapping[str, Any]) -> Any:
    """Return one part of a layer that has its weights: what the recipe's callable makes of it, or its attribute."""
    name, maker = params["part"], params["module"]
    if maker is None:
        entry, part = f"{type(model).__name__}.{name}", getattr(model, name, None)
    else:
        entry = f"{params['entry'].rpartition(':')[0]}:{maker}"
        # The module that was imported for the model: imported again, its classes would be others.
        make = getattr(sys.modules[entry.partition(":")[0]], maker, None)
        with recipe_code(f"calling {entry}"):
            part = make(model) if callable(make) else None
    if not isinstance(part, paddle.nn.Layer):
        raise ModelCodeError(
            f"{entry}: expected a paddle.nn.Layer for the part {name!r}, found a {type(part).__name__}; name a callable "
            f"that makes it under parts.{name}.module"
        )
    return part


def _require_eval(layer: Any, entry: str) -> None:
    """Refuse a layer of which any part is in training mode: what is exported is what the callable returned."""
    training = [name or "the layer itself" for name, part in layer.named_sublayers(include_self=True) if part.training]
    if training:
        more = f" and {len(training) - 3} more" if len(training) > 3 else ""
        raise ModelCodeError(
            f"{entry} returned a layer in training mode ({', '.join(training[:3])}{more}): Dropout would drop and "
            "BatchNorm would use the statistics of the batch, so its outputs would not be those of inference; "
            "call layer.eval() before it is returned (a Paddle layer is in training mode when it is built)"
        )


def _call_order(layer: Any, names: Sequence[str]) -> list[str]:
    """Return the recipe's inputs in the order of forward's parameters; one input may have any name."""
    parameters = list(inspect.signature(layer.forward).parameters.values())
    positional = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if len(names) == 1 and (positional or any(p.kind is p.VAR_POSITIONAL for p in parameters)):
        return list(names)
    if set(names) == set(positional[: len(names)]):
        return positional[: len(names)]
    raise ModelCodeError(
        f"{type(layer).__name__}.forward takes ({', '.join(p.name for p in parameters)}), the recipe names the inputs "
        f"{', '.join(names)}: give the recipe's inputs the names of forward's first parameters"
    )


def _flat(result: object) -> list[Any]:
    """Return the tensors of a result in the order in which paddle.jit.save writes them: mappings by sorted key."""
    if isinstance(result, paddle.Tensor):
        return [result]
    if result is None:
        return []
    if isinstance(result, Mapping):
        return [tensor for key in sorted(result) for tensor in _flat(result[key])]
    if isinstance(result, (list, tuple)):
        return [tensor for value in result for tensor in _flat(value)]
    raise ModelCodeError(f"the layer returned a {type(result).__name__} among its outputs; expected tensors")


def _load_weights(layer: Any, weights: dict[str, Array], file: str, entry: str) -> None:
    wanted = layer.state_dict()
    missing = [name for name in wanted if name not in weights]
    unexpected = [name for name in weights if name not in wanted]
    shapes = [
        f"{name} is {list(weights[name].shape)} in the file, {list(value.shape)} in the layer"
        for name, value in wanted.items()
        if name in weights and list(weights[name].shape) != list(value.shape)
    ]
    parts = (("missing in the file", missing), ("not in the layer", unexpected), ("other shapes", shapes))
    faults = [f"{what}: {', '.join(names[:5])}" for what, names in parts if names]
    if faults:
        raise BackendError(
            "bad data",
            f"{file} does not fit the layer of {entry}: " + "; ".join(faults),
            "give the weights of this very layer, or set source.arguments so that it is the one that was trained",
        )
    layer.set_state_dict({name: paddle.to_tensor(value) for name, value in weights.items()})


def _require_graph(path: Path) -> None:
    """Refuse what is no saved graph before Paddle reads it, which ends the process on some such files."""
    why = _why_no_json(path) if path.suffix == ".json" else _why_no_program(path)
    if why:
        raise BackendError(
            "bad data",
            f"{path.name} is no Paddle graph: {why}",
            "give the file that paddle.jit.save or paddle.static.save_inference_model wrote",
        )


def _why_no_json(path: Path) -> str:
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, UnicodeDecodeError) as err:
        return f"it is not JSON ({err})"
    magic = content.get("base_code", {}).get("magic") if isinstance(content, dict) else None
    return "" if magic == "pir" and "program" in content else "it has no program of Paddle's (base_code.magic: pir)"


def _why_no_program(path: Path) -> str:
    try:
        program = paddle.base.core.ProgramDesc(path.read_bytes())
        if not program.num_blocks():  # other protobuf files parse too, and asking them for a block ends the process
            return "it has no block of operators"
        block = program.block(0)
        operators = {block.op(index).type() for index in range(block.op_size())}
    except Exception as err:  # noqa: BLE001 - whatever it says is the explanation
        return f"it is not a ProgramDesc ({plain_words(str(err), 200)})"
    return "" if "fetch" in operators else "its program fetches nothing"
