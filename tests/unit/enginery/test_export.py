"""`enginery export triton`, as a user meets it; what it writes is read with Triton's own protobuf."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import typer
from click.testing import Result
from typer.testing import CliRunner

from artifacts.catalog import EngineCatalog, EngineId
from artifacts.errors import ArtifactError, IntegrityError, RefusedError
from artifacts.folder import FolderStore
from artifacts.manifest import Manifest
from enginery import catalog_commands, export_commands, sign_commands
from enginery.exporting import export_triton
from enginery.triton import Served, Wishes, triton_models
from tests.engines import digest, make_engine, make_manifest, manifest_document, parts_document
from tests.keys import make_key, write_policy
from tests.triton import triton_config

VERSION = "10.13.3.9"
ASK = ("--gpu", "sm89", "--runtime", f"tensorrt=={VERSION}", "--os", "linux", "--arch", "x86_64")


def classic(gpu: str = "sm89", **changes: Any) -> dict[str, Any]:
    """Return what makes of the golden manifest one of classic TensorRT."""
    return {
        "identity.target": f"tensorrt-{VERSION}-{gpu}",
        "compatibility.runtime": "tensorrt",
        "compatibility.runtime_version": VERSION,
        "compatibility.gpus": [gpu],
    } | {name.replace("__", "."): value for name, value in changes.items()}


class Shell:
    """A user with a store, who publishes engines of classic TensorRT."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.out = folder, folder / "models"
        self.store = FolderStore(folder / "store")
        self.environment = {"ENGINERY_STORE": str(self.store.root), "ENGINERY_STATE": str(folder / "state")}
        self.environment["COLUMNS"] = "400"
        self.app = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False)
        for module in (catalog_commands, export_commands, sign_commands):
            module.register(self.app)

    def __call__(self, *arguments: str, status: int = 0) -> Result:
        unset = dict.fromkeys(("ENGINERY_TRUST", "ENGINERY_SIGN_KEY"))
        done = CliRunner().invoke(self.app, [*arguments], env=unset | self.environment)
        assert done.exit_code == status, (done.stdout, done.stderr, done.exception)
        return done

    def export(self, *arguments: str, status: int = 0) -> Result:
        ask = () if "--gpu" in arguments else ASK
        return self("export", "triton", "digits", *ask, "--out", str(self.out), *arguments, status=status)

    def publish(self, build: str, gpu: str = "sm89", recipe: str = "digits", **changes: Any) -> EngineId:
        manifest = make_engine(self.store, self.folder, build.encode(), recipe=recipe, target="t", build=build)
        own = {f"identity.{name}": value for name, value in {"recipe": recipe, "build": build}.items()}
        document = {**own, "files": json.loads(manifest.to_bytes())["files"], "provenance.key": digest(build + gpu)}
        manifest = make_manifest({**document, **classic(gpu, **changes)})
        EngineCatalog(self.store).publish(manifest)
        return EngineId.of(manifest.identity)

    def written(self) -> dict[str, bytes]:
        return {str(path.relative_to(self.out)): path.read_bytes() for path in self.out.rglob("*") if path.is_file()}


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    return Shell(tmp_path)


def test_a_repository_for_triton(shell: Shell) -> None:
    engine = shell.publish("fp16-a")
    done = shell.export("--cuda-graphs", "--dynamic-batching", "100")
    assert done.stdout == f"{shell.out / 'digits'}\n"
    assert done.stderr.count("warning: no trust policy") == 1
    written = shell.written()
    papers = f"digits/enginery/{engine.target}/manifest.json"
    assert sorted(written) == ["digits/1/model.plan", "digits/config.pbtxt", papers]
    assert written["digits/1/model.plan"] == b"fp16-a"
    assert Manifest.from_bytes(written[papers]).identity.build == "fp16-a"
    assert f"# {engine}\n" in written["digits/config.pbtxt"].decode()
    assert triton_config(written["digits/config.pbtxt"].decode()) == {
        "name": "digits",
        "platform": "tensorrt_plan",
        "max_batch_size": 256,
        "input": [{"name": "image", "data_type": "TYPE_FP32", "dims": ["1", "-1", "-1"]}],
        "output": [{"name": "logits", "data_type": "TYPE_FP32", "dims": ["10"]}],
        "instance_group": [{"kind": "KIND_GPU", "profile": ["0", "1"]}],
        "dynamic_batching": {"max_queue_delay_microseconds": "100"},
        "optimization": {
            "cuda": {
                "graphs": True,
                "graph_spec": [
                    {"batch_size": 1, "input": {"image": {"dim": ["1", "8", "8"]}}},
                    {"batch_size": 64, "input": {"image": {"dim": ["1", "8", "8"]}}},
                ],
            }
        },
    }
    # What was not asked for is not there; and what is there stays, in one piece, with the same arguments.
    assert "give one" in shell.export("--no-batch", "--dynamic-batching", "1", status=2).stderr
    shell.export("--no-batch")
    apart = triton_config((shell.out / "digits" / "config.pbtxt").read_text())
    assert "max_batch_size" not in apart
    assert apart["input"][0]["dims"] == ["-1", "1", "-1", "-1"]
    shell.export()
    plain = triton_config((shell.out / "digits" / "config.pbtxt").read_text())
    assert not {"dynamic_batching", "optimization"} & plain.keys()
    assert "(was there already)" in shell.export().stderr
    model = json.loads(shell.export("--json").stdout)["models"][0]
    assert model == {"name": "digits", "folder": str(shell.out / "digits"), "engines": [str(engine)], "kept": True}


def test_one_model_for_several_kinds_of_gpu(shell: Shell) -> None:
    shell.publish("fp16-a", "sm89")
    shell.publish("fp16-b", "sm120")
    gpus = ("--gpu", "sm89", "--gpu", "sm120", *ASK[2:])
    shell.export(*gpus)
    written = shell.written()
    assert written["digits/1/model.sm89.plan"] == b"fp16-a"
    assert written["digits/1/model.sm120.plan"] == b"fp16-b"
    config = triton_config(written["digits/config.pbtxt"].decode())
    assert config["cc_model_filenames"] == {"8.9": "model.sm89.plan", "12.0": "model.sm120.plan"}
    # Two that a Triton cannot serve as one model are refused, and what was there stays.
    shell.publish("fp16-c", "sm120", identity__created="2030-01-01T00:00:00Z", outputs={"probabilities": {"dtype": "float32", "shape": ["batch", 10]}})  # fmt: skip
    assert "fp16-a has other outputs" in shell.export(*gpus, status=1).stderr
    assert shell.written() == written
    # Of two engines that one GPU may load, each serves the GPUs that it was chosen for.
    shell.publish("fp16-d", "sm120", identity__created="2031-01-01T00:00:00Z", compatibility__gpus=["sm120", "sm89"])
    shell.publish("fp16-e", "sm89", identity__created="2032-01-01T00:00:00Z")
    shell.export(*gpus)
    assert shell.written()["digits/1/model.sm120.plan"] == b"fp16-d"
    assert shell.written()["digits/1/model.sm89.plan"] == b"fp16-e"
    manifests = [one for one in EngineCatalog(shell.store).manifests("digits") if "sm89" in one.compatibility.gpus]
    for gpu in ("../sm89", "cpu", "sm89\n"):
        with pytest.raises(RefusedError, match="no compute capability"):
            triton_models([Served(manifests[0], ("sm80",)), Served(manifests[1], (gpu,))], Wishes())
    fewer = make_manifest(classic("sm120", profiles=manifest_document()["profiles"][:1]))
    both = [Served(make_manifest(classic()), ("sm89",)), Served(fewer, ("sm120",))]
    with pytest.raises(RefusedError, match="has other profiles"):
        triton_models(both, Wishes())
    with pytest.raises(RefusedError, match="is for sm89 too"):
        triton_models([Served(one, ("sm89",)) for one in manifests[:2]], Wishes())


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"outputs": {"logits": {"dtype": "float32", "shape": None}}}, "the shape of logits is not known"),
        (
            {
                "inputs": {
                    "image": {"dtype": "float32", "shape": ["batch", 4]},
                    "scale": {"dtype": "float32", "shape": []},
                }
            },
            "scale is a scalar",
        ),
        ({"inputs": {"image": {"dtype": "float8_e4m3fn", "shape": ["batch", 1, 8, 8]}}}, "which Triton has not"),
    ],
)
def test_what_triton_cannot_serve_is_refused(shell: Shell, changes: dict[str, Any], told: str) -> None:
    shell.publish("fp16-a", **changes)
    assert told in shell.export(status=1).stderr
    assert not shell.out.exists()


def test_engines_of_tensorrt_rtx_are_told_apart(shell: Shell) -> None:
    manifest = make_engine(shell.store, shell.folder, build="fp16-a")
    EngineCatalog(shell.store).publish(manifest)
    rtx = ("--gpu", "sm89", "--runtime", "tensorrt-rtx==1.7.1.116")
    told = shell.export(*rtx, status=1).stderr
    assert "Triton serves engines of tensorrt and onnxruntime" in told
    assert not shell.out.exists()
    with pytest.raises(RefusedError, match="is not served by Triton: Triton has no backend for tensorrt-rtx"):
        triton_models([Served(manifest, ())], Wishes())
    assert "give it or --host, not both" in shell.export("--host", "auto", *ASK, status=2).stderr


def test_no_batch_without_one_free_axis_before_all_others() -> None:
    fixed = {"dtype": "int64", "shape": [1, 8]}
    manifest = make_manifest(classic(inputs={"ids": fixed, "scale": {"dtype": "float32", "shape": [1]}}, profiles=[]))
    (model,) = triton_models([Served(manifest, ())], Wishes())
    config = triton_config(model.config)
    assert "max_batch_size" not in config  # protobuf writes no zeros
    assert config["input"] == [
        {"name": "ids", "data_type": "TYPE_INT64", "dims": ["1", "8"]},
        {"name": "scale", "data_type": "TYPE_FP32", "dims": ["1"]},
    ]
    assert config["output"][0]["dims"] == ["-1", "10"]
    with pytest.raises(RefusedError, match="cannot be put together"):
        triton_models([Served(manifest, ())], Wishes(queue_delay_us=0))
    # TensorRT 8.6 has no int64: its engines take int32.
    old = make_manifest(classic(inputs={"ids": fixed}, profiles=[], compatibility__runtime_version="8.6.1.6"))
    assert triton_config(triton_models([Served(old, ())], Wishes())[0].config)["input"][0]["data_type"] == "TYPE_INT32"


def test_names_that_have_to_be_escaped() -> None:
    name = 'a"b\\c\n\u00e9\u6f22 # { }'
    manifest = make_manifest(classic(inputs={name: {"dtype": "float32", "shape": ["batch", 2]}}, profiles=[]))
    assert triton_config(triton_models([Served(manifest, ())], Wishes())[0].config)["input"][0]["name"] == name


def test_each_part_is_a_model(tmp_path: Path) -> None:
    store = FolderStore(tmp_path / "store")
    entry = json.loads(make_engine(store, tmp_path).to_bytes())["files"]["model.plan"]
    files = {"encoder/model.plan": entry, "decoder/model.plan": entry, "decoder/layers.json": entry}
    manifest = make_manifest({**parts_document("encoder", "decoder"), **classic(), "files": files})
    EngineCatalog(store).publish(manifest)
    done = export_triton(store, [[Served(manifest, ())]], tmp_path / "models")
    assert [one.folder.name for one in done] == ["digits-encoder", "digits-decoder"]
    target = manifest.identity.target
    assert sorted(str(path.relative_to(tmp_path / "models")) for path in (tmp_path / "models").rglob("*.*")) == [
        "digits-decoder/1/model.plan",
        "digits-decoder/config.pbtxt",
        f"digits-decoder/enginery/{target}",
        f"digits-decoder/enginery/{target}/layers.json",
        f"digits-decoder/enginery/{target}/manifest.json",
        "digits-encoder/1/model.plan",
        "digits-encoder/config.pbtxt",
        f"digits-encoder/enginery/{target}",
        f"digits-encoder/enginery/{target}/manifest.json",
    ]
    assert triton_config((tmp_path / "models/digits-decoder/config.pbtxt").read_text())["name"] == "digits-decoder"
    with pytest.raises(ArtifactError, match="two models would be named"):
        export_triton(store, [[Served(manifest, ())]] * 2, tmp_path / "models")


def test_nothing_is_exported_that_pull_refuses(shell: Shell, tmp_path: Path) -> None:
    """Unsigned, of an unknown key, expired, altered: each is refused, and leaves nothing; the flag says what it does."""
    key, stranger = make_key(tmp_path), make_key(tmp_path, "stranger")
    engine = shell.publish("fp16-a")
    policy = write_policy(tmp_path, key)
    shell.environment["ENGINERY_TRUST"] = str(policy)
    assert "is not signed" in shell.export(status=1).stderr
    shell("sign", "fp16-a", "--key", str(stranger.private))
    assert "is not known" in shell.export(status=1).stderr
    assert "nothing for this target" in shell.export("--channel", "production", status=1).stderr
    assert not shell.out.exists()
    told = shell.export("--insecure-no-trust").stderr
    assert "WARNING: no signature is checked (--insecure-no-trust)" in told
    shell.out.rename(tmp_path / "insecure")
    shell("sign", "fp16-a", "--key", str(key.private))
    shell.export()
    whole = shell.written()
    assert f"digits/enginery/{engine.target}/manifest.json.sig" in whole
    text = policy.read_text()
    policy.write_text(text.replace("}\nallow", ", not_after: 2026-01-01T00:00:00Z}\nallow"))
    assert "k0 expired on 2026-01-01" in shell.export(status=1).stderr
    policy.write_text(text)
    plan = shell.store.root / engine.path / "model.plan"
    plan.unlink()
    plan.write_bytes(b"fp16-!")
    assert "SHA-256" in shell.export(status=1).stderr
    assert shell.written() == whole
    # Left by neither: what is written to, beside the repository.
    assert [path.name for path in (tmp_path / ".models.exporting").iterdir()] == ["export"]


def test_models_of_others_stay_and_models_are_exchanged_whole(shell: Shell) -> None:
    shell.publish("fp16-a")
    other = shell.out / "theirs" / "1" / "model.onnx"
    other.parent.mkdir(parents=True)
    other.write_bytes(b"theirs")
    shell.export()
    before = (shell.out / "digits" / "1" / "model.plan").stat().st_ino
    shell.export()
    assert (shell.out / "digits" / "1" / "model.plan").stat().st_ino == before
    shell.publish("fp16-b", identity__created="2030-01-01T00:00:00Z")
    shell.export()
    assert shell.written()["digits/1/model.plan"] == b"fp16-b"
    assert other.read_bytes() == b"theirs"
    other.parent.parent.rename(shell.out / "swin")
    shell.publish("fp16-c", recipe="swin")
    done = shell("export", "triton", "swin", *ASK, "--out", str(shell.out), status=1)
    assert "was not written by enginery export" in done.stderr
    (shell.out / "digits").rename(shell.out / "dogs")
    shell.publish("fp16-d", recipe="dogs")
    done = shell("export", "triton", "dogs", *ASK, "--out", str(shell.out), status=1)
    assert "dogs is of digits, not of dogs; move it away" in done.stderr
    assert f"{shell.out / 'dogs'} is of the same recipe, and was not written now" in shell.export().stderr
    assert (shell.out / "swin" / "1" / "model.onnx").read_bytes() == b"theirs"


def test_what_fails_on_the_way_leaves_nothing(shell: Shell, tmp_path: Path) -> None:
    shell.publish("fp16-a")
    bad = shell.publish("fp16-z", recipe="swin")
    plan = shell.store.root / bad.path / "model.plan"
    plan.unlink()
    plan.write_bytes(b"cut")
    done = shell("export", "triton", "digits", "swin", *ASK, "--out", str(shell.out), status=1)
    assert "expected" in done.stderr
    assert not shell.out.exists()
    (tmp_path / "file").write_text("in the way")
    catalog = EngineCatalog(shell.store)
    served = [[Served(one, ()) for one in catalog.manifests(name)] for name in ("digits", "swin")]
    with pytest.raises(ArtifactError, match="give another folder"):
        export_triton(shell.store, served[:1], tmp_path / "file" / "models")
    with pytest.raises(IntegrityError):
        export_triton(shell.store, served[1:], shell.out)


def test_a_model_that_was_taken_out_is_put_back(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    shell.publish("fp16-a")
    shell.export()
    before, rename = shell.written(), Path.rename
    # Killed between its two renames: what it had taken out lies where the next export sweeps.
    dead = shell.folder / ".models.exporting" / "0123"
    dead.mkdir()
    dead.with_suffix(".lock").touch()
    (shell.out / "digits").rename(dead / "old-digits")
    assert "(was there already)" in shell.export().stderr
    shell.publish("fp16-b", identity__created="2030-01-01T00:00:00Z")

    def interrupted(path: Path, target: Path) -> Path:
        if path.parent.name == "repository":
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    served = [
        Served(one, ()) for one in EngineCatalog(shell.store).manifests("digits") if one.identity.build == "fp16-b"
    ]
    with pytest.raises(KeyboardInterrupt):
        export_triton(shell.store, [served], shell.out)
    assert shell.written() == before


def test_a_mount_point_is_told_before_anything_is_fetched(shell: Shell) -> None:
    shell.publish("fp16-a")
    served = [Served(one, ()) for one in EngineCatalog(shell.store).manifests("digits")]
    with pytest.raises(ArtifactError, match=r"/proc is a mount point.*/proc/repository"):
        export_triton(shell.store, [served], Path("/proc"), pulled=pytest.fail)
    assert not Path("/.proc.exporting").exists()
    # Behind a link the repository may lie on another disk.
    real = shell.folder / "real" / "models"
    real.mkdir(parents=True)
    shell.out.symlink_to(real)
    export_triton(shell.store, [served], shell.out)
    assert (real / "digits" / "config.pbtxt").exists()
    assert (real.parent / ".models.exporting").exists()


def test_only_what_was_resolved_is_exported(shell: Shell) -> None:
    engine = shell.publish("fp16-a")
    (manifest,) = EngineCatalog(shell.store).manifests("digits")
    document = json.loads(manifest.to_bytes())
    later, other = json.loads(manifest.to_bytes()), json.loads(manifest.to_bytes())
    later["verification"]["engine"]["reason"] = "told anew"
    other["profiles"] = document["profiles"][:1]
    served = [[Served(manifest, ())]]
    for document, channel in ((later, "production"), (other, None)):
        shell.store.write(f"{engine.path}/manifest.json", json.dumps(document).encode())
        with pytest.raises(IntegrityError, match="was published anew since it was resolved"):
            export_triton(shell.store, served, shell.out, channel=channel)
    assert not shell.out.exists()
    # What is measured meanwhile changes nothing of what is served.
    shell.store.write(f"{engine.path}/manifest.json", json.dumps(later).encode())
    export_triton(shell.store, served, shell.out)
