"""Files made to do harm: each is refused with the reason, before what it declares is taken as memory or followed."""

from __future__ import annotations

import io
import json
import pickle
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import psutil
import pytest

from artifacts.errors import StoreError
from artifacts.folder import FolderStore
from recipes.onnx_data import location_fault
from tasks.datasets import read_image_folder, read_npz
from tasks.errors import BackendError
from tasks.onnx_files import load_graph

GIB = 1 << 30


def npz(path: Path, member: bytes) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.npy", member)
    return path


def header(shape: str, descr: str = "<f4") -> bytes:
    text = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text


def pickled() -> bytes:
    stream = io.BytesIO()
    np.save(stream, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    return stream.getvalue()


NPZ = {
    "a header that claims terabytes": (header("(1099511627776, 4)"), "the limit is 8 GiB"),
    "a header that claims more than there is": (header("(1000, 1000)"), "has only 0"),
    "Python objects": (pickled(), "pickles are never loaded"),
    "a bare pickle": (pickle.dumps({"a": 1}), "cannot be read"),
    "more bytes than declared": (header("(1,)") + bytes(64 << 20), "declares 4 bytes of data and has more"),
    "a negative extent": (header("(-1, 4)"), ""),
    "a shape that is no number": (header("('a',)"), "cannot be read"),
    "a type of nothing": (header("(4,)", "|V0"), "expected numbers"),
}


@pytest.mark.parametrize("case", NPZ)
def test_arrays(case: str, tmp_path: Path):
    member, words = NPZ[case]
    refused(lambda: read_npz(npz(tmp_path / "data.npz", member), {"x": "x"}), words)


def test_an_image_of_huge_extent(tmp_path: Path):
    pytest.importorskip("PIL", reason="Pillow is not installed (pip install 'enginery[images]')")

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    size = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    (tmp_path / "a.png").write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")
    )
    spec = {
        "size": (8, 8),
        "color": "rgb",
        "resize": "stretch",
        "input": None,
        "scale": 1.0,
        "mean": [0.0],
        "std": [1.0],
    }
    refused(lambda: read_image_folder(tmp_path, spec, None, "x", np.arange), "too large an image")


def graph(folder: Path, location: str, dims: tuple[int, ...] = (4,), length: str | None = None) -> Path:
    """Write a graph that adds a tensor, whose data lies where it says."""
    tensor = onnx.TensorProto(name="w", data_type=1, dims=dims, data_location=onnx.TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value=location)
    if length is not None:
        tensor.external_data.add(key="length", value=length)
    x, y = (onnx.helper.make_tensor_value_info(name, 1, [4]) for name in "xy")
    body = onnx.helper.make_graph([onnx.helper.make_node("Add", ["x", "w"], ["y"])], "g", [x], [y], [tensor])
    folder.mkdir()
    path = folder / "model.onnx"
    path.write_bytes(onnx.helper.make_model(body).SerializeToString())
    return path


@pytest.mark.parametrize("location", ["../secret", "/etc/passwd", "a/../../secret", "..\\secret", "c:secret"])
def test_external_data_outside_of_the_graphs_folder(location: str, tmp_path: Path):
    (tmp_path / "secret").write_bytes(bytes(16))
    refused(lambda: load_graph(graph(tmp_path / "in", location)), "outside the model's folder")
    assert location_fault(location) is not None


@pytest.mark.parametrize("link", ["file", "folder"])
def test_external_data_that_leaves_by_a_link(link: str, tmp_path: Path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "secret").write_bytes(bytes(16))
    path = graph(tmp_path / "in", "data" if link == "file" else "sub/secret")
    if link == "file":
        (path.parent / "data").symlink_to(tmp_path / "out" / "secret")
    else:
        (path.parent / "sub").symlink_to(tmp_path / "out")
    refused(lambda: load_graph(path), "outside the model's folder")


@pytest.mark.parametrize(("dims", "length"), [((4,), str(1 << 50)), ((1 << 40, 1 << 10), None), ((-4,), None)])
def test_tensors_that_claim_what_is_not_there(dims: tuple[int, ...], length: str | None, tmp_path: Path):
    path = graph(tmp_path / "in", "data", dims, length)
    (path.parent / "data").write_bytes(bytes(16))
    refused(lambda: load_graph(path), "is not a whole ONNX file")


def test_a_link_in_a_store_is_not_followed(tmp_path: Path):
    store = FolderStore(tmp_path / "store")
    store.write("hosts/a.json", json.dumps({}).encode())
    (tmp_path / "secret").write_bytes(b"secret")
    (store.root / "hosts" / "b.json").symlink_to(tmp_path / "secret")
    for path in ("hosts/b.json", "hosts/../../secret", "/etc/passwd"):
        with pytest.raises(StoreError):
            store.read(path)


def refused(read: Callable[[], object], words: str) -> None:
    before = psutil.Process().memory_info().vms
    with pytest.raises(BackendError) as told:
        read()
    assert told.value.args
    assert words in str(told.value)
    assert psutil.Process().memory_info().vms - before < GIB
