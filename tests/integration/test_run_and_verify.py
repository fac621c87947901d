"""`enginery run` and `enginery verify` on engines that a real build published: digits from ONNX, for ONNX Runtime."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import yaml
from typer.testing import CliRunner

from artifacts.cache import blob_path, record_path
from artifacts.catalog import EngineCatalog, EngineId
from artifacts.folder import FolderStore
from artifacts.manifest import Manifest
from artifacts.resolve import Request, resolve
from enginery.__main__ import command_line
from enginery.client import pull
from tasks.toolchain import probe_host
from tests.integration.building import RECIPES, build, link_store
from tests.triton import triton_config
from tests.unit.test_product import fenced

HELD_OUT = RECIPES / "digits" / "heldout.npz"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with the one engine of digits-onnx for ONNX Runtime."""
    folder = tmp_path_factory.mktemp("built")
    shutil.copytree(RECIPES / "digits", folder / "digits", ignore=shutil.ignore_patterns("__pycache__"))
    document = yaml.safe_load((RECIPES / "digits-onnx.yaml").read_text())
    document["targets"] = [{"runtime": "onnxruntime", "gpus": ["cpu"], "precision": ["fp32"]}]
    document["precision"] = {"build": ["fp32"]}
    recipe = folder / "digits-onnx.yaml"
    recipe.write_text(yaml.safe_dump(document, sort_keys=False))
    build(recipe, folder / "store")
    return folder / "store"


@pytest.fixture
def catalog(built: Path, tmp_path: Path) -> EngineCatalog:
    shutil.copytree(built, tmp_path / "store", copy_function=link_store)
    return EngineCatalog(FolderStore(tmp_path / "store"))


@pytest.fixture
def engine(catalog: EngineCatalog) -> EngineId:
    return catalog.engines()[0]


@pytest.fixture
def run(catalog: EngineCatalog):
    def run(*arguments: str, status: int = 0):
        store = str(catalog.store.root)
        done = CliRunner().invoke(command_line(), [*arguments], env={"ENGINERY_STORE": store, "COLUMNS": "250"})
        assert done.exit_code == status, (done.stdout, done.stderr, done.exception)
        return done

    return run


def unexecuted(catalog: EngineCatalog, engine: EngineId, **changes: Any) -> EngineId:
    """Publish the engine once more, as a host would that could not execute it; `changes` by dotted path."""
    document = json.loads(catalog.manifest_bytes(engine))
    document["identity"]["build"] = "fp32-elsewhere"
    document["verification"]["engine"] = {"executed": False, "reason": "built where it could not be executed"}
    document["provenance"]["key"] = "e" * 64
    for path, value in changes.items():
        part = document
        *parents, last = path.split("__")
        for name in parents:
            part = part[name]
        part[last] = value
    made = Manifest.from_bytes(json.dumps(document).encode())
    catalog.publish(made)
    return EngineId.of(made.identity)


# ---- run


def test_an_engine_of_the_store_is_run_and_its_outputs_are_kept(run, catalog, engine, tmp_path):
    output = tmp_path / "logits.npz"
    done = run("run", "onnxruntime", "--input", str(HELD_OUT), "--rows", "50", "--output", str(output), "--repeat", "3")
    assert "logits" in done.stdout
    assert "50x10" in done.stdout
    assert "median" in done.stdout
    assert "label is no input of the engine" in done.stderr
    with np.load(HELD_OUT) as data, np.load(output) as found:
        assert (found["logits"].argmax(1) == data["label"][:50]).mean() > 0.9


def test_a_pulled_engine_is_run_by_its_folder_or_its_plan(run, catalog, engine, tmp_path):
    pulled = pull(catalog.store, engine, tmp_path / "pulled")
    for named in (pulled.folder, pulled.plan):
        document = json.loads(run("run", str(named), "--input", str(HELD_OUT), "--rows", "4", "--json").stdout)
        assert document["engine"] == str(engine)
        assert document["outputs"]["logits"]["shape"] == [4, 10]
        assert document["outputs"]["logits"]["non_finite"] == 0
        assert document["milliseconds"]["calls"] == 1
        assert document["profile"] == "default"


def test_what_cannot_be_run_is_said_with_status_2(run, tmp_path):
    for array, words in (
        ({"image": np.zeros((65, 1, 8, 8), np.float32)}, "no profile of the plan admits image [65, 1, 8, 8]"),
        ({"image": np.zeros((2, 1, 8, 8))}, "input image is float64, the engine takes float32"),
        ({"picture": np.zeros((2, 1, 8, 8), np.float32)}, "no array image (it has: picture; the engine takes: image"),
        ({"image": np.array([None])}, "pickles are never loaded"),
    ):
        np.savez(tmp_path / "x.npz", **array)
        done = run("run", "onnxruntime", "--input", str(tmp_path / "x.npz"), status=2)
        assert words in done.stderr
        assert done.stdout == ""
    (tmp_path / "x.npz").write_bytes(b"no zip")
    assert "x.npz" in run("run", "onnxruntime", "--input", str(tmp_path / "x.npz"), status=2).stderr
    assert "there is no such file" in run("run", "onnxruntime", "--input", str(tmp_path / "y.npz"), status=2).stderr
    profile = ("run", "onnxruntime", "--input", str(HELD_OUT), "--rows", "1", "--profile", "fast")
    assert "no profile 'fast' (the engine has: default)" in run(*profile, status=2).stderr
    unwritable = ("run", "onnxruntime", "--input", str(HELD_OUT), "--rows", "1", "--output", "/proc/x.npz")
    assert "give another file for --output" in run(*unwritable, status=2).stderr


def test_damage_is_found_before_anything_is_run(run, catalog, engine):
    catalog.store.write(f"{engine.path}/model.onnx", b"changed")
    assert "model.onnx" in run("run", "onnxruntime", "--input", str(HELD_OUT), status=1).stderr


# ---- verify


def test_what_is_whole_is_whole(run, catalog, engine, tmp_path):
    assert "1 engine: 1 whole" in run("verify").stdout
    assert [row["state"] for row in json.loads(run("verify", "onnxruntime", "--json").stdout)] == ["whole"]
    pulled = pull(catalog.store, engine, tmp_path / "pulled")
    assert json.loads(run("verify", str(pulled.folder), "--json").stdout)[0]["engine"] == str(engine)


@pytest.mark.parametrize("harm", ["changed", "cut", "gone", "manifest"])
def test_damage_is_named_and_ends_with_status_1(run, catalog, engine, harm):
    victim = "manifest.json" if harm == "manifest" else "model.onnx"
    data = catalog.store.read(f"{engine.path}/{victim}")
    catalog.store.delete(f"{engine.path}/{victim}")
    if harm != "gone":
        catalog.store.write(f"{engine.path}/{victim}", data[:-1] if harm == "cut" else b"!" + data[1:])
    (row,) = json.loads(run("verify", "--json", status=1).stdout)
    assert (row["engine"], row["state"]) == (str(engine), "damaged")
    assert victim in row["found"]
    assert "damaged" in run("verify", status=1).stdout


def test_a_damaged_folder_of_a_pulled_engine_is_named(run, catalog, engine, tmp_path):
    pulled = pull(catalog.store, engine, tmp_path / "pulled")
    pulled.plan.unlink()
    assert "model.onnx" in json.loads(run("verify", str(pulled.folder), "--json", status=1).stdout)[0]["found"]


def test_a_name_that_no_engine_has_gets_the_near_one(run):
    assert "did you mean digits-onnx" in run("verify", "digits-onxx", status=1).stderr


def test_an_engine_that_was_not_executed_is_executed_and_readers_see_it(run, catalog, engine):
    other = unexecuted(catalog, engine)
    published = catalog.manifest_bytes(other)
    listed = {row["engine"]: row["executed"] for row in json.loads(run("list", "--json").stdout)}
    assert listed == {str(engine): True, str(other): False}
    assert {row["state"] for row in json.loads(run("verify", "--json").stdout)} == {"whole"}

    (row,) = json.loads(run("verify", str(other), "--execute", "--json").stdout)
    assert (row["state"], row["executed"]) == ("passed", True)
    measured = row["attestation"]["measured"]
    expected = catalog.manifest(engine).verification.engine
    assert measured["metric"]["value"] == expected.metric.value > 0.97
    assert {case["name"] for case in measured["cases"]} == {"default/min", "default/opt", "default/max"}

    assert catalog.manifest_bytes(other) == published
    listed = {row["engine"]: row["executed"] for row in json.loads(run("list", "--json").stdout)}
    assert listed == {str(engine): True, str(other): True}
    assert "passed, on cpu" in run("show", str(other)).stdout
    assert json.loads(run("show", str(other), "--json").stdout)["executed_later"] == [row["attestation"]]
    # Nothing is left to do, unless it is asked for.
    assert {row["state"] for row in json.loads(run("verify", "--execute", "--json").stdout)} == {"whole"}
    assert json.loads(run("verify", str(other), "--execute", "--again", "--json").stdout)[0]["state"] == "passed"


def test_what_a_build_has_measured_is_not_measured_again(run, catalog, engine):
    """The action is the one of a build, so its record is found; without that record it is run."""
    before = sorted(info.path for info in catalog.store.list("cache/actions/verify/"))
    other = unexecuted(catalog, engine)
    (row,) = json.loads(run("verify", str(other), "--execute", "--json").stdout)
    assert sorted(info.path for info in catalog.store.list("cache/actions/verify/")) == before
    steps = {step.id: step.key for step in catalog.manifest(engine).provenance.steps}
    assert row["attestation"]["key"] == steps["verify:onnxruntime:cpu:fp32"]
    catalog.store.delete(record_path("verify", row["attestation"]["key"]))
    again = json.loads(run("verify", str(other), "--execute", "--again", "--json").stdout)[0]
    assert again["attestation"]["measured"]["parity"] == row["attestation"]["measured"]["parity"]
    assert sorted(info.path for info in catalog.store.list("cache/actions/verify/")) == before


def test_gates_are_those_of_the_manifest_and_one_that_fails_keeps_hosts_away(run, catalog, engine):
    gates = {"parity": {"relative_l2": 1e-4, "max_abs": None, "cosine": None}}
    gates["metric"] = {"name": "top1", "floor": 0.999, "max_drop": None}
    other = unexecuted(catalog, engine, verification__gates=gates)
    (row,) = json.loads(run("verify", str(other), "--execute", "--json", status=1).stdout)
    assert row["state"] == "failed"
    assert row["attestation"]["reasons"] == ["top1 0.9889 < floor 0.999"]
    found = resolve(catalog.manifests(), Request.of_host(probe_host()))
    assert [str(one.manifest.identity) for one in found.candidates if one.fits] == [str(engine)]
    assert "its gates did not pass" in run("resolve", "digits-onnx").stderr
    assert "not passed: top1 0.9889 < floor 0.999" in run("show", str(other)).stdout


def test_an_engine_for_another_host_waits_with_status_3(run, catalog, engine):
    unexecuted(catalog, engine, compatibility__gpus=["sm89"])
    rows = json.loads(run("verify", "--execute", "--json", status=3).stdout)
    assert {row["engine"].rpartition("/")[2]: row["state"] for row in rows}["fp32-elsewhere"] == "waiting"
    assert "is for sm89" in rows[0]["found"] + rows[1]["found"]


def test_what_the_comparison_lacks_is_named(run, catalog, engine):
    other = unexecuted(catalog, engine)
    verify_key = next(step.key for step in catalog.manifest(engine).provenance.steps if step.id == "verify:fp32")
    inputs = json.loads(catalog.store.read(record_path("verify", verify_key)))["preimage"]["inputs"]
    catalog.store.delete(blob_path(inputs["reference.safetensors"]))
    (row,) = json.loads(run("verify", str(other), "--execute", "--json", status=1).stdout)
    assert row["state"] == "failed"
    assert "reference.safetensors" in row["found"]
    assert "build its recipe there again" in row["found"]
    for step in catalog.manifest(engine).provenance.steps:
        if step.stage == "verify":
            catalog.store.delete(record_path("verify", step.key))
    (row,) = json.loads(run("verify", str(other), "--execute", "--json", status=1).stdout)
    assert "every record of its verification" in row["found"]


def test_blobs_of_the_engine_itself_need_not_be_in_the_cache(run, catalog, engine):
    other = unexecuted(catalog, engine)
    key = next(step.key for step in catalog.manifest(engine).provenance.steps if step.id.startswith("verify:onnx"))
    catalog.store.delete(record_path("verify", key))
    for entry in catalog.manifest(engine).files.values():
        catalog.store.delete(blob_path(entry.digest))
    assert json.loads(run("verify", str(other), "--execute", "--json").stdout)[0]["state"] == "passed"


def test_an_engine_that_gives_nan_does_not_pass(run, catalog, engine, tmp_path):
    """NaN watch: a graph whose weights hold a NaN is published as the engine, and executed."""
    import onnx
    from onnx import numpy_helper

    from artifacts.refs import ONNX, ArtifactRef, digest_file

    model = onnx.load_from_string(catalog.store.read(f"{engine.path}/model.onnx"))
    tensor = next(one for one in model.graph.initializer if one.data_type == 1 and len(one.dims) > 1)
    values = numpy_helper.to_array(tensor).copy()
    values.flat[0] = np.nan
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    onnx.save(model, tmp_path / "nan.onnx")
    ref = ArtifactRef(digest_file(tmp_path / "nan.onnx"), (tmp_path / "nan.onnx").stat().st_size, ONNX)
    catalog.store.put_file(blob_path(ref.digest), tmp_path / "nan.onnx", ref)
    other = unexecuted(catalog, engine, files={"model.onnx": ref.to_json()})
    (row,) = json.loads(run("verify", str(other), "--execute", "--json", status=1).stdout)
    assert any("NaN or Inf in the outputs" in reason for reason in row["attestation"]["reasons"])
    assert row["attestation"]["measured"]["parity"]["relative_l2"] is None


def test_the_code_in_the_document_on_serving_runs(catalog, tmp_path, capsys):
    (code,) = fenced("docs/serving.md", "python")
    for place, here in (("s3://models/engines", str(catalog.store.root)), ("/var/cache/engines", str(tmp_path / "to"))):
        assert place in code
        code = code.replace(place, here)
    found: dict[str, Any] = {}
    exec(compile(code, "serving.md", "exec"), found)
    assert found["logits"].shape == (16, 10)
    assert "digits-onnx/onnxruntime" in capsys.readouterr().out


def test_an_engine_that_was_built_is_exported_for_triton_and_gives_what_it_gave(run, catalog, engine, tmp_path):
    """Triton itself is not here: its configuration is read with its protobuf, its graph by the runtime of its backend."""
    models = tmp_path / "models"
    run("export", "triton", "digits-onnx", "--out", str(models))
    config = triton_config((models / "digits-onnx" / "config.pbtxt").read_text())
    manifest = catalog.manifest(engine)
    (given,) = config["input"]
    assert (config["name"], config["platform"]) == ("digits-onnx", "onnxruntime_onnx")
    assert config["max_batch_size"] == max(one.max[0] for part in manifest.profiles for one in part.inputs.values())
    assert config["instance_group"] == [{"kind": "KIND_CPU"}]
    papers = models / "digits-onnx" / "enginery" / engine.target
    assert {path.name for path in papers.iterdir()} == {"manifest.json", *manifest.files} - {manifest.plan}
    session = onnxruntime.InferenceSession(models / "digits-onnx" / "1" / "model.onnx")
    (declared,) = session.get_inputs()
    assert (declared.name, declared.type) == (given["name"], "tensor(float)")
    assert declared.shape[1:] == [int(size) for size in given["dims"]]
    image = np.load(HELD_OUT)[given["name"]][:16]
    run("run", str(engine), "--input", str(HELD_OUT), "--rows", "16", "--output", str(tmp_path / "out.npz"))
    outputs = dict(
        zip((one.name for one in session.get_outputs()), session.run(None, {given["name"]: image}), strict=True)
    )
    (output,) = config["output"]
    assert np.array_equal(outputs[output["name"]], np.load(tmp_path / "out.npz")[output["name"]])
