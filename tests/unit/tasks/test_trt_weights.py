"""What weights of a network are made of: found out by TensorRT's own parser, here that of TensorRT-RTX on a CPU.

Loading a plan, and so `Refitter`, needs a GPU (tests/gpu/test_refit.py): there, a stand-in says what a plan takes.
"""

from __future__ import annotations

import gc
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, numpy_helper

from tasks import halves
from tasks.engines.trt_log import Log
from tasks.engines.trt_network import parse
from tasks.engines.trt_refit import read_weights, set_weights
from tasks.engines.trt_weights import (
    NotRefittableError,
    Refittable,
    Source,
    _draw,
    network_sources,
    network_weights,
    refittable,
    require_one_profile,
    require_unfolded,
    transposed,
)
from tasks.errors import BackendError
from tasks.structure import raw_values, weights_of
from tests.unit.tasks.small_graphs import graph, node

GENERATOR = np.random.default_rng(0)
NAMES = ("kernel", "offset", "gain", "shift", "mean", "deviation", "square", "flat")


def network(**values):
    """A convolution, a normalisation that the parser computes with, and a Gemm; ones and zeros, as weights begin."""
    weights = {
        "kernel": GENERATOR.standard_normal((4, 1, 3, 3)).astype(np.float32),
        "offset": np.zeros(4, np.float32),
        "gain": np.ones(4, np.float32),
        "shift": np.zeros(4, np.float32),
        "mean": np.zeros(4, np.float32),
        "deviation": np.ones(4, np.float32),
        "square": GENERATOR.standard_normal((4, 4)).astype(np.float32),
        "flat": np.zeros(4, np.float32),
        "low": np.float32(-3),
    } | values
    return graph(
        [
            node("Conv", ["x", "kernel", "offset"], ["c"], "conv"),
            node("BatchNormalization", ["c", "gain", "shift", "mean", "deviation"], ["n"], "norm"),
            node("GlobalAveragePool", ["n"], ["p"], "pool"),
            node("Flatten", ["p"], ["f"], "flatten"),
            node("Gemm", ["f", "square", "flat"], ["g"], "gemm", transB=1),
            node("Clip", ["g", "low"], ["y"], "clip"),
        ],
        weights,
        inputs={"x": (TensorProto.FLOAT, ["n", 1, 8, 8])},
        outputs={"y": (TensorProto.FLOAT, ["n", 4])},
        opset=17,
    )


@pytest.fixture(scope="module")
def rtx():
    return pytest.importorskip(
        "tensorrt_rtx", reason="TensorRT-RTX is not installed (pip install 'enginery[tensorrt-rtx]')"
    )


@pytest.fixture(scope="module")
def logger(rtx):
    return Log(lambda *_said: None).for_runtime(rtx)


@pytest.fixture
def parsed(rtx, logger, tmp_path):
    """Parse a model as a compilation does; return what is known of its network's weights, and of which file it is."""
    path = tmp_path / "model.onnx"

    def sources(model):
        path.write_bytes(model.SerializeToString())
        log = Log(lambda *_said: None)
        builder = rtx.Builder(logger)
        made, parser = parse(rtx, logger, log, builder, path)
        found = network_sources(rtx, logger, log, builder, made, path)
        del parser, made
        return found, path

    return sources


def test_every_weight_is_found_where_the_parser_put_it(parsed):
    sources, _path = parsed(network())
    known = {
        slot: source.weight for slot, source in sources.items() if source is not None and source.weight is not None
    }
    assert set(known.values()) == {"kernel", "offset", "square", "flat"}
    assert known["conv", "KERNEL"] == "kernel"
    assert known["conv", "BIAS"] == "offset"  # of five tensors of zeros, the right one


def test_what_the_parser_computes_is_told_from_what_it_made_up(parsed):
    sources, _path = parsed(network())
    assert sources["norm", "SCALE"] is None
    assert sources["norm", "SHIFT"] is None
    constants = [source.constant for source in sources.values() if source is not None and source.constant is not None]
    assert constants
    assert all(values.flags.owndata for values in constants)  # the parser's memory is gone with it


def test_constants_outlive_the_parser(parsed):
    sources, _path = parsed(network())
    before = {
        slot: source.constant.copy() for slot, source in sources.items() if source and source.constant is not None
    }
    gc.collect()
    for slot, values in before.items():
        np.testing.assert_array_equal(sources[slot].constant, values)


def test_half_weights_are_followed_too(parsed, rtx, logger, tmp_path):
    model = halves.to_half(network(), "fp16", set(), native=False).model
    sources, _path = parsed(model)
    assert sources["conv", "KERNEL"] == Source("kernel")


class Engine:
    """What a plan says of itself, where none can be loaded; as `trt` module and as refitter of it."""

    def __init__(self, takes, missing=(), *, refuses=()):
        self.takes, self.missing, self.refuses = takes, missing, refuses
        self.set = {}
        self.Refitter = lambda _engine, _logger: self
        self.Weights = lambda values: values
        self.WeightsRole = SimpleNamespace(
            __members__={name: SimpleNamespace(name=name) for name in ("KERNEL", "BIAS", "CONSTANT", "SCALE", "SHIFT")}
        )

    def _listed(self, slots):
        return [layer for layer, _role in slots], [self.WeightsRole.__members__[role] for _layer, role in slots]

    def get_all(self):
        return self._listed(self.takes)

    def get_all_weights(self):
        return [layer for layer, _role in self.takes]

    def get_missing(self):
        return self._listed(self.missing)

    def set_weights(self, layer, role, values):
        self.set[layer, role.name] = values
        return layer not in self.refuses


def slots_of(sources):
    return [slot for slot, source in sources.items() if source is not None]


def test_what_a_plan_does_not_take_back_is_fixed(parsed, tmp_path):
    sources, path = parsed(network())
    takes = [slot for slot in slots_of(sources) if slot[0] != "gemm" and sources[slot].weight != "flat"]
    how = refittable(Engine(takes), None, None, sources, path)
    assert set(how.slots) == set(takes)
    assert set(how.fixed) == {"gain", "shift", "mean", "deviation", "flat"}
    how.write(tmp_path)
    again = Refittable.read(tmp_path / "refit.safetensors")
    assert again.fixed == how.fixed
    assert {slot: (one.weight, one.transposed) for slot, one in again.slots.items()} == {
        slot: (one.weight, one.transposed) for slot, one in how.slots.items()
    }
    for slot, source in how.slots.items():
        if source.constant is not None:
            np.testing.assert_array_equal(again.slots[slot].constant, source.constant)
            assert again.slots[slot].constant.dtype == source.constant.dtype


def test_a_weight_that_two_layers_read_and_one_takes_back_is_fixed(tmp_path):
    sources = {("a", "CONSTANT"): Source("kernel"), ("b", "CONSTANT"): Source("kernel"), ("c", "BIAS"): Source("flat")}
    path = tmp_path / "model.onnx"
    path.write_bytes(network().SerializeToString())
    assert "kernel" in refittable(Engine([("a", "CONSTANT"), ("c", "BIAS")]), None, None, sources, path).fixed
    assert "kernel" not in refittable(Engine(list(sources)), None, None, sources, path).fixed


def test_a_plan_that_takes_what_is_not_known_is_not_offered(parsed):
    sources, path = parsed(network())
    with pytest.raises(NotRefittableError, match=r"norm \(SCALE\)"):
        refittable(Engine([*slots_of(sources), ("norm", "SCALE")]), None, None, sources, path)
    with pytest.raises(NotRefittableError, match="elsewhere"):
        refittable(Engine([("elsewhere", "KERNEL")]), None, None, sources, path)
    with pytest.raises(NotRefittableError, match="none"):
        refittable(Engine([]), None, None, sources, path)


def test_where_the_version_refits_by_name_what_normalisations_compute_with_is_fixed(tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes(network().SerializeToString())
    takes = [(name, "CONSTANT") for name in ("kernel", "offset", "square", "gain", "made up")]
    how = refittable(Engine(takes), None, None, None, path)
    assert how.slots is None
    assert set(how.fixed) == {"gain", "shift", "mean", "deviation", "flat"}
    how = replace(how, compiled={"kept": ["gemm"], "settings": {"REFIT": True}})
    how.write(tmp_path)
    assert Refittable.read(tmp_path / "refit.safetensors") == how


@pytest.fixture
def offered(parsed):
    sources, path = parsed(network())
    takes = slots_of(sources)
    return refittable(Engine(takes), None, None, sources, path), takes, path


def test_a_refit_sets_every_weight_that_the_plan_takes(offered):
    how, takes, path = offered
    model = network(kernel=np.ones((4, 1, 3, 3), np.float32), flat=np.arange(4, dtype=np.float32))
    path.write_bytes(model.SerializeToString())
    weights, refitter = read_weights(path, how), Engine(takes)
    set_weights(refitter, refitter, None, Log(lambda *_said: None), how, weights, path)
    assert set(refitter.set) == set(takes)
    values = {source.weight: refitter.set[slot] for slot, source in how.slots.items() if source.weight is not None}
    assert not (set(values) & {"gain", "shift", "mean", "deviation"})
    np.testing.assert_array_equal(values["kernel"], np.ones(36, np.float32))
    np.testing.assert_array_equal(values["flat"], np.arange(4, dtype=np.float32))


def test_a_fixed_weight_that_changed_is_named(offered):
    how, _takes, path = offered
    path.write_bytes(network(mean=np.ones(4, np.float32)).SerializeToString())
    with pytest.raises(BackendError, match="does not take back: mean") as caught:
        read_weights(path, how)
    assert caught.value.kind == "wrong result"


def test_what_a_plan_lacks_or_does_not_take_stops_the_refit(offered):
    how, takes, path = offered
    weights, log = read_weights(path, how), Log(lambda *_said: None)
    for refitter, words in (
        (Engine(takes, missing=[("gemm", "KERNEL")]), r"needs more than the graph's weights: gemm \(KERNEL\)"),
        (Engine(takes, refuses=["conv"]), "conv does not take its KERNEL"),
    ):
        with pytest.raises(BackendError, match=words):
            set_weights(refitter, refitter, None, log, how, weights, path)


def test_matrices_are_turned_as_the_parser_of_8_6_turns_them(tmp_path):
    """8.6 swaps the axes of a Gemm's B where transB says so, so that its layer holds other bytes than the graph."""
    values = np.arange(6, dtype=np.float16).reshape(2, 3)
    assert transposed(values.tobytes(), values.shape) == np.ascontiguousarray(values.T).tobytes()
    path = tmp_path / "model.onnx"
    path.write_bytes(network().SerializeToString())
    how = Refittable({("gemm", "KERNEL"): Source("square", transposed=True)}, {})
    square = numpy_helper.to_array(weights_of(network())["square"])
    path.write_bytes(network(square=square).SerializeToString())
    np.testing.assert_array_equal(read_weights(path, how)["square", True].reshape(4, 4), square.T)


@given(st.integers(2, 40), st.sampled_from([np.float16, np.float32, np.float64]))
def test_drawn_values_are_finite_and_no_two_weights_get_the_same(count, dtype):
    tensors = [numpy_helper.from_array(np.zeros((), dtype), f"w{number}") for number in range(count)]
    _draw(tensors)
    drawn = [numpy_helper.to_array(tensor) for tensor in tensors]
    assert ((np.abs(drawn) >= 0.5) & (np.abs(drawn) < 8)).all()
    assert len({raw_values(tensor) for tensor in tensors} | {np.zeros((), dtype).tobytes()}) == count + 1


def test_networks_without_numpy_types_and_with_double_names(rtx):
    """Two layers of one name cannot be told apart by a refitter, so neither has weights."""

    class Layer:
        def __init__(self, name, values):
            self.name, self.type, self.weights = name, SimpleNamespace(name="CONSTANT"), values

    layers = [Layer("a", np.ones(2)), Layer("b", np.ones(2)), Layer("a", np.zeros(2)), Layer("c", np.ones(0))]
    made = SimpleNamespace(num_layers=len(layers), get_layer=layers.__getitem__)
    module = SimpleNamespace(IConstantLayer=Layer, Weights=rtx.Weights)
    assert set(network_weights(module, made)) == {("b", "CONSTANT")}


def test_several_profiles_of_8_6_are_not_offered():
    require_one_profile([{"name": "online"}])
    with pytest.raises(NotRefittableError, match=r"\(online, bulk\)"):
        require_one_profile([{"name": "online"}, {"name": "bulk"}])


def test_weights_that_were_folded_beside_pairs_are_not_offered():
    require_unfolded(["weights were cast", "Weights are affected by this issue: Detected subnormal FP16 values."])
    folded = (
        "Weights are folded into Myelin graph when building a refittable engine because the network contains QDQ nodes. "
        "These folded weights cannot be refitted."
    )
    with pytest.raises(NotRefittableError, match="folded"):
        require_unfolded(["another", folded])
