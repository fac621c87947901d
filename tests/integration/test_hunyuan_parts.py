"""HunyuanOCR's architecture in four graphs: the rewritten modules and the pulled engines give what transformers' model gives."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest

from artifacts.catalog import EngineCatalog
from artifacts.store import open_store
from enginery.client import load, pull
from tests.integration.building import RECIPES, build

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
Call = Callable[..., Mapping[str, Any]]
FOLDER = RECIPES / "hunyuan-small"


@pytest.fixture(scope="module")
def code() -> Iterator[SimpleNamespace]:
    """Return the recipe's own modules."""
    sys.path.insert(0, str(FOLDER))
    names = ("model", "pages", "reading")
    yield SimpleNamespace(**{name: importlib.import_module(name) for name in names})
    sys.path.remove(str(FOLDER))
    for name in names:
        del sys.modules[name]


@pytest.fixture(scope="module")
def model(code: SimpleNamespace) -> Any:
    from safetensors.torch import load_file

    made = code.model.build().eval()
    made.load_state_dict(load_file(str(FOLDER / "weights.safetensors")))
    return made


def library(model: Any, code: SimpleNamespace, image: np.ndarray) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """Return the library's own image embeddings, positions on four axes of the prompt, and greedy tokens without a cache."""
    rows, columns = image.shape[2], image.shape[4]
    pixels = torch.from_numpy(image).reshape(1, 3, rows * 2, 16, columns * 2, 16).permute(0, 2, 4, 1, 3, 5)
    given = {
        "pixel_values": pixels.reshape(rows * columns * 4, 768),
        "image_grid_thw": torch.tensor([[1, rows * 2, columns * 2]]),
    }
    with torch.inference_mode():
        (seen,) = model.model.get_image_features(*given.values(), return_dict=True).pooler_output
        ids = torch.tensor([code.reading.BEFORE + [code.model.IMAGE_TOKEN] * len(seen) + code.reading.AFTER])
        kinds = (ids == code.model.IMAGE_TOKEN).int()
        positions, _delta = model.model.get_rope_index(
            ids, mm_token_type_ids=kinds, image_grid_thw=given["image_grid_thw"]
        )
        tokens: list[int] = []
        for _ in range(rows * columns + 1):
            kinds = (ids == code.model.IMAGE_TOKEN).int()
            scores = model(input_ids=ids, mm_token_type_ids=kinds, use_cache=False, **given).logits
            tokens.append(int(scores[0, -1].argmax()))
            ids = torch.cat([ids, torch.tensor([tokens[-1:]])], dim=1)
    return seen.numpy(), positions.numpy(), tokens


def weights_of(part: Path) -> set[bytes]:
    """Return the weights that a part's graph holds."""
    tensors = onnx.load(str(part / "model.onnx")).graph.initializer
    return {onnx.numpy_helper.to_array(one).tobytes() for one in tensors if np.prod(one.dims) > 1000}


def ended(tokens: list[int], end: int) -> list[int]:
    """Return tokens with -1 after the one that ends a text, as the recipe's code gives them."""
    return [-1 if end in tokens[:place] else token for place, token in enumerate(tokens)]


@pytest.mark.slow
@pytest.mark.parametrize(("rows", "columns"), [(2, 3), (5, 2)])
def test_the_rewritten_modules_are_the_librarys_model(code, model, rows, columns):
    image = code.pages.held_out(1, rows, columns)["image"]
    seen, positions, tokens = library(model, code, image)
    outputs = ["scores", "new_key_0", "new_value_0", "new_key_1", "new_value_1"]
    language = code.model.language(model)
    parts = {"vision": code.model.vision(model), "embed": code.model.embed(model), "prompt": language, "step": language}

    def part(name: str) -> Call:
        def call(**given: np.ndarray) -> dict[str, np.ndarray]:
            with torch.inference_mode():
                found = parts[name](**{key: torch.from_numpy(value) for key, value in given.items()})
            if isinstance(found, torch.Tensor):
                return {"embeddings": found.numpy()}
            return dict(zip(outputs, (tensor.numpy() for tensor in found), strict=True))

        return call

    calls = {name: part(name) for name in parts}
    assert np.abs(calls["vision"](image=image)["embeddings"][0] - seen).max() < 1e-4
    assert np.array_equal(code.reading.positions(1, rows, columns), positions)
    assert len(set(tokens)) > 3
    assert code.reading.read(calls, {"image": image})["tokens"][0].tolist() == ended(tokens, code.reading.END)


@pytest.mark.long
def test_greedy_decoding_through_pulled_engines_gives_pytorchs_tokens(code, model, tmp_path: Path):
    """Also in int8: a trained model's scores have margins. Larger pages than it was trained for have none, and are for fp32 and fp16."""
    _ran, planned, _session = build(RECIPES / "hunyuan-small.yaml", tmp_path / "store")
    assert planned.status == 0
    store = open_store(str(tmp_path / "store"))
    engines = [one for one in EngineCatalog(store).engines() if one.target.startswith("onnxruntime")]
    assert {one.build.partition("-")[0] for one in engines} == {"fp32", "fp16", "int8"}
    exact = pull(store, next(one for one in engines if one.build.startswith("fp32")), tmp_path / "exact")
    assert set(exact.manifest.provenance.source) == {"code.tar", "weights.safetensors"}
    assert len(weights_of(exact.folder / "prompt")) > 8
    assert weights_of(exact.folder / "prompt") == weights_of(exact.folder / "step")  # of one model, in each graph
    trained = code.pages.held_out(8)["image"]
    large = code.pages.held_out(1, 12, 7)["image"]
    for image in (*np.split(trained, 8), large):
        _seen, _positions, tokens = library(model, code, image)
        for name in engines:
            if image.shape != large.shape or not name.build.startswith("int8"):
                with load(pull(store, name, tmp_path / "pulled")) as engine:
                    found = code.reading.read({part: engine[part] for part in engine.parts}, {"image": image})
                assert found["tokens"][0].tolist() == ended(tokens, code.reading.END), (name, image.shape)
