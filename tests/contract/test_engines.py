"""What every engine backend promises, and what each refuses; all in fresh processes, as in a build."""

import json
from importlib import metadata
from typing import ClassVar

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from recipes.engine_stages import PLAN_NAMES, RUNTIME_PACKAGES
from recipes.schema import GPUS
from tasks.engines import RUNTIMES
from tasks.errors import BackendError
from tasks.process import Limits, run_stage
from tasks.toolchain import BACKENDS
from tests.contract import graphs

PROFILES = [
    {"name": "online", "inputs": {"x": {"min": [1, 3, 8, 8], "opt": [1, 3, 16, 16], "max": [1, 3, 32, 32]}}},
    {"name": "batch", "inputs": {"x": {"min": [1, 3, 8, 8], "opt": [8, 3, 16, 16], "max": [16, 3, 32, 32]}}},
]


class EngineContract:
    """Subclassed for each backend."""

    runtime = ""
    gpu = ""
    options: ClassVar[dict] = {}

    @pytest.fixture(autouse=True)
    def _folders(self, tmp_path):
        self.folder = tmp_path
        self.output_dir = tmp_path / "outputs"
        self.output_dir.mkdir()
        self.progress = []

    def compile(self, graph, *, external=False, entry=None, **params):
        inputs = graph if isinstance(graph, dict) else graphs.save(graph, self.folder, external=external)
        return run_stage(
            "compile",
            {"runtime": self.runtime, "gpu": self.gpu, **self.options, **params},
            inputs,
            self.output_dir,
            limits=Limits(timeout_s=120, memory_bytes=8 << 30),
            on_progress=lambda *said: self.progress.append(said),
            entry=entry,
        )

    def refuse(self, graph, **params):
        with pytest.raises(BackendError) as caught:
            self.compile(graph, **params)
        assert caught.value.advice
        assert str(self.folder) not in str(caught.value)
        return caught.value

    @pytest.fixture
    def known(self):
        return RUNTIMES[self.runtime]

    def test_a_graph_becomes_a_plan(self, known):
        result = self.compile(graphs.classifier())
        assert dict(result.outputs) == {known.plan_name: known.media_type}
        assert (self.output_dir / known.plan_name).stat().st_size > 0
        assert result.facts["runtime_version"] == metadata.version(known.package)
        assert result.facts["warnings"] == []

    def test_progress_rises_to_something(self):
        self.compile(graphs.classifier())
        fractions = [fraction for fraction, _text in self.progress]
        assert fractions == sorted(fractions)
        assert fractions[0] < fractions[-1] <= 1.0

    def test_a_quantised_graph_becomes_a_plan(self):
        self.compile(graphs.classifier(quantised=True))

    def test_weights_may_lie_beside_the_graph(self):
        self.compile(graphs.classifier(), external=True)

    def test_an_unknown_operator_is_named(self):
        error = self.refuse(graphs.unknown_operator())
        assert error.kind == "unsupported operator"
        assert "Frobnicate" in error.message
        assert "frob" in error.message

    def test_what_is_no_graph_is_bad_data(self):
        path = self.folder / "model.onnx"
        path.write_bytes(b"hello world" * 10)
        assert self.refuse({"model.onnx": path}).kind == "bad data"

    def test_a_graph_cut_short_is_bad_data(self):
        inputs = graphs.save(graphs.classifier(), self.folder)
        content = inputs["model.onnx"].read_bytes()
        inputs["model.onnx"].write_bytes(content[: len(content) // 2])
        assert self.refuse(inputs).kind == "bad data"

    def test_missing_weights_are_bad_data(self):
        inputs = graphs.save(graphs.classifier(), self.folder, external=True)
        inputs.pop("model.onnx.data").unlink()
        error = self.refuse(inputs)
        assert error.kind == "bad data"
        assert "model.onnx.data" in error.message

    def test_a_gpu_that_it_does_not_compile_for_is_refused(self):
        error = self.refuse(graphs.classifier(), gpu="sm90")
        assert error.kind == "rejected setting"
        assert "sm90" in error.message

    def test_a_missing_runtime_names_what_installs_it(self, known):
        error = self.refuse(graphs.classifier(), entry="tests.contract.test_engines:without_the_runtime")
        assert error.kind == "missing package"
        assert error.advice == known.install


def without_the_runtime(request):
    """The compile stage on a host without the runtime."""
    import sys

    from tasks.engines import run

    sys.modules[RUNTIMES[request.params["runtime"]].package] = None
    return run(request)


class TestTensorRtRtx(EngineContract):
    runtime = "tensorrt-rtx"
    gpu = "sm89"
    options: ClassVar[dict] = {
        "tf32": False,
        "profiles": PROFILES,
        "workspace": None,
        "optimization_level": None,
        "hardware_compatibility": "none",
        "version_compatible": False,
    }

    @pytest.mark.parametrize("gpu", ["sm80", "sm86", "sm89", "sm120"])
    def test_a_plan_is_for_the_gpu_that_was_asked_for(self, gpu):
        facts = self.compile(graphs.classifier(), gpu=gpu).facts
        head = (self.output_dir / "model.plan").read_bytes()[:64]
        assert head[:4] == b"vtrt"
        assert ".".join(map(str, head[24:28])) == metadata.version("tensorrt_rtx")
        assert facts["header"]["compute_capabilities"] == [gpu]
        assert facts["inputs"] == {"x": {"dtype": "float", "shape": [None, 3, None, None]}}
        assert facts["settings"]["profiles"] == 2

    def test_half_precision_compiles_for_turing_where_single_does_not(self):
        self.compile(graphs.classifier(dtype=np.float16), gpu="sm75")

    def test_a_gpu_without_the_kernels_is_said(self):
        error = self.refuse(graphs.classifier(), gpu="sm75")
        assert error.kind == "no kernel"
        assert "FP32 GEMM is not supported" in error.message

    def test_a_type_that_the_gpu_lacks_is_said(self):
        error = self.refuse(graphs.float8(), gpu="sm86")
        assert error.kind == "no kernel"
        assert "fp8_e4m3" in error.message

    def test_settings_are_made_and_read_back(self):
        facts = self.compile(graphs.classifier(), tf32=True, workspace=1 << 30, optimization_level=5).facts
        assert facts["settings"] == {
            "targets[].gpus": ["sm89"],
            "tf32": True,
            "build.workspace": 1 << 30,
            "build.optimization_level": 5,
            "profiles": 2,
        }

    @pytest.mark.parametrize(("name", "value"), [("hardware_compatibility", "ampere+"), ("version_compatible", True)])
    def test_what_it_would_only_ignore_is_refused(self, name, value):
        error = self.refuse(graphs.classifier(), **{name: value})
        assert error.kind == "rejected setting"
        assert f"build.{name}" in error.message

    def test_a_setting_that_does_not_stick_is_refused(self):
        error = self.refuse(graphs.classifier(), optimization_level=9)
        assert error.kind == "rejected setting"
        assert "build.optimization_level: asked for 9" in error.message

    def test_too_small_a_workspace_is_out_of_memory(self):
        error = self.refuse(graphs.classifier(), workspace=1 << 20)
        assert error.kind == "out of memory"
        assert "build.workspace" in error.advice

    def test_an_operator_that_needs_an_absent_plugin_is_named(self):
        error = self.refuse(graphs.nonzero())
        assert error.kind == "missing plugin"
        assert "node 'nz' (NonZero)" in error.message

    def test_an_operator_of_another_domain_needs_a_plugin(self):
        error = self.refuse(graphs.unknown_operator("acme"))
        assert error.kind == "missing plugin"
        assert "acme::Frobnicate" in error.advice

    def test_an_operator_that_it_refuses_without_a_word_is_named(self):
        error = self.refuse(graphs.determinant())
        assert error.kind == "unsupported operator"
        assert "node 'det' (Det) is not supported" in error.message

    def test_an_operator_that_only_parses_is_said(self):
        assert self.refuse(graphs.suppression(), profiles=[]).kind == "no kernel"

    def test_asymmetric_quantisation_is_said(self):
        error = self.refuse(graphs.classifier(quantised=True, zero_point=3))
        assert error.kind == "unsupported operator"
        assert "Non-zero zero point" in error.message
        assert "symmetric" in error.advice

    @pytest.mark.parametrize(
        ("profiles", "words"),
        [
            ([], "no optimization profile"),
            ([{"name": "p", "inputs": {}}], "profile p lacks input(s) x"),
            ([{"name": "p", "inputs": PROFILES[0]["inputs"] | {"z": {}}}], "profile p names unknown input(s) z"),
            ([{"name": "p", "inputs": {"x": {c: [1, 4, 8, 8] for c in ("min", "opt", "max")}}}], "tensor has 3"),
            ([{"name": "p", "inputs": {"x": {c: [1, 3, 8] for c in ("min", "opt", "max")}}}], "4 dimensions"),
            (
                [{"name": "p", "inputs": {"x": {"min": [4, 3, 8, 8], "opt": [1, 3, 8, 8], "max": [2, 3, 8, 8]}}}],
                "MIN<=OPT<=MAX",
            ),
        ],
    )
    def test_a_bad_profile_is_said(self, profiles, words):
        error = self.refuse(graphs.classifier(), profiles=profiles)
        assert error.kind == "bad profile"
        assert words in error.message

    def test_a_profile_that_the_model_breaks_inside_is_no_mere_warning(self):
        profile = {"name": "p", "inputs": {"x": {"min": [1, 3, 8, 8], "opt": [1, 3, 8, 8], "max": [2, 3, 16, 16]}}}
        error = self.refuse(graphs.fixed_volume(), profiles=[profile])
        assert error.kind == "bad profile"
        assert "not self-consistent" in error.message


class TestOnnxRuntime(EngineContract):
    runtime = "onnxruntime"
    gpu = "cpu"

    def outputs(self, path, images):
        session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        return session.run(None, {"x": images})[0]

    @pytest.mark.parametrize("shape", [(1, 3, 8, 8), (5, 3, 17, 9)])
    def test_the_optimised_graph_computes_the_same(self, shape):
        self.compile(graphs.classifier())
        images = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
        expected = self.outputs(self.folder / "model.onnx", images)
        assert np.allclose(self.outputs(self.output_dir / "model.onnx", images), expected, rtol=1e-5, atol=1e-6)

    def test_it_is_optimised_for_no_particular_cpu(self):
        self.compile(graphs.classifier())
        nodes = onnx.load(self.output_dir / "model.onnx").graph.node
        assert "FusedConv" in [node.op_type for node in nodes]
        assert not [node for node in nodes if node.domain == "com.microsoft.nchwc"]

    def test_weights_beside_the_graph_stay_there(self):
        result = self.compile(graphs.classifier(), external=True)
        assert set(result.outputs) == {"model.onnx", "model.onnx.data"}
        graph = onnx.load(self.output_dir / "model.onnx", load_external_data=False).graph
        places = {entry.value for w in graph.initializer for entry in w.external_data if entry.key == "location"}
        assert places == {"model.onnx.data"}
        images = np.ones((1, 3, 8, 8), np.float32)
        expected = self.outputs(self.folder / "model.onnx", images)
        assert np.allclose(self.outputs(self.output_dir / "model.onnx", images), expected, rtol=1e-5, atol=1e-6)

    def test_equal_graphs_become_equal_bytes(self):
        contents = []
        for _ in range(2):
            self.compile(graphs.classifier())
            contents.append((self.output_dir / "model.onnx").read_bytes())
            (self.output_dir / "model.onnx").unlink()
        assert contents[0] == contents[1]

    def test_a_type_without_a_kernel_is_said(self):
        error = self.refuse(graphs.double_convolution())
        assert error.kind == "no kernel"
        assert "'conv'" in error.message

    def test_an_operator_of_another_domain_is_unsupported(self):
        assert self.refuse(graphs.unknown_operator("acme")).kind == "unsupported operator"

    def test_an_opset_from_the_future_is_a_version_mismatch(self):
        graph = graphs.classifier()
        graph.opset_import[0].version = 99
        assert self.refuse(graph).kind == "version mismatch"

    def test_what_it_warns_of_is_a_fact(self):
        graph = graphs.classifier()
        graph.graph.initializer.append(graphs.constant("unused", np.zeros(3, np.float32)))
        facts = self.compile(graph).facts
        assert any("unused" in warning for warning in facts["warnings"])


def test_the_registry_agrees_with_the_planner_and_the_schema():
    for name, runtime in RUNTIMES.items():
        assert (RUNTIME_PACKAGES[name], PLAN_NAMES[name], BACKENDS[name]) == (
            runtime.package,
            runtime.plan_name,
            runtime.package,
        )
        assert name in GPUS


def test_a_runtime_without_a_backend_is_refused(tmp_path):
    with pytest.raises(BackendError, match="nothing compiles for 'openvino'") as caught:
        run_stage("compile", {"runtime": "openvino"}, {}, tmp_path / "outputs", limits=Limits(60, 1 << 30))
    assert caught.value.kind == "rejected setting"


def test_facts_are_small(tmp_path):
    (tmp_path / "outputs").mkdir()
    inputs = graphs.save(graphs.classifier(), tmp_path)
    params = {"runtime": "tensorrt-rtx", "gpu": "sm89", **TestTensorRtRtx.options}
    result = run_stage("compile", params, inputs, tmp_path / "outputs", limits=Limits(120, 8 << 30))
    assert len(json.dumps(dict(result.facts))) < 10_000
