"""Counting what really is int8 in listings of the form that TensorRT's inspector writes, written for this test."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from artifacts.keys import Action
from artifacts.records import ActionRecord
from recipes.steps import Step
from tasks.engines.trt_layers import quantized_layers
from tasks.report import warnings_of

LISTING = json.loads((Path(__file__).parent / "layers_int8.json").read_text("utf-8"))


def test_products_are_told_from_the_rest_and_int8_by_the_weights():
    assert quantized_layers(LISTING) == {"products": 6, "int8": 4, "fp8": 0, "unknown": 0}


def test_asked_int8_and_got_fp32_is_seen():
    text = json.dumps(LISTING).replace('"Type": "Int8"', '"Type": "Float"').replace("i8i8_i8i32", "f32f32_f32f32")
    assert quantized_layers(json.loads(text))["int8"] == 0


@pytest.mark.parametrize(
    ("layer", "kind"),
    [
        # dynamic shapes of 8.6: no formats; the tactic tells, or nothing does
        ({"LayerType": "gemm", "TacticName": "sm80_xmma_gemm_i8i8_i8i32_f32_tn", "Inputs": [{"Format/Datatype": "N/A due to dynamic shapes"}]}, "int8"),
        ({"LayerType": "gemm", "TacticName": "", "Inputs": [{"Format/Datatype": "N/A due to dynamic shapes"}]}, "unknown"),
        ({"LayerType": "gemm", "TacticName": "sm89_xmma_gemm_e4m3e4m3_f32", "Inputs": []}, "fp8"),
        # 11: format and type are apart
        ({"LayerType": "gemm", "Inputs": [{"Datatype": "Int8", "Format": "Row major"}]}, "int8"),
        ({"LayerType": "gemm", "Inputs": [{"Datatype": "Half", "Format": "Row major"}]}, None),
        # int8 comes in, and fp32 is what is computed in
        ({"LayerType": "CaskConvolution", "Weights": {"Type": "Float", "Count": 9}, "Inputs": [{"Format/Datatype": "Row major Int8 format"}]}, None),
    ],
)  # fmt: skip
def test_what_tells_the_type_of_a_layer(layer, kind):
    found = quantized_layers({"Layers": ["Reformat", layer]})
    assert found == {"products": 1, **{name: int(name == kind) for name in ("int8", "fp8", "unknown")}}


@pytest.mark.parametrize(
    ("counted", "warned"),
    [
        ({"products": 18, "int8": 0, "fp8": 0, "unknown": 0}, True),
        ({"products": 18, "int8": 3, "fp8": 0, "unknown": 0}, False),
        ({"products": 18, "int8": 0, "fp8": 0, "unknown": 2}, False),
        (None, False),
    ],
)
def test_a_build_warns_where_an_engine_has_nothing_of_what_was_asked(counted, warned):
    action = Action("compile", 1, {"precision": "int8"}, {}, {})
    facts = {"layers": {"count": 20, **({"quantized": counted} if counted else {})}}
    record = ActionRecord(action.preimage(), {}, facts, seconds=1.0)
    words = warnings_of(Step("compile:tensorrt:sm90:int8", "compile", "cached", action=action, record=record))
    assert bool(words) is warned
    assert not warned or words[0].startswith("int8 was asked for, and none of the engine's 18 layers that multiply")
