"""TensorRT's own calibration without a GPU: batches, the cache, and the nodes that int8 cannot express."""

import struct

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.engines.trt_calibrate import Feeds, without_zero_scales
from tasks.engines.trt_weak import nodes_in_fp32, zero_channels
from tasks.errors import BackendError
from tests.unit.tasks.small_graphs import cnn, graph, node

DYNAMIC = {"x": {"dtype": "float32", "shape": ["batch", 4]}}
FIXED = {"x": {"dtype": "float32", "shape": [3, 4]}}


def rows(feeds):
    return [batch["x"][:, 0].tolist() for batch in feeds]


@given(st.integers(1, 60), st.integers(1, 20))
def test_every_sample_is_calibrated_on_once_in_batches_of_one_size(samples, batch):
    data = {"x": np.arange(samples * 4, dtype=np.float32).reshape(samples, 4)}
    feeds = Feeds(data, DYNAMIC, batch)
    seen = rows(feeds)
    assert {len(part) for part in seen} == {feeds.batch}
    assert feeds.batch <= batch
    assert [value for part in seen for value in part] == data["x"][:, 0].tolist()
    assert not any(samples % larger == 0 for larger in range(feeds.batch + 1, batch + 1))
    shape = [feeds.batch, 4]
    assert feeds.profile()["inputs"] == {"x": {"min": shape, "opt": shape, "max": shape}}


def test_a_fixed_batch_is_kept_and_filled():
    feeds = Feeds({"x": np.arange(16, dtype=np.float32).reshape(4, 4)}, FIXED, 8)
    assert rows(feeds) == [[0, 4, 8], [12, 12, 12]]


def test_data_without_an_input_is_told():
    with pytest.raises(BackendError, match="lacks x") as caught:
        Feeds({"y": np.zeros((4, 4), np.float32)}, DYNAMIC, 2).profile()
    assert caught.value.kind == "bad data"


def line(name, scale):
    """As 8.6 writes it: a number in hex, which has no leading zeros."""
    return f"{name}: {struct.unpack('!I', struct.pack('!f', scale))[0]:x}"


@given(
    st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\n"), min_size=1),
        st.floats(width=32),
        max_size=8,
    )
)
def test_scales_that_cannot_be_used_are_left_out_and_named(scales):
    text = "\n".join(["TRT-8600-EntropyCalibration2", *(line(name, scale) for name, scale in scales.items())]) + "\n"
    kept, constant = without_zero_scales(text.encode())
    usable = {name for name, scale in scales.items() if np.isfinite(scale) and abs(scale) >= np.finfo(np.float32).tiny}
    assert set(constant) == set(scales) - usable
    *lines, end = kept.decode().split("\n")
    assert end == ""
    assert lines == ["TRT-8600-EntropyCalibration2", *(line(n, s) for n, s in scales.items() if n in usable)]


def test_names_with_colons_and_brackets_are_names():
    text = f"TRT-8600-MinMaxCalibration\n{line('(Unnamed Layer* 3) [Shuffle]: out', 0.5)}\n{line('a: b', 0.0)}\n"
    kept, constant = without_zero_scales(text.encode())
    assert (constant, b"[Shuffle]: out: 3f000000" in kept) == (["a: b"], True)


def test_a_scale_of_zero_is_one_digit():
    text = b"TRT-8600-EntropyCalibration2\nx: 3c010a14\nr: 0\n"
    assert without_zero_scales(text) == (b"TRT-8600-EntropyCalibration2\nx: 3c010a14\n", ["r"])


@pytest.mark.parametrize("broken", ["x: 13f000000", "x: -3f000000", "x: zz000000", "x", "x: "])
def test_another_text_than_a_cache_is_refused(broken):
    with pytest.raises(BackendError, match="a line of the calibration cache"):
        without_zero_scales(f"TRT-8600-EntropyCalibration2\n{broken}\n".encode())


def test_nodes_with_a_channel_of_zeros_are_found_whatever_axis_it_is_on():
    wide = np.ones((4, 4), np.float32)
    column, row = wide.copy(), wide.copy()
    column[:, 1], row[1] = 0, 0
    conv, transposed = np.ones((2, 2, 1, 1), np.float32), np.ones((2, 2, 1, 1), np.float32)
    conv[1], transposed[:, 1] = 0, 0
    model = graph(
        [
            node("MatMul", ["x", "column"], ["a"], "dead column"),
            node("MatMul", ["a", "row"], ["b"], "dead row"),
            node("Gemm", ["b", "row"], ["c"], "dead row of B transposed", transB=1),
            node("Gemm", ["c", "column"], ["d"], "dead column of B"),
            node("Reshape", ["d", "shape"], ["e"], "reshape"),
            node("Conv", ["e", "conv"], ["f"], "dead filter"),
            node("ConvTranspose", ["f", "transposed"], ["y"], "dead filter of a transposed one"),
        ],
        {"column": column, "row": row, "conv": conv, "transposed": transposed, "shape": np.array([-1, 2, 2, 1])},
        outputs={"y": (onnx.TensorProto.FLOAT, ["batch", 2, 2, 1])},
    )
    assert zero_channels(model) == [
        "dead column",
        "dead row of B transposed",
        "dead column of B",
        "dead filter",
        "dead filter of a transposed one",
    ]


def test_what_the_recipe_keeps_stays_fp32_beside_what_int8_cannot_express(tmp_path):
    model = cnn()
    first = next(tensor for tensor in model.graph.initializer if tensor.name == "w2")
    values = onnx.numpy_helper.to_array(first).copy()
    values[3] = 0
    first.CopyFrom(onnx.numpy_helper.from_array(values, "w2"))
    path = tmp_path / "model.onnx"
    onnx.save(model, path)
    assert nodes_in_fp32(path, ["head/*"], int8=True) == {"body/conv", "head/gemm"}
    assert nodes_in_fp32(path, ["head/*"], int8=False) == {"head/gemm"}
    assert nodes_in_fp32(path, [], int8=False) == set()
    with pytest.raises(BackendError, match=r"precision\.keep 'tail/\*' matches none"):
        nodes_in_fp32(path, ["tail/*"], int8=False)
