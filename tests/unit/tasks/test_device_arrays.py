"""Arrays of other libraries, read where they lie; capsules of numpy's own arrays stand for those on a GPU here."""

import numpy as np
import pytest

from tasks.engines.device_arrays import of_capsule, on_device
from tasks.errors import CallError


def waits_for_none(stream):
    raise AssertionError(stream)


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8", "uint8", "int32", "int64"])
def test_a_capsule_is_read_where_it_lies(dtype):
    array = np.arange(24).astype(dtype).reshape(2, 3, 4)[1:]
    found = of_capsule(array.__dlpack__(), "x")
    assert (found.address, found.shape, found.dtype) == (array.ctypes.data, (1, 3, 4), dtype)
    assert (found.nbytes, found.device) == (array.nbytes, 0)


def test_a_capsule_keeps_its_array_alive():
    array = np.arange(1000.0)
    capsule = array.__dlpack__()
    found = of_capsule(capsule, "x")
    address = array.ctypes.data
    del array, capsule
    others = [np.zeros(1000) for _ in range(10)]
    assert address not in [other.ctypes.data for other in others]
    assert found.address == address


def test_extents_of_one_and_empty_arrays_have_any_strides():
    assert of_capsule(np.zeros((4, 1, 3))[::4].__dlpack__(), "x").shape == (1, 1, 3)
    assert of_capsule(np.zeros((0, 3))[:, ::2].__dlpack__(), "x").nbytes == 0


def test_what_is_not_contiguous_is_refused():
    with pytest.raises(CallError, match="x is not C-contiguous"):
        of_capsule(np.zeros((4, 4)).T.copy().T.__dlpack__(), "x")


def test_arrays_on_the_host_are_left_to_numpy():
    assert on_device(np.zeros(3), 0, "x", waits_for_none) is None
    assert on_device([1, 2], 0, "x", waits_for_none) is None
    torch = pytest.importorskip("torch", reason="torch is not installed (pip install 'enginery[torch]')")
    assert on_device(torch.zeros(3), 0, "x", waits_for_none) is None


def test_bfloat16_of_pytorch_is_known():
    torch = pytest.importorskip("torch", reason="torch is not installed (pip install 'enginery[torch]')")
    tensor = torch.zeros(3, 5, dtype=torch.bfloat16)
    found = of_capsule(tensor.__dlpack__(), "x")
    assert (found.address, found.dtype, found.nbytes) == (tensor.data_ptr(), "bfloat16", 30)


def interface(**changes):
    class Array:
        __cuda_array_interface__ = {
            "shape": (2, 3), "typestr": "<f2", "data": (4096, False), "version": 3, "strides": None,
        } | changes  # fmt: skip

    return Array()


def test_the_cuda_array_interface_is_read():
    array = interface()
    found = on_device(array, 0, "x", waits_for_none)
    assert (found.address, found.shape, found.dtype, found.nbytes) == (4096, (2, 3), "float16", 12)
    assert found.owner is array


def test_the_stream_that_the_interface_names_is_waited_for():
    streams = []
    on_device(interface(stream=7), 0, "x", streams.append)
    on_device(interface(stream=None), 0, "x", streams.append)
    on_device(interface(stream=7, version=2), 0, "x", streams.append)
    assert streams == [7]


def test_strides_of_the_interface_must_be_those_of_c():
    assert on_device(interface(strides=(6, 2)), 0, "x", waits_for_none).shape == (2, 3)
    with pytest.raises(CallError, match="not C-contiguous"):
        on_device(interface(strides=(2, 4)), 0, "x", waits_for_none)


def test_devices_of_other_makers_are_refused():
    class Metal:
        def __dlpack_device__(self):
            return 8, 0

    with pytest.raises(CallError, match="DLPack's type 8"):
        on_device(Metal(), 0, "x", waits_for_none)
