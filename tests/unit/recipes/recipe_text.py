"""A small recipe to break: as YAML text, as a document, and as a folder with everything it names."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from recipes.errors import Fault, RecipeError
from recipes.loader import LoadedRecipe, load
from recipes.schema import Recipe
from recipes.yaml_text import parse

TEXT = """\
# A comment.
enginery: 1
name: tiny
source:
  framework: torch
  model: code/model.py:build
  weights: {file: code/weights.safetensors}
export: {opset: 18}
inputs:
  image: {dtype: float32, shape: [batch, 1, height, 8]}
outputs: [logits]
profiles:
  online: {batch: [1, 1, 4], height: [8, 8, 16]}
  bulk: {batch: [1, 64, 256], height: [8, 8, 8]}
precision:
  build: [int8, fp16]
  fallback: {int8: [fp16, fp32]}
  calibration: {data: data/calibration.npz, samples: 16}
acceptance:
  metric:
    name: top1
    data: {data: data/heldout.npz}
    floor: 0.97
targets:
  - {runtime: tensorrt-rtx, gpus: [sm86, sm89]}
  - {runtime: onnxruntime, precision: [fp32, int8]}
"""
MODEL = "from layers import Layer\n\n\ndef build(width=8):\n    return Layer(width)\n"
LAYERS = "import torch\n\n\nclass Layer(torch.nn.Module):\n    pass\n"


def document(tmp_path: Path) -> dict[str, Any]:
    path = tmp_path / "document.yaml"
    path.write_text(TEXT)
    return copy.deepcopy(parse(path).root.plain())


def recipe(tmp_path: Path, change: Callable[[dict[str, Any]], object] = lambda _document: None) -> Recipe:
    made = document(tmp_path)
    change(made)
    return Recipe.model_validate(made)


def write_project(folder: Path, text: str = TEXT) -> Path:
    """Write the recipe and all files it names below a folder; return the recipe's path."""
    for name, content in {"code/model.py": MODEL, "code/layers.py": LAYERS}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    (folder / "code/weights.safetensors").write_bytes(b"weights")
    (folder / "data").mkdir(exist_ok=True)
    np.savez(folder / "data/calibration.npz", image=np.zeros((2, 1, 8, 8), np.float32))
    np.savez(folder / "data/heldout.npz", image=np.ones((2, 1, 8, 8), np.float32), label=np.zeros(2, np.int64))
    path = folder / "recipe.yaml"
    path.write_text(text)
    return path


def changed(old: str, new: str, text: str = TEXT) -> str:
    assert text.count(old) == 1, f"{old!r} occurs {text.count(old)} times"
    return text.replace(old, new)


def load_text(folder: Path, text: str) -> LoadedRecipe:
    path = folder / "recipe.yaml"
    path.write_text(text)
    return load(path)


def faults_of(folder: Path, text: str) -> list[Fault]:
    with pytest.raises(RecipeError) as caught:
        load_text(folder, text)
    return list(caught.value.faults)


def told(faults: list[Fault], folder: Path) -> list[str]:
    """Return faults as printed, with the folder left out."""
    return [str(fault).replace(f"{folder}/", "") for fault in faults]


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
