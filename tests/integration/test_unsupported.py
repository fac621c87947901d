"""A model with an operator that one target refuses: that target fails, before it compiles, with the node's place; others go on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import yaml

from artifacts.manifest import FALLBACK_SCHEMA
from artifacts.resolve import Request
from artifacts.store import open_store
from enginery import client
from enginery.tables import print_build
from tasks.report import report
from tests.integration.building import build, enginery
from tests.unit.tasks.small_graphs import graph, node

pytestmark = pytest.mark.slow

RECIPE = {
    "enginery": 1,
    "name": "finder",
    "source": {"framework": "onnx", "model": {"file": "finder.onnx"}},
    "inputs": {"x": {"shape": ["batch", 4]}},
    "profiles": {"online": {"batch": [1, 4, 8]}},
    "targets": [
        {"runtime": "tensorrt-rtx", "gpus": ["sm89", "sm120"], "fallback": "onnx"},
        {"runtime": "onnxruntime"},
        # Not installed anywhere that tests run, so that the opset it reads at most is all that is known of it.
        {"runtime": "tensorrt", "gpus": ["sm80"], "version": "8.6.1.6"},
    ],
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
        ("tensorrt", "sm80", "failed"),
        ("onnxruntime", "fallback", "cached"),
    ]
    assert planned.status == 1
    assert (folder / "store" / planned.engines[2].publish.facts["path"] / "manifest.json").is_file()
    print_build(report(session, planned))
    said = capsys.readouterr().out
    assert said.count("  NonZero 'head/nonzero' (node 1 of 2, makes found): ") == 1
    assert "    next: the size of its output depends on values: use a mask" in said
    assert f"in place of what failed, the fallback is served: {planned.engines[4].publish.facts['path']}" in said


def test_a_version_that_is_not_here_is_judged_by_the_opset_that_it_reads(built):
    ran, planned, _session, _folder = built
    assert "check:tensorrt:8.6.1.6" in ran
    why = planned.engines[3].why.splitlines()
    assert why[0] == "tensorrt 8.6.1.6 does not read the model: reads opset 17 at most, this is 18"
    (advice,) = why[1:]
    assert advice.startswith("    next: export with opset 17 or lower (export.opset; ")
    assert advice.endswith("no operator of the graph changed since")


def test_the_fallback_is_verified_published_and_served_only_where_no_engine_fits(built, tmp_path: Path):
    _ran, _planned, _session, folder = built
    store = open_store(str(folder / "store"))
    runtimes = {"onnxruntime": onnxruntime.__version__}
    whole = client.resolve(store, "finder", Request(runtimes, ["sm89", "cpu"], "linux", "x86_64"))
    assert whole.best is not None
    assert whole.best.fallback is None
    assert whole.candidates[-1].reasons == ("is a fallback, and an engine fits",)
    # A GPU alone, on another system and with a later ONNX Runtime: nothing was built for that.
    later = Request({"onnxruntime": "99.0.0"}, ["sm89"], "windows", "x86_64")
    spare = client.resolve(store, "finder", later).best
    assert spare is not None
    assert spare.schema_version == FALLBACK_SCHEMA
    assert spare.fallback is not None
    assert spare.fallback.instead_of == ("tensorrt-rtx:sm89", "tensorrt-rtx:sm120")
    assert [one.name for one in spare.fallback.providers[""]] == [
        "TensorrtExecutionProvider",
        "CUDAExecutionProvider",
        "CPUExecutionProvider",
    ]
    assert spare.fallback.providers[""][0].options["trt_profile_max_shapes"] == "x:8x4"
    assert spare.verification.passed
    assert spare.verification.engine.executed
    earlier = client.resolve(store, "finder", replace(later, runtimes={"onnxruntime": "1.0.0"}))
    assert earlier.best is None
    pulled = client.pull(store, spare, tmp_path)
    with client.load(pulled) as served:
        assert served.device == "cpu"
        found = served(x=np.array([[1, -1, 0, 2]], np.float32))
    assert found["found"].tolist() == [[0, 0], [0, 3]]
    assert pulled.folder.with_name(f"{pulled.folder.name}.cache").is_dir()
    said = enginery(
        "resolve",
        "finder",
        "--gpu",
        "sm89",
        "--runtime",
        "onnxruntime==99.0.0",
        "--store",
        str(folder / "store"),
        cwd=folder,
    )
    assert said.returncode == 0, said.stderr
    assert said.stdout.strip() == str(spare.identity)
    assert f"no engine fits; {spare.identity} is the fallback: onnx for onnxruntime" in said.stderr


def test_the_answer_is_kept(built):
    _ran, _planned, _session, folder = built
    assert build(folder / "finder.yaml", folder / "store")[0] == set()
