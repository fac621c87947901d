"""Files: digests of everything a recipe names, faults at the line that names it, and no code run."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from artifacts.refs import digest_file
from recipes.digests import Digests
from recipes.errors import RecipeError
from recipes.files import ARRAY_SUFFIXES, IMAGE_SUFFIXES, gather
from recipes.loader import load
from tasks import datasets
from tests.unit.recipes.recipe_text import TEXT, changed, load_text, sha256, told, write_project

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 12\n"


@pytest.fixture(autouse=True)
def _own_memory(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def faults(folder, text=TEXT):
    with pytest.raises(RecipeError) as caught:
        gather(load_text(folder, text))
    return told(caught.value.faults, folder)


def test_everything_that_a_recipe_names_is_digested(tmp_path):
    files = gather(load(write_project(tmp_path)))
    assert files.code.entry == "model:build"
    assert set(files.code.members) == {"layers.py", "model.py"}
    assert files.weights.name == "weights.safetensors"
    assert files.weights.digest == sha256(b"weights")
    assert files.weights.size == 7
    assert Path(files.weights.address) == tmp_path / "code/weights.safetensors"
    assert files.calibration.format == "npz"
    assert files.calibration.digest == digest_file(tmp_path / "data/calibration.npz")
    assert files.labelled.path == tmp_path / "data/heldout.npz"
    assert (files.model, files.metric) == ((), None)


def test_all_missing_files_are_told_at_once_with_near_names(tmp_path):
    write_project(tmp_path)
    (tmp_path / "code/weights.safetensors").rename(tmp_path / "code/weight.safetensors")
    (tmp_path / "code/model.py").rename(tmp_path / "code/models.py")
    shutil.rmtree(tmp_path / "data")
    found = [fault.replace(str(tmp_path), ".") for fault in faults(tmp_path)]
    assert found == [
        "recipe.yaml:6: source.model: code/model.py no such file (did you mean 'models.py'?)",
        "recipe.yaml:7: source.weights.file: code/weights.safetensors: no such file (did you mean 'weight.safetensors'?)",
        "recipe.yaml:18: precision.calibration.data: data/calibration.npz: no such file (there is no folder data)",
        "recipe.yaml:22: acceptance.metric.data.data: data/heldout.npz: no such file (there is no folder data)",
    ]


def with_plugins(folder, *stated):
    """The recipe with a classic target that names plugin libraries, whose files are ELF by their first bytes."""
    write_project(folder)
    (folder / "plugins").mkdir(exist_ok=True)
    (folder / "plugins/one.so").write_bytes(b"\x7fELF one")
    (folder / "plugins/text.so").write_bytes(b"no library")
    listed = ", ".join(f"{{file: {file}, sha256: {digest}}}" for file, digest in stated)
    return changed(
        "  - {runtime: onnxruntime, precision: [fp32, int8]}",
        f"  - {{runtime: tensorrt, gpus: [sm90], build: {{plugins: [{listed}]}}}}",
    )


def test_plugins_are_named_by_their_digest_and_their_paths_enter_nothing(tmp_path):
    digest, remote = sha256(b"\x7fELF one"), "a" * 64
    text = with_plugins(tmp_path, ("plugins/one.so", digest), ("s3://bucket/two.so", remote))
    plugins = gather(load_text(tmp_path, text)).plugins
    assert set(plugins) == {digest, remote}
    assert plugins[digest].name == f"plugin-{digest[:16]}.so"
    assert (plugins[digest].size, Path(plugins[digest].address)) == (8, tmp_path / "plugins/one.so")
    assert (plugins[remote].size, plugins[remote].address) == (-1, "s3://bucket/two.so")


@pytest.mark.parametrize(
    ("file", "digest", "words"),
    [
        ("plugins/one.so", "f" * 64, f"sha256: plugins/one.so: expected {'f' * 64}, found"),
        ("plugins/tow.so", "f" * 64, "file: plugins/tow.so: no such file"),
        ("plugins/text.so", sha256(b"no library"), "file: plugins/text.so is no shared library"),
    ],
)
def test_a_plugin_that_is_not_what_the_recipe_names_is_refused(tmp_path, file, digest, words):
    (found,) = faults(tmp_path, with_plugins(tmp_path, (file, digest)))
    assert found.startswith(f"recipe.yaml:26: targets[1].build.plugins[0].{words}")


def test_a_plugin_without_a_digest_is_refused(tmp_path):
    text = with_plugins(tmp_path, ("plugins/one.so", "0" * 64)).replace(f", sha256: {'0' * 64}", "")
    (found,) = faults(tmp_path, text)
    assert found.endswith("targets[1].build.plugins[0].sha256: is required, and missing")


def with_pins(folder, cache, digest):
    write_project(folder)
    (folder / "pinned").mkdir(exist_ok=True)
    (folder / "pinned/timing.cache").write_bytes(b"timing")
    build = f"build: {{timing_cache: {{file: {cache}, sha256: {digest}}}}}"
    return changed(
        "  - {runtime: onnxruntime, precision: [fp32, int8]}", f"  - {{runtime: tensorrt, gpus: [sm90], {build}}}"
    )


def test_a_pinned_file_has_one_name_wherever_it_lies(tmp_path):
    digest = sha256(b"timing")
    pins = gather(load_text(tmp_path, with_pins(tmp_path, "pinned/timing.cache", digest))).pins
    assert set(pins) == {("timing_cache", digest)}
    file = pins["timing_cache", digest]
    assert (file.name, file.size, Path(file.address)) == ("timing.cache", 6, tmp_path / "pinned/timing.cache")
    (remote,) = gather(load_text(tmp_path, with_pins(tmp_path, "s3://bucket/x.cache", digest))).pins.values()
    assert (remote.name, remote.size, remote.address) == ("timing.cache", -1, "s3://bucket/x.cache")


def test_a_pinned_file_that_is_another_is_refused(tmp_path):
    (found,) = faults(tmp_path, with_pins(tmp_path, "pinned/timing.cache", "f" * 64))
    assert f"targets[1].build.timing_cache.sha256: pinned/timing.cache: expected {'f' * 64}, found" in found


def test_a_digest_that_differs_stops(tmp_path):
    path = write_project(tmp_path)
    good, bad = sha256(b"weights"), "f" * 64
    named = "{file: code/weights.safetensors, sha256: %s}"
    old = "{file: code/weights.safetensors}"
    path.write_text(changed(old, named % good))
    assert gather(load(path)).weights.digest == good
    assert faults(tmp_path, changed(old, named % bad)) == [
        (
            f"recipe.yaml:7: source.weights.sha256: code/weights.safetensors: expected {bad}, found {good}; "
            "restore the file, or state the new digest if the change is meant"
        )
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "code/weights.safetensors is empty"),
        (LFS, "code/weights.safetensors is a Git LFS pointer and not the file itself; fetch it: git lfs pull"),
        (None, "code/weights.safetensors is a folder; expected a file"),
    ],
)
def test_files_that_are_not_what_they_should_be(tmp_path, content, message):
    write_project(tmp_path)
    weights = tmp_path / "code/weights.safetensors"
    weights.unlink()
    if content is None:
        weights.mkdir()
    else:
        weights.write_bytes(content)
    assert faults(tmp_path) == [f"recipe.yaml:7: source.weights.file: {message}"]


def test_a_pipe_is_not_waited_for(tmp_path):
    write_project(tmp_path)
    for name in ("code/weights.safetensors", "data/heldout.npz"):
        (tmp_path / name).unlink()
        os.mkfifo(tmp_path / name)
    assert [fault.rpartition(" is ")[2] for fault in faults(tmp_path)] == ["not a regular file"] * 2


@pytest.mark.parametrize(
    ("name", "becomes"),
    [("w.pt", "weights.pt"), ("w.PTH", "weights.pt"), ("w.v2.safetensors", "weights.safetensors"), ("w.bin", None), ("w", None)],
)  # fmt: skip
def test_weights_go_by_their_suffix(tmp_path, name, becomes):
    write_project(tmp_path)
    (tmp_path / name).write_bytes(b"weights")
    text = changed("code/weights.safetensors", name)
    if becomes is not None:
        assert gather(load_text(tmp_path, text)).weights.name == becomes
    else:
        assert faults(tmp_path, text) == [
            (
                f"recipe.yaml:7: source.weights.file: {name}: weights of this kind are not read "
                "(allowed: .safetensors, .pt, .pth); save the tensors with safetensors.torch.save_file"
            )
        ]


def test_links_may_lead_out_of_the_folder(tmp_path):
    (tmp_path / "recipe").mkdir()
    write_project(tmp_path / "recipe")
    weights = tmp_path / "recipe/code/weights.safetensors"
    weights.rename(tmp_path / "elsewhere.safetensors")
    weights.symlink_to(tmp_path / "elsewhere.safetensors")
    assert gather(load(tmp_path / "recipe/recipe.yaml")).weights.digest == sha256(b"weights")
    weights.unlink()
    weights.symlink_to(weights)
    assert "source.weights.file" in faults(tmp_path / "recipe")[0]


def test_remote_files_are_known_by_their_stated_digest(tmp_path):
    write_project(tmp_path)
    digest = "a" * 64
    text = changed("{file: code/weights.safetensors}", f"{{file: 's3://bucket/w.pt', sha256: {digest}}}")
    weights = gather(load_text(tmp_path, text)).weights
    assert (weights.name, weights.digest, weights.size, weights.address) == (
        "weights.pt",
        digest,
        -1,
        "s3://bucket/w.pt",
    )


def test_syntax_errors_are_told_at_their_line(tmp_path):
    write_project(tmp_path)
    (tmp_path / "code/layers.py").write_text("import torch\n\ndef broken(:\n    pass\n")
    assert faults(tmp_path) == ["code/layers.py:3: syntax error: invalid syntax"]


def test_a_callable_that_is_not_there(tmp_path):
    write_project(tmp_path)
    found = faults(tmp_path, changed("model.py:build", "model.py:bild"))
    assert found == [
        (
            "recipe.yaml:6: source.model: code/model.py has no 'bild' at its top level "
            "(did you mean 'build'? there: Layer, build)"
        )
    ]


# ---- data sets -------------------------------------------------------------------------------------------------------

CALIBRATION = "{data: data/calibration.npz, samples: 16}"


def folder_of(path, names):
    for index, name in enumerate(names):
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(b"sample %d" % index)


def test_a_folder_of_arrays_is_digested_by_names_and_bytes(tmp_path):
    write_project(tmp_path)
    folder_of(tmp_path / "set", ["b.npy", "a.npz", "deep/c.npy", "README.md", ".DS_Store"])
    text = changed(CALIBRATION, "{data: set}")
    files = gather(load_text(tmp_path, text))
    lines = [("a.npz", b"sample 1"), ("b.npy", b"sample 0"), ("deep/c.npy", b"sample 2")]
    assert files.calibration.format == "arrays"
    assert files.calibration.digest == sha256("".join(f"{sha256(data)}  {name}\n" for name, data in lines).encode())
    assert files.calibration.path == tmp_path / "set"
    before = files.calibration.digest
    (tmp_path / "set/README.md").write_text("other words")
    assert gather(load_text(tmp_path, text)).calibration.digest == before
    (tmp_path / "set/b.npy").rename(tmp_path / "set/z.npy")
    renamed = gather(load_text(tmp_path, text)).calibration.digest
    (tmp_path / "set/z.npy").write_bytes(b"sample X")
    assert len({before, renamed, gather(load_text(tmp_path, text)).calibration.digest}) == 3


def test_a_folder_of_images(tmp_path):
    write_project(tmp_path)
    folder_of(tmp_path / "set", ["cat/1.JPG", "dog/2.png"])
    spec = "{data: set, images: {size: [8, 8], color: gray}}"
    files = gather(load_text(tmp_path, changed(CALIBRATION, spec)))
    assert files.calibration.format == "images"
    assert files.calibration.digest == sha256(
        f"{sha256(b'sample 0')}  cat/1.JPG\n{sha256(b'sample 1')}  dog/2.png\n".encode()
    )


@pytest.mark.parametrize(
    ("names", "spec", "message"),
    [
        (["a.png"], "{data: set}", "data: set holds images: say how they become arrays, under images: (at least size: [height, width])"),
        (["a.png", "b.npy"], "{data: set}", "data: set holds 1 images and 1 arrays; expected one kind"),
        (["a.txt"], "{data: set}", "data: set holds no samples (looked for .npy, .npz)"),
        (["a.npy"], "{data: set, sha256: " + "f" * 64 + "}", "sha256: is for a single file, and set is a folder"),
        (["a.npy"], "{data: set/a.npy}", "data: set/a.npy: data of this kind are not read (allowed: an .npz, a folder of .npy, .npz or images, file.py:callable)"),
        (["a.npz"], "{data: set/a.npz, sha256: " + "f" * 64 + "}", "sha256: set/a.npz: expected " + "f" * 64),
        (["a.npz"], "{data: sett}", "data: sett: no such file (did you mean 'set'?)"),
    ],
)  # fmt: skip
def test_data_sets_that_cannot_be_read(tmp_path, names, spec, message):
    write_project(tmp_path)
    folder_of(tmp_path / "set", names)
    found = faults(tmp_path, changed(CALIBRATION, spec))
    assert any(f"recipe.yaml:18: precision.calibration.{message}" in fault for fault in found), found


def test_a_callable_is_a_bundle_and_its_arguments_do_not_enter(tmp_path):
    write_project(tmp_path)
    (tmp_path / "load.py").write_text("import numpy\n\ndef samples(count=1):\n    raise SystemExit('never run')\n")
    (tmp_path / "words.txt").write_text("words")
    one = gather(load_text(tmp_path, changed(CALIBRATION, "{data: 'load.py:samples', arguments: {count: 2}}")))
    other = gather(load_text(tmp_path, changed(CALIBRATION, "{data: 'load.py:samples', arguments: {count: 3}}")))
    assert one.calibration.format == "callable"
    assert one.calibration.code.entry == "load:samples"
    assert one.calibration.digest == one.calibration.code.digest == other.calibration.digest
    assert one.calibration.code.packages == ("numpy",)
    more = gather(load_text(tmp_path, changed(CALIBRATION, "{data: 'load.py:samples', include: ['*.txt']}")))
    assert more.calibration.digest != one.calibration.digest
    assert set(more.calibration.code.members) == {"load.py", "words.txt"}
    assert faults(tmp_path, changed(CALIBRATION, "{data: 'load.py:samples', include: ['*.csv']}")) == [
        f"recipe.yaml:18: precision.calibration.include: '*.csv' matches no file in {tmp_path}"
    ]


def test_own_metrics_are_bundles(tmp_path):
    write_project(tmp_path)
    (tmp_path / "own.py").write_text("def score(outputs, labels):\n    return 1.0\n")
    files = gather(load_text(tmp_path, changed("name: top1", "name: own.py:score")))
    assert files.metric.entry == "own:score"
    assert faults(tmp_path, changed("name: top1", "name: own.py:scored")) == [
        (
            "recipe.yaml:21: acceptance.metric.name: own.py has no 'scored' at its top level "
            "(did you mean 'score'? there: score)"
        )
    ]


def test_a_gate_on_a_copy_of_the_calibration_data_is_refused(tmp_path):
    write_project(tmp_path)
    shutil.copy(tmp_path / "data/calibration.npz", tmp_path / "data/heldout.npz")
    assert faults(tmp_path) == [
        (
            "recipe.yaml:22: acceptance.metric.data.data: heldout.npz has the same content as the calibration data; "
            "the gate must be held out"
        )
    ]


def test_what_is_read_from_folders_is_what_is_digested():
    """A suffix that the fetch stage reads but that is not digested would go stale unseen."""
    assert datasets._IMAGE_SUFFIXES == IMAGE_SUFFIXES
    assert frozenset((".npy", ".npz")) == ARRAY_SUFFIXES


# ---- ONNX ------------------------------------------------------------------------------------------------------------

ONNX_TEXT = """\
enginery: 1
name: graph
source: {framework: onnx, model: {file: models/graph.onnx}}
inputs: {x: {shape: [1, 300]}}
targets: [{runtime: onnxruntime}]
"""


def write_graph(path, location=None, name="w"):
    path.parent.mkdir(parents=True, exist_ok=True)
    weight = numpy_helper.from_array(np.ones((300, 300), np.float32), name)
    node = helper.make_node("MatMul", ["x", name], ["y"])
    tensors = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, 300]) for n in ("x", "y")]
    model = helper.make_model(helper.make_graph([node], "g", tensors[:1], tensors[1:], [weight]))
    if location is None:
        onnx.save(model, path)
    else:
        onnx.save(model, path, save_as_external_data=True, location=location, size_threshold=0)


def test_a_graph_alone(tmp_path):
    write_graph(tmp_path / "models/graph.onnx")
    digests = Digests(tmp_path / "digests.json")
    (model,) = gather(load_text(tmp_path, ONNX_TEXT), digests).model
    assert (model.name, model.digest) == ("model.onnx", digest_file(tmp_path / "models/graph.onnx"))
    assert not digests.path.exists()  # onnx was not asked, so there is nothing to remember


def test_a_graph_with_external_data_brings_it_along(tmp_path):
    write_graph(tmp_path / "models/graph.onnx", "graph.data")
    digests = Digests(tmp_path / "digests.json")
    model, data = gather(load_text(tmp_path, ONNX_TEXT), digests).model
    assert (model.name, data.name) == ("model.onnx", "graph.data")
    assert data.digest == digest_file(tmp_path / "models/graph.data")
    assert data.size == 360_000
    assert Digests(tmp_path / "digests.json").noted("onnx", model.digest) == '["graph.data"]'


def test_what_onnx_answered_is_remembered(tmp_path):
    write_graph(tmp_path / "models/graph.onnx", "graph.data")
    digests = Digests(tmp_path / "digests.json")
    digest = digest_file(tmp_path / "models/graph.onnx")
    digests.note("onnx", digest, "[]")
    assert len(gather(load_text(tmp_path, ONNX_TEXT), digests).model) == 1


def test_the_word_location_alone_means_nothing(tmp_path):
    write_graph(tmp_path / "models/graph.onnx", name="location")
    assert len(gather(load_text(tmp_path, ONNX_TEXT), Digests(None)).model) == 1


def test_no_file_of_the_working_folder_passes_for_onnx(tmp_path, monkeypatch):
    """`python -c` puts the working folder first on sys.path; an onnx.py there must not run."""
    write_graph(tmp_path / "models/graph.onnx", "graph.data")
    (tmp_path / "onnx.py").write_text("raise SystemExit('recipe code was run')\n")
    monkeypatch.chdir(tmp_path)
    assert len(gather(load_text(tmp_path, ONNX_TEXT), Digests(None)).model) == 2


def test_missing_external_data(tmp_path):
    write_graph(tmp_path / "models/graph.onnx", "graph.data")
    (tmp_path / "models/graph.data").unlink()
    assert faults(tmp_path, ONNX_TEXT) == [
        "recipe.yaml:3: source.model.file: models/graph.data: no such file (did you mean 'graph.onnx'?)"
    ]


@pytest.mark.parametrize(
    ("location", "message"),
    [
        ("../up", "its external data '../up' leads out of the graph's folder; save the graph with data beside it"),
        ("a/../../up", "its external data 'a/../../up' leads out of the graph's folder"),
        ("/etc/passwd", "its external data '/etc/passwd' leads out of the graph's folder"),
        ("C:\\x", "leads out of the graph's folder"),
        (
            "model.onnx",
            "its external data cannot be called 'model.onnx'; save the graph with data in 'model.onnx.data'",
        ),
        ("a/./b", "its external data cannot be called 'a/./b'"),
    ],
)
def test_external_data_stays_inside(tmp_path, location, message):
    path = tmp_path / "models/graph.onnx"
    write_graph(path, "graph.data")
    model = onnx.load(path, load_external_data=False)
    for entry in model.graph.initializer[0].external_data:
        if entry.key == "location":
            entry.value = location
    path.write_bytes(model.SerializeToString())
    assert message in faults(tmp_path, ONNX_TEXT)[0]


def test_what_is_no_graph_is_told(tmp_path):
    (tmp_path / "models").mkdir()
    (tmp_path / "models/graph.onnx").write_bytes(b"location: nowhere")
    (fault,) = faults(tmp_path, ONNX_TEXT)
    assert fault.startswith(
        "recipe.yaml:3: source.model.file: models/graph.onnx is no ONNX graph: onnx cannot read it:"
    )
    assert "Traceback" not in fault


def test_a_damaged_memory_asks_onnx_again(tmp_path):
    write_graph(tmp_path / "models/graph.onnx", "graph.data")
    digests = Digests(None)
    for text in ("nonsense", "{}", "[3]"):
        digests.note("onnx", digest_file(tmp_path / "models/graph.onnx"), text)
        assert len(gather(load_text(tmp_path, ONNX_TEXT), digests).model) == 2


def test_names_that_no_file_can_have(tmp_path):
    write_project(tmp_path)
    long = "x" * 300
    for old, new, path in [
        ("code/model.py", f"{long}.py", "source.model"),
        ("code/weights", long, "source.weights.file"),
        ("data/calibration.npz", long, "precision.calibration.data"),
        ("data/heldout.npz", f"{long}.npz", "acceptance.metric.data.data"),
    ]:
        (fault,) = faults(tmp_path, changed(old, new))
        assert path in fault
        assert "cannot be read: File name too long" in fault


def test_a_remote_graph(tmp_path):
    text = changed("{file: models/graph.onnx}", f"{{file: 's3://b/g.onnx', sha256: {'b' * 64}}}", ONNX_TEXT)
    (model,) = gather(load_text(tmp_path, text)).model
    assert (model.name, model.size, model.address) == ("model.onnx", -1, "s3://b/g.onnx")


# ---- what enters -----------------------------------------------------------------------------------------------------


def test_renaming_folders_and_working_elsewhere_changes_no_digest(tmp_path, monkeypatch):
    def digests(path):
        files = gather(load(path))
        return (
            files.code.digest, files.code.size, files.code.entry, files.code.digests, files.code.packages,
            files.weights.digest, files.calibration.digest, files.labelled.digest,
        )  # fmt: skip

    write_project(tmp_path / "one")
    expected = digests(tmp_path / "one/recipe.yaml")
    monkeypatch.chdir(tmp_path / "one")
    assert digests(Path("recipe.yaml")) == expected
    monkeypatch.chdir(tmp_path)
    assert digests(Path("one/../one/recipe.yaml")) == expected
    (tmp_path / "one").rename(tmp_path / "two")
    assert digests(tmp_path / "two/recipe.yaml") == expected
    (tmp_path / "two/code").rename(tmp_path / "two/network")
    (tmp_path / "two/recipe.yaml").write_text(TEXT.replace("code/", "network/"))
    assert digests(Path("two/recipe.yaml")) == expected


def test_each_file_changes_its_own_digest(tmp_path):
    path = write_project(tmp_path)
    before = gather(load(path))
    for name, field in {
        "code/layers.py": "code", "code/weights.safetensors": "weights",
        "data/calibration.npz": "calibration", "data/heldout.npz": "labelled",
    }.items():  # fmt: skip
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content + b"\n")
        after = gather(load(path))
        assert getattr(after, field).digest != getattr(before, field).digest
        assert replace(after, **{field: None}) == replace(before, **{field: None})
        (tmp_path / name).write_bytes(content)
