import json
import pickle
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import load_file, save_file

from tasks.errors import BackendError, ModelCodeError
from tasks.onnx_files import dims_of
from tasks.onnx_sessions import GraphRunner
from tasks.sources import run_export, run_reference
from tests.unit.tasks.bundles import code_tar, frames, fresh, request, tensor

DIGITS = Path(__file__).parents[3] / "recipes" / "digits"
IMAGE = {"image": tensor(["batch", 1, "height", "width"], low=0.0, high=1.0)}
CASES = [
    {"name": "a/min", "shapes": {"image": [1, 1, 8, 8]}},
    {"name": "a/max", "shapes": {"image": [5, 1, 11, 13]}},
]


@pytest.fixture(autouse=True)
def _restored_interpreter():
    path, modules = list(sys.path), set(sys.modules)
    yield
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        if str(getattr(sys.modules[name], "__file__", "")).find("enginery-code-") >= 0:
            del sys.modules[name]


def digits(tmp_path):
    files = {name: (DIGITS / name).read_text() for name in ("model.py", "layers.py")}
    return {"code.tar": code_tar(fresh(tmp_path, "in"), files), "weights.safetensors": DIGITS / "weights.safetensors"}


def torch_params(**changes):
    return {
        "framework": "torch",
        "entry": "model:build",
        "arguments": {},
        "seed": 0,
        "exporter": "torchscript",
        "opset": 18,
        "tensors": IMAGE,
        "trace": {"image": [2, 1, 8, 8]},
        "outputs": ["logits"],
    } | changes


def module(forward, init="pass", signature="self, image"):
    """A model.py whose module has this forward."""
    lines = "\n".join(f"        {line}" for line in forward.splitlines())
    return (
        "import torch\nfrom torch import nn\n\nclass Net(nn.Module):\n    def __init__(self):\n        super().__init__()\n"
        f"        {init}\n    def forward({signature}):\n{lines}\n\ndef build():\n    return Net()\n"
    )


def export_code(tmp_path, source, **changes):
    tar = code_tar(fresh(tmp_path, "in"), {"model.py": source})
    asked = request("export", torch_params(**changes), {"code.tar": tar}, tmp_path)
    return run_export(asked), asked.output_dir


# ---- torch: what comes out ------------------------------------------------------------------------------------------


def assert_digits_export(tmp_path, exporter, opset):
    inputs = digits(tmp_path)
    asked = request("export", torch_params(exporter=exporter, opset=opset), inputs, tmp_path)
    result = run_export(asked)
    # Where the exporter notes which module a node came from, that is kept beside the graph, which holds no notes.
    noted = {"places.json": "application/json"} if exporter == "dynamo" else {}
    assert result.outputs == {"model.onnx": "application/onnx"} | noted
    assert {path.name for path in asked.output_dir.iterdir()} == result.outputs.keys()
    if noted:
        places = json.loads((asked.output_dir / "places.json").read_text())
        assert any(": torch.nn.modules.linear.Linear" in module for module in places.values())
    assert result.facts["opset"] == opset
    assert result.facts["inputs"] == {"image": {"dtype": "float32", "shape": ["batch", 1, "height", "width"]}}
    assert result.facts["outputs"] == {"logits": {"dtype": "float32", "shape": ["batch", 10]}}
    assert result.facts["parameters"] == 28842
    parity = request("reference", torch_params(kind="parity", cases=CASES, input_seed=0), inputs, tmp_path)
    facts = run_reference(parity).facts
    assert facts == {"outputs": {"logits": {"dtype": "float32", "rank": 2}}, "non_finite": 0, "cases": 2}
    arrays = load_file(parity.output_dir / "reference.safetensors")
    runner = GraphRunner(asked.output_dir / "model.onnx")
    for case in CASES:
        image, expected = arrays[f"{case['name']}/in/image"], arrays[f"{case['name']}/out/logits"]
        assert list(image.shape) == case["shapes"]["image"]
        np.testing.assert_allclose(runner.run({"image": image}, "")["logits"], expected, atol=1e-5)
    return (asked.output_dir / "model.onnx").read_bytes()


def test_digits_by_torchscript_equals_the_module_at_other_sizes_and_holds_no_path(tmp_path):
    first = assert_digits_export(tmp_path / "one", "torchscript", 17)
    second = assert_digits_export(tmp_path / "elsewhere" / "two", "torchscript", 17)
    assert first == second
    assert str(tmp_path).encode() not in first
    assert b"enginery-code-" not in first


@pytest.mark.slow
@pytest.mark.parametrize(
    ("exporter", "opset"),
    [("dynamo", 18), ("dynamo", 20), ("torchscript", 18), ("torchscript", 20), ("torchscript", 11)],
)
def test_digits_by_both_exporters_equals_the_module_at_other_sizes(tmp_path, exporter, opset):
    first = assert_digits_export(tmp_path / "one", exporter, opset)
    second = assert_digits_export(tmp_path / "elsewhere" / "two", exporter, opset)
    assert first == second
    for trace in (str(tmp_path).encode(), b"enginery-code-", b"site-packages", b"stack_trace"):
        assert trace not in first


def test_the_reference_on_a_data_set_has_one_row_for_each_sample_and_the_accuracy_of_the_readme(tmp_path):
    held = np.load(DIGITS / "heldout.npz")
    save_file({"image": held["image"], "label": held["label"]}, tmp_path / "dataset.safetensors")
    inputs = digits(tmp_path) | {"dataset.safetensors": tmp_path / "dataset.safetensors"}
    asked = request("reference", torch_params(kind="dataset", batch=64), inputs, tmp_path)
    assert run_reference(asked).facts["samples"] == len(held["label"])
    logits = load_file(asked.output_dir / "outputs.safetensors")["logits"]
    assert float((logits.argmax(1) == held["label"]).mean()) >= 0.985


def test_calibration_and_held_out_digits_share_no_image():
    calibration, held = (np.load(DIGITS / name)["image"] for name in ("calibration.npz", "heldout.npz"))
    assert len(calibration) >= 256
    for images in (calibration, held):
        assert images.dtype == np.float32
        assert images.shape[1:] == (1, 8, 8)
        assert (images.min(), images.max()) == (0.0, 1.0)
    assert not {image.tobytes() for image in calibration} & {image.tobytes() for image in held}


def test_several_inputs_go_by_name_whatever_their_order_and_mappings_come_out_flat(tmp_path):
    source = module(
        "return {'first': image - scale, 'none': None, 'rest': (image * 2,)}", signature="self, image, scale"
    )
    tensors = {"scale": tensor([1]), **IMAGE}
    _, folder = export_code(
        tmp_path,
        source,
        tensors=tensors,
        trace={"image": [2, 1, 8, 8], "scale": [1]},
        outputs=["difference", "double"],
    )
    image, scale = np.full((3, 1, 4, 5), 7, np.float32), np.array([2], np.float32)
    found = GraphRunner(folder / "model.onnx").run({"image": image, "scale": scale}, "")
    assert np.array_equal(found["difference"], image - 2)
    assert np.array_equal(found["double"], image * 2)


def test_a_module_without_weights_is_initialised_from_its_seed(tmp_path):
    source = module("return self.layer(image)", "self.layer = nn.Conv2d(1, 2, 1)")
    written = [(export_code(tmp_path, source, seed=seed)[1] / "model.onnx").read_bytes() for seed in (3, 3, 4)]
    assert written[0] == written[1]
    assert written[0] != written[2]


def test_dropout_is_off_in_the_graph_and_in_the_reference(tmp_path):
    source = module("return self.drop(image)", "self.drop = nn.Dropout(0.9)")
    _, folder = export_code(tmp_path, source)
    assert "Dropout" not in {node.op_type for node in onnx.load(folder / "model.onnx").graph.node}
    tar = code_tar(tmp_path, {"model.py": source})
    asked = request("reference", torch_params(kind="parity", cases=CASES, input_seed=0), {"code.tar": tar}, tmp_path)
    run_reference(asked)
    arrays = load_file(asked.output_dir / "reference.safetensors")
    assert np.array_equal(arrays["a/max/in/image"], arrays["a/max/out/logits"])


# ---- torch: the recipe's own faults ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("def build():\n    raise KeyError('depth')\n", r'(?s)File "model.py", line 2, in build.*KeyError'),
        ("def build():\n    return 3\n", "model:build returned a int; expected a torch.nn.Module"),
        ("from torch import nn\ndef build():\n    return nn.Linear\n", "returned the class Linear itself"),
        (module("return undefined"), r"(?s)running the module at image \[2, 1, 8, 8\].*line 9, in forward.*NameError"),
        (module("return image, image"), r"returns 2 tensors .* the recipe names 1 outputs \(logits\)"),
        (module("return 'text'"), "returned a str among its outputs"),
        (module("return image", signature="self"), "forward takes"),
        (module("return a + b", signature="self, a, b"), r"forward\(\) missing|forward takes|missing 1 required"),
    ],
)
def test_model_code_that_cannot_be_used_is_its_authors_fault(tmp_path, source, expected):
    with pytest.raises(ModelCodeError, match=expected) as caught:
        export_code(tmp_path, source)
    assert "enginery-code-" not in str(caught.value)
    if "Traceback" in str(caught.value):
        assert set(frames(caught.value)) == {"model.py"}


def test_inputs_that_forward_does_not_name_are_listed(tmp_path):
    with pytest.raises(
        ModelCodeError, match=r"forward takes \(image, scale\), the recipe names the inputs image, factor"
    ):
        export_code(
            tmp_path,
            module("return image * scale", signature="self, image, scale"),
            tensors={**IMAGE, "factor": tensor([1])},
            trace={"image": [2, 1, 8, 8], "factor": [1]},
        )


def test_a_case_that_the_module_refuses_is_named(tmp_path):
    tar = code_tar(tmp_path, {"model.py": module("return image.view(-1, 64)")})
    asked = request("reference", torch_params(kind="parity", cases=CASES, input_seed=0), {"code.tar": tar}, tmp_path)
    with pytest.raises(ModelCodeError, match=r"at case a/max \(image \[5, 1, 11, 13\]\)"):
        run_reference(asked)


# ---- torch: weights -------------------------------------------------------------------------------------------------


def with_weights(tmp_path, name, write, init="self.layer = nn.Linear(8, 2)"):
    folder = fresh(tmp_path, "in")
    write(folder / name)
    tar = code_tar(folder, {"model.py": module("return self.layer(image)", init)})
    return request("export", torch_params(), {"code.tar": tar, name: folder / name}, tmp_path)


def test_weights_that_do_not_fit_are_named_all_at_once(tmp_path):
    arrays = {"layer.weight": np.zeros((3, 8), np.float32), "other": np.zeros(1, np.float32)}
    with pytest.raises(BackendError) as caught:
        run_export(with_weights(tmp_path, "weights.safetensors", lambda path: save_file(arrays, path)))
    assert caught.value.kind == "bad data"
    for part in (
        "missing in the file: layer.bias",
        "not in the module: other",
        "layer.weight is [3, 8] in the file, [2, 8]",
    ):
        assert part in caught.value.message


def test_a_damaged_weights_file_is_bad_data(tmp_path):
    with pytest.raises(BackendError, match=r"bad data: weights.safetensors: not readable as safetensors"):
        run_export(with_weights(tmp_path, "weights.safetensors", lambda path: path.write_bytes(b"\xff" * 100)))
    with pytest.raises(BackendError, match=r"bad data: weights.pt"):
        run_export(with_weights(tmp_path, "weights.pt", lambda path: path.write_bytes(b"PK\x03\x04" + b"\0" * 100)))


class Attack:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return (Path.touch, (self.target,))


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_would_run_code_is_refused_unrun(tmp_path, zipped):
    import torch

    target = tmp_path / "owned"
    attack = {"layer.weight": Attack(target)}

    def write(path):
        if zipped:
            torch.save(attack, path)
        else:
            path.write_bytes(pickle.dumps(attack))

    with pytest.raises(BackendError, match=r"weights.pt: (refused|torch.load)") as caught:
        run_export(with_weights(tmp_path, "weights.pt", write))
    assert caught.value.kind == "bad data"
    assert not target.exists()


def test_a_state_dict_and_a_trainers_checkpoint_are_read(tmp_path):
    import torch

    state = {"layer.weight": torch.full((2, 8), 0.5), "layer.bias": torch.zeros(2)}
    for content in (state, {"state_dict": state, "epoch": 3}):
        asked = with_weights(tmp_path, "weights.pt", lambda path, content=content: torch.save(content, path))
        run_export(asked)
        image = np.ones((1, 1, 1, 8), np.float32)
        found = GraphRunner(asked.output_dir / "model.onnx").run({"image": image}, "")["logits"]
        assert np.array_equal(found, np.full((1, 1, 1, 2), 4, np.float32))


def test_a_tied_parameter_may_be_stored_once(tmp_path):
    init = "self.layer = nn.Linear(8, 8); self.again = self.layer"
    arrays = {"layer.weight": np.zeros((8, 8), np.float32), "layer.bias": np.ones(8, np.float32)}
    asked = with_weights(tmp_path, "weights.safetensors", lambda path: save_file(arrays, path), init)
    run_export(asked)
    found = GraphRunner(asked.output_dir / "model.onnx").run({"image": np.ones((1, 1, 1, 8), np.float32)}, "")
    assert np.array_equal(found["logits"], np.ones((1, 1, 1, 8), np.float32))


# ---- torch: what exporters get wrong --------------------------------------------------------------------------------

BY_VALUE = module("if image.sum() > 3:\n    return image\nreturn -image")
LOOP = module("return torch.stack([image[i] * 2 for i in range(image.shape[0])])")


def test_a_decision_by_value_is_not_baked_in_by_tracing(tmp_path):
    with pytest.raises(BackendError, match=r"decides by the values of its inputs.*model\.py:9: Converting") as caught:
        export_code(tmp_path, BY_VALUE)
    assert caught.value.kind == "wrong result"
    assert "torch.where" in caught.value.advice


def test_decisions_by_size_or_by_constants_are_notes_only(tmp_path):
    source = module(
        "if image.shape[2] % 2 == 1:\n    image = nn.functional.pad(image, (0, 0, 0, 1))\n"
        "return image if self.factor > 1 else -image",
        "self.factor = nn.Parameter(torch.tensor(2.0))",
    )
    result, _ = export_code(tmp_path, source)
    assert any(
        note.startswith("model.py:9: Converting a tensor to a Python boolean") for note in result.facts["warnings"]
    )


def test_a_batch_frozen_by_tracing_is_found_in_the_output(tmp_path):
    with pytest.raises(
        BackendError, match="axis 'batch' is frozen: output 'logits' axis 0 is the constant 2"
    ) as caught:
        export_code(tmp_path, LOOP)
    assert caught.value.kind == "wrong result"


def test_an_input_that_the_module_ignores_is_named(tmp_path):
    with pytest.raises(BackendError, match="no input mask: the module does not use it"):
        export_code(
            tmp_path,
            module("return image * 2", signature="self, image, mask"),
            tensors={**IMAGE, "mask": tensor([3])},
            trace={"image": [2, 1, 8, 8], "mask": [3]},
        )


def test_an_operator_that_the_opset_lacks_is_said_in_the_exporters_words(tmp_path):
    source = module("return nn.functional.scaled_dot_product_attention(image, image, image)")
    with pytest.raises(BackendError, match=r"scaled_dot_product_attention.*opset") as caught:
        export_code(tmp_path, source, opset=13)
    assert caught.value.kind == "unsupported operator"


def test_an_ir_version_newer_than_onnx_is_a_version_mismatch(tmp_path):
    with pytest.raises(BackendError, match=r"version mismatch.*ir_version"):
        export_code(tmp_path, module("return image * 2"), opset=23)


def test_what_dynamo_gets_wrong_is_said_with_its_own_words(tmp_path):
    with pytest.raises(BackendError, match=r"(?s)decides by the values.*data-dependent") as decided:
        export_code(tmp_path, BY_VALUE, exporter="dynamo")
    assert "enginery-code-" not in str(decided.value)
    with pytest.raises(
        BackendError, match=r"'batch' \(input 'image' axis 0\) became 2; .*(constant \(2\)|static shape of 2)"
    ):
        export_code(tmp_path, LOOP, exporter="dynamo")
    with pytest.raises(BackendError, match="opset 17 was asked for, the dynamo exporter wrote opset 18") as opset:
        export_code(tmp_path, module("return image.mean((2, 3))"), exporter="dynamo", opset=17)
    assert opset.value.kind == "rejected setting"


@pytest.mark.slow
def test_axes_that_the_module_needs_to_be_equal_are_named(tmp_path):
    with pytest.raises(
        BackendError, match="one size, 'height', for what the recipe calls 'height' and 'width'"
    ) as caught:
        export_code(tmp_path, module("return image + image.transpose(2, 3)"), exporter="dynamo")
    assert caught.value.kind == "wrong result"


# ---- onnx -----------------------------------------------------------------------------------------------------------


def graph(shape=("n", 4), *, dtype=TensorProto.FLOAT, opset=13, nodes=None, initializers=None, ir_version=8):
    rows = 4 if initializers is None else None
    weights = [numpy_helper.from_array(np.eye(4, dtype=np.float32) * 3, "w")] if rows else initializers
    nodes = nodes or [
        helper.make_node("MatMul", ["x", "w"], ["h"], name="first", doc_string="File /somewhere/model.py"),
        helper.make_node("ReduceMean", ["h"], ["y"], axes=[1], keepdims=1),
    ]
    made = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", dtype, list(shape))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [shape[0], 1])],
        weights,
    )
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir_version)


def onnx_params(**changes):
    return {"framework": "onnx", "opset": None, "tensors": {"x": tensor(["batch", 4])}, "outputs": ["y"]} | changes


def export_graph(tmp_path, model, **changes):
    folder = fresh(tmp_path, "in")
    onnx.save(model, folder / "model.onnx")
    asked = request("export", onnx_params(**changes), {"model.onnx": folder / "model.onnx"}, tmp_path)
    return run_export(asked), asked.output_dir


def test_a_file_keeps_its_opset_and_gets_the_recipes_axis_names(tmp_path):
    result, folder = export_graph(tmp_path, graph())
    assert result.facts["opset"] == 13
    assert result.facts["inputs"] == {"x": {"dtype": "float32", "shape": ["batch", 4]}}
    assert result.facts["outputs"] == {"y": {"dtype": "float32", "shape": ["batch", 1]}}
    assert result.facts["parameters"] == 16
    written = onnx.load(folder / "model.onnx")
    assert {dim for value in written.graph.value_info for dim in dims_of(value)} == {"batch", 4}
    assert b"/somewhere" not in (folder / "model.onnx").read_bytes()


def test_conversion_13_to_18_keeps_the_outputs(tmp_path):
    result, folder = export_graph(tmp_path, graph(), opset=18)
    assert result.facts["opset"] == 18
    x = np.arange(8, dtype=np.float32).reshape(2, 4)
    found = GraphRunner(folder / "model.onnx").run({"x": x}, "")["y"]
    np.testing.assert_allclose(found, 3 * x.mean(1, keepdims=True))


def test_the_shipped_digits_file_converts_and_is_accurate(tmp_path):
    inputs = {"model.onnx": DIGITS / "digits.onnx"}
    tensors = {"image": tensor(["batch", 1, 8, 8], low=0.0, high=1.0)}
    params = onnx_params(opset=18, tensors=tensors, outputs=["logits"])
    asked = request("export", params, inputs, tmp_path)
    assert run_export(asked).facts["inputs"]["image"]["shape"] == ["batch", 1, 8, 8]
    held = np.load(DIGITS / "heldout.npz")
    logits = GraphRunner(asked.output_dir / "model.onnx").run({"image": held["image"]}, "")["logits"]
    save_file({"image": held["image"]}, tmp_path / "dataset.safetensors")
    with_data = inputs | {"dataset.safetensors": tmp_path / "dataset.safetensors"}
    kept = request("reference", params | {"kind": "dataset", "batch": 64}, with_data, tmp_path)
    run_reference(kept)
    np.testing.assert_allclose(load_file(kept.output_dir / "outputs.safetensors")["logits"], logits, atol=1e-4)
    assert float((logits.argmax(1) == held["label"]).mean()) >= 0.985


def test_a_file_with_functions_converts(tmp_path):
    """The converter drops functions, so they are written out first."""
    body = [helper.make_node("ReduceMean", ["a"], ["b"], axes=[1])]
    imports = [helper.make_opsetid("", 13)]
    function = helper.make_function("acme", "Mean", ["a"], ["b"], body, imports)
    model = graph(
        nodes=[helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("Mean", ["h"], ["y"], domain="acme")]
    )
    model.functions.append(function)
    model.opset_import.append(helper.make_opsetid("acme", 1))
    result, folder = export_graph(tmp_path, model, opset=18)
    assert result.facts["opset"] == 18
    assert "domains" not in result.facts
    x = np.arange(8, dtype=np.float32).reshape(2, 4)
    found = GraphRunner(folder / "model.onnx").run({"x": x}, "")["y"]
    np.testing.assert_allclose(found, 3 * x.mean(1, keepdims=True))


def test_a_file_of_halves_is_refused_and_half_inputs_are_not(tmp_path):
    """It would pass for fp32, and as bf16 it would still compute in float16."""
    halves = [
        helper.make_node("Cast", ["x"], ["h"], to=TensorProto.FLOAT16),
        helper.make_node("ReduceMean", ["h"], ["m"], axes=[1]),
        helper.make_node("Cast", ["m"], ["y"], to=TensorProto.FLOAT),
    ]
    with pytest.raises(BackendError, match=r"computes in half precision \(ReduceMean\)") as caught:
        export_graph(tmp_path, graph(nodes=halves))
    assert caught.value.kind == "bad data"
    widened = [
        helper.make_node("Cast", ["x"], ["h"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["h"], ["y"], axes=[1]),
    ]
    model = graph(nodes=widened, dtype=TensorProto.FLOAT16)
    model.graph.output[0].type.tensor_type.elem_type = TensorProto.FLOAT
    result, _ = export_graph(tmp_path, model, tensors={"x": tensor(["batch", 4], dtype="float16")})
    assert result.facts["inputs"]["x"]["dtype"] == "float16"


def test_a_conversion_that_onnx_cannot_do_is_a_rejected_setting(tmp_path):
    nodes = [helper.make_node("Mish", ["x"], ["h"]), helper.make_node("ReduceMean", ["h", "axes"], ["y"])]
    model = graph(nodes=nodes, initializers=[numpy_helper.from_array(np.array([1]), "axes")], opset=18)
    with pytest.raises(BackendError, match=r"opset 18 to 13: .*No Previous Version of Mish exists") as caught:
        export_graph(tmp_path, model, opset=13)
    assert caught.value.kind == "rejected setting"
    assert "remove export.opset" in caught.value.advice


def external(tmp_path, model):
    folder = fresh(tmp_path, "in")
    onnx.save_model(model, folder / "model.onnx", save_as_external_data=True, location="weights.bin", size_threshold=0)
    return folder


def test_external_data_ends_in_one_file_of_the_name_that_the_contract_says(tmp_path):
    big = [numpy_helper.from_array(np.ones((4, 600), np.float32), name) for name in ("w", "v")]
    nodes = [
        helper.make_node("Add", ["w", "v"], ["both"]),
        helper.make_node("MatMul", ["x", "both"], ["h"]),
        helper.make_node("ReduceMean", ["h"], ["y"], axes=[1], keepdims=1),
    ]
    folder = external(tmp_path, graph(nodes=nodes, initializers=big))
    files = {path.name: path for path in folder.iterdir()}
    asked = request("export", onnx_params(), files, tmp_path)
    assert set(run_export(asked).outputs) == {"model.onnx", "model.onnx.data"}
    assert {path.name for path in asked.output_dir.iterdir()} == {"model.onnx", "model.onnx.data"}
    written = onnx.load(asked.output_dir / "model.onnx", load_external_data=False)
    assert {entry.value for t in written.graph.initializer for entry in t.external_data if entry.key == "location"} == {
        "model.onnx.data"
    }
    found = GraphRunner(asked.output_dir / "model.onnx").run({"x": np.ones((2, 4), np.float32)}, "")["y"]
    assert np.array_equal(found, np.full((2, 1), 8, np.float32))


@pytest.mark.parametrize("stage", [run_export, run_reference])
@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (lambda folder: (folder / "weights.bin").unlink(), "'weights.bin' of tensor 'w' is not beside it"),
        (lambda folder: (folder / "weights.bin").write_bytes(b"1234"), "weights.bin has 4 bytes, tensor 'w' needs 64"),
        (lambda folder: relocate(folder, "../secret"), r"reads its data from '\.\./secret', outside"),
        (lambda folder: relocate(folder, "/etc/passwd"), "reads its data from '/etc/passwd', outside"),
        (lambda folder: (folder / "model.onnx").write_bytes(b"not onnx"), "not a whole ONNX file"),
        (lambda folder: (folder / "model.onnx").write_bytes(b""), "not a whole ONNX file"),
        (
            lambda folder: (folder / "model.onnx").write_bytes((folder / "model.onnx").read_bytes()[:-40]),
            "not a whole ONNX file",
        ),
    ],
)
def test_files_that_are_damaged_or_reach_outside_are_bad_data(tmp_path, spoil, expected, stage):
    folder = external(tmp_path, graph())
    (tmp_path / "in" / "secret").parent.mkdir(exist_ok=True)
    spoil(folder)
    params = onnx_params(kind="parity", cases=[{"name": "a", "shapes": {"x": [1, 4]}}], input_seed=0)
    with pytest.raises(BackendError, match=expected) as caught:
        stage(request("export", params, {"model.onnx": folder / "model.onnx"}, tmp_path))
    assert caught.value.kind == "bad data"


def relocate(folder, location):
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    for entry in model.graph.initializer[0].external_data:
        if entry.key == "location":
            entry.value = location
    (folder / "model.onnx").write_bytes(model.SerializeToString())


@pytest.mark.parametrize(
    ("model", "changes", "expected"),
    [
        (graph((8, 4)), {}, "axis 0 is fixed at 8 in the file, the recipe calls it 'batch'"),
        (graph(("n", 4)), {"tensors": {"x": tensor(["batch", 5])}}, "axis 1 is 4, the recipe says 5"),
        (graph(), {"tensors": {"x": tensor(["batch", 4], "float16")}}, "'x' is float32, the recipe says float16"),
        (graph(), {"tensors": {"x": tensor(["batch", 4, 4])}}, r"has shape \[n, 4\], the recipe says \[batch, 4, 4\]"),
        (graph(), {"tensors": {"image": tensor(["batch", 4])}}, r"no input 'image' \(it has: x\)"),
        (
            graph(("n", "n")),
            {"tensors": {"x": tensor(["batch", 4])}},
            "one size, 'n', for what the recipe calls 'batch' and 4",
        ),
        (graph(), {"outputs": ["z"]}, "the file's outputs are y; the recipe names z"),
    ],
)
def test_a_file_that_disagrees_with_the_recipe_says_how(tmp_path, model, changes, expected):
    with pytest.raises(BackendError, match=expected) as caught:
        export_graph(tmp_path, model, **changes)
    assert caught.value.kind == "bad data"
    assert caught.value.advice


def test_an_axis_that_the_recipe_fixes_becomes_fixed_everywhere(tmp_path):
    nodes = [helper.make_node("Relu", ["x"], ["h"]), helper.make_node("ReduceMean", ["h"], ["y"], axes=[1], keepdims=1)]
    model = graph(("n", "k"), nodes=nodes, initializers=[])
    result, folder = export_graph(tmp_path, model, tensors={"x": tensor(["batch", 7])})
    assert result.facts["inputs"]["x"]["shape"] == ["batch", 7]
    assert [dims_of(value) for value in onnx.load(folder / "model.onnx").graph.value_info] == [["batch", 7]]


def test_initialisers_listed_as_inputs_are_not_fed(tmp_path):
    model = graph(ir_version=3)
    model.graph.input.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, [4, 4]))
    result, folder = export_graph(tmp_path, model)
    assert set(result.facts["inputs"]) == {"x"}
    assert [value.name for value in onnx.load(folder / "model.onnx").graph.input] == ["x"]


def test_an_invalid_graph_is_refused_in_the_checkers_words(tmp_path):
    nodes = [helper.make_node("MatMul", ["nowhere", "w"], ["y"])]
    weights = [numpy_helper.from_array(np.eye(4, dtype=np.float32), "w")]
    with pytest.raises(BackendError, match=r"onnx.checker: .*nowhere"):
        export_graph(tmp_path, graph(nodes=nodes, initializers=weights))


def test_outputs_of_one_name_are_refused_before_anything_is_made_of_them(tmp_path):
    model = graph()
    model.graph.output.append(model.graph.output[0])
    with pytest.raises(BackendError, match=r"(?s)several outputs of one name: 'y'.*Identity"):
        export_graph(tmp_path, model)


def test_custom_operators_are_kept_and_reported(tmp_path):
    model = graph(nodes=[helper.make_node("Magic", ["x", "w"], ["y"], domain="acme")])
    model.opset_import.append(helper.make_opsetid("acme", 1))
    result, _ = export_graph(tmp_path, model)
    assert result.facts["domains"] == {"acme": ["Magic"]}
    path = fresh(tmp_path, "author") / "model.onnx"
    onnx.save(model, path)
    with pytest.raises(BackendError) as caught:
        GraphRunner(path)
    assert "acme::Magic '' (node 0 of 1, makes y)" in caught.value.message
    assert str(path.parent) not in caught.value.message


def test_a_case_that_the_file_does_not_run_at_is_named(tmp_path):
    folder = fresh(tmp_path, "in")
    nodes = [helper.make_node("Reshape", ["x", "two"], ["h"]), helper.make_node("ReduceMean", ["h"], ["y"], axes=[1])]
    onnx.save(
        graph(nodes=nodes, initializers=[numpy_helper.from_array(np.array([2, -1]), "two")]), folder / "model.onnx"
    )
    cases = [{"name": f"p/{n}", "shapes": {"x": [n, 4]}} for n in (2, 3)]
    nodes[0].input[1] = "two"
    params = onnx_params(kind="parity", cases=[*cases, {"name": "p/odd", "shapes": {"x": [1, 3]}}], input_seed=0)
    asked = request("reference", params, {"model.onnx": folder / "model.onnx"}, tmp_path)
    with pytest.raises(BackendError, match=r"does not run at case p/odd \(x \[1, 3\]\)") as caught:
        run_reference(asked)
    assert caught.value.kind == "bad profile"


def test_outputs_whose_rows_are_no_samples_are_refused(tmp_path):
    folder = fresh(tmp_path, "in")
    nodes = [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("NonZero", ["h"], ["y"])]
    model = graph(nodes=nodes)
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info("y", TensorProto.INT64, [2, None]))
    onnx.save(model, folder / "model.onnx")
    x = np.array([[1, 0, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1]], np.float32)
    save_file({"x": x}, folder / "dataset.safetensors")
    inputs = {"model.onnx": folder / "model.onnx", "dataset.safetensors": folder / "dataset.safetensors"}
    asked = request("reference", onnx_params(kind="dataset", batch=2), inputs, tmp_path)
    with pytest.raises(BackendError, match=r"output 'y' has shape \[2, 8\] for 2 samples: it needs one row") as caught:
        run_reference(asked)
    assert caught.value.kind == "bad data"


def test_a_fixed_batch_pads_the_last_samples_of_a_data_set(tmp_path):
    folder = fresh(tmp_path, "in")
    onnx.save(graph((3, 4)), folder / "model.onnx")
    x = np.arange(28, dtype=np.float32).reshape(7, 4)
    save_file({"x": x}, folder / "dataset.safetensors")
    params = onnx_params(kind="dataset", batch=32, tensors={"x": tensor([3, 4])})
    asked = request("reference", params, {path.name: path for path in folder.iterdir()}, tmp_path)
    run_reference(asked)
    np.testing.assert_allclose(load_file(asked.output_dir / "outputs.safetensors")["y"], 3 * x.mean(1, keepdims=True))


def test_an_unknown_framework_is_refused(tmp_path):
    with pytest.raises(BackendError, match=r"no source 'tensorflow' \(allowed: torch, paddle, onnx\)"):
        run_export(request("export", {"framework": "tensorflow"}, {}, tmp_path))
