"""Where the hardware or the packages are missing, every test here is skipped, and says what is missing."""

import pytest


@pytest.fixture(scope="session")
def device():
    """Properties of the GPU that is here."""
    pytest.importorskip("tensorrt", reason="TensorRT is not installed (pip install 'enginery[tensorrt]')")
    pytest.importorskip("cuda.bindings", reason="cuda-bindings is not installed (pip install 'enginery[tensorrt]')")
    from tasks.engines.cuda import device_properties
    from tasks.errors import BackendError

    try:
        return device_properties()
    except BackendError as err:
        pytest.skip(f"no CUDA device: {err.message}")
