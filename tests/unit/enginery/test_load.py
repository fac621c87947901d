"""`enginery.load`: what is checked before a byte reaches a runtime."""

import os
import subprocess
import sys

import numpy as np
import pytest

import enginery
from artifacts.catalog import EngineCatalog
from artifacts.errors import IntegrityError, NotFoundError, RefusedError
from artifacts.folder import FolderStore
from enginery import client
from tests.engines import make_engine, make_onnx_engine
from tests.unit.tasks.small_graphs import cnn, evaluate, images

GRAPH = cnn().SerializeToString()


@pytest.fixture
def pulled(tmp_path):
    def pulled(changes=None):
        store = FolderStore(tmp_path / "store")
        manifest = make_onnx_engine(store, tmp_path, GRAPH, changes)
        EngineCatalog(store).publish(manifest)
        return client.pull(store, manifest, tmp_path / "pulled")

    return pulled


def replace(path, data):
    path.unlink()  # it may be a link to the store's own
    path.write_bytes(data)


def test_a_pulled_engine_runs_by_its_folder_its_plan_or_what_pull_returned(pulled):
    x, engine = images(2), pulled()
    expected = evaluate(cnn(), {"x": x})["y"]
    for named in (engine, engine.folder, engine.plan, str(engine.folder)):
        with enginery.load(named) as loaded:
            np.testing.assert_allclose(loaded(x=x)["y"], expected, rtol=1e-4, atol=1e-5)
            assert loaded.manifest == engine.manifest


@pytest.mark.parametrize("harm", ["changed", "cut", "gone", "a folder"])
def test_a_damaged_file_is_named_and_never_loaded(pulled, harm):
    engine = pulled()
    data = engine.plan.read_bytes()
    engine.plan.unlink()
    if harm == "a folder":
        engine.plan.mkdir()
    elif harm != "gone":
        engine.plan.write_bytes(data[:-1] if harm == "cut" else data[:-1] + b"!")
    with pytest.raises(IntegrityError, match=r"model\.onnx"):
        enginery.load(engine.folder)


def test_a_damaged_manifest_is_named(pulled):
    engine = pulled()
    replace(engine.folder / "manifest.json", b"{")
    with pytest.raises(IntegrityError, match=r"manifest\.json: manifest is not JSON"):
        enginery.load(engine.folder)


def test_a_folder_without_a_manifest_is_no_engine(tmp_path):
    with pytest.raises(NotFoundError, match=r"nothing at manifest\.json"):
        enginery.load(tmp_path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"compatibility.runtime_version": "1.0"}, r"needs onnxruntime 1\.0; there is"),
        ({"compatibility.gpus": ["sm21"]}, "is for sm21; there is"),
        ({"compatibility.os": "plan9"}, "is for plan9"),
        ({"verification.passed": False}, "its gates did not pass"),
    ],
)
def test_what_this_host_may_not_load_is_refused_with_every_reason(pulled, changes, words):
    engine = pulled(changes)
    with pytest.raises(RefusedError, match=words) as caught:
        enginery.load(engine)
    assert str(engine.manifest.identity) in str(caught.value)
    assert len(caught.value.reasons) == 1


def test_trust_is_asked_with_the_manifest_and_its_signature_before_anything_is_loaded(pulled):
    engine, asked = pulled(), []
    enginery.load(engine, trust=lambda *given: asked.append(given)).close()
    (engine.folder / "manifest.json.sig").write_bytes(b"signature")
    enginery.load(engine, trust=lambda *given: asked.append(given)).close()
    manifest = (engine.folder / "manifest.json").read_bytes()
    assert asked == [(manifest, None), (manifest, b"signature")]

    def refuse(_manifest, _signature):
        raise PermissionError("unknown key")

    replace(engine.plan, b"never read")
    with pytest.raises(PermissionError, match="unknown key"):
        enginery.load(engine, trust=refuse)


def test_a_graph_with_external_data_is_loaded_from_its_folder(tmp_path):
    import onnx

    from artifacts.cache import blob_path
    from artifacts.refs import ONNX_DATA, ArtifactRef, digest_file

    onnx.save(cnn(), tmp_path / "model.onnx", save_as_external_data=True, location="model.onnx.data", size_threshold=0)
    store = FolderStore(tmp_path / "store")
    data = tmp_path / "model.onnx.data"
    ref = ArtifactRef(digest_file(data), data.stat().st_size, ONNX_DATA)
    store.put_file(blob_path(ref.digest), data, ref)
    manifest = make_onnx_engine(store, tmp_path, (tmp_path / "model.onnx").read_bytes())
    both = {name: entry.model_dump() for name, entry in manifest.files.items()} | {"model.onnx.data": ref.to_json()}
    manifest = make_onnx_engine(store, tmp_path, (tmp_path / "model.onnx").read_bytes(), {"files": both})
    EngineCatalog(store).publish(manifest)
    engine = client.pull(store, manifest, tmp_path / "pulled")
    with enginery.load(engine) as loaded:
        assert loaded(x=images(2))["y"].shape == (2, 10)
    replace(engine.folder / "model.onnx.data", data.read_bytes()[:-1] + b"!")
    with pytest.raises(IntegrityError, match=r"model\.onnx\.data"):
        enginery.load(engine)


def test_an_engine_for_a_gpu_is_refused_here(tmp_path):
    store = FolderStore(tmp_path / "store")
    manifest = make_engine(store, tmp_path)
    EngineCatalog(store).publish(manifest)
    with pytest.raises(RefusedError, match="is for sm89"):
        enginery.load(client.pull(store, manifest, tmp_path / "pulled"))


def test_importing_enginery_imports_nothing_else():
    code = "import sys; before = set(sys.modules); import enginery; print(*sorted(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, env={**os.environ})
    assert {name.partition(".")[0] for name in done.stdout.split()} - sys.stdlib_module_names == {"enginery"}
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        _ = enginery.lode
