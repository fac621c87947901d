"""Failures that need the device or classic TensorRT itself; tests/contract/test_failures.py has every class without a GPU."""

import contextlib
import re
import sys

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from tasks.errors import BackendError
from tasks.process import Limits
from tests.gpu.compiling import PROFILES
from tests.unit.tasks.small_graphs import cnn, graph, images, node

pytestmark = pytest.mark.gpu

HERE = "tests.gpu.test_failures:"


def told(error):
    sys.stdout.write(f"{error}\n")
    assert error.advice
    return error.kind


def without_asking_for_the_device(request):
    """Compile where TensorRT itself finds no device."""
    import tensorrt

    from tasks.engines.trt import Build

    Build(tensorrt, request).run(lambda: 1 << 30)


def test_a_device_that_is_hidden_is_no_device(compiler, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert told(compiler.refuse(cnn())) == "no device"
    error = compiler.refuse(cnn(), entry=f"{HERE}without_asking_for_the_device")
    assert told(error) == "no device"
    assert "does not start" in error.message


def test_a_plan_of_another_version_is_a_version_mismatch(plan, load, trt, tmp_path):
    data = bytearray(plan[0].read_bytes())
    version = bytes(data[24:28])  # major to build (TensorRT issue 3073); what loads a plan with a lean runtime reads it
    sys.stdout.write(f"start of the plan: {bytes(data[:512]).hex()}\n")
    assert version[0] == int(trt.__version__.partition(".")[0])
    data[24] += 1
    # The engine itself begins with the four again, each after the same tag; of an ordinary plan it is these that are compared.
    parts = [re.escape(bytes([part])) for part in version]
    pattern = parts[0] + rb"(?P<tag>.{1,16}?)" + rb"(?P=tag)".join(parts[1:])
    inner = re.search(pattern, bytes(data[28:4096]), re.DOTALL)
    assert inner is not None, "the engine's own version is not where it was in 8.6"
    data[28 + inner.start()] += 1
    (tmp_path / "model.plan").write_bytes(data)
    with pytest.raises(BackendError) as caught:
        load(tmp_path / "model.plan")
    assert told(caught.value) == "version mismatch"
    assert "does not load model.plan" in caught.value.message


def test_a_plan_cut_short_is_refused(plan, load, tmp_path):
    data = plan[0].read_bytes()
    (tmp_path / "model.plan").write_bytes(data[: len(data) // 2])
    with pytest.raises(BackendError) as caught:
        load(tmp_path / "model.plan")
    assert told(caught.value) == "version mismatch"


def test_where_no_kernel_fits_the_workspace_it_is_said(compiler):
    # The best 3000 of a million values take megabytes of scratch memory whatever the kernel.
    nodes = [node("TopK", ["x", "k"], ["y", "where"], "best", axis=1)]
    spec = {"x": (TensorProto.FLOAT, ["batch", 1 << 20])}, {"y": (TensorProto.FLOAT, ["batch", 3000])}
    model = graph(nodes, {"k": np.array([3000])}, inputs=spec[0], outputs=spec[1])
    profile = {"name": "wide", "inputs": {"x": {corner: [8, 1 << 20] for corner in ("min", "opt", "max")}}}
    error = compiler.refuse(model, profiles=[profile], workspace=1 << 10)
    assert told(error) in ("no kernel", "out of memory")
    assert "build.workspace" in error.advice


def test_memory_that_others_hold_is_out_of_memory_when_an_engine_is_loaded(plan, load):
    from tasks.engines.cuda import Cuda

    cuda = Cuda()
    try:
        size = cuda.free_bytes()
        while size >= 1 << 20:
            with contextlib.suppress(BackendError):
                while True:
                    cuda.allocate(size)
            size //= 2
        with pytest.raises(BackendError) as caught:
            load(plan[0])({"x": images(128)})
    finally:
        cuda.close()
    assert told(caught.value) == "out of memory"


@pytest.mark.timeout(120)
def test_a_compiler_that_is_stopped_leaves_the_device_free(compiler):
    error = compiler.refuse(cnn(), limits=Limits(timeout_s=5, memory_bytes=64 << 30), optimization_level=5)
    assert told(error) == "time-out"
    result, _output = compiler(cnn(), profiles=PROFILES[:1])
    assert result.facts["layers"]["count"] > 0


def test_a_full_disk_is_said(compiler):
    error = compiler.refuse(cnn(), profiles=PROFILES[:1], entry="tests.contract.test_failures:on_a_full_disk")
    assert told(error) == "disk full"


def test_a_crash_in_the_compiler_ends_it_alone(compiler):
    error = compiler.refuse(cnn(), profiles=PROFILES[:1], entry="tests.contract.test_failures:crash_in_the_compiler")
    assert told(error) == "crash"
    assert "SIGSEGV" in error.message


def test_an_operator_of_a_plugin_that_no_library_brings(compiler):
    """The parser knows how to import a plugin by its name; the registry has none of this one."""
    spec = [onnx.helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 4]) for name in "xy"]
    known = onnx.helper.make_node("Deform_TRT", ["x"], ["y"], name="d", plugin_version="1", plugin_namespace="acme")
    model = onnx.helper.make_model(
        onnx.helper.make_graph([known], "g", spec[:1], spec[1:]),
        opset_imports=[onnx.helper.make_opsetid("", 17)],
        ir_version=8,
    )
    profile = {"name": "one", "inputs": {"x": {corner: [2, 4] for corner in ("min", "opt", "max")}}}
    error = compiler.refuse(model, profiles=[profile])
    assert told(error) in ("missing plugin", "unsupported operator")
    assert "Deform_TRT" in str(error)
