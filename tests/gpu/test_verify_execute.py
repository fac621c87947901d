"""An engine that was published without having been executed is executed on the GPU that is here, and attested."""

import hashlib
import json
import shutil

import pytest
import yaml

from artifacts.cache import ActionCache, blob_path
from artifacts.catalog import EngineCatalog, EngineId
from artifacts.folder import FolderStore
from artifacts.keys import Action
from artifacts.manifest import Manifest
from artifacts.records import ActionRecord
from artifacts.refs import ENGINE_PLAN, SAFETENSORS, ArtifactRef, digest_file
from recipes.steps import STAGE_VERSIONS
from tasks.executing import execute, why_not_here
from tasks.references import save_arrays
from tasks.toolchain import probe_host
from tests.engines import manifest_document
from tests.gpu.compiling import PROFILES, Compiler
from tests.unit.tasks.small_graphs import cnn, evaluate, images

pytestmark = pytest.mark.gpu

RECIPE = {"enginery": 1, "name": "digits", "build": {"timeout": "5m", "memory": "64GiB"}}


class Published:
    """A store with a plan that was compiled here, its reference and labelled data, and a manifest that says: not executed."""

    def __init__(self, folder, gpu):
        self.folder = folder
        self.catalog = EngineCatalog(FolderStore(folder / "store"))
        _result, output = Compiler(gpu, folder / "built")(cnn())
        self.gpu, self.host = gpu, probe_host()
        self.plan = self._put(output / "model.plan", ENGINE_PLAN)
        shapes = {"online/min": (1, 8, 8), "online/max": (4, 16, 16), "bulk/opt": (64, 8, 8), "bulk/max": (128, 8, 8)}
        reference = {}
        for case, shape in shapes.items():
            reference[f"{case}/in/x"] = images(*shape)
            reference[f"{case}/out/y"] = evaluate(cnn(), {"x": images(*shape)})["y"]
        x = images(70, seed=1)
        y = evaluate(cnn(), {"x": x})["y"]
        inputs = {"model.onnx": hashlib.sha256(b"the typed graph, which is not looked at").hexdigest()}
        for name, arrays in (
            ("reference.safetensors", reference),
            ("dataset.safetensors", {"x": x, "label": y.argmax(1)}),
            ("outputs.safetensors", {"y": y}),
        ):
            save_arrays(arrays, folder / name)
            inputs[name] = self._put(folder / name, SAFETENSORS).digest
        params = {
            "subject": "graph",
            "executor": "onnxruntime",
            "batch": 32,
            "tensors": {"x": {"dtype": "float32", "shape": ["batch", 1, "height", "width"]}},
            "metric": {"name": "top1", "entry": None, "label": "label", "output": None},
        }
        action = Action("verify", STAGE_VERSIONS["verify"], params, inputs, {"onnx": "1", "numpy": "1"})
        ActionCache(self.catalog.store).put_record(ActionRecord(action.preimage(), {}, {"executed": True}))
        self.graph_key = action.key

    def publish(self, build, floor):
        document = manifest_document(
            {
                "identity.target": f"tensorrt-{self.host.runtimes['tensorrt']}-{self.gpu}",
                "identity.build": build,
                "compatibility.runtime": "tensorrt",
                "compatibility.runtime_version": self.host.runtimes["tensorrt"],
                "compatibility.gpus": [self.gpu],
                "compatibility.os": self.host.os,
                "compatibility.arch": self.host.arch,
                "files": {"model.plan": self.plan.to_json()},
                "inputs": {"x": {"dtype": "float32", "shape": ["batch", 1, "height", "width"]}},
                "outputs": {"y": {"dtype": "float32", "shape": ["batch", 10]}},
                "profiles": PROFILES,
                "precision.given": "fp32",
                "verification.gates.metric.floor": floor,
                "provenance.recipe_text": yaml.safe_dump(RECIPE),
                "provenance.key": hashlib.sha256(build.encode()).hexdigest(),
            }
        )
        like = document["provenance"]["steps"][-1]
        document["provenance"]["steps"].append(like | {"id": "verify:fp32", "stage": "verify", "key": self.graph_key})
        manifest = Manifest.from_bytes(json.dumps(document).encode())
        self.catalog.publish(manifest)
        return EngineId.of(manifest.identity)

    def _put(self, path, media_type):
        ref = ArtifactRef(digest_file(path), path.stat().st_size, media_type)
        self.catalog.store.put_file(blob_path(ref.digest), path, ref)
        return ref


@pytest.fixture(scope="module")
def published(device, tmp_path_factory):
    made = Published(tmp_path_factory.mktemp("executed"), device["compute_capability"])
    yield made
    shutil.rmtree(made.folder)


def test_it_is_executed_on_the_device_and_passes(published, device):
    engine = published.publish("fp32-passes", 0.9)
    manifest = published.catalog.manifest(engine)
    assert not manifest.verification.engine.executed
    assert why_not_here(manifest, published.host) == ()
    found = execute(published.catalog, engine, published.host)
    assert found.passed, found.reasons
    assert found.gpu == device["compute_capability"]
    assert found.device.name
    assert found.measured.parity.relative_l2 < 1e-4
    assert found.measured.parity.non_finite == 0
    assert found.measured.metric.value == 1.0
    assert {case.name for case in found.measured.cases} == {"online/min", "online/max", "bulk/opt", "bulk/max"}
    read = published.catalog.effective(engine)
    assert read.verification.engine.executed
    assert read.verification.passed
    assert published.catalog.manifest(engine) == manifest


def test_a_gate_that_fails_on_the_device_fails_the_engine(published):
    engine = published.publish("fp32-fails", 1.5)
    found = execute(published.catalog, engine, published.host)
    assert found.reasons == ("top1 1 < floor 1.5",)
    assert not published.catalog.effective(engine).verification.passed


def test_an_engine_for_another_gpu_waits(published):
    engine = published.publish("fp32-elsewhere", 0.9)
    manifest = published.catalog.manifest(engine)
    elsewhere = manifest.compatibility.model_copy(update={"gpus": ("sm21",)})
    (reason,) = why_not_here(manifest.model_copy(update={"compatibility": elsewhere}), published.host)
    assert "is for sm21" in reason
