"""Engines of several parts, from PyTorch to what a server calls: greedy decoding gives PyTorch's tokens; all parts or none."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import yaml

from artifacts.catalog import EngineCatalog
from artifacts.errors import IntegrityError
from artifacts.manifest import PARTS_SCHEMA
from artifacts.store import open_store
from enginery.client import PulledEngine, load, pull
from tasks.errors import CallError
from tests.integration.building import RECIPES, build
from tests.integration.killing import started

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytestmark = pytest.mark.slow
STEPS = 16


def copy(folder: Path) -> Path:
    """Copy the recipe, with its engines for ONNX Runtime alone."""
    folder.mkdir(parents=True)
    shutil.copytree(RECIPES / "trocr-small", folder / "trocr-small", ignore=shutil.ignore_patterns("__pycache__"))
    document = yaml.safe_load((RECIPES / "trocr-small.yaml").read_text())
    document["targets"] = [{"runtime": "onnxruntime", "gpus": ["cpu"], "precision": ["fp16", "fp32"]}]
    path = folder / "trocr-small.yaml"
    path.write_text(yaml.safe_dump(document, sort_keys=False))
    return path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return the recipe and the store of a build that was killed when it first published, and then went on."""
    folder = tmp_path_factory.mktemp("parts")
    recipe, store = copy(folder / "recipes"), folder / "recipes" / "store"
    with started(recipe.parent, recipe.name) as killed:
        reached = killed.wait_for("publish", 280)
        killed.kill()
    assert reached, killed.stderr
    for engine in EngineCatalog(open_store(str(store))).engines():  # what is visible is whole
        pull(open_store(str(store)), engine, folder / "after-the-kill")
    build(recipe, store)
    return recipe, store


@pytest.fixture(scope="module")
def model() -> ModuleType:
    spec = importlib.util.spec_from_file_location("trocr_small_model", RECIPES / "trocr-small" / "model.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def pulled(store: Path, precision: str, to: Path) -> PulledEngine:
    opened = open_store(str(store))
    (engine,) = [one for one in EngineCatalog(opened).engines() if one.build.startswith(precision)]
    return pull(opened, engine, to)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_greedy_decoding_through_the_parts_gives_pytorchs_tokens(made, model, tmp_path, precision):
    images = np.random.default_rng(5).uniform(-1, 1, (4, 3, 32, 32)).astype(np.float32)
    torch.manual_seed(0)
    expected = model.reference(model.build().eval(), torch.from_numpy(images), STEPS).numpy()
    assert len(np.unique(expected)) > 8  # a model that says one word would agree with anything
    tokens = []
    with load(pulled(made[1], precision, tmp_path)) as engine:
        states = engine["encoder"](pixel_values=images)["states"]
        ids = np.full((len(images), 1), model.START, np.int64)
        found = engine["first"](input_ids=ids, states=states)
        for _ in range(STEPS):
            ids = found["scores"][:, -1:].argmax(-1)
            tokens.append(ids)
            past = {name.removeprefix("new_"): value for name, value in found.items() if name != "scores"}
            found = engine["step"](input_ids=ids, states=states, **past)
    assert np.array_equal(np.concatenate(tokens, axis=1), expected)


def test_an_engine_of_parts_is_called_by_part_and_says_so(made, tmp_path):
    engine = pulled(made[1], "fp32", tmp_path)
    assert engine.manifest.schema_version == PARTS_SCHEMA
    assert set(engine.manifest.parts) == {"encoder", "first", "step"}
    assert {"encoder/model.onnx", "first/model.onnx", "step/model.onnx"} <= set(engine.manifest.files)
    with load(engine) as loaded:
        with pytest.raises(CallError, match="has the parts encoder, first, step"):
            loaded(pixel_values=np.zeros((1, 3, 32, 32), np.float32))
        with pytest.raises(CallError, match="has no part 'decoder'"):
            loaded["decoder"]
        first = loaded["first"]
    assert loaded.closed
    assert first.closed


def test_one_damaged_part_keeps_the_whole_engine_from_being_loaded(made, tmp_path):
    engine = pulled(made[1], "fp32", tmp_path)
    path = engine.folder / "step" / "model.onnx"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.chmod(0o644)
    path.write_bytes(data)
    with pytest.raises(IntegrityError, match=r"step/model\.onnx"):
        load(engine)


def test_an_engine_that_lost_one_part_is_published_again_and_nothing_else_runs(made):
    recipe, store = made
    (folder,) = (store / "engines" / "trocr-small").glob("*/fp32-*")
    (folder / "step" / "model.onnx").unlink()
    ran, planned, _session = build(recipe, store)
    assert ran == {"publish:onnxruntime:cpu:fp32"}
    assert planned.fresh
    assert (folder / "step" / "model.onnx").is_file()
