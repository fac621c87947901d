from __future__ import annotations

import io
import struct
import tarfile
import zipfile
import zlib

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from tasks import fetch
from tasks.datasets import held_out, without_held_out
from tasks.errors import BackendError, ModelCodeError
from tests.unit.tasks.bundles import frames
from tests.unit.tasks.small_graphs import stage

TENSORS = {"x": {"dtype": "float32", "shape": ["batch", 2, 3]}}
PARAMS = {
    "kind": "dataset",
    "format": "npz",
    "entry": None,
    "arguments": {},
    "fields": {},
    "names": ["x"],
    "label": None,
    "images": None,
    "samples": None,
    "order": "sequential",
    "seed": 0,
    "tensors": TENSORS,
}
LABELLED = {"names": ["x", "label"], "label": "label"}
ROWS = np.arange(120, dtype=np.float32).reshape(20, 2, 3)
PICTURE = {
    "size": [4, 6], "resize": "stretch", "color": "rgb", "scale": 1 / 255, "mean": [0.0], "std": [1.0], "input": None
}  # fmt: skip
PIXELS = {"x": {"dtype": "float32", "shape": ["batch", 3, 4, 6]}}


def run(folder, **changes):
    """Fetch; `data` is the local file or folder, what remains changes PARAMS."""
    data = changes.pop("data")
    params = PARAMS | changes
    key = {"npz": "data_npz", "callable": "code_tar"}.get(params["format"], "data")
    result, output = stage(fetch.run, folder / "stages", params, **{key: data})
    return load_file(output / "dataset.safetensors"), result.facts


def npz(folder, **arrays):
    path = folder / "data.npz"
    np.savez(path, **arrays)
    return path


def header(shape, descr="<f4"):
    text = repr({"descr": descr, "fortran_order": False, "shape": shape}).encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text


def zipped(folder, data):
    path = folder / "data.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.npy", data)
    return path


def bundle(folder, source):
    path = folder / "code.tar"
    with tarfile.open(path, "w") as archive:
        member = tarfile.TarInfo("samples.py")
        member.size = len(source.encode())
        archive.addfile(member, io.BytesIO(source.encode()))
    return {"data": path, "format": "callable", "entry": "samples:make"}


def test_an_npz_in_its_order(tmp_path):
    data, facts = run(tmp_path, data=npz(tmp_path, x=ROWS, other=np.zeros(3)))
    assert np.array_equal(data["x"], ROWS)
    assert list(data) == ["x"]
    assert facts["samples"] == 20
    assert facts["arrays"]["x"] == {
        "dtype": "float32", "shape": [20, 2, 3], "min": 0.0, "max": 119.0, "mean": 59.5,
        "std": pytest.approx(np.arange(120).std()),
    }  # fmt: skip
    assert facts["warnings"] == []


def test_fields_map_names_and_labels_come_along(tmp_path):
    path = npz(tmp_path, pictures=ROWS, digit=np.arange(20))
    data, _facts = run(tmp_path, data=path, **LABELLED, fields={"x": "pictures", "label": "digit"}, samples=17)
    assert np.array_equal(data["label"], np.arange(17))
    assert len(data["x"]) == 17


def test_a_shuffled_choice_is_seeded_and_pairs_labels(tmp_path):
    path = npz(tmp_path, x=ROWS, label=np.arange(20))
    first, second, other = (
        run(tmp_path, data=path, **LABELLED, order="shuffled", samples=17, seed=seed)[0] for seed in (1, 1, 2)
    )
    assert np.array_equal(first["x"], second["x"])
    assert not np.array_equal(first["label"], other["label"])
    assert sorted(first["label"]) != list(range(17))
    assert np.array_equal(first["x"], ROWS[first["label"]])


def test_the_same_data_gives_the_same_bytes(tmp_path):
    path = npz(tmp_path, x=ROWS, label=np.arange(20))
    digests = {
        (stage(fetch.run, tmp_path / "s", PARAMS | LABELLED, data_npz=path)[1] / "dataset.safetensors").read_bytes()
        for _ in range(2)
    }
    assert len(digests) == 1


def test_floats_are_cast_and_it_is_said(tmp_path):
    data, facts = run(tmp_path, data=npz(tmp_path, x=ROWS.astype(">f8")))
    assert data["x"].dtype == np.float32
    assert np.array_equal(data["x"], ROWS)
    assert facts["warnings"] == ["x: cast from float64 to float32"]


def test_fortran_order_is_read_as_it_is_meant(tmp_path):
    data, _facts = run(tmp_path, data=npz(tmp_path, x=np.asfortranarray(ROWS)))
    assert np.array_equal(data["x"], ROWS)


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"y": ROWS}, r"no array 'x' \(it has: y\)"),
        ({"x": ROWS.astype(np.int64)}, "'x' is int64, the input is float32"),
        ({"x": ROWS.astype(np.complex64)}, "holds complex64, expected numbers"),
        ({"x": np.array([{}] * 3)}, "holds Python objects"),
        ({"x": ROWS[:, 0]}, "'x' has 2 axes"),
        ({"x": ROWS[:, :1]}, r"\[20, 1, 3\], axis 1 must be 2"),
        ({"x": np.where(ROWS == 5, np.nan, ROWS)}, "holds 1 NaN or infinite values"),
        ({"x": ROWS.astype(np.float64) * 1e300}, "NaN or infinite"),
        ({"x": ROWS[:0]}, "the data set is empty"),
        ({"x": np.float32(1)}, "single number"),
    ],
)
def test_data_that_does_not_fit_is_refused(tmp_path, arrays, words):
    with pytest.raises(BackendError, match=words) as caught:
        run(tmp_path, data=npz(tmp_path, **arrays))
    assert caught.value.kind == "bad data"


def test_integers_are_cast_only_where_they_fit(tmp_path):
    tensors = {"x": {"dtype": "int32", "shape": ["batch"]}}
    data, _facts = run(tmp_path, data=npz(tmp_path, x=np.arange(20)), tensors=tensors)
    assert data["x"].dtype == np.int32
    with pytest.raises(BackendError, match="do not fit int32"):
        run(tmp_path, data=npz(tmp_path, x=np.arange(20) << 40), tensors=tensors)


def test_too_few_samples_and_unequal_lengths(tmp_path):
    with pytest.raises(BackendError, match="21 samples were asked for, the data set has 20"):
        run(tmp_path, data=npz(tmp_path, x=ROWS), samples=21)
    with pytest.raises(BackendError, match="x 20, label 19"):
        run(tmp_path, data=npz(tmp_path, x=ROWS, label=np.arange(19)), **LABELLED)
    assert "only 3 samples" in run(tmp_path, data=npz(tmp_path, x=ROWS), samples=3)[1]["warnings"][0]


def test_a_bomb_is_refused_by_what_it_declares(tmp_path):
    with pytest.raises(BackendError, match=r"would take 40\.0 GiB, the limit is 8 GiB"):
        run(tmp_path, data=zipped(tmp_path, header((10 << 30,)) + bytes(100)))


@pytest.mark.parametrize(
    "data",
    [b"junk", header((100,)) + bytes(100), header((1,)) + bytes(100), header((2,), "|O") + bytes(16), b"\x93NUMPY\x01"],
)
def test_damaged_arrays_are_refused(tmp_path, data):
    with pytest.raises(BackendError) as caught:
        run(tmp_path, data=zipped(tmp_path, data))
    assert caught.value.kind == "bad data"


def test_a_file_that_is_no_npz(tmp_path):
    (tmp_path / "data.npz").write_bytes(b"PK\x03\x04 cut")
    with pytest.raises(BackendError, match=r"data\.npz cannot be read"):
        run(tmp_path, data=tmp_path / "data.npz")


def test_constant_data_and_noise_are_suspicious(tmp_path):
    _data, facts = run(tmp_path, data=npz(tmp_path, x=np.ones_like(ROWS)))
    assert facts["warnings"] == ["x: every value is 1 (standard deviation 0)"]
    tensors = {"x": {"dtype": "float32", "shape": ["batch", 32, 32]}}
    noise = np.random.default_rng(0).uniform(size=(40, 32, 32)).astype(np.float32)
    _data, facts = run(tmp_path, data=npz(tmp_path, x=noise), tensors=tensors)
    assert "looks like random noise" in facts["warnings"][0]
    _data, facts = run(tmp_path, data=npz(tmp_path, x=noise.cumsum(-1)), tensors=tensors)
    assert facts["warnings"] == []


def test_a_folder_of_arrays_is_read_by_name(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for index in (2, 0, 1):
        np.save(folder / f"{index}.npy", ROWS[index] if index else ROWS[:1])  # with and without a batch axis
    data, _facts = run(tmp_path, data=folder, format="arrays")
    assert np.array_equal(data["x"], ROWS[:3])
    with pytest.raises(BackendError, match="holds one array, and x, label are needed"):
        run(tmp_path, data=folder, format="arrays", **LABELLED)
    np.save(folder / "1.npy", ROWS[1][:1])
    with pytest.raises(BackendError, match=r"1\.npy: 'x' is float32 \[1, 3\], in 0\.npy float32 \[2, 3\]"):
        run(tmp_path, data=folder, format="arrays")


def test_a_folder_of_npz_has_labels(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for index in range(3):
        np.savez(folder / f"{index}.npz", x=ROWS[index], label=index * 10)
    data, _facts = run(tmp_path, data=folder, format="arrays", **LABELLED, samples=2)
    assert data["label"].tolist() == [0, 10]


def picture(path, color, size=(6, 4), **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path, **options)


def test_images_become_nchw_with_labels_by_folder(tmp_path):
    folder = tmp_path / "data"
    picture(folder / "dog" / "a.png", (255, 0, 0))
    picture(folder / "cat" / "b.png", (0, 255, 0))
    picture(folder / "cat" / "a.png", (0, 0, 255))
    (folder / "cat" / "notes.txt").write_text("no picture")
    data, _facts = run(tmp_path, data=folder, format="images", images=PICTURE, tensors=PIXELS, **LABELLED)
    assert data["label"].tolist() == [0, 0, 1]
    assert data["x"][:, :, 0, 0].tolist() == [[0, 0, 1], [0, 1, 0], [1, 0, 0]]
    bgr = PICTURE | {"color": "bgr", "mean": [0.5, 0.25, 0.0], "std": [0.5, 0.5, 2.0]}
    data, _facts = run(tmp_path, data=folder, format="images", images=bgr, tensors=PIXELS)
    assert data["x"][2, :, 0, 0].tolist() == [-1, -0.5, 0.5]


@pytest.mark.parametrize(
    ("how", "column"),
    [("stretch", [1, 1, 1, 1]), ("shorter-side-crop", [1, 1, 1, 1]), ("letterbox", [0, 1, 1, 0])],
)
def test_how_images_are_resized(tmp_path, how, column):
    picture(tmp_path / "data" / "wide.png", (255, 255, 255), size=(30, 10))
    tensors = {"x": {"dtype": "float32", "shape": ["batch", 1, 4, 6]}}
    spec = PICTURE | {"color": "gray", "resize": how}
    data, _facts = run(tmp_path, data=tmp_path / "data", format="images", images=spec, tensors=tensors)
    assert data["x"][0, 0, :, 3].tolist() == column


def test_images_are_turned_as_their_camera_was(tmp_path):
    image = Image.new("RGB", (4, 6))
    image.paste((255, 255, 255), (0, 0, 4, 1))  # a white top row that belongs to the right
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "data").mkdir()
    image.save(tmp_path / "data" / "turned.png", exif=exif)
    data, _facts = run(tmp_path, data=tmp_path / "data", format="images", images=PICTURE, tensors=PIXELS)
    assert data["x"][0, 0].tolist() == [[0, 0, 0, 0, 0, 1]] * 4


def vast(png):
    """The same file, declared as 10000 x 10000 pixels."""
    head = png[12:16] + struct.pack(">II", 10_000, 10_000) + png[24:29]
    return png[:12] + head + struct.pack(">I", zlib.crc32(head)) + png[33:]


def test_images_that_cannot_be_used_are_named(tmp_path):
    picture(tmp_path / "data" / "a.png", (1, 2, 3))
    (tmp_path / "data" / "b.png").write_bytes((tmp_path / "data" / "a.png").read_bytes()[:40])
    settings = {"data": tmp_path / "data", "format": "images", "images": PICTURE, "tensors": PIXELS}
    with pytest.raises(BackendError, match=r"b\.png is not a readable image"):
        run(tmp_path, **settings)
    with pytest.raises(BackendError, match=r"a\.png lies in no class folder"):
        run(tmp_path, **settings, **LABELLED)
    (tmp_path / "data" / "b.png").write_bytes(vast((tmp_path / "data" / "a.png").read_bytes()))
    with pytest.raises(BackendError, match=r"b\.png is too large an image"):
        run(tmp_path, **settings)
    with pytest.raises(BackendError, match=r"images\.mean has 2 values for 3 channels"):
        run(tmp_path, **settings | {"images": PICTURE | {"mean": [1, 2]}})


def test_a_callable_returns_arrays(tmp_path):
    source = (
        "import numpy as np\ndef make(count):\n    return {'x': np.ones((count, 2, 3)), 'label': list(range(count))}\n"
    )
    data, _facts = run(tmp_path, **bundle(tmp_path, source), **LABELLED, arguments={"count": 18}, samples=17)
    assert data["x"].shape == (17, 2, 3)
    assert data["label"].tolist() == list(range(17))


ENDLESS = """
import itertools, numpy as np
def make():
    for index in itertools.count():
        yield {'x': np.full((2, 3), index, np.float32)}
"""


def test_an_endless_callable_is_read_as_far_as_needed(tmp_path):
    data, _facts = run(tmp_path, **bundle(tmp_path, ENDLESS), samples=17)
    assert data["x"][:, 0, 0].tolist() == list(range(17))


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("return 3", "returned int"),
        ("return [1, 2]", "gave a int as a sample"),
        ("return [{'y': 1}]", r"no array 'x' \(it gave: y\)"),
        ("return {'x': ['a', 'b']}", "expected numbers"),
        ("yield {'x': [1.0]}; raise KeyError('gone')", r"samples\.py"),
        ("raise KeyError('gone')", r"line 2, in make"),
    ],
)
def test_faults_of_a_callable_are_its_own(tmp_path, body, words):
    with pytest.raises(ModelCodeError, match=words) as error:
        run(tmp_path, **bundle(tmp_path, f"def make():\n    {body}\n"))
    if "Traceback" in str(error.value):
        assert frames(error.value) == ["samples.py"]


def test_a_callable_without_samples(tmp_path):
    with pytest.raises(BackendError, match="gave no sample"):
        run(tmp_path, **bundle(tmp_path, "def make():\n    return iter(())\n"))


@pytest.mark.parametrize(
    ("count", "rows"),
    [(0, []), (15, []), (16, [7, 15]), (31, [7, 15, 23]), (256, [*range(7, 256, 8)]), (1000, [*range(30, 1000, 31)])],
)
def test_every_eighth_sample_is_held_out_but_few_of_many(count, rows):
    assert held_out(count).tolist() == rows[:32]
    left = without_held_out({"x": np.arange(count)})["x"].tolist()
    assert sorted(left + rows[:32]) == list(range(count))
