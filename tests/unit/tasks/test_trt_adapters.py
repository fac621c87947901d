"""TensorRT without a GPU: adapters against the bindings of real versions, logs, profiles, types, retries.

The bindings are looked for in the folders that ENGINERY_TRT_BINDINGS names (separated by ":"), one for each version:
    pip install --no-deps --target /tmp/trt8 tensorrt-bindings==8.6.1
    pip install --no-deps --target /tmp/trt10 tensorrt-cu13-bindings==10.16.1.11
    pip install --no-deps --target /tmp/trt11 tensorrt-cu13-bindings==11.4.0.106
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks import halves
from tasks.engines import trt_log
from tasks.engines.profiles import Profile, choose_profile
from tasks.engines.trt import LEAST_WORKSPACE, Build, _smaller
from tasks.engines.trt_types import as_type, bf16_bits, widened
from tasks.engines.trt_v8 import Weak, typing_of
from tasks.errors import KINDS, BackendError
from tasks.process import Limits, run_stage
from tasks.stage import StageRequest, StageResult
from tests.contract import graphs
from tests.unit.tasks.small_graphs import cnn, graph, node

ROOT = Path(__file__).resolve().parents[3]
PROFILE = {"name": "one", "inputs": {"x": {"min": [1, 1, 8, 8], "opt": [2, 1, 8, 8], "max": [4, 1, 16, 16]}}}


@pytest.fixture(scope="module", params=["8", "10", "11"])
def bindings(request, tmp_path_factory):
    """What our code finds in the bindings of one major version, as trt_bindings reports it."""
    folders = [Path(name) for name in os.environ.get("ENGINERY_TRT_BINDINGS", "").split(":") if name]
    for folder in folders:
        if list(folder.glob(f"tensorrt*_bindings-{request.param}.*.dist-info")):
            break
    else:
        pytest.skip(
            f"no bindings of TensorRT {request.param} in ENGINERY_TRT_BINDINGS (this file says how to get them)"
        )
    if shutil.which("gcc") is None or shutil.which("nm") is None:
        pytest.skip("gcc and nm are needed to stand in for TensorRT's libraries")
    model = tmp_path_factory.mktemp("graph") / "model.onnx"
    model.write_bytes(at_opset(cnn(), 17).SerializeToString())
    command = [sys.executable, "-m", "tests.unit.tasks.trt_bindings", str(folder), str(model)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_adapter_is_chosen_by_what_the_module_has(bindings):
    major = bindings["version"].split(".")[0]
    expected = {"8": ("Weak", 1), "10": ("StronglyTyped", bindings["strongly_typed"]), "11": ("Typed", 0)}[major]
    assert (bindings["adapter"], bindings["network_flags"]) == expected


def major_of(bindings):
    return int(bindings["version"].split(".")[0])


def test_weak_typing_is_refused_where_it_ended(bindings):
    if major_of(bindings) < 11:
        newer = ["fp32", "tf32", "fp16", "bf16", "int8", "int8-fp16"]
        expected = {8: [17, ["fp32", "tf32", "fp16", "int8", "int8-fp16"]], 10: [None, newer]}[major_of(bindings)]
        assert bindings["weak"] == ["Untyped", 1, *expected]
        assert bindings["missing for calibration"] == []
        assert bindings["calibrator"] == [[True, "cache", [], True]] * 2
    else:
        for found, member in (("weak", "BuilderFlag.FP16"), ("calibrator", "IInt8EntropyCalibrator2")):
            kind, message, advice = bindings[found]
            assert (kind, member in message) == ("version mismatch", True)
            assert "8.6" in advice


def test_options_that_came_or_went_are_refused_naming_the_versions_that_have_them(bindings):
    gone = {name for name, refused in bindings["sources"].items() if refused is not None}
    assert gone == (set() if major_of(bindings) < 11 else {"CUBLAS", "CUBLAS_LT", "CUDNN"})
    assert all("8.6 or 10" in bindings["sources"][name][2] for name in gone)
    assert bindings["preview"] is (major_of(bindings) < 10)
    assert (bindings["missing for streaming"] == []) is (major_of(bindings) > 8)
    assert (bindings["missing for refitting"] == []) is (major_of(bindings) > 8)
    assert (bindings["missing for fully connected"] == []) is (major_of(bindings) == 8)
    assert bindings["dla"] is None
    assert bindings["creators"]


def test_the_timing_cache_can_be_edited_from_10_8_on(bindings):
    flags = ["EDITABLE_TIMING_CACHE", "DISABLE_COMPILATION_CACHE", "ERROR_ON_TIMING_CACHE_MISS"]
    editable = major_of(bindings) > 8
    assert bindings["replay flags"] == [[name, None] for name in flags if editable]
    assert (bindings["missing for editing"] == []) is editable


def test_every_member_that_is_used_is_there(bindings):
    assert bindings["missing"] == []
    assert bindings["device_memory"]
    assert bindings["bare_contexts"]
    assert bindings["given_memory"]
    for method in (
        "reallocate_output(self, tensor_name, memory, size, alignment)",
        "notify_shape(self, tensor_name, shape)",
    ):
        assert method in bindings["allocator"]  # what is called on a subclass is not a member of the base
    assert bindings["signatures"] == {path: [] for path in bindings["signatures"]}
    assert bindings["members"] == [None] * len(bindings["members"])
    newer = {"BF16", "INT64"} if major_of(bindings) > 8 else set()
    assert {"FLOAT", "HALF", "INT8", "INT32", "UINT8", "BOOL"} | newer <= set(bindings["types"])


def test_every_option_has_its_flag(bindings):
    lacking = {name for name, refused in bindings["flags"].items() if refused is not None}
    assert lacking == (set() if major_of(bindings) > 8 else {"STRIP_PLAN", "WEIGHT_STREAMING"})
    assert all("10.0 and later" in bindings["flags"][name][2] for name in lacking)
    lacking = {name for name, refused in bindings["hardware"].items() if refused is not None}
    assert lacking == (set() if major_of(bindings) > 8 else {"SAME_COMPUTE_CAPABILITY"})
    assert (bindings["bf16"] is None) is (major_of(bindings) > 8)


def test_loggers_and_progress_monitors_are_of_the_versions_own_types(bindings):
    assert bindings["errors"] == ["words"]
    if major_of(bindings) > 8:  # which has no progress monitor: the log reports
        assert [0.0, "Building"] in bindings["said"]
        assert True in bindings["said"]  # a monitor's step says: go on


def test_a_builder_that_does_not_start_is_no_device(bindings):
    kind, message, advice = bindings["build"]
    assert kind == "no device"
    assert bindings["version"] in message
    assert "driver" in advice


def compile_with_rtx(request: StageRequest) -> StageResult:
    """Stage code: compile through the interface of TensorRT 11, which TensorRT-RTX has too, on a CPU."""
    import tensorrt_rtx

    facts = Build(tensorrt_rtx, request).compile(lambda: 1 << 30)
    return StageResult({"model.plan": "x", "timing.cache": "x"}, facts)


def at_opset(model, opset):
    del model.opset_import[:]
    model.opset_import.append(graphs.helper.make_opsetid("", opset))
    return model


class OnRtx:
    """Our compiler run for real on the one TensorRT that needs no GPU; its interface is that of 11."""

    def __init__(self, folder):
        self.folder, self.progress = folder, []
        self.inputs = {"model.onnx": folder / "model.onnx"}

    def __call__(self, model, **params):
        (self.folder / "model.onnx").write_bytes(model.SerializeToString())
        output = self.folder / "out"
        output.mkdir()
        asked = {"tf32": False, "profiles": [PROFILE], "workspace": 64 << 20, "optimization_level": None}
        return run_stage(
            "compile",
            asked | params,
            self.inputs,
            output,
            limits=Limits(timeout_s=120, memory_bytes=8 << 30),
            on_progress=lambda *said: self.progress.append(said),
            entry="tests.unit.tasks.test_trt_adapters:compile_with_rtx",
        )

    def refuse(self, model, **params):
        with pytest.raises(BackendError) as caught:
            self(model, **params)
        assert str(self.folder) not in str(caught.value)
        return caught.value


@pytest.fixture
def on_rtx(tmp_path):
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed (pip install 'enginery[tensorrt-rtx]')")
    return OnRtx(tmp_path)


def test_a_reproducible_build_sets_the_flags_of_an_editable_timing_cache(on_rtx):
    flags = {"EDITABLE_TIMING_CACHE", "DISABLE_COMPILATION_CACHE"}
    settings = on_rtx(cnn(), reproducible=True).facts["settings"]
    assert {name for name in settings if "CACHE" in name} == flags
    assert {settings[name] for name in flags} == {True}


def test_a_pinned_timing_cache_is_used_or_the_build_fails(on_rtx):
    (on_rtx.folder / "timing.cache").write_bytes(b"no timing cache")
    on_rtx.inputs["timing.cache"] = on_rtx.folder / "timing.cache"
    error = on_rtx.refuse(cnn(), timing_cache="pinned")
    assert error.kind == "version mismatch"
    assert "does not take the pinned timing cache" in error.message
    assert "build.timing_cache" in error.advice


def test_the_interface_of_11_compiles_a_typed_graph(on_rtx):
    typed = halves.to_half(cnn(), "fp16", set(), native=False).model
    result = on_rtx(typed, tf32=True, optimization_level=2)
    assert result.facts["settings"]["TF32"] is True
    assert result.facts["settings"]["builder_optimization_level"] == 2
    assert "FP16" not in result.facts["settings"]
    assert result.facts["workspace"] == {"asked": 64 << 20, "limit": 64 << 20, "tried": [64 << 20]}
    assert result.facts["inputs"] == {"x": {"dtype": "FLOAT", "shape": [-1, 1, -1, -1]}}
    assert (on_rtx.folder / "out" / "model.plan").stat().st_size > 0
    assert on_rtx.progress


@pytest.mark.parametrize(
    ("model", "params", "kind", "words"),
    [
        (cnn(), {"optimization_level": 9}, "rejected setting", "builder_optimization_level"),
        (cnn(), {"hardware_compatibility": "sideways"}, "rejected setting", "same-compute-capability"),
        (cnn(), {"tactic_sources": ["ABACUS"]}, "version mismatch", "TacticSource.ABACUS"),
        (cnn(), {"profiles": [{"name": "p", "inputs": {"y": PROFILE["inputs"]["x"]}}]}, "bad profile", "x, y"),
        (cnn(), {"profiles": [{"name": "p", "inputs": {"x": {c: [1, 2, 8, 8] for c in ("min", "opt", "max")}}}]}, "bad profile", "does not fit"),
        (cnn(), {"profiles": [{"name": "p", "inputs": {"x": {"min": [4, 1, 8, 8], "opt": [1, 1, 8, 8], "max": [4, 1, 8, 8]}}}]}, "bad profile", "profile p"),
        (graphs.model([graphs.helper.make_node("Frobnicate", ["x"], ["y"], name="f", domain="acme")], graphs.IMAGE, [graphs.value("y", ["n", 3, "h", "w"])], domains=("acme",)), {}, "missing plugin", "acme::Frobnicate"),
    ],
)  # fmt: skip
def test_refusals_name_what_is_refused(on_rtx, model, params, kind, words):
    error = on_rtx.refuse(model, **params)
    assert error.kind == kind, error
    assert words in str(error)
    assert error.advice


@pytest.mark.parametrize(
    ("words", "kind"),
    [
        # TensorRT 8.6.0 on an H200
        ('Assertion failed: creator && "Plugin not found, are the plugin name, version, and namespace correct?"', "missing plugin"),
        ("1: [runtime.cpp::parsePlan::314] Error Code 1: Serialization (Serialization assertion plan->header.magicTag == rt::kPLAN_MAGIC_TAG failed.)", "version mismatch"),
        ("6: [libLoader.cpp::Impl::293] Error Code 6: Internal Error (Unable to load library: libnvinfer_lean.so.8.6.0)", "missing package"),
        ("3: SymbolAddress for cublasGetProperty could not be loaded, check function name against library symbol", "missing package"),
        ("6: [libLoader.cpp::Impl::293] Error Code 6: Internal Error (Unable to load library: libcublas.so.12)", "missing package"),
        ("6: [executionResources.cpp] Error Code 6: Could not initialize cudnn, please check cudnn installation.", "missing package"),
        ("4: [graphShapeAnalyzer.cpp::processCheck::862] Error Code 4: Internal Error (c: tensor volume exceeds (2^31)-1, dimensions are [1,16,16384,16384])", "bad profile"),
        # strings of the libraries, and of reports
        ("1: [pluginV2Runner.cpp::load::303] Error Code 1: Serialization (Serialization assertion creator failed.Cannot deserialize plugin since corresponding IPluginCreator not found in Plugin Registry)", "missing plugin"),
        ("10: [optimizer.cpp::computeCosts::3869] Error Code 10: Internal Error (Could not find any implementation for node conv.)", "no kernel"),
        ("2: [virtualMemoryBuffer.cpp::resizePhysical::140] Error Code 2: OutOfMemory (no further information)", "out of memory"),
        ("2: [virtualMemoryBuffer.cpp::resizePhysical::145] Error Code 2: OutOfMemory (no further information)\n10: Could not find any implementation for node Conv_c.", "out of memory"),
        ("Requested amount of GPU memory (34359738368 bytes) could not be allocated.", "out of memory"),
        ("CUDA initialization failure with error: 35. Please check your CUDA installation", "no device"),
        ("6: The engine plan file is not compatible with this version of TensorRT, expecting library version 8.6.1.6 got 8.6.0.12", "version mismatch"),
        ("6: The engine plan file is generated on an incompatible device, expecting compute 9.0 got compute 8.6", "version mismatch"),
        ("No importer registered for op: Unique. Attempting to import as plugin.", "unsupported operator"),
        ("4: [network.cpp::validate::3102] Error Code 4: Internal Error (Network has dynamic or shape inputs, but no optimization profile has been defined.)", "bad profile"),
        ("something new", "crash"),
    ],
)  # fmt: skip
def test_failures_are_told_apart_by_tensorrts_words(words, kind):
    assert trt_log.kind_of(words) == kind
    log = trt_log.Log(lambda _fraction, _text: None)
    log.write("ERROR", words)
    failure = log.failure("it failed")
    assert (failure.kind, words in failure.message) == (kind, True)
    assert failure.advice


def test_every_kind_of_failure_is_one_of_ours():
    assert {kind for kind, _pattern in trt_log._KINDS} | set(trt_log._ADVICE) <= set(KINDS)


def test_messages_name_no_temporary_folder(capsys):
    log = trt_log.Log(lambda _fraction, _text: None, folder="/scratch/stage")
    log.write("ERROR", " Failed to parse /scratch/stage/model.onnx\n")
    log.write("ERROR", "Failed to parse /scratch/stage/model.onnx")
    assert log.errors == ["Failed to parse model.onnx"]
    assert (log.take_errors(0), log.errors, log.lines) == (["Failed to parse model.onnx"], [], 2)
    assert "[ERROR]" in capsys.readouterr().err


def test_the_log_beats_where_there_is_no_progress_monitor():
    said = []
    log = trt_log.Log(lambda *progress: said.append(progress))
    log.write("VERBOSE", "something else")
    log.write("VERBOSE", "--------------- Timing Runner: /conv1/Conv (CaskConvolution[0x80000009])")
    log.write("VERBOSE", "--------------- Timing Runner: /conv2/Conv (CaskConvolution[0x80000009])")
    assert said == [(None, "compiling, 1 layers and formats timed: /conv1/Conv")]


@given(st.lists(st.integers(1, 6), min_size=1, max_size=4))
def test_nested_phases_make_one_fraction_that_never_falls(counts):
    said = []
    phases = trt_log.Phases(lambda fraction, _text: said.append(fraction))

    def run(depth, parent):
        name = f"phase {depth}"
        phases.start(name, parent, counts[depth])
        for step in range(counts[depth]):
            phases._spoke = -1e9  # every step may speak
            if depth + 1 < len(counts):
                run(depth + 1, name)
            phases.step(name, step)
        phases.finish(name)

    run(0, None)
    assert said == sorted(said)
    assert said[-1] == 1.0


@given(st.integers(0, 1 << 38), st.integers(1, 1 << 40))
def test_workspaces_halve_down_to_the_least(first, free):
    tried = [max(first, 1)]
    while (following := _smaller(tried, lambda: free)) is not None:
        assert LEAST_WORKSPACE <= following < tried[-1]
        assert following <= max(free // 2, LEAST_WORKSPACE)
        tried.append(following)
    assert len(tried) < 20
    assert tried[-1] <= LEAST_WORKSPACE
    assert _smaller([], lambda: free) is None


def test_a_graph_says_which_flags_of_8_6_it_needs(tmp_path):
    def flags(model):
        (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
        return typing_of(tmp_path / "model.onnx")

    assert flags(cnn()) == ((), frozenset())
    assert flags(graphs.classifier(quantised=True)) == (("INT8",), frozenset())
    assert flags(halves.to_half(cnn(), "fp16", set(), native=False).model) == (("FP16",), frozenset())
    kept = halves.to_half(cnn(), "fp16", {"pool", "flatten", "head/gemm"}, native=True).model
    assert flags(kept) == (("FP16",), frozenset({"pool", "head/gemm"}))  # Flatten computes nothing


class Layer:
    """A layer of a network in 8.6, whose own objects need a GPU: what `trt_v8` reads and sets of one."""

    def __init__(self, name, metadata="", dtype="FLOAT"):
        self.name, self.metadata, self.precision, self.types = name, metadata, None, {}
        self.num_outputs, self._output = 1, SimpleNamespace(dtype=dtype)

    def get_output(self, _index):
        return self._output

    def set_output_type(self, index, dtype):
        self.types[index] = dtype


def test_only_layers_of_kept_nodes_are_held_in_fp32(tmp_path):
    kept = halves.to_half(cnn(), "fp16", {"pool", "head/gemm"}, native=True).model
    (tmp_path / "model.onnx").write_bytes(kept.SerializeToString())
    layers = [
        Layer("stem/conv"),
        Layer("pool"),
        Layer("(Unnamed Layer* 7) [Shuffle]", "[ONNX Layer: head/gemm]"),
        Layer("head/gemm_shape", "[ONNX Layer: head/gemm]\x1e[ONNX Layer: flatten]", "INT32"),
        Layer("flatten", "[ONNX Layer: flatten]"),
    ]
    network = SimpleNamespace(num_layers=len(layers), get_layer=layers.__getitem__)
    module = SimpleNamespace(DataType=SimpleNamespace(FLOAT="FLOAT"))
    assert Weak().type_flags(module, network, tmp_path / "model.onnx", {}) == ("FP16", "OBEY_PRECISION_CONSTRAINTS")
    assert [layer.precision for layer in layers] == [None, "FLOAT", "FLOAT", None, None]
    assert [layer.types for layer in layers] == [{}, {0: "FLOAT"}, {0: "FLOAT"}, {}, {}]


PROFILES = [
    Profile(0, {"x": [[1, 8], [1, 8], [4, 16]]}),
    Profile(1, {"x": [[1, 8], [64, 8], [128, 8]]}),
    Profile(2, {"x": [[1, 8], [1, 8], [4, 16]]}),
]


@pytest.mark.parametrize(("shape", "index"), [((1, 8), 0), ((4, 16), 0), ((60, 8), 1), ((4, 8), 0), ((128, 8), 1)])
def test_the_profile_tuned_nearest_is_chosen(shape, index):
    assert choose_profile(PROFILES, {"x": shape}, "here").index == index


@pytest.mark.parametrize("shape", [(5, 16), (129, 8), (1, 7), (0, 8), (1, 8, 1), ()])
def test_shapes_outside_of_all_profiles_are_refused(shape):
    with pytest.raises(BackendError, match=r"here: no profile .* profile 1: x \[1, 8\] to \[128, 8\]") as caught:
        choose_profile(PROFILES, {"x": shape}, "here")
    assert caught.value.kind == "bad profile"


def test_inputs_are_cast_only_where_nothing_is_lost_but_width():
    assert as_type(np.ones(3, np.float64), "HALF", "x").dtype == np.float16
    assert as_type(np.ones((2, 3), np.float32).T, "FLOAT", "x").flags.c_contiguous
    assert as_type(np.array(5, np.int64), "INT32", "x").shape == ()
    assert as_type(np.array([5], np.int32), "INT64", "x").dtype == np.int64
    for values, kind in [
        (np.array([1 << 31]), "INT32"),
        (np.ones(1, np.int64), "FLOAT"),
        (np.ones(1, np.float32), "INT8"),
        (np.ones(1, np.bool_), "INT32"),
        (np.ones(1, np.float32), "FP8"),
    ]:
        with pytest.raises(BackendError, match="input x") as caught:
            as_type(values, kind, "input x")
        assert caught.value.kind == "bad data"


@given(st.lists(st.floats(width=32), max_size=20))
def test_bfloat16_is_rounded_as_the_typing_stage_rounds(values):
    array = np.array(values, np.float32)
    np.testing.assert_array_equal(bf16_bits(array), halves.round_to_half(array, "bf16"))
    np.testing.assert_array_equal(
        widened(bf16_bits(widened(bf16_bits(array), "BF16")), "BF16"), widened(bf16_bits(array), "BF16")
    )


def test_a_scalar_keeps_its_shape_in_bfloat16():
    assert as_type(np.array(1.5, np.float32), "BF16", "x").shape == ()
    assert widened(as_type(np.array(1.5, np.float32), "BF16", "x"), "BF16") == 1.5


def test_an_operator_that_the_parser_does_not_take_is_named(on_rtx):
    model = graph([node("Unique", ["x"], ["y"])], {}, outputs={"y": (1, ["count"])})
    shapes = {"min": [1, 4], "opt": [1, 4], "max": [1, 4]}
    error = on_rtx.refuse(model, profiles=[{"name": "p", "inputs": {"x": shapes}}])
    assert (error.kind, "Unique" in error.advice) == ("unsupported operator", True)
