"""Files made to do harm: each is refused with the reason, before what it declares is taken as memory or followed."""

from __future__ import annotations

import io
import json
import pickle
import struct
import tarfile
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
from bench.faults.recipe import write_tiny
from recipes.errors import RecipeError
from recipes.loader import load
from recipes.onnx_data import location_fault
from tasks.code import load_callable
from tasks.datasets import read_image_folder, read_npz
from tasks.errors import BackendError
from tasks.onnx_files import load_graph
from tasks.paddle_weights import read_weights

GIB = 1 << 30


def npz(path: Path, member: bytes) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.npy", member)
    return path


def header(shape: str, descr: str = "<f4") -> bytes:
    text = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text


def literal(text: bytes) -> bytes:
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
    "no elements of too many": (header("(0, 4611686018427387904, 4611686018427387904)"), "the limit is 8 GiB"),
    "extents that are no numbers": (header("(True, 4)") + bytes(16), "which no array has"),
    "two unknown extents": (header("(-2, -2)") + bytes(16), "which no array has"),
    "a thousand axes": (header(f"({'1,' * 1000})") + bytes(4), "which no array has"),
    "a header of nine thousand signs": (literal(b"-" * 9000 + b"1"), "cannot be read"),
    "a header of nine thousand brackets": (literal(b"(" * 9000), "cannot be read"),
}


@pytest.mark.parametrize("case", NPZ)
def test_arrays(case: str, tmp_path: Path):
    member, words = NPZ[case]
    refused(lambda: read_npz(npz(tmp_path / "data.npz", member), {"x": "x"}), words)


def _set(at: bytes, offset: int, value: int) -> Callable[[bytearray], None]:
    def change(data: bytearray) -> None:
        data[data.find(at) + offset] = value

    return change


LOCAL, CENTRAL = b"PK\x03\x04", b"PK\x01\x02"
ARCHIVES = {
    "encrypted": (zipfile.ZIP_DEFLATED, [_set(LOCAL, 6, 1), _set(CENTRAL, 8, 1)]),
    "of an unknown method": (zipfile.ZIP_DEFLATED, [_set(LOCAL, 8, 99), _set(CENTRAL, 10, 99)]),
    "of a later version": (zipfile.ZIP_DEFLATED, [_set(CENTRAL, 6, 255)]),
    "with damaged deflate data": (zipfile.ZIP_DEFLATED, [_set(LOCAL, 35, 0xFF)]),
    "with damaged lzma data": (zipfile.ZIP_LZMA, [_set(LOCAL, 50 + index, 0xFF) for index in range(9)]),
    "that begins beyond its end": (zipfile.ZIP_STORED, [_set(CENTRAL, 45, 0x7F)]),
}


@pytest.mark.parametrize("case", ARCHIVES)
def test_archives(case: str, tmp_path: Path):
    method, changes = ARCHIVES[case]
    with zipfile.ZipFile(tmp_path / "data.npz", "w", method) as archive:
        archive.writestr("x.npy", header("(4,)") + bytes(16))
    data = bytearray((tmp_path / "data.npz").read_bytes())
    for change in changes:
        change(data)
    (tmp_path / "data.npz").write_bytes(data)
    refused(lambda: read_npz(tmp_path / "data.npz", {"x": "x"}), "data.npz")


def member(name: str, kind: bytes = tarfile.REGTYPE, size: int = 0, target: str = "") -> bytes:
    info = tarfile.TarInfo(name)
    info.type, info.size, info.linkname = kind, size, target
    return info.tobuf(tarfile.USTAR_FORMAT)


def sparse(size: int) -> bytes:
    """Return the header of a member without data that stands for so many zeros (GNU tar manual, "Old GNU Format")."""
    data = bytearray(member("zeros.py", tarfile.GNUTYPE_SPARSE))
    data[483:495] = b"%011o\0" % size
    data[148:156] = b" " * 8
    data[148:156] = b"%06o\0 " % sum(data)
    return bytes(data)


BUNDLES = {
    "a path that leads out": (member("a/../../model.py"), "not a plain file inside the bundle"),
    "an absolute path": (member("/tmp/model.py"), "not a plain file inside the bundle"),
    "a path of another system": (member("..\\model.py"), "not a plain file inside the bundle"),
    "a folder that leads out": (member("../out", tarfile.DIRTYPE), "not a plain file inside the bundle"),
    "a symbolic link": (member("model.py", tarfile.SYMTYPE, target="/etc/passwd"), "not a plain file"),
    "a hard link": (member("model.py", tarfile.LNKTYPE, target="/etc/passwd"), "not a plain file"),
    "a device": (member("model.py", tarfile.CHRTYPE), "not a plain file"),
    "a pipe": (member("model.py", tarfile.FIFOTYPE), "not a plain file"),
    "a megabyte of zeros that is not there": (sparse(1 << 20), "not a plain file"),
    "a member of gigabytes": (member("model.py", size=1 << 32), "claim 4294967296 bytes"),
    "a member longer than the archive": (member("model.py", size=1 << 20), "not a readable tar"),
    "a file where a folder is": (member("a") + member("a/model.py"), "not a readable tar"),
    "a folder where a file is": (member("a/model.py") + member("a"), "not a readable tar"),
    "compressed": (zlib.compress(bytes(1 << 20), wbits=31), "not a readable tar"),
    "no archive": (b"no archive" * 100, "not a readable tar"),
}


@pytest.mark.parametrize("case", BUNDLES)
def test_code_bundles(case: str, tmp_path: Path):
    data, words = BUNDLES[case]
    (tmp_path / "code.tar").write_bytes(data if case == "compressed" else data + bytes(1024))
    refused(lambda: load_callable(tmp_path / "code.tar", "model:build"), words)


def safetensors(**tensors: object) -> bytes:
    return json.dumps(tensors).encode()


def tensor(shape: list[int], *offsets: int, dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


# Header, the length that is stated for it (None: its own), bytes of data.
SAFETENSORS = {
    "a header of exabytes": (b"{}", 1 << 62, 0),
    "a header longer than the file": (b"{}", 1000, 0),
    "a header nested too deep": (b'{"a":' * 100_000, None, 0),
    "an extent that is not there": (safetensors(a=tensor([1 << 40], 0, 4)), None, 4),
    "extents that overflow": (safetensors(a=tensor([1 << 62, 1 << 62], 0, 4)), None, 4),
    "data beyond the end": (safetensors(a=tensor([1024], 0, 4096)), None, 4),
    "data of two tensors in one place": (safetensors(a=tensor([1], 0, 4), b=tensor([1], 0, 4)), None, 4),
    "data backwards": (safetensors(a=tensor([1], 4, 0)), None, 4),
    "a type that numpy lacks": (safetensors(a=tensor([2], 0, 1, dtype="F4")), None, 1),
    "no elements of too many": (safetensors(a=tensor([0, 1 << 62, 1 << 62], 0, 0)), None, 0),
}


@pytest.mark.parametrize("case", SAFETENSORS)
def test_safetensors(case: str, tmp_path: Path):
    text, stated, size = SAFETENSORS[case]
    path = tmp_path / "weights.safetensors"
    path.write_bytes(struct.pack("<Q", len(text) if stated is None else stated) + text + bytes(size))
    refused(lambda: read_weights(path), "not readable as safetensors")
    if case not in ("a type that numpy lacks", "no elements of too many"):  # torch has both
        torch_module = pytest.importorskip("tasks.torch_module", reason="PyTorch is not installed")
        refused(lambda: torch_module._read_weights(path), "not readable as safetensors")


PICKLES = {
    "values numbered beyond the file": b"\x80\x04Nr\xff\xff\xff\x7f.",
    "bytes that are not there": b"\x80\x04\x8e" + struct.pack("<Q", 1 << 40) + b".",
    "a frame that is not there": b"\x80\x04\x95" + struct.pack("<Q", 1 << 40) + b".",
    "a call": b"cos\nsystem\n(S'true'\ntR.",
}


@pytest.mark.parametrize("case", PICKLES)
def test_pickled_weights(case: str, tmp_path: Path):
    (tmp_path / "weights.pdparams").write_bytes(PICKLES[case])
    words = "it names os.system" if case == "a call" else "not readable as a Paddle state dict"
    refused(lambda: read_weights(tmp_path / "weights.pdparams"), words)


def test_a_checkpoint_that_is_compressed(tmp_path: Path):
    torch_module = pytest.importorskip("tasks.torch_module", reason="PyTorch is not installed")
    with zipfile.ZipFile(tmp_path / "weights.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data/0", bytes(64 << 20))
    refused(lambda: torch_module._read_weights(tmp_path / "weights.pt"), "claims to hold 67108864")


ABSURD = {
    "[batch, 1, 8, 8]}}\nprofiles: {online: {batch: [1, 1, 1000000000000]}}": "must be at most",
    "[batch, 1000000, 1000000, 8]}}\nprofiles: {online: {batch: [1, 1, 2]}}": "the inputs at max take 59,605 GiB",
    "[1000000, 1000000, 8]}}": "the inputs at max take 29,802 GiB",
}


@pytest.mark.parametrize("case", ABSURD)
def test_recipes_of_absurd_shapes(case: str, tmp_path: Path):
    path = write_tiny(tmp_path)
    start, _shape, rest = path.read_text().partition("[batch, 1, 8, 8]}}\nprofiles: {online: {batch: [1, 1, 2]}}")
    path.write_text(start + case + rest)
    with pytest.raises(RecipeError, match=ABSURD[case]):
        load(path)


def test_an_image_that_would_be_a_program(tmp_path: Path):
    pytest.importorskip("PIL", reason="Pillow is not installed (pip install 'enginery[images]')")
    (tmp_path / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n")
    refused(lambda: read_image_folder(tmp_path, IMAGES, None, "x", np.arange), "its format is not recognised")


IMAGES = {"size": (8, 8), "color": "rgb", "resize": "stretch", "input": None, "scale": 1.0, "mean": [0.0], "std": [1.0]}


def test_an_image_of_huge_extent(tmp_path: Path):
    pytest.importorskip("PIL", reason="Pillow is not installed (pip install 'enginery[images]')")

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    size = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    (tmp_path / "a.png").write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")
    )
    refused(lambda: read_image_folder(tmp_path, IMAGES, None, "x", np.arange), "too large an image")


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
