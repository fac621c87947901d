"""From `model.onnx` to a TensorRT network with its optimisation profiles, refused in words where it cannot be."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from tasks.engines.trt_adapter import adapter
from tasks.engines.trt_log import Log
from tasks.errors import BackendError

_CORNERS: Final = ("min", "opt", "max")
# How parsers name the operator that they do not know: 8.6's importer, the plugin lookup, and ParserError.node_operator.
_OPERATOR: Final = re.compile(
    r"No importer registered for op: (\w+)|could not find plugin:? (\w+)|searchPlugin.*?\b([A-Z]\w+)\b|operator:? (\w+)"
)


def parse(trt: Any, logger: Any, log: Log, builder: Any, path: Path, typing: str = "strong") -> tuple[Any, Any]:
    """Return the network and its parser, which owns the weights and must live as long; `typing` as `trt_adapter.adapter`.

    Raises BackendError: "unsupported operator" or "missing plugin" with the parser's words and the nodes.
    """
    chosen = adapter(trt, typing)
    network = builder.create_network(chosen.network_flags(trt))
    parser = trt.OnnxParser(network, logger)
    chosen.prepare_parser(trt, parser)
    before = len(log.errors)
    if not parser.parse_from_file(str(path)):
        found = [parser.get_error(index) for index in range(parser.num_errors)]
        words = "\n    ".join(dict.fromkeys(_words(error) for error in found)).replace(f"{path.parent}/", "")
        failure = log.failure(
            f"TensorRT {trt.__version__} does not read the graph", otherwise="bad data", extra=words, since=before
        )
        raise _about_operator(trt, failure, found, path)
    return network, parser


def _words(error: Any) -> str:
    """Return one parser error; which members it has depends on the version."""
    place = [f"node {error.node()}"]
    for name, shown in (("node_name", "named"), ("node_operator", "operator")):
        if hasattr(error, name) and (value := getattr(error, name)()):
            place.append(f"{shown} {value}")
    # 8.6 binds `name` of this enumeration as a method.
    return f"{str(error.code()).rpartition('.')[2]}: {error.desc()} ({', '.join(place)})"


def _about_operator(trt: Any, failure: BackendError, errors: Sequence[Any], path: Path) -> BackendError:
    """Tell an operator of the ONNX standard that this version lacks from one that only a plugin could bring."""
    if failure.kind not in ("missing plugin", "unsupported operator"):
        return failure
    import onnx

    nodes = onnx.load_model(str(path), load_external_data=False).graph.node
    kinds = {
        (node.op_type, node.domain)
        for error in errors
        if 0 <= error.node() < len(nodes)
        for node in [nodes[error.node()]]
    }
    if not kinds:
        named = {next(filter(None, match.groups())) for match in _OPERATOR.finditer(failure.message)}
        kinds = {(node.op_type, node.domain) for node in nodes if node.op_type in named}
    if not kinds:
        return failure
    custom = sorted(f"{domain}::{name}" for name, domain in kinds if domain not in ("", "ai.onnx"))
    if custom:
        needed = ", ".join(custom)
        advice = f"name the library that brings {needed}, with its digest, under build.plugins; or use operators of the ONNX standard"
        return BackendError("missing plugin", failure.message, advice)
    standard = ", ".join(sorted(name for name, _domain in kinds))
    advice = f"TensorRT {trt.__version__} does not take {standard} as it is used here; change the model, or use a newer TensorRT"
    return BackendError("unsupported operator", failure.message, advice)


def add_profiles(
    trt: Any, log: Log, builder: Any, network: Any, config: Any, profiles: Sequence[Mapping[str, Any]]
) -> list[Any]:
    """Add every profile to the configuration, in order, and return them as TensorRT's objects.

    `profiles` is `[{"name", "inputs": {input: {"min", "opt", "max"}}}]`. Raises BackendError("bad profile") where inputs
    or ranks differ from the network's, a fixed extent is asked to vary, or TensorRT refuses.
    """
    inputs = {tensor.name: tensor for tensor in map(network.get_input, range(network.num_inputs))}
    added = []
    for profile in profiles:
        where = f"profile {profile['name']}"
        missing = sorted(set(inputs) ^ set(profile["inputs"]))
        if missing:
            raise BackendError(
                "bad profile",
                f"{where} and the network do not agree on inputs: {', '.join(missing)}",
                f"the network takes {', '.join(inputs)}; name them under `inputs`",
            )
        ranges = builder.create_optimization_profile()
        before = len(log.errors)
        for name, tensor in inputs.items():
            shapes = [list(profile["inputs"][name][corner]) for corner in _CORNERS]
            _check_shapes(f"{where}, input {name}", tensor, shapes)
            try:
                ranges.set_shape(name, *shapes)
            except (ValueError, TypeError) as err:
                raise BackendError("bad profile", f"{where}, input {name}: {err}", "correct the profile") from err
        if config.add_optimization_profile(ranges) < 0 or len(log.errors) > before:
            raise log.failure(f"TensorRT {trt.__version__} refuses {where}", kind="bad profile", since=before)
        added.append(ranges)
    return added


def _check_shapes(where: str, tensor: Any, shapes: Sequence[Sequence[int]]) -> None:
    if tensor.is_shape_tensor:
        raise BackendError(
            "bad profile",
            f"{where} is read as a shape, whose values (not extents) a profile would have to bound",
            "compute the shape inside the model, or make it a constant",
        )
    network = list(tensor.shape)
    for corner, shape in zip(_CORNERS, shapes, strict=True):
        fits = len(shape) == len(network) and all(own in (-1, asked) for own, asked in zip(network, shape, strict=True))
        if not fits:
            raise BackendError(
                "bad profile",
                f"{where}: {corner} {list(shape)} does not fit the network's {network} (-1 is dynamic)",
                "change the profile, or the axis: an exporter may have frozen it",
            )


def signature(network: Any) -> dict[str, Any]:
    """Return inputs and outputs as {name: {"dtype", "shape"}}, by TensorRT's own names; -1 is dynamic."""

    def described(tensor: Any) -> dict[str, Any]:
        try:
            shape = list(tensor.shape)
        except ValueError:  # a rank that is not known before run time
            shape = []
        return {"dtype": tensor.dtype.name, "shape": shape}

    return {
        "inputs": {tensor.name: described(tensor) for tensor in map(network.get_input, range(network.num_inputs))},
        "outputs": {tensor.name: described(tensor) for tensor in map(network.get_output, range(network.num_outputs))},
    }
