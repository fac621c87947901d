"""A model with an operator that one target refuses: that target fails, before it compiles, with the node's place; others go on."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import yaml

from enginery.tables import print_build
from tasks.report import report
from tests.integration.building import build
from tests.unit.tasks.small_graphs import graph, node

pytestmark = pytest.mark.slow

RECIPE = {
    "enginery": 1,
    "name": "finder",
    "source": {"framework": "onnx", "model": {"file": "finder.onnx"}},
    "inputs": {"x": {"shape": ["batch", 4]}},
    "profiles": {"online": {"batch": [1, 4, 8]}},
    "targets": [{"runtime": "tensorrt-rtx", "gpus": ["sm89", "sm120"]}, {"runtime": "onnxruntime"}],
}


def project(folder: Path, **changes: object) -> Path:
    """A node whose output's size depends on values: TensorRT-RTX's parser refuses it, ONNX Runtime runs it."""
    model = graph(
        [node("Relu", ["x"], ["y"], "body/relu"), node("NonZero", ["y"], ["found"], "head/nonzero")],
        {},
        inputs={"x": (onnx.TensorProto.FLOAT, ["batch", 4])},
        outputs={"y": (onnx.TensorProto.FLOAT, ["batch", 4]), "found": (onnx.TensorProto.INT64, [2, None])},
    )
    folder.mkdir(exist_ok=True)
    onnx.save(model, folder / "finder.onnx")
    (folder / "finder.yaml").write_text(yaml.safe_dump({**RECIPE, **changes}))
    return folder / "finder.yaml"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("unsupported")
    return (*build(project(folder), folder / "store"), folder)


def test_the_target_alone_fails_with_the_node_its_place_and_what_to_do(built, capsys):
    ran, planned, session, folder = built
    assert not [step for step in ran if step.startswith("compile:tensorrt-rtx")]
    states = [(engine.runtime, engine.gpu, engine.state) for engine in planned.engines]
    assert states == [
        ("tensorrt-rtx", "sm89", "failed"),
        ("tensorrt-rtx", "sm120", "failed"),
        ("onnxruntime", "cpu", "cached"),
    ]
    assert planned.status == 1
    assert (folder / "store" / planned.engines[2].publish.facts["path"] / "manifest.json").is_file()
    print_build(report(session, planned))
    said = capsys.readouterr().out
    assert said.count("  NonZero 'head/nonzero' (node 1 of 2, makes found): ") == 1
    assert "    next: the size of its output depends on values: use a mask" in said


def test_the_answer_is_kept(built):
    _ran, _planned, _session, folder = built
    assert build(folder / "finder.yaml", folder / "store")[0] == set()
