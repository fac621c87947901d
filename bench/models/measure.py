"""Run one engine: parity with PyTorch, times, kernels and layers.

python -m bench.models.measure MODEL BATCH VARIANT FOLDER
"""

from __future__ import annotations

import argparse
import json
import traceback
from pathlib import Path
from typing import Any

import numpy as np

from bench.models.kernels import Kernels, find_cupti, per_run


def parity(runner: Any, data: Any, batch: int) -> dict[str, Any]:
    """Compare all held-out images with PyTorch's fp32 outputs: relative L2, least cosine, agreement and top-1."""
    images, expected = data["image"], data["out"]
    count = len(images) // batch * batch
    found = np.concatenate(
        [next(iter(runner({"image": images[start : start + batch]}).values())) for start in range(0, count, batch)]
    ).astype(np.float64)
    expected = expected[:count].astype(np.float64)
    rows = found.reshape(count, -1), expected.reshape(count, -1)
    cosine = (rows[0] * rows[1]).sum(1) / np.linalg.norm(rows[0], axis=1) / np.linalg.norm(rows[1], axis=1)
    result: dict[str, Any] = {
        "samples": count,
        "finite": bool(np.isfinite(found).all()),
        "relative_l2": float(np.linalg.norm(found - expected) / np.linalg.norm(expected)),
        "cosine_min": float(cosine.min()),
    }
    if expected.ndim == 2:
        labels = data["label"][:count]
        result["agreement"] = float((found.argmax(1) == expected.argmax(1)).mean())
        result["top1"] = float((found.argmax(1) == labels).mean())
        result["top1_source"] = float((expected.argmax(1) == labels).mean())
    return result


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("batch", type=int)
    parser.add_argument("variant")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--no-kernels", action="store_true")
    asked = parser.parse_args()
    base = asked.folder / asked.model
    folder = base / f"b{asked.batch}" / asked.variant
    target = folder / "run.json"
    facts: dict[str, Any] = {}

    def keep() -> None:
        target.write_text(json.dumps(facts, indent=1) + "\n")

    library = None if asked.no_kernels else find_cupti()
    facts["cupti"] = library
    keep()
    recorder = None
    if library is not None:
        try:
            recorder = Kernels(library)
        except Exception:  # noqa: BLE001  # without it, TensorRT's own layer times remain
            facts["cupti_error"] = traceback.format_exc()[-500:]
    try:
        from bench.models.timing import Engine

        data = np.load(base / "data.npz")
        engine = Engine(folder / "compile" / "model.plan", {"image": data["image"][: asked.batch]})
        facts["times"] = engine.times()
        keep()
        facts["parity"] = parity(engine.runner, data, asked.batch)
        keep()
        if recorder is not None:
            bound = engine.runner.bind(engine.feeds)
            bound.run()
            bound.synchronize()
            recorder.start()
            for _ in range(11):
                bound.run()
                bound.synchronize()
            rows = recorder.stop()
            facts["kernels"] = per_run(rows, 11)
            facts["kernels_us"] = round(sum(row["us"] for row in facts["kernels"]), 1)
            facts["kernel_records"] = len(rows)
            keep()
        facts["layers"] = engine.layers()
        keep()
    except Exception:  # noqa: BLE001  # one engine that fails is a result
        facts["error"] = traceback.format_exc()[-2000:]
        keep()
    times, judged = facts.get("times", {}), facts.get("parity", {})
    print(
        asked.model, asked.batch, asked.variant,
        {name: times.get(name) for name in ("device_ms", "call_ms", "end_to_end_ms")},
        {name: judged.get(name) for name in ("relative_l2", "cosine_min", "agreement", "top1")},
        "kernels", len(facts.get("kernels", ())), facts.get("kernels_us"), facts.get("error", "")[-300:],
        flush=True,
    )  # fmt: skip


if __name__ == "__main__":
    main()
