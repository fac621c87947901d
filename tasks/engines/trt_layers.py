"""Which layers of an engine compute in int8 or fp8, as the inspector's listing (layers.json) tells.

TensorRT may leave everything in fp32 though int8 was asked for: 8.6's calibrator at optimisation level 1 did, without a word.
The listing says of what computes with weights their type; what has none there is told by its tactic's name, then by its inputs.
With dynamic shapes 8.6 prints "N/A due to dynamic shapes" in place of the formats of inputs and outputs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

_PRODUCT: Final = re.compile(r"conv|gemm|matmul|matrix_?multiply|fully_?connected", re.IGNORECASE)
_NO_PRODUCT: Final = ("constant", "scale", "reformat", "shuffle", "noop")
# sm80_xmma_..._i8i8_i8i32, turing_..._i8816cudnn_int8, volta_int8x4, imma; and e4m3 of fp8.
_TACTICS: Final = (
    ("fp8", re.compile(r"e4m3|fp8", re.IGNORECASE)),
    ("int8", re.compile(r"i8i8|i8816|int8|imma", re.IGNORECASE)),
    ("other", re.compile(r"f32f32|f16f16", re.IGNORECASE)),  # also of tf32 and bf16
)


def quantized_layers(listing: Mapping[str, Any]) -> dict[str, int]:
    """Count the layers that multiply (convolutions, matrix products): {"products", "int8", "fp8", "unknown"}.

    `unknown` are those of which neither weights, tactic nor inputs tell a type; layers that are listed as text alone are
    no products.
    """
    kinds = [_kind(layer) for layer in listing.get("Layers", ()) if isinstance(layer, Mapping) and _multiplies(layer)]
    return {"products": len(kinds), **{kind: kinds.count(kind) for kind in ("int8", "fp8", "unknown")}}


def _multiplies(layer: Mapping[str, Any]) -> bool:
    kind = str(layer.get("LayerType", ""))
    if kind.lower() in _NO_PRODUCT:
        return False
    words = (kind, str(layer.get("ParameterType", "")), str(layer.get("TacticName", "")))
    return isinstance(layer.get("Weights"), Mapping) or any(_PRODUCT.search(word) for word in words)


def _kind(layer: Mapping[str, Any]) -> str:
    weights = layer.get("Weights")
    told = str(weights.get("Type", "")) if isinstance(weights, Mapping) else ""
    if told:
        return _of_type(told)
    tactic = str(layer.get("TacticName", ""))
    for kind, words in _TACTICS:
        if words.search(tactic):
            return kind
    inputs = [
        f"{tensor.get('Datatype', '')} {tensor.get('Format/Datatype', '')}"
        for tensor in layer.get("Inputs", ())
        if isinstance(tensor, Mapping)
    ]
    found = {_of_type(words) for words in inputs if words.strip() and "N/A" not in words}
    return found.pop() if len(found) == 1 else "other" if found else "unknown"


def _of_type(words: str) -> str:
    return (
        "fp8" if re.search(r"fp8|e4m3|float8", words, re.IGNORECASE) else "int8" if "int8" in words.lower() else "other"
    )
