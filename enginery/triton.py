"""A Triton Inference Server model from an engine's manifest: its `config.pbtxt` and where its files lie. Pure.

Source of every field: Triton's ModelConfig (triton-inference-server/common, protobuf/model_config.proto) and its user
guide, "Model Repository" and "Model Configuration". The text is parsed with Triton's own protobuf in the tests.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from artifacts.errors import RefusedError
from artifacts.manifest import Manifest, Profile, TensorFacts

BACKENDS: Final = {"tensorrt": "tensorrt_plan", "onnxruntime": "onnxruntime_onnx"}
VERSION: Final = "1"
# Of a model's folder Triton reads config.pbtxt, configs/ and folders whose names are numbers; this it passes over.
PAPERS: Final = "enginery"
_TYPES: Final = {
    "bool": "TYPE_BOOL", "uint8": "TYPE_UINT8", "uint16": "TYPE_UINT16", "uint32": "TYPE_UINT32", "uint64": "TYPE_UINT64",
    "int8": "TYPE_INT8", "int16": "TYPE_INT16", "int32": "TYPE_INT32", "int64": "TYPE_INT64", "float16": "TYPE_FP16",
    "bfloat16": "TYPE_BF16", "float32": "TYPE_FP32", "float64": "TYPE_FP64", "string": "TYPE_STRING",
}  # fmt: skip
_CAPABILITY: Final = re.compile(r"sm[0-9]{2,3}")
_INT64_SINCE: Final = 10  # major version of TensorRT; before, an int64 of the graph is an int32 of the engine


class Word(str):
    """A name of an enumeration, which is written without quotes."""

    __slots__ = ()


@dataclass(frozen=True)
class Served:
    """An engine, and the compute capabilities (sm89) that it was chosen for."""

    engine: Manifest
    gpus: tuple[str, ...]


@dataclass(frozen=True)
class Wishes:
    """What a model repository is asked to have beyond what manifests say."""

    graphs: bool = False
    batch: bool = True
    """Whether an axis that leads all inputs and outputs is a batch, which manifests do not say; else it is one of `dims`."""
    queue_delay_us: int | None = None
    """Microseconds that Triton waits for more requests to put into one batch; None: it puts none together."""


@dataclass(frozen=True)
class TritonModel:
    """One model of a repository: its name, its config.pbtxt, and its files: path in the model's folder -> (engine, file)."""

    name: str
    config: str
    files: Mapping[str, tuple[str, str]]


def triton_models(served: Sequence[Served], wishes: Wishes) -> list[TritonModel]:
    """Return the models that serve engines of one recipe, one engine for each kind of GPU: one model for each graph.

    Raises RefusedError where Triton cannot serve an engine, or several not as one model; it says why and what to do.
    """
    engines = [one.engine for one in served]
    plans = _plans(served)
    recipe, parts = engines[0].identity.recipe, engines[0].parts
    if any(one.parts.keys() != parts.keys() for one in engines):
        raise _refused(engines[-1], [f"not all of these engines have the parts of {engines[0].identity}"])
    if not parts:
        return [_model(recipe, [(one, one, "") for one in engines], plans, wishes)]
    return [
        _model(f"{recipe}-{part}", [(one, one.part(part), f"{part}/") for one in engines], plans, wishes)
        for part in parts
    ]


def _model(
    name: str, graphs: Sequence[tuple[Manifest, Manifest, str]], plans: Mapping[str, str], wishes: Wishes
) -> TritonModel:
    """Describe one model of (engine, its graph as an engine of its own, folder of the graph's files) for each kind of GPU."""
    configs = [_config(name, graph, wishes) for _whole, graph, _folder in graphs]
    described, first = configs[0], graphs[0][1]
    for (whole, graph, _folder), config in zip(graphs[1:], configs[1:], strict=True):
        unlike = [f"{first.identity} has {_LABELS[field]}" for field in config if described.get(field) != config[field]]
        if graph.profiles != first.profiles and described["instance_group"] == config["instance_group"]:
            unlike.append(f"{first.identity} has other profiles")
        if graph.compatibility.runtime_version != first.compatibility.runtime_version:
            unlike.append(
                f"{first.identity} is for another version of {graph.compatibility.runtime}, and a Triton has one"
            )
        if first.compatibility.runtime != "tensorrt":
            unlike.append(f"a model has one ONNX graph, and {first.identity} is another")
        if unlike:
            raise _refused(whole, unlike, "export a repository for each")
    files = dict[str, tuple[str, str]]()
    if len(plans) > 1 and first.compatibility.runtime == "tensorrt":
        described["cc_model_filenames"] = [{"key": gpu, "value": plan} for gpu, plan in plans.items()]
    for (whole, graph, folder), plan in zip(graphs, dict.fromkeys(plans.values()), strict=True):
        for place, file in _served_files(graph, plan).items():
            files[f"{VERSION}/{place}"] = (str(whole.identity), folder + file)
        for file in graph.files:
            found = (str(whole.identity), folder + file if folder + file in whole.files else file)
            if found not in files.values():
                files[f"{PAPERS}/{whole.identity.target}/{file}"] = found
    engines = "".join(f"# {whole.identity}\n" for whole, _graph, _folder in graphs)
    return TritonModel(name, f"# Written by enginery export triton from\n{engines}{pbtxt(described)}", files)


def _served_files(graph: Manifest, plan: str) -> dict[str, str]:
    """Return which files a runtime reads, by their path in the version's folder; a graph of several files is a folder."""
    if graph.compatibility.runtime == "tensorrt":
        return {plan: graph.plan}
    beside = [file for file in graph.files if file.startswith(f"{graph.plan}.")]
    if not beside:
        return {"model.onnx": graph.plan}
    return {"model.onnx/model.onnx": graph.plan} | {f"model.onnx/{file}": file for file in beside}


def _plans(served: Sequence[Served]) -> dict[str, str]:
    """Return the plan's file name for each compute capability, as Triton writes it (8.9); for a lone engine its one name."""
    if len(served) == 1:
        return {"": "model.plan"}
    plans, by = dict[str, str](), dict[str, Manifest]()
    for one in served:
        for gpu in one.gpus:
            if not _CAPABILITY.fullmatch(gpu):
                what = f"{gpu!r} is no compute capability such as sm89, by which alone Triton tells several plans apart"
                raise _refused(one.engine, [what], "export a repository for each")
            digits = gpu.removeprefix("sm")
            capability = f"{digits[:-1]}.{digits[-1]}"
            if capability in by:
                what = f"{by[capability].identity} is for {gpu} too, and Triton tells GPUs apart by that alone"
                raise _refused(one.engine, [what], "export a repository for each")
            by[capability], plans[capability] = one.engine, f"model.{one.gpus[0]}.plan"
    return plans


_LABELS: Final = {
    "platform": "another runtime", "max_batch_size": "another greatest batch", "input": "other inputs", "output": "other outputs",
    "instance_group": "other profiles", "dynamic_batching": "another queue", "optimization": "other shapes that are fastest",
}  # fmt: skip


def _config(name: str, graph: Manifest, wishes: Wishes) -> dict[str, Any]:
    needs, reasons = graph.compatibility, list[str]()
    if needs.runtime not in BACKENDS:
        reasons.append(f"Triton has no backend for {needs.runtime}; it serves {' and '.join(BACKENDS)}")
    elif not (graph.inputs and graph.outputs):
        reasons.append("its inputs and outputs are not known")
    batch = _greatest_batch(graph) if wishes.batch else 0
    described: dict[str, Any] = {
        "name": name,
        "platform": BACKENDS.get(needs.runtime, ""),
        "max_batch_size": batch,
        "input": [_tensor(graph, one, facts, batch, reasons) for one, facts in graph.inputs.items()],
        "output": [_tensor(graph, one, facts, batch, reasons) for one, facts in graph.outputs.items()],
        "instance_group": _instances(graph),
    }
    if wishes.queue_delay_us is not None:
        if batch == 0:
            reasons.append(
                "requests cannot be put together: not every input and output begins with one and the same free axis"
            )
        described["dynamic_batching"] = {"max_queue_delay_microseconds": wishes.queue_delay_us}
    if wishes.graphs and needs.runtime == "tensorrt":
        specs = [_graph_spec(profile, batch) for profile in graph.profiles]
        described["optimization"] = {"cuda": {"graphs": True, "graph_spec": specs}}
    if reasons:
        raise _refused(graph, reasons)
    return described


def _greatest_batch(graph: Manifest) -> int:
    """Return Triton's max_batch_size: 0 unless every tensor begins with one and the same dynamic axis."""
    shapes = [facts.shape for facts in (*graph.inputs.values(), *graph.outputs.values())]
    leading = {shape[0] if shape else None for shape in shapes}
    if len(leading) != 1 or not isinstance(next(iter(leading)), str):
        return 0
    greatest = {one.max[0] for profile in graph.profiles for one in profile.inputs.values() if one.max}
    same = all(len({one.max[0] for one in profile.inputs.values() if one.max}) == 1 for profile in graph.profiles)
    return max(greatest) if greatest and same else 0


def _tensor(graph: Manifest, name: str, facts: TensorFacts, batch: int, reasons: list[str]) -> dict[str, Any]:
    dtype = _TYPES.get(facts.dtype)
    if dtype == "TYPE_INT64" and graph.compatibility.runtime == "tensorrt" and _major(graph) < _INT64_SINCE:
        dtype = "TYPE_INT32"
    if dtype is None:
        reasons.append(f"{name} is of type {facts.dtype}, which Triton has not")
    if facts.shape is None:
        reasons.append(f"the shape of {name} is not known")
    elif not facts.shape and not batch:
        reasons.append(f"{name} is a scalar, which Triton serves only in a batch")
    dims = [size if isinstance(size, int) else -1 for size in (facts.shape or ())[1 if batch else 0 :]]
    described: dict[str, Any] = {"name": name, "data_type": Word(dtype or "TYPE_INVALID"), "dims": dims or [1]}
    return described if dims else described | {"reshape": {"shape": []}}


def _instances(graph: Manifest) -> list[dict[str, Any]]:
    needs = graph.compatibility
    if needs.runtime != "tensorrt":
        return [{"kind": Word("KIND_AUTO" if graph.fallback is not None or "cpu" not in needs.gpus else "KIND_CPU")}]
    group: dict[str, Any] = {"kind": Word("KIND_GPU")}
    if len(graph.profiles) > 1:
        group["profile"] = [str(index) for index in range(len(graph.profiles))]
    if needs.dla_core is not None:
        group["secondary_devices"] = [{"kind": Word("KIND_NVDLA"), "device_id": needs.dla_core}]
    return [group]


def _graph_spec(profile: Profile, batch: int) -> dict[str, Any]:
    """Describe the CUDA graph of the shapes that a profile is fastest at."""
    shapes = {name: list(one.opt) for name, one in profile.inputs.items()}
    least = min((shape[0] for shape in shapes.values()), default=0) if batch else 0
    return {
        "batch_size": least,
        "input": [{"key": name, "value": {"dim": shape[1:] if batch else shape}} for name, shape in shapes.items()],
    }


def _major(graph: Manifest) -> int:
    return int(re.match(r"[0-9]*", graph.compatibility.runtime_version)[0] or 0)  # type: ignore[index]  # matches ""


def _refused(engine: Manifest, reasons: Sequence[str], advice: str = "") -> RefusedError:
    return RefusedError(str(engine.identity), reasons, advice, verb="served by Triton")


def pbtxt(message: Mapping[str, Any], indent: str = "") -> str:
    """Write a message in protobuf's text format (https://protobuf.dev/reference/protobuf/textformat-spec/)."""
    lines: list[str] = []
    for field, value in message.items():
        for one in value if isinstance(value, list) else [value]:
            if isinstance(one, Mapping):
                inner = pbtxt(one, f"{indent}  ")
                lines.append(f"{indent}{field} {{\n{inner}{indent}}}\n" if inner else f"{indent}{field} {{}}\n")
            else:
                lines.append(f"{indent}{field}: {_scalar(one)}\n")
    return "".join(lines)


def _scalar(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, Word | int):
        return str(value)
    # Bytes, since what follows \u is not read by every parser.
    return (
        '"'
        + "".join(
            chr(byte) if 32 <= byte < 127 and byte not in b'"\\' else f"\\{byte:03o}" for byte in str(value).encode()
        )
        + '"'
    )
