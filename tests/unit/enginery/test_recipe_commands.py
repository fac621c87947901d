"""Commands on recipes, as far as they run no stage."""

from __future__ import annotations

import typer
from typer.testing import CliRunner

from artifacts.cache import ActionCache, blob_path
from artifacts.folder import FolderStore
from artifacts.records import ActionRecord
from artifacts.refs import ArtifactRef, digest_bytes
from enginery import recipe_commands
from enginery.output import FAILED, WAITING
from tasks.session import open_session

RECIPE = """
enginery: 1
name: {name}
source: {{framework: onnx, model: {{file: model.onnx}}}}
inputs: {{x: {{shape: [1, 4]}}}}
precision: {{build: [fp32]}}
targets: [{target}]
"""
FAR = {"executed": True, "parity": {"relative_l2": 0.5, "max_abs": 1.0, "cosine": 0.1, "non_finite": 0}, "metric": None}


def make_every_graph_wrong(recipe, store, folder):
    """Record the portable stages of a recipe, whose graphs are far from their source."""
    while ready := open_session(recipe, store).plan().ready:
        for step in ready:
            outputs = {}
            for name in {"fetch": ["model.onnx"], "reference": ["reference.safetensors"], "verify": []}.get(
                step.stage, ["model.onnx"]
            ):
                data = f"{name} of {step.stage}".encode()
                ref = ArtifactRef(digest_bytes(data), len(data), "x/y")
                (folder / "blob").write_bytes(data)
                store.put_file(blob_path(ref.digest), folder / "blob", ref)
                outputs[name] = ref
            facts = FAR if step.stage == "verify" else {}
            ActionCache(store).put_record(ActionRecord(step.action.preimage(), outputs, facts))


def test_a_plan_of_several_recipes_ends_with_the_worst_status(tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"a graph")
    bad, waits = tmp_path / "bad.yaml", tmp_path / "waits.yaml"
    bad.write_text(RECIPE.format(name="bad", target="{runtime: onnxruntime}"))
    waits.write_text(RECIPE.format(name="waits", target="{runtime: tensorrt-rtx, gpus: [sm89], version: 1.0.0.1}"))
    store = FolderStore(tmp_path / "store")
    make_every_graph_wrong(bad, store, tmp_path)

    app = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False)
    recipe_commands.register(app)

    def status(*recipes):
        return CliRunner().invoke(app, ["plan", *map(str, recipes), "--store", str(store.root)]).exit_code

    assert status(bad) == FAILED
    store = FolderStore(tmp_path / "empty")
    assert status(waits) == WAITING
    store = FolderStore(tmp_path / "store")
    assert status(bad, waits) == FAILED
