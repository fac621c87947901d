"""HunyuanOCR at its full size: the plan of its four parts, and the export of its vision part with its peak of memory.

    python bench/hunyuan_full.py --out bench/results/hunyuan_full.json

Sizes are those of the released model: the vision tower of transformers' defaults with an output of 1024, and a language model of 24
layers (1024 wide, 16 heads of 128, 8 of keys and values, 3584 inside, 120818 tokens). Weights are random; the language model of the
export is on PyTorch's device `meta`, and takes no memory. What is not exported here is told with what it would take.
"""

from __future__ import annotations

import argparse
import datetime as dt
import importlib.metadata
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any, Final

import yaml

ROOT: Final = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

FULL: Final = """
import torch
from model import REDUCED, Vision, embed, language, vision
from transformers import HunYuanVLConfig, HunYuanVLForConditionalGeneration
import model as reduced

reduced.LAYERS = 24
TEXT = REDUCED["text"] | {
    "vocab_size": 120818, "hidden_size": 1024, "intermediate_size": 3584, "num_hidden_layers": 24, "num_attention_heads": 16,
    "num_key_value_heads": 8, "head_dim": 128, "initializer_range": 0.02, "max_position_embeddings": 32768,
}
TEXT["rope_parameters"] = TEXT["rope_parameters"] | {"mrope_section": [16, 16, 16, 16]}
VISION = {"text_hidden_size": 1024, "out_hidden_size": 1024}

def build():
    config = HunYuanVLConfig(text_config=TEXT, vision_config=dict(VISION), attn_implementation="eager")
    with torch.device("meta"):
        whole = HunYuanVLForConditionalGeneration(config)
    tower = whole.model.vision_tower.to_empty(device="cpu")
    for name, value in tower.named_parameters():
        with torch.no_grad():
            torch.nn.init.normal_(value, std=0.02) if value.ndim > 1 else value.fill_(1.0 if name.endswith("norm.weight") else 0.0)
    return whole

def tower_of_vision():
    return Vision(build())
"""
LAYERS, HEADS, SIZE, WIDTH, VOCABULARY = 24, 8, 128, 1024, 120818


def recipe(folder: Path) -> Path:
    """Write the recipe of all parts at the full size, and its code, and return its path."""
    shutil.copytree(
        ROOT / "recipes" / "hunyuan-small", folder / "hunyuan-small", ignore=shutil.ignore_patterns("__pycache__")
    )
    (folder / "hunyuan-small" / "full.py").write_text(FULL)
    document = yaml.safe_load((ROOT / "recipes" / "hunyuan-small.yaml").read_text())
    document["name"], document["acceptance"] = "hunyuan-full", {}
    document["source"] = {"framework": "torch", "model": "hunyuan-small/full.py:build"}
    cache = {
        f"{kind}_{layer}": {"shape": ["batch", HEADS, "past", SIZE]}
        for layer in range(LAYERS)
        for kind in ("key", "value")
    }
    outputs = ["scores", *(f"new_{kind}_{layer}" for layer in range(LAYERS) for kind in ("key", "value"))]
    parts = document["parts"]
    for name in ("prompt", "step"):
        parts[name]["inputs"]["embeddings"]["shape"][2] = WIDTH
        parts[name]["outputs"] = outputs
    parts["step"]["inputs"] = {key: parts["step"]["inputs"][key] for key in ("embeddings", "positions")} | cache
    parts["embed"]["inputs"]["input_ids"]["high"] = VOCABULARY - 1
    parts["vision"]["precision"]["calibration"]["batch"] = 1
    path = folder / "hunyuan-full.yaml"
    path.write_text(yaml.safe_dump(document, sort_keys=False))
    return path


def plan(folder: Path) -> dict[str, int]:
    """Plan the recipe with an empty store: how many steps of each stage there are."""
    from recipes.files import gather
    from recipes.loader import load
    from recipes.planner import plan as planned_of
    from tasks.toolchain import probe_host, version

    loaded = load(recipe(folder))
    planned = planned_of(loaded.recipe, gather(loaded), probe_host(), version=version, lookup=lambda _stage, _key: None)
    stages = [step.stage for step in planned.steps]
    return {stage: stages.count(stage) for stage in dict.fromkeys(stages)}


def exported(folder: Path) -> dict[str, Any]:
    """Run the export stage of the vision part alone, in a process of its own."""
    from bench.big_model import measured
    from recipes.bundle import collect, write_tar

    bundle = collect(folder / "hunyuan-small" / "full.py", "tower_of_vision", folder, [])
    write_tar(bundle, folder / "code.tar")
    params = {
        "framework": "torch",
        "tensors": {
            "image": {"dtype": "float32", "shape": ["batch", 3, "rows", 32, "columns", 32], "low": -1.0, "high": 1.0}
        },
        "outputs": ["embeddings"],
        "entry": bundle.entry,
        "arguments": {},
        "seed": 0,
        "exporter": "torchscript",
        "opset": 17,
        "trace": {"image": [1, 3, 3, 32, 4, 32]},
    }
    row = measured("export", params, {"code.tar": folder / "code.tar"}, folder / "export")
    import onnx

    graph = onnx.load(str(folder / "export" / "model.onnx"), load_external_data=False)
    sizes = {path.name: path.stat().st_size for path in (folder / "export").iterdir()}
    shape = [dim.dim_param or dim.dim_value for dim in graph.graph.output[0].type.tensor_type.shape.dim]
    return {
        **row,
        "nodes": len(graph.graph.node),
        "opset": graph.opset_import[0].version,
        "bytes": sizes,
        "output": shape,
    }


def main() -> None:
    """Plan, export, print and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="enginery-hunyuan-") as name:
        found = {
            "command": "python bench/hunyuan_full.py",
            "date": dt.datetime.now(dt.timezone.utc).strftime("%Y-%m-%d"),
            "versions": {package: importlib.metadata.version(package) for package in ("torch", "transformers", "onnx")},
            "load_before": round(os.getloadavg()[0], 1),
            "plan": plan(Path(name)),
            "vision": exported(Path(name)),
        }
    text = json.dumps(found, indent=1) + "\n"
    print(text)
    if asked.out is not None:
        asked.out.write_text(text)


if __name__ == "__main__":
    main()
