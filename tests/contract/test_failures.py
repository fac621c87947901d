"""Every class of failure, provoked in a real compile stage on a host without a GPU; tests/gpu/test_failures.py has the rest."""

import contextlib
import ctypes
import dataclasses
import resource
import sys

import pytest

from tasks.engines import run
from tasks.errors import BackendError
from tasks.process import Limits, run_stage
from tests.contract import graphs

CORNERS = {"min": [1, 3, 8, 8], "opt": [1, 3, 8, 8], "max": [4, 3, 32, 32]}
RTX = {
    "runtime": "tensorrt-rtx",
    "gpu": "sm89",
    "tf32": False,
    "profiles": [{"name": "p", "inputs": {"x": CORNERS}}],
    "workspace": None,
    "optimization_level": None,
    "hardware_compatibility": "none",
    "version_compatible": False,
}
HERE = "tests.contract.test_failures:"


def from_the_future():
    graph = graphs.classifier()
    graph.opset_import[0].version = 99
    return graph


def on_a_full_disk(request):
    """Compile where no file may exceed 16 KiB, which the kernel says as a full disk is said."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 14, 1 << 14))
    return run(request)


def crash_in_the_compiler(request):
    """Compile, and touch memory that is not there when the compiler tells of its progress."""
    return run(dataclasses.replace(request, report=lambda _f, text: text == "compiling" or ctypes.string_at(0)))


def hang_in_the_compiler(request):
    """Compile, and never come back from telling of it."""
    import time

    return run(dataclasses.replace(request, report=lambda _fraction, _text: time.sleep(600)))


def for_a_gpu_that_is_not_here(request):
    """Compile as classic TensorRT does, whose first question is for the device; TensorRT-RTX stands in for its package."""
    import tensorrt_rtx

    sys.modules["tensorrt"] = tensorrt_rtx
    return run(request)


FAILURES = {
    "out of memory": (graphs.classifier, {"workspace": 1 << 20}, {}, "build.workspace"),
    "unsupported operator": (graphs.determinant, {}, {}, "change the model"),
    "no kernel": (graphs.classifier, {"gpu": "sm75"}, {}, "another precision"),
    "missing plugin": (lambda: graphs.unknown_operator("acme"), {}, {}, "acme::Frobnicate"),
    "bad profile": (graphs.classifier, {"profiles": []}, {}, "[min, opt, max]"),
    "version mismatch": (from_the_future, {"runtime": "onnxruntime", "gpu": "cpu"}, {}, "export.opset"),
    "no device": (
        graphs.classifier,
        {"runtime": "tensorrt", "gpu": "sm90"},
        {"entry": f"{HERE}for_a_gpu_that_is_not_here"},
        "enginery doctor",
    ),
    "crash": (graphs.classifier, {}, {"entry": f"{HERE}crash_in_the_compiler"}, "report it"),
    "time-out": (graphs.classifier, {}, {"entry": f"{HERE}hang_in_the_compiler", "timeout_s": 4}, "build.timeout"),
    "disk full": (graphs.classifier, {}, {"entry": f"{HERE}on_a_full_disk"}, "larger disk"),
}
# The compiler's (or the system's) own words, which every message carries.
WORDS = {
    "out of memory": "workspace",
    "unsupported operator": "node 'det' (Det)",
    "no kernel": "FP32 GEMM is not supported",
    "missing plugin": "Frobnicate",
    "bad profile": "no optimization profile",
    "version mismatch": "99",
    "no device": "CUDA",
    "crash": "SIGSEGV",
    "time-out": "after 4 s",
    "disk full": "File too large",
}


def provoke(kind, folder):
    graph, params, how, _advice = FAILURES[kind]
    output = folder / "outputs"
    output.mkdir()
    return run_stage(
        "compile",
        RTX | params,
        graphs.save(graph(), folder),
        output,
        limits=Limits(timeout_s=how.get("timeout_s", 120), memory_bytes=8 << 30),
        entry=how.get("entry"),
    )


@pytest.mark.parametrize("kind", FAILURES)
def test_every_class_of_failure_says_the_compilers_words_and_what_to_do(kind, tmp_path):
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed (pip install 'enginery[tensorrt-rtx]')")
    if kind == "no device":
        pytest.importorskip("cuda.bindings", reason="cuda-bindings is not installed")
        from tasks.engines import cuda

        with contextlib.suppress(BackendError):
            pytest.skip(f"{cuda.device_count()} CUDA devices are here")
    with pytest.raises(BackendError) as caught:
        provoke(kind, tmp_path)
    assert caught.value.kind == kind, caught.value
    assert WORDS[kind] in caught.value.message
    assert FAILURES[kind][3] in caught.value.advice
    if kind not in ("crash", "time-out"):  # of which the log's last lines are told as they are
        assert str(tmp_path) not in str(caught.value)
