"""CUDA where there is none: every way in says what is missing, and nothing crashes. With a GPU, tests/gpu covers it."""

import subprocess
import sys

import pytest

from tasks.engines import cuda
from tasks.errors import BackendError

pytest.importorskip("cuda.bindings", reason="cuda-bindings is not installed (pip install 'enginery[tensorrt]')")


@pytest.fixture(autouse=True)
def _no_driver():
    try:
        count = cuda.device_count()
    except BackendError:
        return
    pytest.skip(f"{count} CUDA devices are here")


@pytest.mark.parametrize(
    "call",
    [cuda.device_count, cuda.device_properties, cuda.driver_version, cuda.Cuda, lambda: cuda.find_device("sm90")],
)
def test_no_driver_is_no_device(call):
    with pytest.raises(BackendError) as caught:
        call()
    assert caught.value.kind == "no device"
    assert "driver" in caught.value.advice


def test_nothing_of_cuda_is_imported_before_it_is_used():
    code = "import sys, tasks.engines.cuda, tasks.engines.trt; sys.exit('cuda' in sys.modules or 'tensorrt' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
