"""What is told of an ONNX file: axes, operators, sizes, ceilings, and nodes that real runtimes refuse, by name and place."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from tasks import precision
from tasks.errors import BackendError
from tasks.onnx_files import save_graph
from tasks.support import contents, parser_query, session_query
from tests.unit.tasks.small_graphs import cnn, node, stage


def model(nodes, outputs, *, opset=17, domains=()):
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 4])],
        [helper.make_tensor_value_info(name, kind, None) for name, kind in outputs.items()],
    )
    imports = [helper.make_opsetid("", opset), *(helper.make_opsetid(domain, 1) for domain in domains)]
    return helper.make_model(graph, opset_imports=imports, ir_version=8)


def branch(operator, output):
    inner = helper.make_node(operator, ["x"], [output], name=f"in/{output}")
    return helper.make_graph([inner], output, [], [helper.make_tensor_value_info(output, TensorProto.FLOAT, None)])


REFUSED = model(
    [
        node("Relu", ["x"], ["a"]),
        helper.make_node("Mystery", ["a"], ["b"], name="odd", domain="my"),
        helper.make_node("Bernoulli", ["b"], ["c"]),
        node("Relu", ["c"], ["y"]),
        node("Unique", ["y"], ["u"], "head/unique"),
    ],
    {"y": TensorProto.FLOAT, "u": TensorProto.FLOAT},
    domains=["my"],
)
BRANCHED = model(
    [
        node("ReduceSum", ["x"], ["s"], keepdims=0),
        node("Cast", ["s"], ["c"], to=TensorProto.BOOL),
        node("If", ["c"], ["y"], "choose", then_branch=branch("Bernoulli", "t"), else_branch=branch("Relu", "e")),
    ],
    {"y": TensorProto.FLOAT},
)


def facts(run, folder, graph):
    return stage(run, folder, {}, model_onnx=graph)[0].facts


def by_release(told):
    return {entry["target"]: entry["state"] for entry in told["support"]}


def test_the_contents_of_a_file_are_told(tmp_path: Path):
    told = facts(contents.run, tmp_path, cnn())
    assert told["inputs"] == {"x": {"dtype": "float32", "shape": ["batch", 1, "height", "width"]}}
    assert told["dynamic_axes"] == {"batch": ["x[0]", "y[0]"], "height": ["x[2]"], "width": ["x[3]"]}
    assert told["operators"] == {"Conv": 2, "Relu": 2, "Flatten": 1, "Gemm": 1, "GlobalAveragePool": 1}
    assert told["opset"] == 18
    assert told["parameters"] == 8 * 9 + 8 + 16 * 8 * 9 + 16 + 160 + 10
    assert told["size"]["external_files"] == []


def test_external_data_counts_and_operators_in_branches_too(tmp_path: Path):
    graph = cnn()
    graph.graph.initializer.append(numpy_helper.from_array(np.zeros(1000, np.float32), "unused"))
    save_graph(graph, tmp_path, external=True)
    size = facts(contents.run, tmp_path / "stage", tmp_path / "model.onnx")["size"]
    assert size["external_files"] == ["model.onnx.data"]
    assert size["external_bytes"] == (tmp_path / "model.onnx.data").stat().st_size >= 4000
    told = facts(contents.run, tmp_path / "stage", BRANCHED)
    assert told["operators"]["Bernoulli"] == 1
    assert told["outputs"]["y"]["shape"] is None


def test_a_graph_with_pairs_tells_what_each_range_and_weight_costs(tmp_path: Path):
    assert "quantized" not in facts(contents.run, tmp_path, cnn())
    ranges = tmp_path / "ranges.json"
    ranges.write_text('{"x": [0.0, 1.0], "r1": [0.0, 2.0], "f": [0.0, 3.0]}')
    asked = {"precision": "int8", "keep": [], "io": "float32"}
    _result, made = stage(precision.run, tmp_path, asked, model_onnx=cnn(), ranges_json=ranges)
    told = facts(contents.run, tmp_path / "typed", made / "model.onnx")["quantized"]
    assert {row["tensor"]: round(row["range"][1], 1) for row in told["activations"]} == {"x": 1.0, "r1": 2.0, "f": 3.0}
    assert {(row["type"], row["channels"], row["clipped"]) for row in told["weights"]} == {
        ("int8", 8, 0.0),
        ("int8", 16, 0.0),
        ("int8", 10, 0.0),
    }
    assert all(30 < row["snr_db"] < 60 for row in told["weights"])


@pytest.mark.parametrize(
    ("opset", "states"),
    [(17, ("opset ok", "opset ok")), (18, ("no", "opset ok")), (20, ("no", "opset ok")), (21, ("no", "no"))],
)
def test_releases_are_judged_by_their_ceiling_and_later_ones_are_not_known(tmp_path: Path, opset, states):
    told = facts(contents.run, tmp_path, model([node("Relu", ["x"], ["y"])], {"y": TensorProto.FLOAT}, opset=opset))
    assert tuple(by_release(told).values()) == (*states, "not known")
    assert list(by_release(told)) == ["tensorrt 8.6", "tensorrt 10.0, 10.1", "tensorrt 10.2 and later"]


def test_operators_outside_the_standard_need_a_plugin_in_every_release(tmp_path: Path):
    told = facts(contents.run, tmp_path, REFUSED)
    assert set(by_release(told).values()) == {"needs plugins"}
    assert [entry["operator"] for entry in told["support"][0]["nodes"]] == ["my::Mystery"]
    assert "build.plugins" in told["support"][0]["nodes"][0]["advice"]


def test_the_parser_names_every_node_that_it_refuses(tmp_path: Path):
    pytest.importorskip("tensorrt_rtx")
    told = facts(parser_query.run, tmp_path, REFUSED)
    assert told["state"] == "no"
    found = [(entry["index"], entry["operator"], entry["name"], entry["location"]) for entry in told["nodes"]]
    assert found == [
        (1, "my::Mystery", "odd", "node 1 of 5, makes b"),
        (2, "Bernoulli", "", "node 2 of 5, makes c"),
        (4, "Unique", "head/unique", "node 4 of 5, makes u"),
    ]
    assert "Plugin not found" in told["nodes"][0]["words"]
    assert "eval()" in told["nodes"][1]["advice"]
    assert "if that knows it" in told["nodes"][0]["advice"]


def test_a_node_of_a_branch_is_placed_in_it(tmp_path: Path):
    pytest.importorskip("tensorrt_rtx")
    (refused,) = facts(parser_query.run, tmp_path, BRANCHED)["nodes"]
    assert (refused["operator"], refused["name"]) == ("Bernoulli", "in/t")
    assert refused["location"] == "node 2 of 3 > If 'choose' then_branch, makes t"


def test_the_module_that_a_node_was_exported_from_is_told(tmp_path: Path):
    graph = onnx.ModelProto()
    graph.CopyFrom(REFUSED)
    graph.graph.node[1].metadata_props.add(key="namespace", value=": net.Model/head: net.Head")
    (told,) = facts(contents.run, tmp_path, graph)["support"][0]["nodes"]
    assert told["location"] == "node 1 of 5, makes b, in net.Model/head: net.Head"


def test_what_the_parser_takes_has_no_refused_nodes(tmp_path: Path):
    pytest.importorskip("tensorrt_rtx")
    told = facts(parser_query.run, tmp_path, cnn())
    assert (told["state"], told["nodes"]) == ("yes", [])


def test_onnx_runtime_names_every_operator_that_it_lacks(tmp_path: Path):
    told = facts(session_query.run, tmp_path, REFUSED)
    assert told["state"] == "no"
    assert [(entry["operator"], entry["name"]) for entry in told["nodes"]] == [("my::Mystery", "odd")]
    assert "onnxruntime" not in told["nodes"][0]["advice"]
    assert facts(session_query.run, tmp_path, BRANCHED)["state"] == "yes"


@pytest.mark.parametrize("operator", ["Floor", "Sin"])  # no kernel for bfloat16; not taken by the operator at all
def test_a_node_whose_type_onnx_runtime_does_not_take_is_named(tmp_path: Path, operator):
    graph = model([node(operator, ["d"], ["y"], "bad/one"), node("Relu", ["d"], ["z"])], {"y": TensorProto.BFLOAT16})
    graph.graph.input[0].CopyFrom(helper.make_tensor_value_info("d", TensorProto.BFLOAT16, [2, 2]))
    told = facts(session_query.run, tmp_path, graph)
    assert told["state"] == "no"
    assert [(entry["name"], entry["operator"]) for entry in told["nodes"]] == [("bad/one", operator)]


def test_what_is_no_onnx_is_bad_data(tmp_path: Path):
    whole = onnx.ModelProto()
    whole.CopyFrom(cnn())
    (tmp_path / "cut.onnx").write_bytes(whole.SerializeToString()[:500])
    with pytest.raises(BackendError, match="not a whole ONNX file") as caught:
        facts(contents.run, tmp_path / "stage", tmp_path / "cut.onnx")
    assert caught.value.kind == "bad data"
