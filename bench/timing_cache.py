"""What a timing cache saves on a GPU host, by the product's own compile stage and merging. Nine minutes at most:

    python -m bench.timing_cache RESULT.json [--seconds 560] [--only convolutions,attention,resnet50,vit]

Every build is a process of its own, as in the product, and bounded. For each network (fp16, one profile of batch 1):

1. cold      built without a cache
2. warm      built again with the cache that the first build wrote
3. merged    built once more with the caches of all networks, merged by TensorRT as the store's is

RESULT.json is written after each step. Networks have seeded random weights (`bench.synthetic`): a cache knows no weights.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench import synthetic

SECONDS = 200
CACHE = "timing.cache"
NETWORKS: dict[str, tuple[int, Callable[[Path], Path]]] = {
    "convolutions": (32, synthetic.convolutions),
    "attention": (64, lambda path: synthetic.vit(path, side=64, layers=1, width=128, heads=2)),
    "resnet50": (224, synthetic.resnet50),
    "vit": (224, synthetic.vit),
}


class Bench:
    """Builds under one deadline; what they said goes to the result file."""

    def __init__(self, target: Path, work: Path, seconds: float) -> None:
        from tasks.engines.cuda import device_properties, driver_version

        self.target, self.work, self.count = target, work, 0
        self.deadline = time.monotonic() + seconds
        self.device = device_properties()
        self.result: dict[str, Any] = {
            "command": " ".join(["python -m bench.timing_cache RESULT.json", *sys.argv[2:]]),
            "date": dt.datetime.now(dt.timezone.utc).date().isoformat(),
            "device": self.device,
            "cuda": driver_version(),
            "networks": {},
        }

    def keep(self) -> None:
        self.target.parent.mkdir(parents=True, exist_ok=True)
        self.target.write_text(json.dumps(self.result, indent=1, sort_keys=True) + "\n", "utf-8")

    def params(self, side: int) -> dict[str, Any]:
        shape = [1, 3, side, side]
        return {
            "runtime": "tensorrt",
            "gpu": self.device["compute_capability"],
            "precision": "fp16",
            "tf32": False,
            "profiles": [{"name": "p", "inputs": {"x": {"min": shape, "opt": shape, "max": shape}}}],
            "workspace": None,
            "optimization_level": None,
            "hardware_compatibility": "none",
            "version_compatible": False,
        }

    def run(self, entry: str, params: dict, inputs: dict[str, Path]) -> tuple[dict[str, Any], Path]:
        """Run one step in a process of its own; what fails is a result too."""
        from tasks.errors import TaskError
        from tasks.process import Limits, run_stage

        self.count += 1
        folder = self.work / str(self.count)
        folder.mkdir()
        left = self.deadline - time.monotonic()
        if left < 15:
            return {"not_run": "no time left"}, folder
        started = time.monotonic()
        try:
            limits = Limits(timeout_s=min(SECONDS, left), memory_bytes=64 << 30)
            facts = dict(run_stage("compile", params, inputs, folder, limits=limits, entry=entry).facts)
        except TaskError as err:
            facts = {"error": str(err)[:1500]}
        facts["stage_seconds"] = round(time.monotonic() - started, 2)
        return facts, folder

    def build(self, name: str, way: str, graph: Path, cache: Path | None) -> Path | None:
        """Build a network, with a cache or without; return the cache that it wrote."""
        inputs = {"model.onnx": graph} | ({CACHE: cache} if cache is not None else {})
        facts, folder = self.run("tasks.engines.trt:compile_plan", self.params(NETWORKS[name][0]), inputs)
        kept = ("error", "not_run", "seconds", "stage_seconds", "phases", "timing_cache")
        row = self.result["networks"].setdefault(name, {})
        row[way] = {key: facts[key] for key in kept if key in facts}
        cold, build = row["cold"].get("phases"), facts.get("phases")
        if way != "cold" and cold and build:
            row[way]["of_cold"] = {
                "build": round(build["build"] / cold["build"], 3),
                "stage": round(facts["stage_seconds"] / row["cold"]["stage_seconds"], 3),
            }
        self.result.setdefault("tensorrt", facts.get("runtime_version"))
        print(name, way, json.dumps(row[way])[:600], flush=True)
        self.keep()
        return folder / CACHE if (folder / CACHE).exists() else None

    def merge(self, caches: list[Path]) -> Path | None:
        """Merge all caches, one after another."""
        merged = caches[0]
        for more in caches[1:]:
            inputs = {"base.cache": merged, "more.cache": more}
            facts, folder = self.run("tasks.engines.trt_timing:merge", {}, inputs)
            sizes = [path.stat().st_size for path in (merged, more)]
            row = {"sizes": sizes, **facts}
            self.result.setdefault("merges", []).append(row)
            if not (folder / CACHE).exists():
                return None
            merged = folder / CACHE
            row["size"] = merged.stat().st_size
        return merged


def half(path: Path) -> Path:
    """Type a graph as fp16, by the product's own code."""
    import onnx

    from tasks import halves

    target = path.with_name(f"{path.stem}-fp16.onnx")
    onnx.save(halves.to_half(onnx.load(path), "fp16", set(), native=False).model, target)
    return target


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path)
    parser.add_argument("--seconds", type=float, default=560)
    parser.add_argument("--only", default=",".join(NETWORKS))
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        work = Path(made)
        bench = Bench(asked.result, work, asked.seconds)
        names = asked.only.split(",")
        graphs = {name: half(NETWORKS[name][1](work / "in" / f"{name}.onnx")) for name in names}
        caches = {name: bench.build(name, "cold", graph, None) for name, graph in graphs.items()}
        for name, cache in caches.items():
            if cache is not None:
                bench.build(name, "warm", graphs[name], cache)
        there = [cache for cache in caches.values() if cache is not None]
        merged = bench.merge(there) if len(there) > 1 else None
        for name, graph in graphs.items():
            if merged is not None:
                bench.build(name, "merged", graph, merged)
        bench.keep()


if __name__ == "__main__":
    main()
