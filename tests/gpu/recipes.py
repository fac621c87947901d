"""Recipes of a small convolutional network for the GPU that is here."""

from __future__ import annotations

from pathlib import Path

import onnx
import yaml

from tests.unit.tasks.small_graphs import cnn


def write_recipe(folder: Path, gpu: str, name: str = "small", *, seed: int = 0, **build: object) -> Path:
    """Write a recipe with its ONNX file, whose weights follow from `seed`; `build` are fields of its `build`."""
    folder.mkdir(parents=True, exist_ok=True)
    model = cnn(seed)
    del model.opset_import[:]
    model.opset_import.append(onnx.helper.make_opsetid("", 17))  # what every version from 8.6 on reads
    onnx.save(model, folder / f"{name}.onnx")
    document = {
        "enginery": 1,
        "name": name,
        "source": {"framework": "onnx", "model": {"file": f"{name}.onnx"}},
        "export": {"simplifier": "none"},
        "inputs": {"x": {"shape": ["batch", 1, 8, 8], "low": 0.0, "high": 1.0}},
        "outputs": ["y"],
        "profiles": {"one": {"batch": [1, 2, 4]}},
        "targets": [{"runtime": "tensorrt", "gpus": [gpu]}],
        "build": {"optimization_level": 1, "timeout": "3m", **build},
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(document, sort_keys=False))
    return path
