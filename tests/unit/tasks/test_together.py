"""Parts that are run together: what fails on what they give says so of them, and not of this host or the recipe."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from tasks import verify
from tasks.errors import BackendError
from tasks.references import save_arrays
from tasks.stage import StageRequest
from tests.unit.tasks.bundles import code_tar
from tests.unit.tasks.small_graphs import graph, node

CODE = """
    def read(parts, inputs):
        found = parts["detector"](x=inputs["x"])["y"]
        if found.max() < 0:
            raise ValueError("nothing detected")
        return {"boxes": found[:, :2] if found.max() < 100 else found[:, :3]}
    """


def measured(folder, factor, **params):
    """Measure a detector whose outputs are `factor` times those of its source."""
    x = np.arange(1, 13, dtype=np.float32).reshape(3, 4)
    onnx.save(graph([node("Mul", ["x", "f"], ["y"])], {"f": np.float32([factor])}), folder / "model.onnx")
    save_arrays({"x": x, "label": np.zeros(3, np.int64)}, folder / "dataset.safetensors")
    save_arrays({"boxes": x[:, :2]}, folder / "outputs.safetensors")
    asked = {
        "subject": "together", "run": "own:read", "batch": 3,
        "parts": {"detector": {"executor": "onnxruntime", "subject": "graph"}},
        "tensors": {"x": {"dtype": "float32", "shape": ["batch", 4]}},
        "metric": {"name": "top1", "entry": None, "label": "label", "output": None},
    }  # fmt: skip
    files = {name: folder / name for name in ("dataset.safetensors", "outputs.safetensors")}
    files |= {"detector/model.onnx": folder / "model.onnx", "run/code.tar": code_tar(folder, {"own.py": CODE})}
    return verify.run(StageRequest("verify", {**asked, **params}, files, folder)).facts


def test_parts_as_their_source_has_them_are_measured(tmp_path):
    facts = measured(tmp_path, 1)
    assert (facts["executed"], facts["same"]) == (True, 1.0)


@pytest.mark.parametrize(
    ("factor", "words"),
    [(-1, "nothing detected"), (100, "boxes has shape [3, 3], the source gave [3, 2]")],
)
def test_a_precision_on_which_the_recipes_code_fails_is_not_executed_and_may_give_way(tmp_path, factor, words):
    facts = measured(tmp_path, factor)
    assert facts["executed"] is False
    assert words in facts["reason"]


def test_what_no_part_is_the_cause_of_fails_the_step(tmp_path):
    with pytest.raises(BackendError, match="no device"):
        measured(tmp_path, 1, parts={"detector": {"executor": "elsewhere", "subject": "graph"}})
