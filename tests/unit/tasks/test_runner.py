"""The runner on engines for ONNX Runtime, which execute here; tests/gpu/test_runner.py has the same on a GPU."""

import concurrent.futures

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from artifacts.folder import FolderStore
from tasks.engines.profiles import Profile, nearest
from tasks.errors import BackendError, CallError
from tasks.runner import TensorSpec, open_runner
from tests.engines import make_onnx_engine
from tests.unit.tasks.small_graphs import cnn, evaluate, graph, images, node


@pytest.fixture
def opened(tmp_path):
    runners = []

    def opened(model=None, changes=None, **options):
        data = (model or cnn()).SerializeToString()
        manifest = make_onnx_engine(FolderStore(tmp_path / "store"), tmp_path, data, changes)
        runners.append(open_runner(data, manifest, **options))
        return runners[-1]

    yield opened
    for runner in runners:
        runner.close()


@pytest.fixture
def engine(opened):
    return opened()


def two_inputs():
    spec = {"ids": (TensorProto.INT32, ["batch", 4]), "profile": (TensorProto.FLOAT, ["batch", 4])}
    nodes = [node("Cast", ["ids"], ["f"], to=TensorProto.FLOAT), node("Add", ["f", "profile"], ["y"])]
    return graph(nodes, {}, inputs=spec, outputs={"y": (TensorProto.FLOAT, ["batch", 4])})


CORNERS = {"min": [1, 4], "opt": [2, 4], "max": [8, 4]}
TWO = {
    "inputs": {
        "ids": {"dtype": "int64", "shape": ["batch", 4]},
        "profile": {"dtype": "float32", "shape": ["batch", 4]},
    },
    "profiles": [{"name": "one", "inputs": {"ids": CORNERS, "profile": CORNERS}}],
}


def test_outputs_are_those_of_the_graph_at_every_profile(engine):
    for shape in [(1, 8, 8), (4, 16, 16), (64, 8, 8), (256, 8, 8), (3, 11, 13)]:
        x = images(*shape)
        np.testing.assert_allclose(engine(x=x)["y"], evaluate(cnn(), {"x": x})["y"], rtol=1e-4, atol=1e-5)


def test_it_says_what_it_takes_and_gives(engine):
    assert engine.inputs == {"x": TensorSpec("float32", ("batch", 1, "height", "width"))}
    assert engine.outputs == {"y": TensorSpec("float32", ("batch", 10))}
    assert [profile.name for profile in engine.profiles] == ["online", "bulk"]
    assert engine.device == "cpu"
    assert "fp16-a" in repr(engine)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, r"no input x \(the engine takes: x\)"),
        ({"x": images(1), "z": images(1)}, r"unknown z \(the engine takes: x\)"),
        ({"y": images(1)}, "no input x; unknown y"),
        ({"x": images(1).astype(np.float64)}, "input x is float64, the engine takes float32"),
        ({"x": images(1).tolist()}, "input x is float64"),
        ({"x": images(257)}, r"no profile of the plan admits x \[257, 1, 8, 8\] \(profile online: x \[1, 1, 8, 8\] to"),
        ({"x": images(8, 16, 16)}, r"admits x \[8, 1, 16, 16\].*profile bulk: x \[1, 1, 8, 8\] to \[256, 1, 8, 8\]"),
        ({"x": images(1)[0]}, r"admits x \[1, 8, 8\]"),
    ],
)
def test_what_it_does_not_take_is_the_callers_fault_and_named(engine, given, words):
    with pytest.raises(CallError, match=words):
        engine(given)
    assert engine(x=images(2))["y"].shape == (2, 10)


def test_the_profile_can_be_chosen_and_must_admit_the_shape(engine):
    engine(x=images(8), profile="bulk")
    with pytest.raises(CallError, match=r"no profile 'fast' \(the engine has: online, bulk\)"):
        engine(x=images(1), profile="fast")
    with pytest.raises(CallError, match="no profile of the plan admits"):
        engine(x=images(8), profile="online")


def test_of_profiles_that_admit_a_shape_the_nearest_is_chosen():
    online = Profile(0, {"x": [[1, 8], [1, 8], [64, 8]]}, "online")
    bulk = Profile(1, {"x": [[1, 8], [64, 8], [64, 8]]}, "bulk")
    assert nearest([online, bulk], {"x": [2, 8]}) is online
    assert nearest([online, bulk], {"x": [33, 8]}) is bulk
    assert nearest([online, bulk], {"x": [65, 8]}) is None


def test_names_of_inputs_that_are_parameters_too_go_into_a_mapping(opened):
    engine = opened(two_inputs(), TWO)
    ids, offsets = np.arange(8, dtype=np.int32).reshape(2, 4), np.full((2, 4), 0.5, np.float32)
    np.testing.assert_array_equal(engine({"ids": ids, "profile": offsets})["y"], ids + offsets)
    np.testing.assert_array_equal(engine({"profile": offsets}, ids=ids, profile="one")["y"], ids + offsets)


def test_wider_integers_are_taken_where_they_fit(opened):
    engine = opened(two_inputs(), TWO)
    ids, offsets = np.arange(8).reshape(2, 4), np.zeros((2, 4), np.float32)
    np.testing.assert_array_equal(engine({"ids": ids, "profile": offsets})["y"], ids)
    with pytest.raises(CallError, match="beyond int32"):
        engine({"ids": ids + (1 << 40), "profile": offsets})
    with pytest.raises(CallError, match="input ids is float32, the engine takes int32, or int64"):
        engine({"ids": offsets, "profile": offsets})


def test_arrays_that_are_not_contiguous_are_taken(engine):
    wide = np.random.default_rng(0).uniform(0, 1, (2, 1, 8, 16)).astype(np.float32)
    np.testing.assert_array_equal(engine(x=wide[..., ::2])["y"], engine(x=wide[..., ::2].copy())["y"])


def test_arrays_of_other_libraries_on_the_host_are_taken(engine):
    torch = pytest.importorskip("torch", reason="torch is not installed (pip install 'enginery[torch]')")
    x = images(2)
    np.testing.assert_array_equal(engine(x=torch.from_numpy(x))["y"], engine(x=x)["y"])


class OnGpu:
    def __init__(self):
        self.__cuda_array_interface__ = {"shape": (1, 1, 8, 8), "typestr": "<f4", "data": (256, False), "version": 3}


def test_what_lies_on_a_gpu_is_refused_by_an_engine_for_the_cpu(engine):
    with pytest.raises(CallError, match="input x lies on a device; this engine takes its inputs on the host"):
        engine(x=OnGpu())


def test_outputs_land_in_the_callers_arrays(engine):
    x, out = images(2), np.empty((2, 10), np.float32)
    found = engine(x=x, out={"y": out})
    assert found["y"] is out
    np.testing.assert_array_equal(out, engine(x=x)["y"])


@pytest.mark.parametrize(
    ("out", "words"),
    [
        ({"z": np.empty((2, 10), np.float32)}, r"no output z \(the engine gives: y\)"),
        ({"y": np.empty((2, 10))}, "out y is float64; a writable C-contiguous array of float32"),
        ({"y": np.empty((2, 20), np.float32)[:, ::2]}, "C-contiguous"),
        ({"y": np.empty((3, 10), np.float32)}, r"the output y is \[2, 10\] at these inputs, `out` has \[3, 10\]"),
        ({"y": [0.0]}, "out y is a list"),
    ],
)
def test_arrays_that_cannot_hold_an_output_are_refused(engine, out, words):
    with pytest.raises(CallError, match=words):
        engine(x=images(2), out=out)


def test_a_closed_engine_says_so(opened):
    with opened() as engine:
        assert not engine.closed
    engine.close()
    assert engine.closed
    with pytest.raises(CallError, match=r"fp16-a is closed; load it again"):
        engine(x=images(1))
    with pytest.raises(CallError, match="is closed"):
        _ = engine.warnings


def test_prepare_runs_a_shape_before_it_is_needed(engine):
    engine.prepare({"x": [4, 1, 8, 8]})
    with pytest.raises(CallError, match=r"shapes are needed for x, and for nothing else \(wrong: z\)"):
        engine.prepare({"x": [4, 1, 8, 8], "z": [1]})
    with pytest.raises(CallError, match="no profile"):
        engine.prepare({"x": [257, 1, 8, 8]})


def test_many_threads_may_call_one_engine(engine):
    inputs = [images(1 + seed % 3, seed=seed) for seed in range(24)]
    expected = [engine(x=x)["y"] for x in inputs]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda x: engine(x=x)["y"], inputs))
    for one, other in zip(expected, found, strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_file_that_is_no_graph_is_bad_data(tmp_path):
    manifest = make_onnx_engine(FolderStore(tmp_path / "store"), tmp_path, b"not a graph")
    with pytest.raises(BackendError) as caught:
        open_runner(b"not a graph", manifest)
    assert caught.value.kind == "bad data"


def test_what_fails_while_it_runs_is_classified(opened):
    # The reshape fits batches of 2 only, which no profile says.
    nodes = [node("Flatten", ["x"], ["f"]), node("Reshape", ["f", "shape"], ["y"])]
    spec = {"x": (TensorProto.FLOAT, ["batch", 1, "height", "width"])}
    model = graph(nodes, {"shape": np.array([2, 64])}, inputs=spec, outputs={"y": (TensorProto.FLOAT, [2, 64])})
    engine = opened(model)
    assert engine(x=images(2))["y"].shape == (2, 64)
    with pytest.raises(BackendError, match="this call") as caught:
        engine(x=images(3))
    assert caught.value.kind == "crash"


def test_an_operator_that_the_runtime_lacks_is_named(tmp_path):
    model = cnn()
    model.graph.node[1].op_type = "Frobnicate"
    manifest = make_onnx_engine(FolderStore(tmp_path / "store"), tmp_path, model.SerializeToString())
    with pytest.raises(BackendError, match="Frobnicate") as caught:
        open_runner(model.SerializeToString(), manifest)
    assert caught.value.kind == "unsupported operator"


def test_half_precision_inputs_and_outputs_keep_their_type(opened):
    spec = {"x": (TensorProto.FLOAT16, ["batch", 1, "height", "width"])}
    model = graph([node("Neg", ["x"], ["y"])], {}, inputs=spec, outputs={"y": spec["x"]})
    engine = opened(onnx.load_from_string(model.SerializeToString()))
    assert engine.inputs["x"].dtype == "float16"
    x = images(2).astype(np.float16)
    assert engine(x=x)["y"].dtype == np.float16
    with pytest.raises(CallError, match="input x is float32, the engine takes float16"):
        engine(x=images(2))
