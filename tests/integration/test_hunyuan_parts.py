"""HunyuanOCR's architecture in four graphs: the rewritten modules and the pulled engines give what transformers' model gives."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from artifacts.catalog import EngineCatalog
from artifacts.store import open_store
from enginery.client import load, pull
from tests.integration.building import RECIPES, build

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
STEPS = 12
BEFORE, AFTER = [5], [7, 8, 9]
Call = Callable[..., Mapping[str, Any]]


@pytest.fixture(scope="module")
def code() -> ModuleType:
    spec = importlib.util.spec_from_file_location("hunyuan_small_model", RECIPES / "hunyuan-small" / "model.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def model(code: ModuleType) -> Any:
    torch.manual_seed(0)
    return code.build().eval()


def page(rows: int, columns: int) -> np.ndarray:
    return np.random.default_rng(7).uniform(-1, 1, (1, 3, rows, 32, columns, 32)).astype(np.float32)


def library(model: Any, code: ModuleType, image: np.ndarray) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """Return the library's own image embeddings, positions on four axes of the prompt, and greedy tokens without a cache."""
    rows, columns = image.shape[2], image.shape[4]
    pixels = torch.from_numpy(image).reshape(1, 3, rows * 2, 16, columns * 2, 16).permute(0, 2, 4, 1, 3, 5)
    given = {
        "pixel_values": pixels.reshape(rows * columns * 4, 768),
        "image_grid_thw": torch.tensor([[1, rows * 2, columns * 2]]),
    }
    with torch.inference_mode():
        (seen,) = model.model.get_image_features(*given.values(), return_dict=True).pooler_output
        ids = torch.tensor([BEFORE + [code.IMAGE_TOKEN] * len(seen) + AFTER])
        kinds = (ids == code.IMAGE_TOKEN).int()
        positions, _delta = model.model.get_rope_index(
            ids, mm_token_type_ids=kinds, image_grid_thw=given["image_grid_thw"]
        )
        tokens: list[int] = []
        for _ in range(STEPS):
            kinds = (ids == code.IMAGE_TOKEN).int()
            scores = model(input_ids=ids, mm_token_type_ids=kinds, use_cache=False, **given).logits
            tokens.append(int(scores[0, -1].argmax()))
            ids = torch.cat([ids, torch.tensor([tokens[-1:]])], dim=1)
    return seen.numpy(), positions.numpy(), tokens


def decode(call: Call, image: np.ndarray, positions: np.ndarray) -> list[int]:
    """Decode greedily through the parts."""
    seen = call("vision", image=image)["embeddings"]

    def embed(tokens: list[int]) -> np.ndarray:
        return call("embed", input_ids=np.array([tokens], np.int64))["embeddings"]

    prompt = np.concatenate([embed(BEFORE), seen, embed(AFTER)], axis=1)
    found, tokens = call("prompt", embeddings=prompt, positions=positions), list[int]()
    for step in range(STEPS):
        tokens.append(int(found["scores"][0].argmax()))
        past = {name.removeprefix("new_"): value for name, value in found.items() if name != "scores"}
        place = np.full((4, 1, 1), prompt.shape[1] + step, np.int64)
        found = call("step", embeddings=embed(tokens[-1:]), positions=place, **past)
    return tokens


@pytest.mark.slow
@pytest.mark.parametrize(("rows", "columns"), [(2, 3), (5, 2)])
def test_the_rewritten_modules_are_the_librarys_model(code, model, rows, columns):
    image = page(rows, columns)
    seen, positions, tokens = library(model, code, image)
    outputs = ["scores", "new_key_0", "new_value_0", "new_key_1", "new_value_1"]
    language = code.language(model)
    parts = {"vision": code.vision(model), "embed": code.embed(model), "prompt": language, "step": language}

    def call(part: str, **given: np.ndarray) -> dict[str, np.ndarray]:
        with torch.inference_mode():
            found = parts[part](**{name: torch.from_numpy(value) for name, value in given.items()})
        if isinstance(found, torch.Tensor):
            return {"embeddings": found.numpy()}
        return dict(zip(outputs, (tensor.numpy() for tensor in found), strict=True))

    assert np.abs(call("vision", image=image)["embeddings"][0] - seen).max() < 1e-5
    assert len(set(tokens)) > 3
    assert decode(call, image, positions) == tokens


@pytest.mark.long
def test_greedy_decoding_through_pulled_engines_gives_pytorchs_tokens(code, model, tmp_path: Path):
    _ran, planned, _session = build(RECIPES / "hunyuan-small.yaml", tmp_path / "store")
    assert planned.status == 0
    store = open_store(str(tmp_path / "store"))
    engines = [one for one in EngineCatalog(store).engines() if one.target.startswith("onnxruntime")]
    exact = [one for one in engines if one.build.startswith(("fp32", "fp16"))]
    assert len(exact) == 2
    for rows, columns in ((2, 3), (12, 7)):
        image = page(rows, columns)
        _seen, positions, tokens = library(model, code, image)
        for name in exact:
            with load(pull(store, name, tmp_path / "pulled")) as engine:
                assert decode(lambda part, engine=engine, **given: engine[part](**given), image, positions) == tokens
