"""TensorRT 8.6: weakly typed. Flags allow what the typed graph uses, and constraints keep its fp32 parts as they are.

There is no bf16 and no int64; Q/DQ pairs make int8 explicit, so no calibrator is asked.
"""

from __future__ import annotations

from typing import Any, Final

# Layers that move or describe data: they have no arithmetic to constrain, and constraints on them warn or fail.
_NO_ARITHMETIC: Final = (
    "CONSTANT", "SHAPE", "SHUFFLE", "CONCATENATION", "SLICE", "GATHER", "IDENTITY", "CAST", "QUANTIZE", "DEQUANTIZE",
    "CONDITION", "CONDITIONAL_INPUT", "CONDITIONAL_OUTPUT", "TRIP_LIMIT", "RECURRENCE", "ITERATOR", "LOOP_OUTPUT",
    "PLUGIN_V2", "ASSERTION",
)  # fmt: skip


class Weak:
    """8.6: EXPLICIT_BATCH networks, FP16 and INT8 flags."""

    opset: int | None = 17
    precisions: tuple[str, ...] = ("fp32", "tf32", "fp16", "int8")

    def network_flags(self, trt: Any) -> int:
        """Return EXPLICIT_BATCH, which parsed ONNX needs."""
        return 1 << int(trt.NetworkDefinitionCreationFlag.EXPLICIT_BATCH)

    def prepare_parser(self, trt: Any, parser: Any) -> None:
        """Ask for native InstanceNorm where the parser can be asked (8.6.1): version-compatible plans need it."""
        if hasattr(parser, "set_flag"):
            parser.set_flag(trt.OnnxParserFlag.NATIVE_INSTANCENORM)

    def type_flags(self, trt: Any, network: Any) -> tuple[str, ...]:
        """Return FP16 where the network has half tensors, INT8 where it has Q/DQ pairs; constrain fp32 beside half.

        With the FP16 flag alone, the builder would also run in half what the graph keeps in fp32.
        """
        layers = [network.get_layer(index) for index in range(network.num_layers)]
        types = {_output_type(layer, index) for layer in layers for index in range(layer.num_outputs)}
        kinds = {layer.type for layer in layers}
        flags = ["FP16"] if trt.DataType.HALF in types else []
        if trt.LayerType.QUANTIZE in kinds or trt.LayerType.DEQUANTIZE in kinds or trt.DataType.INT8 in types:
            flags.append("INT8")
        if "FP16" not in flags:
            return tuple(flags)
        passive = {getattr(trt.LayerType, name) for name in _NO_ARITHMETIC if hasattr(trt.LayerType, name)}
        full = trt.DataType.FLOAT
        constrained = False
        for layer in layers:
            if layer.type not in passive and any(_output_type(layer, i) == full for i in range(layer.num_outputs)):
                layer.precision = full
                constrained = True
        return (*flags, "OBEY_PRECISION_CONSTRAINTS") if constrained else tuple(flags)


def _output_type(layer: Any, index: int) -> Any:
    tensor = layer.get_output(index)
    return tensor.dtype if tensor is not None else None
