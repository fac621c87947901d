"""Exports that lie: what an exporter took from its sample is found by exporting once more, and named."""

from __future__ import annotations

import dataclasses

import pytest

from tasks.errors import BackendError
from tasks.onnx_sessions import GraphRunner
from tasks.seeded import seeded_inputs
from tasks.sources import explaining, run_export
from tests.unit.tasks.bundles import code_tar, fresh, request
from tests.unit.tasks.test_sources import CASES, IMAGE, _restored_interpreter, module, torch_params

__all__ = ["_restored_interpreter"]

pytestmark = pytest.mark.long

CONV = "self.conv, self.first = nn.Conv2d(1, 4, 3, padding=1), None"
LIES = {
    # Tracing keeps the way that the sample's height led to.
    "decision": (
        "y = self.conv(image)\nif image.shape[2] > 9:\n    y = torch.relu(y)\nreturn y.mean((2, 3))",
        [("height", "ReduceMean", "from here on the graphs differ (ReduceMean, there Relu): a decision was frozen")],
    ),
    # A constant that was computed from the first values that the module saw, of which no tracer warns.
    "folded values": (
        "if self.first is None:\n    self.first = image.mean().detach()\nreturn self.conv(image).mean((2, 3)) - self.first",
        [(None, "Sub", None)],
    ),
    # A constant that follows from the sample's width.
    "folded size": (
        "return self.conv(image).mean((2, 3)) * torch.full((1, 4), float(int(image.shape[3])))",
        [("width", "Mul", None)],
    ),
}


def lied(tmp_path, source, **changes):
    """Export what lies, see that it does at another size or other values, and return what was found."""
    tar = code_tar(fresh(tmp_path, "in"), {"model.py": source})
    asked = request("export", torch_params(**changes), {"code.tar": tar}, tmp_path)
    run_export(asked)
    params = {**asked.params, "cases": CASES}
    inputs = {"code.tar": tar, "graph/model.onnx": asked.output_dir / "model.onnx"}
    again = dataclasses.replace(request("explain", params, {}, fresh(tmp_path, "again")), inputs=inputs)
    return explaining.run(again).facts, asked.output_dir / "model.onnx"


@pytest.mark.parametrize(
    ("what", "exporter"),
    [*((what, "torchscript") for what in LIES), ("decision", "dynamo"), ("folded values", "dynamo")],
)
def test_what_was_taken_from_the_sample_is_named_with_node_and_axis(tmp_path, what, exporter):
    source, expected = LIES[what]
    facts, _graph = lied(tmp_path, module(source, CONV), exporter=exporter)
    found = facts["found"]
    for axis, operator, words in expected:
        match = [one for one in found if one["axis"] == axis and one["operator"] == operator]
        assert match, found
        assert words is None or match[0]["words"] == words
        assert words is not None or match[0]["words"].startswith("the constant at input")
        assert match[0]["node"]
    assert {one["axis"] for one in found} == {axis for axis, _operator, _words in expected}


def test_a_size_that_the_newer_exporter_fixes_ends_the_export_with_its_axis(tmp_path):
    with pytest.raises(
        BackendError, match=r"froze a dynamic axis: 'width' \(input 'image' axis 3\) became 8"
    ) as caught:
        lied(tmp_path, module(LIES["folded size"][0], CONV), exporter="dynamo")
    assert "does not depend on the size" in caught.value.advice


def test_an_export_that_took_nothing_is_told_as_the_exporters_own_fault(tmp_path):
    facts, graph = lied(tmp_path, module("return self.conv(image).mean((2, 3))", CONV))
    assert facts == {"found": [], "exports": 4}
    runner = GraphRunner(graph)
    assert runner.run(seeded_inputs(IMAGE, {"image": [3, 1, 9, 11]}, 0, 0), "here")["logits"].shape == (3, 4)


PADDLE = """
import paddle
from paddle import nn

class Net(nn.Layer):
    def __init__(self):
        super().__init__()
        self.conv, self.first = nn.Conv2D(1, 4, 3, padding=1), None

    def forward(self, image):
        if self.first is None:
            self.first = float(image.mean())
        return self.conv(image).mean([2, 3]) - self.first

def build():
    net = Net()
    net.eval()
    return net
"""


@pytest.mark.filterwarnings("ignore")  # Paddle's own
def test_a_constant_that_paddle_folded_from_the_sample_is_named(tmp_path):
    pytest.importorskip("paddle2onnx", reason="paddle2onnx is not installed")
    facts, _graph = lied(tmp_path, PADDLE, framework="paddle", opset=17)
    (constant,) = facts["found"]
    assert (constant["axis"], constant["at"]) == (None, "other values")
    assert constant["node"].startswith(constant["operator"])
    assert constant["words"].startswith("the constant at input 1 is [")
