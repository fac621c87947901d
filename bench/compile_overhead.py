"""Wall time of the product's compile stage against the same build through the bare API, each in a process of its own.

    python bench/compile_overhead.py RESULT.json                                    # on a GPU host, about five minutes
    python bench/compile_overhead.py RESULT.json --runtime tensorrt-rtx --rounds 5  # without a GPU: checks the script

Bare: a Python process that parses the graph, sets the same flags and profile, builds and writes the plan. Product: the step
runner on an empty store, as `enginery build` uses it: the graph out of the store, the stage's process, the plan loaded once and
its layers listed, plan and listing digested and stored, the record written, the timing cache kept. Both build without a cache
from earlier, in turn, so that a host that is slow for a while is slow for both. fp16 ResNet-50, batch 1 to 8.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SECONDS = 300
SHAPES = {"min": [1, 3, 224, 224], "opt": [1, 3, 224, 224], "max": [8, 3, 224, 224]}
PROFILES = [{"name": "p", "inputs": {"x": SHAPES}}]
GPU = {"tensorrt-rtx": "sm89"}


def bare(runtime: str, graph: str, target: str) -> None:
    """Build as the shortest program does."""
    if runtime == "tensorrt-rtx":
        import tensorrt_rtx as trt
    else:
        import tensorrt as trt
    logger = trt.Logger(trt.Logger.WARNING)
    builder = trt.Builder(logger)
    flags = trt.NetworkDefinitionCreationFlag
    explicit = hasattr(flags, "EXPLICIT_BATCH") and not hasattr(flags, "STRONGLY_TYPED")
    strong = 1 << int(flags.STRONGLY_TYPED) if hasattr(flags, "STRONGLY_TYPED") and runtime == "tensorrt" else 0
    network = builder.create_network(1 << int(flags.EXPLICIT_BATCH) if explicit else strong)
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(graph):
        sys.exit(f"not parsed: {[str(parser.get_error(index)) for index in range(parser.num_errors)]}")
    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)
    if explicit:
        config.set_flag(trt.BuilderFlag.FP16)
    if runtime == "tensorrt-rtx":
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(trt.ComputeCapability, GPU[runtime].upper()), 0)
    profile = builder.create_optimization_profile()
    profile.set_shape("x", *(tuple(SHAPES[corner]) for corner in ("min", "opt", "max")))
    config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        sys.exit("not built")
    Path(target).write_bytes(memoryview(plan))


def product(runtime: str, graph: Path, store_folder: Path) -> tuple[float, dict[str, Any]]:
    """Run the compile step on an empty store; return its wall time and what it says of itself."""
    from artifacts.cache import ActionCache, blob_path
    from artifacts.folder import FolderStore
    from artifacts.keys import Action
    from artifacts.refs import ONNX, ArtifactRef, digest_file
    from recipes.engine_stages import RUNTIME_PACKAGES
    from recipes.steps import Step
    from tasks.process import Limits
    from tasks.run import StepRunner
    from tasks.toolchain import probe_host, version

    host = probe_host()
    gpu = GPU.get(runtime) or host.gpus[0].compute_capability
    params = {
        "runtime": runtime,
        "gpu": gpu,
        "precision": "fp16",
        "tf32": False,
        "profiles": PROFILES,
        "workspace": None,
        "optimization_level": None,
        "hardware_compatibility": "none",
        "version_compatible": False,
    }
    store = FolderStore(store_folder)
    ref = ArtifactRef(digest_file(graph), graph.stat().st_size, ONNX)
    store.put_file(blob_path(ref.digest), graph, ref)
    tools = {
        RUNTIME_PACKAGES[runtime]: version(RUNTIME_PACKAGES[runtime]),
        "os": host.os,
        "arch": host.arch,
        "cuda": "",
    }
    step = Step(
        "compile:it",
        "compile",
        "run",
        action=Action("compile", 1, params, {"model.onnx": ref.digest}, tools),
        inputs={"model.onnx": ref},
    )
    runner = StepRunner(store, ActionCache(store), Limits(SECONDS, 64 << 30), {"host": "bench"}, host=host)
    started = time.perf_counter()
    record, _built = runner.run(step)
    kept = ("seconds", "phases", "timing_cache", "size", "runtime_version")
    return time.perf_counter() - started, {name: record.facts[name] for name in kept if name in record.facts}


def main() -> None:
    if sys.argv[1:2] == ["--bare"]:
        bare(*sys.argv[2:])
        return
    import onnx
    import synthetic  # beside this file

    from tasks import halves

    parser = argparse.ArgumentParser()
    parser.add_argument("result", type=Path)
    parser.add_argument("--runtime", default="tensorrt", choices=["tensorrt", "tensorrt-rtx"])
    parser.add_argument("--rounds", type=int, default=2)
    asked = parser.parse_args()
    result: dict[str, Any] = {"command": " ".join(["python", *sys.argv]), "runtime": asked.runtime, "rounds": []}
    with tempfile.TemporaryDirectory() as made:
        work = Path(made)
        graph = work / "fp16.onnx"
        model = onnx.load(synthetic.resnet50(work / "fp32.onnx"))
        onnx.save(halves.to_half(model, "fp16", set(), native=False).model, graph)
        for number in range(asked.rounds):
            row: dict[str, Any] = {}
            for way in ("bare", "product") if number % 2 == 0 else ("product", "bare"):
                if way == "product":
                    row["product_s"], row["facts"] = product(asked.runtime, graph, work / f"store-{number}")
                else:
                    command = [sys.executable, __file__, "--bare", asked.runtime, str(graph), str(work / "bare.plan")]
                    started = time.perf_counter()
                    subprocess.run(command, check=True, timeout=SECONDS)
                    row["bare_s"] = time.perf_counter() - started
            row["ratio"] = row["product_s"] / row["bare_s"]
            result["rounds"].append(row)
            result["median_ratio"] = statistics.median(one["ratio"] for one in result["rounds"])
            asked.result.parent.mkdir(parents=True, exist_ok=True)
            asked.result.write_text(json.dumps(result, indent=1, sort_keys=True) + "\n", "utf-8")
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
