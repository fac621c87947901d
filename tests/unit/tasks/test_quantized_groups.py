"""A group that is quantised alone, out of a graph in which all are, gives what quantising it alone gives: bit for bit."""

from __future__ import annotations

import json

import numpy as np
import onnx
import pytest

from tasks import precision
from tasks.graphs import hoist_constants, name_nodes
from tasks.onnx_sessions import GraphRunner
from tasks.quantized_groups import Groups
from tests.unit.tasks.small_graphs import cnn, graph, images, node, stage

DRAW = np.random.default_rng(0)


def residual():
    """The shortcut of a ResNet's block: `r` is read by two convolutions and by no sum, `t` by a sum and an output."""
    nodes = [
        node("Conv", ["x", "k1"], ["c1"], "first", pads=[1, 1, 1, 1]),
        node("Relu", ["c1"], ["r"], "relu"),
        node("Conv", ["r", "k2"], ["c2"], "main", pads=[1, 1, 1, 1]),
        node("Conv", ["r", "k3"], ["c3"], "short", pads=[1, 1, 1, 1]),
        node("Add", ["c2", "c3"], ["s"], "sum"),
        node("Relu", ["s"], ["t"], "relu2"),
        node("Conv", ["t", "k4"], ["c4"], "last", pads=[1, 1, 1, 1]),
        node("Add", ["c4", "t"], ["y"], "sum2"),
    ]
    weights = {
        name: DRAW.normal(size=(3, channels, 3, 3)).astype(np.float32)
        for name, channels in (("k1", 1), ("k2", 3), ("k3", 3), ("k4", 3))
    }
    shape = ["batch", 3, "height", "width"]
    return graph(
        nodes,
        weights,
        inputs={"x": (onnx.TensorProto.FLOAT, ["batch", 1, "height", "width"])},
        outputs={"y": (onnx.TensorProto.FLOAT, shape), "t": (onnx.TensorProto.FLOAT, shape)},
    )


@pytest.mark.parametrize("as_what", ["int8", "fp8"])
@pytest.mark.parametrize("made", [cnn(), residual()], ids=["cnn", "residual"])
def test_a_group_alone_is_what_quantising_it_alone_gives(tmp_path, made, as_what):
    hoist_constants(made)
    name_nodes(made)
    names = [one.name for one in made.graph.node if one.op_type in ("Conv", "Gemm")]
    ranges = tmp_path / "ranges.json"
    taken = {one.input[0] for one in made.graph.node if one.op_type in ("Conv", "Gemm")} | {"c2", "c3", "t"}
    ranges.write_text(json.dumps({name: [-1.5, 2.0 + index] for index, name in enumerate(sorted(taken))}))

    def typed(keep, folder):
        asked = {"precision": as_what, "keep": keep, "io": "float32"}
        return stage(precision.run, tmp_path / folder, asked, model_onnx=made, ranges_json=ranges)[1] / "model.onnx"

    (tmp_path / "alone").mkdir()
    groups = Groups(typed([], "all"), made, tmp_path / "alone", residual_pairs=as_what == "int8")
    feeds, moved = {"x": images(4)}, 0
    exact = GraphRunner(groups.alone(())).run(feeds, "here")
    for index, group in enumerate([*([name] for name in names), names[:2], names]):
        expected = GraphRunner(typed([name for name in names if name not in group], f"group{index}")).run(feeds, "here")
        found = GraphRunner(groups.alone(group)).run(feeds, "here")
        for name, array in expected.items():
            np.testing.assert_array_equal(found[name], array, err_msg=f"{group}: {name}")
        moved += any(not np.array_equal(expected[name], exact[name]) for name in expected)
    assert moved == len(names) + 2


def test_with_no_group_the_graph_is_the_source(tmp_path):
    ranges = tmp_path / "ranges.json"
    ranges.write_text('{"x": [0.0, 1.0], "r1": [0.0, 2.0], "f": [0.0, 3.0]}')
    made = cnn()
    asked = {"precision": "int8", "keep": [], "io": "float32"}
    all_of_it = stage(precision.run, tmp_path / "all", asked, model_onnx=made, ranges_json=ranges)[1] / "model.onnx"
    (tmp_path / "alone").mkdir()
    alone = onnx.load(Groups(all_of_it, made, tmp_path / "alone", residual_pairs=True).alone(()))
    assert [one.op_type for one in alone.graph.node] == [one.op_type for one in made.graph.node]
