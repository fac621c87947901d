"""The tables of docs/sources.md: figures from bench/results/sources.json, and beside them what a person has to say.

`python -m bench.sources --docs` writes them anew between their marks; tests/unit/test_sources_table.py holds both together.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results" / "sources.json"
DOCUMENT = ROOT / "docs" / "sources.md"
STAGES = ("export", "calibrate", "type", "verify")
HEAD = (
    "architecture",
    "recipe",
    "exporter, opset",
    "`onnxruntime`: given, parity",
    "`tensorrt-rtx`: given, parity",
    f"built; {', '.join(STAGES)}",
    "did not work, and why",
)
# Not in the tables: what needs a GPU. digits-gpu is for TensorRT (bench/results/digits_gpu_h200.json); digits-auto times engines, and
# has no target for TensorRT-RTX, which is not executed without one (tests/gpu/test_benchmark.py).
# The figures of the others are in bench/results/recipes.json.
LEFT_OUT = {"digits-auto", "digits-gpu", "digits", "swin-tiny"}
# By table, then by recipe: the architecture, and what did not work.
TABLES: dict[str, dict[str, tuple[str, str]]] = {
    "classification": {
        "resnet50": ("ResNet-50 of transformers", ""),
        "paddle-resnet50": ("ResNet-50 of paddle.vision", ""),
        "paddle-mobilenetv3": (
            "MobileNetV3-Small of paddle.vision",
            (
                "fp16 failed its gate (0.25) while batch normalisation had its fresh statistics: random weights shrink the outputs to 5e-7, "
                "where halves, of which the least is 6e-8, have no digits. The recipe's code now gives it those of a seeded batch, as "
                "training would"
            ),
        ),
        "swin-tiny-int8": ("Swin-Tiny of transformers, ranges by entropy from photographs", ""),
        "paddle-text": ("text recognition, SVTR kind, width 32 to 640", ""),
    },
    "detection": {
        "digits-boxes": (
            "a detector without anchors, trained on scikit-learn's digits pasted on canvases",
            "at first the model itself: sizes that are no multiple of 8, refused by the check of the simplified graph at sizes drawn inside the profile",
        ),
        "rtdetr-small": (
            "RT-DETR of transformers (ResNet backbone, 20 queries of 84 places)",
            (
                "elementwise parity as the gate of fp16, where another place is the last to be chosen (below). onnxsim 0.8.1 makes axes static "
                "that torch left unnamed, and is refused (`simplifier: none`). No operator: GridSample (opset 16 and later), TopK and "
                "GatherElements are read and compiled by TensorRT-RTX 1.7"
            ),
        ),
        "rtdetr": (
            "RT-DETR-R50 at its real size (300 queries of 8400 places)",
            "as the small one; at elementwise parity fp16 is at 0.32",
        ),
    },
    "parts": {
        "trocr-small": (
            "TrOCR of transformers: encoder, first step, later steps with a key and value cache",
            "onnxsim 0.8.1 drops the name of the batch axis and is refused (`simplifier: none`)",
        ),
        "hunyuan-small": (
            "HunyuanOCR (`hunyuan_vl`) of transformers: vision of 64 to 1024 pixels in both directions, batch 1 to 4; embedding, prompt, step",
            (
                "at random weights on noise int8 gave 0 to 3 of 12 tokens. Sizes that follow from values (`grid_thw`, `masked_scatter`, "
                "`get_rope_index`) were written anew in the recipe's code, which a test compares with the library's"
            ),
        ),
    },
    "digits": {
        "digits-onnx": ("the network of the README, trained, from an ONNX file of opset 13", ""),
        "digits-parts": ("the same network, from PyTorch in two parts", ""),
    },
}


def entries() -> dict[str, dict[str, Any]]:
    """Return what was measured, by the recipe's name."""
    found = json.loads(RESULTS.read_text())["recipes"]
    return {Path(entry["recipe"]).stem: entry for name, entry in found.items() if "#" not in name}


def table(name: str, measured: dict[str, dict[str, Any]]) -> str:
    """Return one table in Markdown: a row for each recipe; one that was not built says so."""
    rows = [HEAD, ["---"] * len(HEAD)]
    for recipe, (architecture, failed) in TABLES[name].items():
        entry = measured.get(recipe)
        shown = _measured(entry) if entry else ["", "not built", "not built", ""]
        size = f", {_parameters(entry)} parameters" if entry and _parameters(entry) else ""
        rows.append([architecture + size, f"`recipes/{recipe}.yaml`", *shown, failed])
    return "".join(f"| {' | '.join(row)} |\n".replace("  |", " |") for row in rows)


def written(text: str, measured: dict[str, dict[str, Any]]) -> str:
    """Return the document with its tables as they are measured: each stands between `<!-- table NAME -->` and `<!-- end -->`."""
    for name in TABLES:
        mark = f"<!-- table {name} -->\n"
        pattern = re.compile(re.escape(mark) + r".*?<!-- end -->", re.DOTALL)
        made = mark + table(name, measured) + "<!-- end -->"
        text, places = pattern.subn(lambda _found, made=made: made, text)
        if places != 1:
            raise ValueError(f"{DOCUMENT.name}: expected one '{mark.strip()}' with an end, found {places}")
    return text


def _measured(entry: dict[str, Any]) -> list[str]:
    versions = entry.get("stage_versions")
    export = entry["export"]
    opsets = sorted({one["opset"] for one in _graphs(export)})
    return [
        f"{_exporter(entry)}, {' and '.join(map(str, opsets))}",
        _runtime(entry, "onnxruntime"),
        _runtime(entry, "tensorrt-rtx"),
        f"{entry['date']}; {', '.join(str(versions[stage]) for stage in STAGES) if versions else 'not recorded'}",
    ]


def _exporter(entry: dict[str, Any]) -> str:
    """Return the exporter with the version of the package that it is of; an ONNX file needs none."""
    name = entry["export"]["exporter"]
    package = {"dynamo": "torch", "torchscript": "torch", "paddle2onnx": "paddle2onnx"}.get(name)
    version = entry["versions"][package].partition("+")[0] if package else ""
    return f"{name} of torch {version}" if package == "torch" else f"{name} {version}".strip()


def _graphs(export: dict[str, Any]) -> list[dict[str, Any]]:
    return [export["graph"]] if "graph" in export else list(export["parts"].values())


def _parameters(entry: dict[str, Any]) -> str:
    """Return how many there are; of parts, which may share them, nothing."""
    found = entry["export"].get("graph", {}).get("parameters")
    if not found:
        return ""
    return f"{found / 1e6:.1f} million" if found >= 1e5 else f"{found / 1e3:.0f} thousand"


def _runtime(entry: dict[str, Any], runtime: str) -> str:
    """Return what engines of one runtime are, those of one text once: "fp16 6.0e-4", "int8 asked, fp16 given 2.1e-3"."""
    shown = dict.fromkeys(_engine(one) for one in entry["engines"] if one["target"].startswith(runtime))
    same = [
        found["same"]
        for step, found in entry.get("together", {}).items()
        if step.startswith("onnxruntime:") == (runtime == "onnxruntime")
        and found["metric"]["name"] == "exact-match"  # tokens; scores are never the same to the last bit
    ]
    together = [f"{100 * min(same):.0f} % of samples decoded as by the source, in each"] if same else []
    return "; ".join([*shown, *together]) or "not asked"


def _engine(engine: dict[str, Any]) -> str:
    asked, given = engine["precision"]["asked"], engine["precision"]["given"]
    named = asked if asked == given else f"{asked} asked, {given} given"
    if engine.get("published") is False:
        return f"{asked} asked, nothing given"
    shown = f"{named} {_number(engine['parity']['relative_l2'])}"
    data = (engine.get("data") or {}).get("relative_l2")
    if data is not None:
        shown += f" ({_number(data)} on data)"
    metric = engine.get("metric")
    return shown + (f", {metric['name']} {metric['value']:.3f} of {metric['source']:.3f}" if metric else "")


def _number(value: float) -> str:
    if value == 0 or value >= 0.01:
        return f"{value:.2g}"
    digits, _, power = f"{value:.1e}".partition("e")
    return f"{digits}e{int(power)}"
