"""Which weights of a plan can be replaced, and what of a graph each is made of: found out when the plan is compiled.

TensorRT 8.6 names refittable weights by layer and role; what its parser made of the graph's tensors to get them
(transposed for a Gemm, computed for a BatchNormalization), it does not tell. So the graph is parsed once more with
other values in its weights: what follows a weight byte for byte is that weight, what stays is a constant of the
parser's, and where anything else changed the plan is not offered for refitting. Later versions have a refitter of their
own for ONNX files, which knows weights by name.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np

from tasks.engines.trt_log import Log
from tasks.engines.trt_network import parse
from tasks.onnx_files import GRAPH, load_graph, save_graph

Array = np.ndarray[Any, np.dtype[Any]]
Slot = tuple[str, str]  # the layer's name, and the name of the role (trt.WeightsRole) that the weights have in it

REFIT: Final = "refit.safetensors"
# The layers that have weights: their interface, and the attribute that gives the weights of each role.
_LAYERS: Final[Mapping[str, tuple[str, Mapping[str, str]]]] = {
    "CONVOLUTION": ("IConvolutionLayer", {"KERNEL": "kernel", "BIAS": "bias"}),
    "DECONVOLUTION": ("IDeconvolutionLayer", {"KERNEL": "kernel", "BIAS": "bias"}),
    "FULLY_CONNECTED": ("IFullyConnectedLayer", {"KERNEL": "kernel", "BIAS": "bias"}),  # 8.6 only
    "SCALE": ("IScaleLayer", {"SHIFT": "shift", "SCALE": "scale"}),
    "CONSTANT": ("IConstantLayer", {"CONSTANT": "weights"}),
}
_DRAWS: Final = 100  # of a small weight, until no other has these values
_FOLDED: Final = (
    "folded weights cannot be refitted"  # "... into Myelin graph ... because the network contains QDQ nodes"
)
_NAMED: Final = 20  # in facts, of what may be hundreds
_SMALL: Final = 64  # bytes: above, two draws are never equal


@dataclass(frozen=True)
class Source:
    """What a layer's weights are: a weight of the graph (with its two axes swapped, where `transposed`), or a constant."""

    weight: str | None
    transposed: bool = False
    constant: Array | None = None


@dataclass(frozen=True)
class Refittable:
    """What a refit needs to know of a plan.

    `slots` are all weights that the plan takes, None where the version finds them by itself from an ONNX file; `fixed`
    has the SHA-256 of the values of every weight of the graph that the plan does not take (all) back; `compiled` are facts
    of the compilation that are true of what is refitted too.
    """

    slots: Mapping[Slot, Source] | None
    fixed: Mapping[str, str]
    compiled: Mapping[str, Any] = field(default_factory=dict)

    def facts(self) -> dict[str, Any]:
        """Return how many weights and constants are put back (None: the version finds them), and names of fixed weights."""
        slots = None if self.slots is None else list(self.slots.values())
        return {
            "weights": None if slots is None else sum(source.weight is not None for source in slots),
            "constants": None if slots is None else sum(source.constant is not None for source in slots),
            "fixed": sorted(self.fixed)[:_NAMED],
        }

    def write(self, folder: Path) -> None:
        """Write it as `refit.safetensors`: constants as tensors, the rest as JSON in the metadata."""
        from safetensors.numpy import save_file

        constants: dict[str, Array] = {}
        slots = None
        if self.slots is not None:
            slots = []
            for (layer, role), source in self.slots.items():
                name = None
                if source.constant is not None:
                    name = f"constant {len(constants)}"
                    constants[name] = source.constant
                slots.append([layer, role, source.weight, source.transposed, name])
        document = json.dumps(
            {"slots": slots, "fixed": dict(self.fixed), "compiled": dict(self.compiled)}, sort_keys=True
        )
        save_file(constants, folder / REFIT, metadata={"refit": document})

    @classmethod
    def read(cls, path: Path) -> Refittable:
        """Read back what `write` wrote."""
        from safetensors import safe_open

        with safe_open(path, framework="numpy") as stream:
            document = json.loads(stream.metadata()["refit"])
            if document["slots"] is None:
                return cls(None, document["fixed"], document["compiled"])
            slots = {
                (layer, role): Source(weight, transposed, stream.get_tensor(name) if name is not None else None)
                for layer, role, weight, transposed, name in document["slots"]
            }
        return cls(slots, document["fixed"], document["compiled"])


class NotRefittableError(Exception):
    """New weights cannot be put into the plan with certainty; the message says why."""


def finds_by_name(trt: Any) -> bool:
    """Tell whether a TensorRT module refits from ONNX files by itself (10.0 and later)."""
    return hasattr(trt, "OnnxParserRefitter")


def network_sources(
    trt: Any, logger: Any, log: Log, builder: Any, network: Any, graph: Path
) -> dict[Slot, Source | None]:
    """Return what the weights of every layer of `network`, which was parsed from the file `graph`, are; None: not known."""
    from tasks.structure import weights_of

    real = network_weights(trt, network)
    model = load_graph(graph)
    weights = weights_of(model)
    before = {name: _spellings(tensor) for name, tensor in weights.items()}
    _draw(weights.values())
    after = {
        spelling: (name, kind) for name, tensor in weights.items() for kind, spelling in _spellings(tensor).items()
    }
    with tempfile.TemporaryDirectory() as folder:
        save_graph(model, Path(folder))
        other, parser = parse(trt, logger, log, builder, Path(folder, GRAPH))
        drawn = {slot: digest_of(values) for slot, values in network_weights(trt, other).items()}
        del other, parser
    sources: dict[Slot, Source | None] = {}
    for slot, values in real.items():
        digest = digest_of(values)
        name, kind = after.get(drawn.get(slot, ""), ("", ""))
        if drawn.get(slot) == digest:
            sources[slot] = Source(None, constant=values.copy())  # its own memory goes with the parser
        elif name and before[name][kind] == digest:
            sources[slot] = Source(name, transposed=kind == "transposed")
        else:
            sources[slot] = None
    return sources


def network_weights(trt: Any, network: Any) -> dict[Slot, Array]:
    """Return the weights of every layer, flat, as they lie in the parser's memory; layers of one name have none."""
    found: dict[Slot, Array] = {}
    seen: set[str] = set()
    for layer in map(network.get_layer, range(network.num_layers)):
        interface, roles = _LAYERS.get(layer.type.name, ("", {}))
        twice = layer.name in seen
        seen.add(layer.name)
        if not roles:
            continue
        layer.__class__ = getattr(trt, interface)  # what get_layer returns has only what all layers have
        for role, attribute in roles.items():
            values = getattr(layer, attribute)
            if twice:
                found.pop((layer.name, role), None)
            elif values is not None and values.size:  # a convolution may have no bias
                # Which of the two it is depends on the version.
                found[layer.name, role] = values.numpy() if isinstance(values, trt.Weights) else values
    return found


def refittable(
    trt: Any, engine: Any, logger: Any, sources: Mapping[Slot, Source | None] | None, graph: Path
) -> Refittable:
    """Say how a plan compiled from the file `graph` is refitted; `sources` are its network's, where they are needed.

    Raises NotRefittableError where the plan takes what is not known, or nothing.
    """
    from tasks.structure import raw_values, weights_of

    refitter = trt.Refitter(engine, logger)
    model = load_graph(graph)
    weights = weights_of(model)
    slots: dict[Slot, Source] | None = None
    if sources is None:
        # What a BatchNormalization reads, the parser computes with.
        computed = {name for node in model.graph.node if node.op_type == "BatchNormalization" for name in node.input}
        taken = set(refitter.get_all_weights()) - computed
    else:
        layers, roles = refitter.get_all()
        slots = {}
        for slot in zip(layers, (role.name for role in roles), strict=True):
            source = sources.get(slot)
            if source is None:
                raise NotRefittableError(f"{slot[0]} ({slot[1]}) takes what is no weight of the graph as it is stored")
            slots[slot] = source
        taken = _taken(slots, sources)
    fixed = {name: digest_of(raw_values(tensor)) for name, tensor in weights.items() if name not in taken}
    if len(fixed) == len(weights):
        raise NotRefittableError("the plan takes none of the graph's weights back")
    return Refittable(slots, fixed)


def require_unfolded(warnings: Iterable[str]) -> None:
    """Raise NotRefittableError where 8.6 warned that it folded weights, as its graph compiler does beside Q/DQ pairs.

    It does not tell which: a refit would leave old weights among new ones.
    """
    if any(_FOLDED in words for words in warnings):
        raise NotRefittableError("TensorRT folded weights beside Q/DQ pairs, and takes no new ones for those")


def require_one_profile(profiles: Sequence[Mapping[str, Any]]) -> None:
    """Raise NotRefittableError for a plan of 8.6 with several profiles, whose kernels do not all take new weights.

    Measured with 8.6.0 on an H100 (bench/results/gpu_tests_h100.txt): a small convolutional network with two profiles, refitted,
    was right in the first and wrong in the second (fp16), or ended the refit with a CUDA error (fp32).
    """
    if len(profiles) > 1:
        names = ", ".join(str(profile["name"]) for profile in profiles)
        raise NotRefittableError(f"TensorRT 8.6 does not put new weights into every profile of several ({names})")


def _taken(slots: Collection[Slot], sources: Mapping[Slot, Source | None]) -> set[str]:
    """Return the weights that every layer which reads them takes back."""
    readers: dict[str, list[Slot]] = {}
    for slot, source in sources.items():
        if source is not None and source.weight is not None:
            readers.setdefault(source.weight, []).append(slot)
    return {name for name, where in readers.items() if all(slot in slots for slot in where)}


def transposed(values: bytes, shape: Sequence[int]) -> bytes:
    """Return the values of a matrix with its two axes swapped; `shape` is the one that it has before."""
    rows, columns = shape
    size = len(values) // max(rows * columns, 1)
    return bytes(np.frombuffer(values, np.dtype((np.void, size))).reshape(rows, columns).T.tobytes())


def _spellings(tensor: Any) -> dict[str, str]:
    """Return the digests of a weight as it is stored, and of it with its axes swapped where it is a matrix."""
    from tasks.structure import raw_values

    values = raw_values(tensor)
    found = {"transposed": digest_of(transposed(values, tensor.dims))} if len(tensor.dims) == 2 and values else {}
    return found | {"": digest_of(values)}


def _draw(weights: Collection[Any]) -> None:
    """Give every weight other values, ordinary numbers that no other weight has; deterministic."""
    from tasks.structure import raw_values

    generator = np.random.default_rng(0)
    taken = {raw_values(tensor) for tensor in weights if len(raw_values(tensor)) <= _SMALL}
    for tensor in weights:
        data = b""
        for _ in range(_DRAWS):
            data = _ordinary(generator.bytes(len(raw_values(tensor))), tensor.data_type)
            if data not in taken:
                break
        taken |= {data} if len(data) <= _SMALL else set()
        for storage in ("float_data", "int32_data", "double_data"):
            tensor.ClearField(storage)
        tensor.raw_data = data


def _ordinary(data: bytes, data_type: int) -> bytes:
    """Turn random bits into numbers from 0.5 to 8 of either sign: what is computed with such differs from each of them.

    Of bits as they come, most are so small that adding them to another weight changes nothing.
    """
    from onnx import TensorProto

    half = (2, 10, 15)
    width, mantissa, bias = {
        TensorProto.FLOAT: (4, 23, 127),
        TensorProto.DOUBLE: (8, 52, 1023),
        TensorProto.BFLOAT16: (2, 7, 127),
    }.get(data_type, half)
    bits = np.frombuffer(data, f"<u{width}")
    number = bits.dtype.type
    kept = bits & number((1 << mantissa) - 1 | 1 << (8 * width - 1))
    exponent = (bits >> number(mantissa) & number(3)) + number(bias - 1)
    return bytes((kept | exponent << number(mantissa)).tobytes())


def digest_of(values: bytes | Array) -> str:
    """Return the SHA-256 of values as they lie in memory."""
    return hashlib.sha256(values if isinstance(values, bytes) else np.ascontiguousarray(values).data).hexdigest()
