"""What differs between major versions of TensorRT, behind one Protocol; which one applies is probed by member.

Everything else that a version may lack is looked up by name where it is used (`named`): the numbers behind TensorRT's
enumerations move from version to version, and a setter that refuses says so only in the log.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Protocol

from tasks.errors import BackendError

# Which versions have what another lacks, for messages (facts/tensorrt.md section 1, read from the bindings).
_HAVE: Final = {
    "BuilderFlag.VERSION_COMPATIBLE": "TensorRT 8.6 and later",
    "BuilderFlag.STRIP_PLAN": "TensorRT 10.0 and later",
    "BuilderFlag.REFIT_IDENTICAL": "TensorRT 10.0 and later",
    "BuilderFlag.WEIGHT_STREAMING": "TensorRT 10.0 and later",
    "BuilderFlag.BF16": "TensorRT 10",
    "TacticSource.CUBLAS": "TensorRT 8.6 or 10",
    "TacticSource.CUBLAS_LT": "TensorRT 8.6 or 10",
    "TacticSource.CUDNN": "TensorRT 8.6 or 10",
    "DeviceType.DLA": "TensorRT 8.6 to 10.7, or 11.4.1 and later",
    "HardwareCompatibilityLevel.AMPERE_PLUS": "TensorRT 8.6 and later",
    "HardwareCompatibilityLevel.SAME_COMPUTE_CAPABILITY": "TensorRT 10.9 and later",
}


class Adapter(Protocol):
    """One major version: how a typed graph becomes a network and a configuration there.

    `opset` is the newest ONNX operator set that the version's documentation lists, None where it is not known;
    `precisions` are those that the version can express.
    """

    opset: int | None
    precisions: tuple[str, ...]

    def network_flags(self, trt: Any) -> int:
        """Return the bits that `Builder.create_network` takes."""

    def prepare_parser(self, trt: Any, parser: Any) -> None:
        """Set what the parser needs before it reads the graph."""

    def type_flags(self, trt: Any, network: Any, graph: Path, params: Mapping[str, Any]) -> tuple[str, ...]:
        """Return the names of the BuilderFlags without which the types of the ONNX file `graph` would not be used.

        May constrain layers of the network, which was parsed from it, so that flags do not lower what it keeps in fp32.
        `params` are those of the compilation.
        """


def adapter(trt: Any, typing: str = "strong") -> Adapter:
    """Return the adapter for a TensorRT module, chosen by what the module has.

    `typing` weak is that of an untyped graph, which the builder lowers itself. Raises BackendError("version mismatch")
    where a version knows typed networks only.
    """
    from tasks.engines import trt_v8, trt_v10, trt_v11, trt_weak

    has_flags = hasattr(trt.BuilderFlag, "FP16")
    if typing == "weak":
        if not has_flags:
            raise BackendError(
                "version mismatch",
                f"TensorRT {trt.__version__} has no BuilderFlag.FP16: it knows strongly typed networks only",
                "set build.typing to strong and precision.int8 to qdq, or build with TensorRT 8.6 or 10",
            )
        return trt_weak.Untyped(trt)
    if not hasattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED"):
        return trt_v8.Weak()
    return trt_v10.StronglyTyped() if has_flags else trt_v11.Typed()


def named(trt: Any, enumeration: str, name: str) -> Any:
    """Return a member of one of TensorRT's enumerations. Raises BackendError naming the versions that have it."""
    member = getattr(getattr(trt, enumeration, None), name, None)
    if member is None:
        path = f"{enumeration}.{name}"
        raise BackendError(
            "version mismatch",
            f"TensorRT {trt.__version__} has no {path}",
            f"build with {_HAVE.get(path, 'another version of TensorRT')}, or leave this option out",
        )
    return member


def require(trt: Any, precision: str, opset: int, typing: str = "strong") -> None:
    """Refuse a precision or operator set that this version cannot express, naming the versions that can."""
    chosen = adapter(trt, typing)
    if precision not in chosen.precisions:
        raise BackendError(
            "version mismatch",
            f"TensorRT {trt.__version__} has no {precision} (it has: {', '.join(chosen.precisions)})",
            f"build {precision} with TensorRT 10.0 or later, or TensorRT-RTX; or ask for fp16",
        )
    if chosen.opset is not None and opset > chosen.opset:
        raise BackendError(
            "version mismatch",
            f"TensorRT {trt.__version__} reads ONNX up to opset {chosen.opset}, the graph has {opset}",
            f"set export.opset to {chosen.opset} (exporter: torchscript), or build with TensorRT 10.0 or later",
        )


def device_memory(engine: Any) -> int:
    """Return how many bytes of device memory one execution context of an engine needs, besides the weights."""
    newer = getattr(engine, "device_memory_size_v2", None)  # 10.1 and later; 11 has no other
    return int(engine.device_memory_size if newer is None else newer)
