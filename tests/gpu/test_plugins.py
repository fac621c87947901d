"""A plugin library on the device: named by its digest, loaded by the compiler, published, and loaded again to run."""

import shutil
import subprocess
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from artifacts.refs import digest_bytes
from tasks.errors import BackendError
from tests.gpu.compiling import VECTOR

pytestmark = pytest.mark.gpu

SOURCE = Path(__file__).with_name("answer_plugin.cpp")


@pytest.fixture(scope="module")
def library(trt, tmp_path_factory):
    """The library, as (name among a stage's inputs, path)."""
    if not trt.__version__.startswith("8.6"):
        pytest.skip("the plugin is written for the interface of TensorRT 8.6")
    if shutil.which("g++") is None:
        pytest.skip("g++ is needed to compile a plugin library")
    made = tmp_path_factory.mktemp("plugin") / "made.so"
    folder = Path(trt.__file__).parent
    command = ["g++", "-shared", "-fPIC", "-O1", "-o", made, SOURCE, folder / "libnvinfer.so.8", "-ldl"]
    subprocess.run(command, check=True, timeout=120)
    name = f"plugin-{digest_bytes(made.read_bytes())[:16]}.so"
    return name, made.rename(made.with_name(name))


def asks():
    """(x + 1), then the plugin's operator, then its answer less 2."""
    spec = [onnx.helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 4]) for name in "xy"]
    weights = [onnx.numpy_helper.from_array(np.float32(value), name) for name, value in (("one", 1), ("two", 2))]
    nodes = [
        onnx.helper.make_node("Add", ["x", "one"], ["a"], name="add"),
        onnx.helper.make_node(
            "Answer", ["a"], ["b"], name="ask", domain="acme", plugin_version="1", plugin_namespace="acme"
        ),
        onnx.helper.make_node("Sub", ["b", "two"], ["y"], name="sub"),
    ]
    opsets = [onnx.helper.make_opsetid("", 17), onnx.helper.make_opsetid("acme", 1)]
    model = onnx.helper.make_graph(nodes, "g", spec[:1], spec[1:], weights)
    return onnx.helper.make_model(model, opset_imports=opsets, ir_version=8)


def test_an_operator_comes_with_its_library_and_not_without(compiler, load, library):
    name, path = library
    # By default TensorRT starts cuBLAS and cuDNN for any plugin, should it want them; this one does not.
    sources = ["jit-convolutions", "edge-mask-convolutions"]
    asked = {"keep_opset": True, "profiles": VECTOR, "tactic_sources": sources}
    error = compiler.refuse(asks(), **asked)
    assert error.kind == "missing plugin"
    assert "acme::Answer" in str(error)

    result, output = compiler(asks(), files={name: path.read_bytes()}, **asked)
    assert result.facts["plugins"] == ["acme::Answer 1"]

    with pytest.raises(BackendError) as caught:
        load(output / "model.plan")
    assert caught.value.kind == "missing plugin", caught.value

    found = load(output / "model.plan", plugins=[path])({"x": np.ones((2, 4), np.float32)})["y"]
    np.testing.assert_array_equal(found, np.full((2, 4), 40, np.float32))
