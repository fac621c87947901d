"""Engines of several parts, from PyTorch to what a server calls: greedy decoding gives PyTorch's tokens; all parts or none."""

from __future__ import annotations

import importlib
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

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


def copy(folder: Path) -> Path:
    """Copy the recipe, with its engines for ONNX Runtime alone, and without its own gate on all parts: tests here decode themselves."""
    folder.mkdir(parents=True)
    shutil.copytree(RECIPES / "trocr-small", folder / "trocr-small", ignore=shutil.ignore_patterns("__pycache__"))
    document = yaml.safe_load((RECIPES / "trocr-small.yaml").read_text())
    document["targets"] = [{"runtime": "onnxruntime", "gpus": ["cpu"], "precision": ["fp16", "fp32"]}]
    del document["acceptance"], document["precision"]["fallback"]["int8"]
    document["precision"]["build"] = ["fp16"]
    for part in document["parts"].values():
        del part["precision"]
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
def code() -> Iterator[SimpleNamespace]:
    """Return the recipe's own modules."""
    sys.path.insert(0, str(RECIPES / "trocr-small"))
    names = ("model", "reading", "lines")
    yield SimpleNamespace(**{name: importlib.import_module(name) for name in names})
    sys.path.remove(str(RECIPES / "trocr-small"))
    for name in names:
        del sys.modules[name]


def pytorch(code: SimpleNamespace, images: np.ndarray) -> np.ndarray:
    """Decode lines greedily by the library's own model, without any cache: tokens [N, 5]."""
    from safetensors.torch import load_file

    model = code.model.build().eval()
    model.load_state_dict(load_file(str(RECIPES / "trocr-small" / "weights.safetensors")))
    with torch.inference_mode():
        states = model.vision(torch.from_numpy(images)).last_hidden_state
        tokens = torch.full((len(images), 1), code.reading.START)
        for _ in range(code.reading.LONGEST + 1):
            scores = model.text(input_ids=tokens, encoder_hidden_states=states, use_cache=False).logits
            tokens = torch.cat([tokens, scores[:, -1:].argmax(-1)], dim=1)
    return code.reading.ended(tokens[:, 1:].numpy())


def pulled(store: Path, precision: str, to: Path) -> PulledEngine:
    opened = open_store(str(store))
    (engine,) = [one for one in EngineCatalog(opened).engines() if one.build.startswith(precision)]
    return pull(opened, engine, to)


def decoded(engine: PulledEngine, code: SimpleNamespace, images: np.ndarray) -> np.ndarray:
    with load(engine) as loaded:
        parts = {name: loaded[name] for name in loaded.parts}
        four = [
            code.reading.read(parts, {"pixel_values": batch})["tokens"] for batch in np.split(images, len(images) // 4)
        ]
    return np.concatenate(four)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_greedy_decoding_through_the_parts_gives_pytorchs_tokens(made, code, tmp_path, precision):
    lines = code.lines.held_out(32)
    expected = pytorch(code, lines["pixel_values"])
    assert (expected == lines["label"]).all(axis=1).mean() > 0.8  # a model that says one word would agree with anything
    assert np.array_equal(decoded(pulled(made[1], precision, tmp_path), code, lines["pixel_values"]), expected)


@pytest.mark.long
def test_the_recipe_as_it_is_decodes_to_pytorchs_tokens_in_int8_too(code, tmp_path):
    _ran, planned, _session = build(RECIPES / "trocr-small.yaml", tmp_path / "store")
    assert planned.status == 0
    assert [(one.runtime, one.given) for one in planned.engines] == [
        *(("tensorrt-rtx", name) for name in ("int8", "fp16")),
        *(("onnxruntime", name) for name in ("int8", "fp16", "fp32")),
    ]
    images = code.lines.held_out()["pixel_values"]
    expected = pytorch(code, images)
    store = open_store(str(tmp_path / "store"))
    engines = [one for one in EngineCatalog(store).engines() if one.target.startswith("onnxruntime")]
    assert len(engines) == 3
    for engine in engines:
        found = decoded(pull(store, engine, tmp_path / "pulled"), code, images)
        assert np.array_equal(found, expected), engine.build


def test_an_engine_of_parts_is_called_by_part_and_says_so(made, tmp_path):
    engine = pulled(made[1], "fp32", tmp_path)
    assert engine.manifest.schema_version == PARTS_SCHEMA
    assert set(engine.manifest.parts) == {"encoder", "first", "step"}
    assert {"encoder/model.onnx", "first/model.onnx", "step/model.onnx"} <= set(engine.manifest.files)
    with load(engine) as loaded:
        with pytest.raises(CallError, match="has the parts encoder, first, step"):
            loaded(pixel_values=np.zeros((1, 3, 32, 128), np.float32))
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
