"""Engines published from simulated builds: plans and keys are real, graphs and plans are a few bytes."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import signal
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from artifacts.cache import ActionCache, blob_path
from artifacts.catalog import EngineCatalog, EngineId
from artifacts.errors import IntegrityError, NotFoundError, SigningError, StoreError
from artifacts.folder import FolderStore
from artifacts.host import Gpu
from artifacts.observed import ObservedStore
from artifacts.publications import mark_path, publication_path
from artifacts.records import ActionRecord
from artifacts.refs import BYTES, ENGINE_PLAN, ArtifactRef, digest_bytes
from recipes.files import LocalFile
from recipes.loader import load
from tasks.publish import is_published, publish_engines
from tasks.session import BuildSession
from tests.keys import make_key, trust
from tests.unit.recipes.simulated import FILES, GOOD, HOST, RECIPE, World

FACTS = {
    "export": {"outputs": {"logits": {"dtype": "float32", "shape": ["batch", 10]}}},
    "type": {"inputs": {"image": "float32"}, "outputs": {"logits": "float32"}, "kept": ["/head/Gemm"], "casts": 2},
    "calibrate": {
        "tensors": 9,
        "samples": 256,
        "method": "entropy",
        "constant": [],
        "worst": {"tensor": "p", "clipped": 0.01, "snr_db": 21.5},
    },
}
BAD = {**GOOD, "metric": {"name": "top1", "value": 0.5, "source": 0.99}}


@dataclass
class Builder(World):
    """A simulated build whose compiled engines are real blobs, and whose publish step is the real one."""

    folder: Path = Path()
    text: str = RECIPE
    built: list[str] = field(default_factory=list)

    def __post_init__(self):
        self.facts = FACTS | self.facts
        self.store = FolderStore(self.folder / "store")
        (self.folder / "recipe").mkdir(exist_ok=True)
        self.path = self.folder / "recipe" / "digits.yaml"
        self.path.write_text(self.text)
        self.loaded = load(self.path)

    def run(self, step):
        self.built.append(step.id)
        if step.stage == "publish":
            return self.publish(step)
        record = super().run(step)
        for name in record.outputs:
            if step.stage == "compile" or name == "calibration.json":
                data = f"{name} of {step.action.key}".encode()
                ref = ArtifactRef(digest_bytes(data), len(data), ENGINE_PLAN)
                source = self.folder / "blob"
                source.write_bytes(data)
                self.store.put_file(blob_path(ref.digest), source, ref)
                record.outputs[name] = ref
        return record

    def publish(self, step):
        planned = self.plan(self.loaded.recipe)
        engine = next(e for e in planned.engines if e.publish is not None and e.publish.id == step.id)
        engines = {step.action.key: (step, engine)}
        (record,) = publish_engines(
            engines, planned.steps, self.loaded, self.host, self.store, built=set(self.built)
        ).values()
        return ActionCache(self.store).put_record(record)

    def build_all(self):
        return self.build(self.loaded.recipe)[1]

    def manifests(self):
        return {(m.compatibility.gpus[0], m.precision.asked): m for m in EngineCatalog(self.store).manifests()}

    def record(self, subject):
        return next(r for (stage, _), r in self.records.items() if stage == "publish" and subject in r.facts["path"])


@pytest.fixture
def builder(tmp_path):
    return Builder(folder=tmp_path)


class Gpu90(Builder):
    """The simulated build on a host with a GPU, whose classic engines need a plugin library."""

    plugin = "plugin-aaaaaaaaaaaaaaaa.so"

    def plan(self, made, files=FILES, targets=()):
        library = LocalFile(self.plugin, "a" * 64, 6, "plugins/a.so")
        return super().plan(made, replace(files, plugins={library.digest: library}), targets)

    def run(self, step):
        if step.id != f"fetch:{self.plugin}":
            return super().run(step)
        self.built.append(step.id)
        ref = ArtifactRef(digest_bytes(b"plugin"), 6, BYTES)
        (self.folder / "blob").write_bytes(b"plugin")
        self.store.put_file(blob_path(ref.digest), self.folder / "blob", ref)
        return ActionRecord(step.action.preimage(), {self.plugin: ref}, {}, seconds=1.0)


def test_plugin_libraries_are_published_beside_the_plan_and_named(tmp_path):
    gpu = Gpu("NVIDIA H200", "GPU-1", "sm90", 150 << 30)
    options = {"plugins": [{"file": "plugins/a.so", "sha256": "a" * 64}]}
    targets = json.dumps([{"runtime": "tensorrt", "gpus": ["sm90"], "build": options}])
    text = RECIPE[: RECIPE.index("targets:")] + f"targets: {targets}\n"
    host = replace(HOST, runtimes={"tensorrt": "8.6.0"}, gpus=(gpu,), driver="570.86.15")
    builder = Gpu90(folder=tmp_path, text=text, host=host)
    builder.build_all()
    manifest = builder.manifests()["sm90", "fp16"]
    assert manifest.plan == "model.plan"
    assert manifest.compatibility.plugins == (Gpu90.plugin,)
    assert manifest.files[Gpu90.plugin].digest == digest_bytes(b"plugin")
    assert (tmp_path / "store" / "engines" / str(manifest.identity) / Gpu90.plugin).read_bytes() == b"plugin"


def test_an_engine_that_was_calibrated_by_tensorrt_says_on_what(tmp_path):
    gpu = Gpu("NVIDIA H200", "GPU-1", "sm90", 150 << 30)
    text = RECIPE[: RECIPE.index("targets:")].replace("build: [int8, fp16]", "build: [int8, fp16]\n  int8: calibrator")
    host = replace(HOST, runtimes={"tensorrt": "8.6.0"}, gpus=(gpu,), driver="570.86.15")
    facts = {
        "calibrate:tensorrt:sm90": {"samples": 256, "method": "entropy"},
        "compile:tensorrt:sm90:int8": {"kept": ["stem/conv"]},
    }
    builder = Builder(
        folder=tmp_path, text=f"{text}targets: [{{runtime: tensorrt, gpus: [sm90]}}]\n", host=host, facts=facts
    )
    builder.build_all()
    manifest = builder.manifests()["sm90", "int8"]
    assert (manifest.calibration.samples, manifest.calibration.method) == (256, "entropy")
    assert manifest.precision.kept == ("stem/conv",)
    assert manifest.precision.io == "float32"
    assert "calibrate:tensorrt:sm90" in {step.id for step in manifest.provenance.steps}


def test_every_engine_of_the_plan_is_published_and_says_what_it_is(builder):
    planned = builder.build_all()
    assert {engine.state for engine in planned.engines} == {"cached"}
    found = builder.manifests()
    assert set(found) == {
        ("sm89", "int8"), ("sm89", "fp16"), ("sm120", "int8"), ("sm120", "fp16"), ("cpu", "fp32"), ("cpu", "int8"),
    }  # fmt: skip
    manifest = found["sm89", "int8"]
    engine = next(e for e in planned.engines if (e.gpu, e.asked) == ("sm89", "int8"))
    assert manifest.identity.build == f"int8-{engine.publish.action.key[:16]}"
    assert engine.publish.facts["path"] == f"engines/{manifest.identity}"
    assert manifest.identity.target == "tensorrt-rtx-1.7.1.116-sm89"
    assert (manifest.compatibility.runtime_version, manifest.compatibility.os) == ("1.7.1.116", "linux")
    assert manifest.plan == "model.plan"
    files = {name: entry.ref for name, entry in manifest.files.items()}
    assert files.items() >= engine.compile.record.outputs.items()
    (provenance,) = files.keys() - engine.compile.record.outputs.keys() - {manifest.calibration.report}
    assert provenance == f"provenance-{files[provenance].digest[:12]}.intoto.json"
    assert (manifest.calibration.report, manifest.calibration.worst.tensor) == ("calibration.json", "p")
    assert manifest.inputs["image"].shape == ("batch", 1, "height", "width")
    assert manifest.outputs["logits"].shape == ("batch", 10)
    assert manifest.profiles[0].inputs["image"].opt == (64, 1, 8, 8)
    assert manifest.precision.wish == ("int8", "fp16")
    assert manifest.precision.kept == ("/head/Gemm",)
    assert manifest.calibration.samples == 256
    assert manifest.verification.passed
    assert manifest.verification.gates.metric.floor == 0.97
    assert manifest.verification.graph.metric.value == 0.99
    assert not manifest.verification.engine.executed
    assert "do not run on this host" in manifest.verification.engine.reason
    assert found["cpu", "fp32"].verification.engine.executed
    assert found["cpu", "fp32"].precision.wish == ("fp32", "int8")
    assert found["cpu", "fp32"].plan == "model.onnx"
    assert found["sm89", "fp16"].calibration is None
    assert manifest.provenance.recipe_digest == builder.loaded.digest
    assert "name: digits" in manifest.provenance.recipe_text
    assert set(manifest.provenance.source) == {"code.tar", "weights.safetensors"}


@pytest.mark.parametrize("portable", [False, True])
def test_the_manifest_of_a_classic_engine_names_the_device_it_was_built_on(tmp_path, portable):
    gpu = Gpu("NVIDIA H200", "GPU-1", "sm90", 150 << 30, sm_count=132, ecc=True)
    text = RECIPE.partition("targets:")[0] + "targets: [{runtime: tensorrt, gpus: [sm90]}]\n"
    builder = Builder(
        folder=tmp_path,
        text=f"{text}build: {{hardware_compatibility: ampere+}}\n" if portable else text,
        host=replace(HOST, gpus=(gpu,), runtimes={"tensorrt": "8.6.0"}),
    )
    builder.build_all()
    device = builder.manifests()["sm90", "fp16"].compatibility.device
    assert (device.model_dump() if device is not None else None) == (None if portable else gpu.device())


def test_the_manifest_lists_the_steps_that_the_engine_came_through_and_no_other(builder):
    builder.build_all()
    manifest = builder.manifests()["sm89", "fp16"]
    steps = {step.id: step for step in manifest.provenance.steps}
    assert set(steps) == {
        "fetch:code", "fetch:weights", "export", "reference:parity", "fetch:labelled", "reference:labelled",
        "verify:export", "simplify", "verify:simplify", "type:fp16", "verify:fp16", "compile:tensorrt-rtx:sm89:fp16",
        "fetch:calibration", "outliers",
    }  # fmt: skip
    assert steps["export"].toolchain["torch"] == "2.13.0"
    assert "calibrate" in {step.id for step in builder.manifests()["sm89", "int8"].provenance.steps}
    assert list(steps).index("export") < list(steps).index("simplify") < list(steps).index("type:fp16")


def test_steps_whose_bytes_are_equal_are_not_taken_for_one_another(tmp_path):
    builder = Builder(folder=tmp_path)
    # Typing fp32 changes nothing: the graph's bytes are those of simplify.
    plain = type(builder).run

    def run(self, step):
        record = plain(self, step)
        if step.id == "type:fp32":
            record.outputs["model.onnx"] = step.inputs["model.onnx"]
        return record

    builder.run = run.__get__(builder)
    builder.build_all()
    fp16 = {step.id for step in builder.manifests()["sm89", "fp16"].provenance.steps}
    fp32 = {step.id for step in builder.manifests()["cpu", "fp32"].provenance.steps}
    assert "type:fp32" not in fp16
    assert {"type:fp32", "simplify", "export"} <= fp32


def test_a_fallback_says_what_was_asked_tried_and_given(tmp_path):
    builder = Builder(folder=tmp_path, facts={"verify:int8": BAD})
    builder.build_all()
    precision = builder.manifests()["sm89", "int8"].precision
    assert (precision.asked, precision.given) == ("int8", "fp16")
    assert precision.tried[0].precision == "int8"
    assert any("floor" in reason for reason in precision.tried[0].reasons)


def test_reuse_is_stated(builder):
    builder.build_all()
    first = {step.id: step.reused for step in builder.manifests()["sm89", "fp16"].provenance.steps}
    assert not any(first.values())
    # Another build finds every stage cached, and only the manifest gone.
    builder.built.clear()
    for stage, key in [name for name in builder.records if name[0] == "publish"]:
        del builder.records[stage, key]
    for engine in EngineCatalog(builder.store).engines():
        builder.store.delete(f"{engine.path}/manifest.json")
    builder.build_all()
    assert all(step.reused for step in builder.manifests()["sm89", "fp16"].provenance.steps)


def test_publishing_again_finds_what_is_there(builder):
    planned = builder.build_all()
    before = {path: path.read_bytes() for path in (builder.store.root / "engines").rglob("*") if path.is_file()}
    for engine in planned.engines:
        builder.publish(engine.publish)
    after = {path: path.read_bytes() for path in (builder.store.root / "engines").rglob("*") if path.is_file()}
    assert before == after


@pytest.mark.parametrize("harm", ["manifest gone", "manifest damaged", "plan gone", "plan cut"])
def test_what_was_lost_or_damaged_is_noticed_and_publishing_again_mends_it(builder, harm):
    planned = builder.build_all()
    record = builder.record("sm89/fp16")
    assert is_published(record, builder.store)
    folder = record.facts["path"]
    name = "manifest.json" if harm.startswith("manifest") else "model.plan"
    if harm.endswith("gone"):
        builder.store.delete(f"{folder}/{name}")
    else:
        builder.store.write(f"{folder}/{name}", b"{}")
    assert not is_published(record, builder.store)
    step = next(e.publish for e in planned.engines if (e.gpu, e.asked) == ("sm89", "fp16"))
    mended = builder.publish(step)
    assert is_published(mended, builder.store)
    # And so it stays: the record that is found next time is the one that holds.
    assert is_published(ActionCache(builder.store).lookup("publish", step.action.key), builder.store)
    assert len(builder.manifests()) == 6


def test_an_engine_whose_publication_ended_early_is_not_published_whatever_its_marks_name_is(builder):
    builder.build_all()
    record = builder.record("sm89/fp16")
    (mark,) = builder.store.list(f"{record.facts['path']}/publications/")
    builder.store.delete(mark.path)
    assert is_published(record, builder.store)  # as an earlier release published it
    other = "0123456789abcdef"  # a mirror's name of a part of them
    builder.store.write(mark_path(record.facts["path"].removeprefix("engines/"), other), b"")
    assert not is_published(record, builder.store)
    assert not is_published(record, ObservedStore(builder.store))
    builder.store.write(publication_path(record.facts["path"].split("/")[1], other), b"")
    assert is_published(record, builder.store)


def test_engines_go_to_another_store_too_a_relative_one_beside_the_recipe(tmp_path):
    builder = Builder(folder=tmp_path, text=f"{RECIPE}\npublish: {{to: ../fleet}}\n")
    builder.build_all()
    fleet = EngineCatalog(FolderStore(tmp_path / "fleet"))
    assert fleet.manifests() == EngineCatalog(builder.store).manifests()
    manifest = builder.manifests()["sm89", "fp16"]
    sent = fleet.store.read(f"engines/{manifest.identity}/model.plan")
    assert digest_bytes(sent) == manifest.files["model.plan"].digest
    # As the recipe states it: a record is shared, and holds no path of the machine that made it.
    assert builder.record("sm89/fp16").facts["to"] == "../fleet"
    assert str(tmp_path).encode() not in builder.record("sm89/fp16").to_bytes()


def test_another_checkout_publishes_to_its_own_folder_too(tmp_path):
    """A relative `publish.to` is one text and two folders: what the first checkout sent is not in the second's."""
    builder = Builder(folder=tmp_path, text=f"{RECIPE}\npublish: {{to: ../fleet}}\n")
    builder.build_all()
    for record in builder.records.values():
        ActionCache(builder.store).put_record(record)

    def published(folder):
        path = folder / "digits.yaml"
        path.write_text(builder.text)
        session = BuildSession(load(path), FILES, builder.store, builder.host)
        stage, key = next(name for name in builder.records if name[0] == "publish")
        return session._lookup(stage, key) is not None

    assert published(builder.path.parent)
    (tmp_path / "elsewhere" / "recipe").mkdir(parents=True)
    assert not published(tmp_path / "elsewhere" / "recipe")


def test_another_store_that_cannot_be_written_is_the_stores_fault_and_leaves_no_record(tmp_path):
    (tmp_path / "fleet").write_text("not a folder")
    builder = Builder(folder=tmp_path, text=f"{RECIPE}\npublish: {{to: ../fleet}}\n")
    with pytest.raises(StoreError, match="fleet"):
        builder.build_all()
    assert not any(stage == "publish" for stage, _key in builder.records)


def test_a_compiled_engine_whose_blob_is_gone_is_not_published(builder):
    builder.build_all()
    manifest = builder.manifests()["sm89", "fp16"]
    planned = builder.plan(builder.loaded.recipe)
    step = next(e.publish for e in planned.engines if (e.gpu, e.asked) == ("sm89", "fp16"))
    builder.store.delete(f"engines/{manifest.identity}/manifest.json")
    builder.store.delete(blob_path(manifest.files["model.plan"].digest))
    with pytest.raises((NotFoundError, IntegrityError)):
        builder.publish(step)
    assert len(builder.manifests()) == 5


def git(folder, *arguments):
    environment = {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_SYSTEM": os.devnull, "PATH": os.environ["PATH"]}
    identity = ("-c", "user.name=a", "-c", "user.email=a@example.org")
    done = subprocess.run(
        ["git", "-C", str(folder), *identity, *arguments], check=True, capture_output=True, text=True, env=environment
    )
    return done.stdout.strip()


def publish_again(builder):
    for stage, key in [name for name in builder.records if name[0] == "publish"]:
        del builder.records[stage, key]
    for engine in EngineCatalog(builder.store).engines():
        builder.store.delete(f"{engine.path}/manifest.json")
    builder.build_all()
    return builder.manifests()["sm89", "fp16"].provenance.git


def test_the_commit_and_whether_anything_differs_from_it_are_stated(builder, monkeypatch):
    builder.build_all()
    assert builder.manifests()["sm89", "fp16"].provenance.git is None
    git(builder.folder, "init", "-q")
    # As a hook has it, for a repository that is not the recipe's.
    monkeypatch.setenv("GIT_DIR", "/nowhere")
    assert publish_again(builder) is None  # no commit yet
    git(builder.folder, "add", "recipe")
    git(builder.folder, "commit", "-qm", "one")
    facts = publish_again(builder)
    assert facts.commit == git(builder.folder, "rev-parse", "HEAD")
    assert not facts.dirty  # the store, untracked in the same folder, says nothing
    builder.path.write_text(builder.text + "# changed\n")
    assert publish_again(builder).dirty
    git(builder.folder, "rm", "-q", "--cached", "recipe/digits.yaml")
    git(builder.folder, "commit", "-qm", "the recipe is not tracked", "--allow-empty")
    assert publish_again(builder).dirty


def killed_builds(tmp_path, build, step):
    """Run `build(folder, limit)` in processes killed at later and later instants, until one completes; yield folders, and which did."""
    context = multiprocessing.get_context("fork")
    for limit in itertools.count(1, step):
        folder = tmp_path / str(limit)
        folder.mkdir()
        child = context.Process(target=build, args=(folder, limit))
        child.start()
        child.join()
        assert child.exitcode in (0, -signal.SIGKILL)
        yield folder, child.exitcode == 0
        if child.exitcode == 0:
            return


def build_and_die(folder, limit):
    """Build two engines, and die by SIGKILL when the name of a file changes for the `limit`-th time."""
    changes = itertools.count(1)

    def watch(event, arguments):
        changed = event in ("os.rename", "os.link", "os.mkdir", "os.remove") and str(folder) in str(arguments)
        if changed and next(changes) == limit:
            os.kill(os.getpid(), signal.SIGKILL)

    builder = Builder(folder=folder)
    sys.addaudithook(watch)
    builder.build(builder.loaded.recipe, targets=("tensorrt-rtx:sm89",))


@pytest.mark.parametrize("step", [3, pytest.param(1, marks=pytest.mark.long)])
def test_killed_at_any_instant_nothing_half_published_is_visible_and_the_next_build_completes(tmp_path, step):
    kills = 0
    for folder, completed in killed_builds(tmp_path, build_and_die, step):
        catalog = EngineCatalog(FolderStore(folder / "store"), pytest.fail)
        visible = catalog.manifests()
        for manifest in visible:
            for name, entry in manifest.files.items():
                assert digest_bytes(catalog.store.read(f"engines/{manifest.identity}/{name}")) == entry.digest
        if completed:
            assert len(visible) == 2
            continue
        kills += 1
        again = Builder(folder=folder)
        again.build(again.loaded.recipe, targets=("tensorrt-rtx:sm89",))
        assert len(catalog.manifests()) == 2
    # Two engines of one file and a manifest each, and records: there are many instants between those.
    assert kills > 30 // step


# ---- signatures and provenance


def test_a_build_signs_what_it_publishes_where_a_key_is_named(tmp_path, monkeypatch):
    key = make_key(tmp_path)
    monkeypatch.setenv("ENGINERY_SIGN_KEY", str(key.private))
    builder = Builder(folder=tmp_path)
    builder.build_all()
    catalog = EngineCatalog(builder.store)
    engines = catalog.engines()
    assert engines
    for manifest, data in catalog.stored_manifests():
        signatures = catalog.signatures(EngineId.of(manifest.identity), data)
        assert trust(key).check_engine(manifest, data, signatures) == key.fingerprint
    # The key, and where it is, is nowhere in the store.
    secret = b"".join(key.private.read_bytes().splitlines()[1:2])
    for info in builder.store.list(""):
        kept = builder.store.read(info.path)
        assert str(key.private).encode() not in kept
        assert secret not in kept
        assert b"PRIVATE KEY" not in kept


def test_a_key_that_cannot_be_used_publishes_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("ENGINERY_SIGN_KEY", str(tmp_path / "absent.pem"))
    builder = Builder(folder=tmp_path)
    with pytest.raises(SigningError, match=r"absent.pem"):
        builder.build_all()
    assert EngineCatalog(builder.store).engines() == []


def test_every_engine_has_its_provenance_among_its_files(builder, monkeypatch):
    monkeypatch.setenv("ENGINERY_BUILDER_ID", "https://ci.example/gpu-7")
    builder.build_all()
    for manifest in builder.manifests().values():
        (name,) = [name for name in manifest.files if name.endswith(".intoto.json")]
        data = builder.store.read(f"engines/{manifest.identity}/{name}")
        assert digest_bytes(data) == manifest.files[name].digest
        document = json.loads(data)
        assert [subject["name"] for subject in document["subject"]] == [one for one in manifest.files if one != name]
        details = document["predicate"]["runDetails"]
        assert details["builder"]["id"] == "https://ci.example/gpu-7"
        assert details["metadata"]["invocationId"] == manifest.provenance.key


def test_who_publishes_second_changes_nothing_of_the_first_and_leaves_nothing(builder):
    planned = builder.build_all()
    step = next(engine.publish for engine in planned.engines if engine.publish is not None)
    engine = next(engine for engine in planned.engines if engine.publish is step)
    before = {info.path: builder.store.read(info.path) for info in builder.store.list("engines/")}
    later = replace(HOST, name="another")
    publish_engines({step.action.key: (step, engine)}, planned.steps, builder.loaded, later, builder.store)
    assert {info.path: builder.store.read(info.path) for info in builder.store.list("engines/")} == before
