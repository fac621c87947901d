"""Plugin libraries, compiled here and loaded by a real plugin registry: that of TensorRT-RTX, which needs no GPU."""

import json
import shutil
import subprocess
import sys

import pytest

# What NvInferRuntime.h of TensorRT 10 and later declares of a creator, by layout of its table of virtual functions.
CREATOR = """
#include <cstdint>
struct InterfaceInfo { char const* kind; int32_t major; int32_t minor; };
struct Fields { int32_t count; void const* fields; };
struct Creator {
    virtual int getAPILanguage() const noexcept { return 0; }
    virtual InterfaceInfo getInterfaceInfo() const noexcept { return {"PLUGIN CREATOR_V3ONE", 1, 0}; }
    virtual ~Creator() = default;
    virtual void* createPlugin(char const*, Fields const*, int) noexcept { return nullptr; }
    virtual Fields const* getFieldNames() noexcept { static Fields none{0, nullptr}; return &none; }
    virtual char const* getPluginName() const noexcept { return "Deform"; }
    virtual char const* getPluginVersion() const noexcept { return "2"; }
    virtual char const* getPluginNamespace() const noexcept { return "acme"; }
};
extern "C" void setLoggerFinder(void*) {}
extern "C" Creator* const* getCreators(int32_t& count) {
    static Creator creator;
    static Creator* const all[] = {&creator};
    count = 1;
    return all;
}
"""
NEEDY = 'extern "C" int of_another_library(); extern "C" int call() { return of_another_library(); }'
# In a process of its own: what a library registers stays until the process ends.
LOAD = """
import json, sys
from pathlib import Path
import tensorrt_rtx
from tasks.engines.trt_plugins import load_plugins
from tasks.errors import BackendError
try:
    found = load_plugins(tensorrt_rtx, [Path(name) for name in sys.argv[1:]])
except BackendError as err:
    found = {"kind": err.kind, "message": err.message, "advice": err.advice}
print("RESULT", json.dumps(found))
"""


@pytest.fixture
def library(tmp_path):
    """Compile C++ to a shared library."""
    if shutil.which("g++") is None:
        pytest.skip("g++ is needed to compile a plugin library")

    def compiled(source, name, *options):
        (tmp_path / f"{name}.cpp").write_text(source)
        target = tmp_path / f"{name}.so"
        subprocess.run(
            ["g++", "-shared", "-fPIC", *options, "-o", target, tmp_path / f"{name}.cpp"], check=True, timeout=120
        )
        return target

    return compiled


def load(*paths):
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed (pip install 'enginery[tensorrt-rtx]')")
    done = subprocess.run(
        [sys.executable, "-c", LOAD, *map(str, paths)], capture_output=True, text=True, timeout=60, check=True
    )
    return json.loads(done.stdout.partition("RESULT ")[2])


def test_a_library_that_exports_its_creators_is_registered(library):
    assert load(library(CREATOR, "deform")) == ["acme::Deform 2"]


def test_a_library_that_brings_no_plugin_is_refused(library):
    error = load(library('extern "C" int answer() { return 42; }', "empty"))
    assert error["kind"] == "missing plugin"
    assert "empty.so registers no plugin" in error["message"]
    assert "getCreators" in error["advice"]


def test_a_library_that_cannot_be_loaded_says_why(library, tmp_path):
    error = load(library(NEEDY, "needy", "-Wl,-z,now"))
    assert (error["kind"], "of_another_library" in error["message"]) == ("missing plugin", True)
    (tmp_path / "text.so").write_text("no library")
    error = load(tmp_path / "text.so")
    assert (error["kind"], "text.so cannot be loaded" in error["message"]) == ("missing plugin", True)
    assert str(tmp_path) not in error["message"]


def test_nothing_is_loaded_where_nothing_is_named():
    assert load() == []
