"""A model that no exporter reads: its engine fails, and the model itself is published, and served without its code."""

from __future__ import annotations

import json

import numpy as np
import pytest
import yaml

from artifacts.errors import IntegrityError
from artifacts.resolve import Request
from artifacts.store import open_store
from enginery import client
from enginery.catalog_tables import fallback_words
from enginery.tables import print_build
from tasks.report import report
from tests.integration.building import build, enginery

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.slow

RECIPE = {
    "enginery": 1,
    "name": "waves",
    "source": {"framework": "torch", "model": "waves_model.py:build"},
    "export": {"exporter": "torchscript"},
    "inputs": {"x": {"shape": ["batch", 4]}},
    "outputs": ["logits", "waves"],
    "profiles": {"online": {"batch": [1, 4, 8]}},
    "acceptance": {
        "metric": {"name": "top1", "data": {"data": "labelled.npz"}, "output": "logits", "floor": 0.9, "max_drop": 0.0}
    },
    "fallback": "source",
    "targets": [{"runtime": "tensorrt-rtx", "gpus": ["sm89"]}],
}
# Bessel functions have no ONNX operator.
MODEL = """
import torch
from waves_layers import Waves

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.waves = Waves()

    def forward(self, x):
        waves = self.waves(x)
        return {"logits": waves[:, :3] * 2, "waves": waves}

def build():
    return Net()
"""
LAYERS = """
import torch

class Waves(torch.nn.Module):
    def forward(self, x):
        return torch.special.bessel_j0(x)
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("waves")
    (folder / "waves_model.py").write_text(MODEL)
    (folder / "waves_layers.py").write_text(LAYERS)
    (folder / "waves.yaml").write_text(yaml.safe_dump(RECIPE))
    x = np.random.default_rng(0).uniform(0, 3, (16, 4)).astype(np.float32)
    np.savez(folder / "labelled.npz", x=x, label=x[:, :3].argmin(1))  # J0 falls from 0 on to 3.8
    made = build(folder / "waves.yaml", folder / "store", fails=("export",))
    for name in ("waves_model.py", "waves_layers.py"):
        (folder / name).unlink()
    return (*made, folder)


def test_the_engine_fails_and_the_table_says_that_the_source_model_stands_in(built, capsys):
    ran, planned, session, folder = built
    assert {"save", "verify:source", "publish:fallback:source"} <= ran
    assert [(engine.runtime, engine.gpu, engine.state) for engine in planned.engines] == [
        ("tensorrt-rtx", "sm89", "failed"),
        ("torch", "source", "cached"),
    ]
    assert planned.status == 1
    print_build(report(session, planned))
    said = capsys.readouterr().out
    spare = planned.engines[1].publish.facts["path"]
    assert f"in place of what failed, the fallback is served: {spare}" in said
    manifest = json.loads((folder / "store" / spare / "manifest.json").read_text())
    assert manifest["fallback"]["instead_of"] == ["tensorrt-rtx:sm89"]
    assert manifest["fallback"]["saved"][""] == {
        "form": "exported program",
        "inputs": ["x"],
        "outputs": ["logits", "waves"],
        "refused": [],
    }
    assert manifest["outputs"]["waves"] == {"dtype": "float32", "shape": ["batch", 4]}
    measured = manifest["verification"]["engine"]
    assert [case["name"] for case in measured["cases"]] == ["online/max", "online/min", "online/opt"]
    assert measured["metric"] == {"name": "top1", "value": 1.0, "source": 1.0, "samples": 16}
    assert manifest["verification"]["passed"] is True


def test_a_host_that_no_engine_fits_pulls_it_and_runs_it_without_the_models_code(built, tmp_path):
    _ran, _planned, _session, folder = built
    store = open_store(str(folder / "store"))
    asked = Request({"tensorrt-rtx": "1.0"}, ["sm89"], "windows", "x86_64", frameworks={"torch": torch.__version__})
    spare = client.resolve(store, "waves", asked).best
    assert spare is not None
    assert spare.fallback is not None
    pulled = client.pull(store, spare, tmp_path)
    np.savez(tmp_path / "x.npz", x=np.full((8, 4), 0.5, np.float32))
    ran = enginery("run", str(pulled.folder), "--input", "x.npz", "--output", "found.npz", cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert " on cpu, profile online" in ran.stdout
    with np.load(tmp_path / "found.npz") as found:
        np.testing.assert_allclose(found["waves"], 0.938470, atol=1e-5)  # J0(0.5)
        assert found["logits"].shape == (8, 3)
    (pulled.folder / "model.pt2").write_bytes(b"PK")
    with pytest.raises(IntegrityError, match=r"model\.pt2"):
        client.load(pulled)
    assert fallback_words(spare).startswith(
        f"no engine fits; {spare.identity} is the fallback: source (exported program) for torch {torch.__version__} or later of the"
    )
