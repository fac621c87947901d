"""Where the hardware or the packages are missing, every test here is skipped, and says what is missing.

A fault of a driver or compiler may end the process, and with it the report at its end: a failure is printed when it comes.
`make test-gpu` gives each file a process of its own.
"""

import sys

import pytest

from tests.gpu.compiling import Compiler
from tests.unit.tasks.small_graphs import cnn


def pytest_runtest_logreport(report):
    if report.failed and report.nodeid.startswith("tests/gpu/"):
        said = "\n".join(text for _title, text in report.sections)
        sys.__stderr__.write(f"\n{report.nodeid} ({report.when})\n{said}\n{report.longreprtext}\n")
        sys.__stderr__.flush()


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


@pytest.fixture(scope="module")
def trt(device):
    import tensorrt

    return tensorrt


@pytest.fixture
def compiler(device, tmp_path):
    return Compiler(device["compute_capability"], tmp_path)


@pytest.fixture(scope="module")
def plan(device, tmp_path_factory):
    """The small convolutional network in fp32, with two profiles: its plan and facts."""
    compile_once = Compiler(device["compute_capability"], tmp_path_factory.mktemp("plan"))
    result, output = compile_once(cnn())
    return output / "model.plan", result.facts, compile_once.progress


@pytest.fixture
def load(trt):
    from tasks.engines.trt_run import PlanRunner

    runners = []

    def loaded(path, *, digest=None, **options):
        runners.append(PlanRunner(path, digest, **options))
        return runners[-1]

    yield loaded
    for runner in runners:
        runner.close()
