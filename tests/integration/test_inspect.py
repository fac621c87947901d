"""`enginery inspect` on real files, asking the parser and the runtime that are installed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from tests.integration.building import environment
from tests.unit.test_product import ROOT

DIGITS = ROOT / "recipes" / "digits" / "digits.onnx"


def inspect(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "enginery", "inspect", *arguments]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, check=False, timeout=120)


def support(document):
    return {entry["target"].split()[0] + " " + entry["by"]: entry for entry in document["support"]}


def test_a_shipped_model_is_read_by_all_that_are_installed():
    done = inspect(str(DIGITS), "--json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["dynamic_axes"] == {"n": ["image[0]", "logits[0]"]}
    assert document["size"]["graph_bytes"] == DIGITS.stat().st_size
    asked = support(document)
    assert asked["tensorrt-rtx its parser"]["state"] == asked["onnxruntime a session"]["state"] == "yes"


def test_a_node_that_the_parser_refuses_is_named_with_what_to_do(tmp_path: Path):
    model = onnx.load(DIGITS)
    model.graph.node.append(helper.make_node("NonZero", ["logits"], ["found"], name="head/nonzero"))
    model.graph.output.append(helper.make_tensor_value_info("found", TensorProto.INT64, None))
    onnx.save(model, tmp_path / "found.onnx")
    done = inspect(str(tmp_path / "found.onnx"))
    assert done.returncode == 0, done.stderr
    assert "NonZero 'head/nonzero' (node 8 of 9, makes found)" in done.stdout
    assert "next: the size of its output depends on values" in done.stdout
    refused = [line for line in done.stdout.splitlines() if line.startswith("refused by")]
    assert len(refused) == 1
    assert refused[0].startswith("refused by tensorrt-rtx 1.")


@pytest.mark.parametrize(
    ("content", "status", "said"),
    [
        (None, 2, "no such file"),
        (b"", 1, "not a whole ONNX file"),
        (b"no model at all", 1, "not a whole ONNX file"),
        (DIGITS.read_bytes()[:5000], 1, "not a whole ONNX file"),
    ],
    ids=["missing", "empty", "text", "cut"],
)
def test_what_is_no_model_is_a_clear_error(tmp_path: Path, content, status, said):
    path = tmp_path / "broken.onnx"
    if content is not None:
        path.write_bytes(content)
    done = inspect(str(path), "--json")
    assert done.returncode == status
    assert said in json.loads(done.stdout)["error"]
    assert "broken.onnx" in done.stderr
    assert "Traceback" not in done.stderr
