"""What a call of a loaded engine costs beyond the bare launch, for digits on the runtime and device that are here.

    python bench/runner.py RESULT.json [--runtime tensorrt|onnxruntime] [--precision fp16] [--seconds 120]

Builds one engine of recipes/digits-gpu.yaml in a temporary store (about 45 s with TensorRT 8.6), pulls it, loads it with
`enginery.load`, and times whole calls on the host's clock, each ended by a synchronisation: medians of many, in microseconds.
With TensorRT, for each batch: bare graph launch and bare enqueue (inputs and outputs stay on the device, called through the
driver's API alone), the graph with its copies from page-locked memory, and the runner's calls (numpy to numpy, into given
arrays, with arrays on the device, without graphs). Then what page-locked staging costs against the driver's own copies, by
size. With ONNX Runtime: the bare session and the runner. RESULT.json is written after each batch. Bounded by --seconds.
"""

# ruff: noqa: SLF001 - the bare launch that calls are compared with is inside of the runner

from __future__ import annotations

import argparse
import asyncio
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import yaml

import enginery
from artifacts.store import open_store
from enginery.client import pull, resolve
from recipes.steps import Step
from tasks.drive import drive
from tasks.session import open_session
from tasks.toolchain import probe_host

ROOT = Path(__file__).resolve().parents[1]
BATCHES = (1, 4, 64, 256)
WARM, LEAST, MOST = 20, 50, 3000
Array = np.ndarray[Any, np.dtype[Any]]


def published(folder: Path, runtime: str, precision: str) -> Path:
    """Build one engine and return the folder that it was pulled to."""
    shutil.copytree(ROOT / "recipes" / "digits", folder / "digits", ignore=shutil.ignore_patterns("__pycache__"))
    document = yaml.safe_load((ROOT / "recipes" / "digits-gpu.yaml").read_text())
    host = probe_host()
    gpus = ["cpu"] if runtime == "onnxruntime" else [host.gpus[0].compute_capability]
    document["targets"] = [{"runtime": runtime, "gpus": gpus}]
    document["precision"] = {"build": [precision]}
    if precision == "int8":
        document["precision"]["calibration"] = {"data": "digits/calibration.npz", "samples": 256}
    recipe = folder / "digits-gpu.yaml"
    recipe.write_text(yaml.safe_dump(document, sort_keys=False))
    store = open_store(str(folder / "store"))
    session = open_session(recipe, store)

    async def run(step: Step, planned: Any) -> Any:
        return await asyncio.to_thread(session.ensure, step, planned)

    asyncio.run(drive(session, run))
    failed = {name: outcome.message for name, outcome in session.outcomes.items() if outcome.state == "failed"}
    chosen = resolve(store, "digits-gpu").best
    if failed or chosen is None:
        raise SystemExit(f"the build failed: {failed}")
    return pull(store, chosen, folder / "pulled").folder


def microseconds(call: Callable[[], object], seconds: float = 1.0) -> dict[str, float]:
    """Return median, p10 and p99 of whole calls, after a warm-up, within a time."""
    for _ in range(WARM):
        call()
    taken: list[float] = []
    end = time.perf_counter() + seconds
    while len(taken) < LEAST or (len(taken) < MOST and time.perf_counter() < end):
        begin = time.perf_counter_ns()
        call()
        taken.append((time.perf_counter_ns() - begin) / 1e3)
    taken.sort()
    return {
        "median": round(statistics.median(taken), 2),
        "p10": round(taken[len(taken) // 10], 2),
        "p99": round(taken[int(len(taken) * 0.99)], 2),
        "calls": len(taken),
    }


class OnDevice:
    """An array in the runner's own device memory, as other libraries offer theirs."""

    def __init__(self, cuda: Any, values: Array) -> None:
        address = cuda.allocate(values.nbytes)
        cuda.upload(address, values)
        cuda.synchronize()
        self.__cuda_array_interface__ = {
            "shape": values.shape, "typestr": values.dtype.str, "data": (address, False), "version": 3, "strides": None,
            "stream": None,
        }  # fmt: skip


def on_gpu(folder: Path, x: Array) -> dict[str, Any]:
    """Time every way to run one batch with TensorRT."""
    from cuda.bindings import driver

    found: dict[str, Any] = {}
    with enginery.load(folder) as engine, enginery.load(folder, graphs=False) as plain:
        name = next(iter(engine.inputs))
        shape = (len(x), *engine.outputs["logits"].shape[1:])  # type: ignore[index]
        execution = engine._execution
        cuda = execution._cuda
        stream = driver.CUstream(cuda.stream)
        for graph in (True, False):
            bound = execution.bind({name: x}, graph=graph)
            for _ in range(WARM):
                bound.run()
            bound.synchronize()
            if graph:
                ready = bound._slot._graph

                def bare(ready: Any = ready) -> None:
                    driver.cuGraphLaunch(ready, stream)
                    driver.cuStreamSynchronize(stream)

                found["bare graph launch"] = microseconds(bare) if ready is not None else None
            else:
                context = bound._slot._context

                def enqueue(context: Any = context) -> None:
                    context.execute_async_v3(cuda.stream)
                    driver.cuStreamSynchronize(stream)

                found["bare enqueue"] = microseconds(enqueue)
            bound.close()
        engine.prepare({name: x.shape})
        pool = execution._pool
        slot, _graph = pool.slot(engine.profile_for({name: x.shape}).index, (x.shape,))
        if slot._graph is not None:
            ready = slot._graph

            def copied(ready: Any = ready) -> None:
                driver.cuGraphLaunch(ready, stream)
                driver.cuStreamSynchronize(stream)

            found["bare graph launch, small copies inside"] = microseconds(copied)
        given, y = OnDevice(cuda, x), OnDevice(cuda, np.zeros(shape, np.float32))
        out = np.empty(shape, np.float32)
        found["runner, numpy to numpy"] = microseconds(lambda: engine({name: x}))
        found["runner, numpy into a given array"] = microseconds(lambda: engine({name: x}, out={"logits": out}))
        found["runner, on the device"] = microseconds(lambda: engine({name: given}, out={"logits": y}))
        found["runner without graphs, numpy to numpy"] = microseconds(lambda: plain({name: x}))
        found["own contexts"], found["warnings"] = len(pool._own), list(engine.warnings)
    pairs = {
        "of the runner on the device over the bare graph launch": ("runner, on the device", "bare graph launch"),
        "of the runner from numpy over the graph with its copies": (
            "runner, numpy to numpy",
            "bare graph launch, small copies inside",
        ),
        "of the runner without graphs over the bare enqueue": ("runner without graphs, numpy to numpy", "bare enqueue"),
    }
    found["overhead"] = {
        what: round(found[one]["median"] - found[other]["median"], 2)
        for what, (one, other) in pairs.items()
        if found.get(one) and found.get(other)
    }
    return found


def staging() -> list[dict[str, Any]]:
    """Time a copy to the device through page-locked memory against the driver's own, by size."""
    from tasks.engines.cuda import Cuda

    cuda, rows = Cuda(), []
    for size in (1 << power for power in range(12, 26)):
        values, address, locked = np.zeros(size, np.uint8), cuda.allocate(size), cuda.pinned(size)

        def staged(values: Array = values, address: int = address, locked: Array = locked) -> None:
            np.copyto(locked, values)
            cuda.upload(address, locked)
            cuda.synchronize()

        def direct(values: Array = values, address: int = address) -> None:
            cuda.upload(address, values)
            cuda.synchronize()

        rows.append({"bytes": size, "staged": microseconds(staged, 0.2), "direct": microseconds(direct, 0.2)})
        cuda.free(address)
        cuda.free_pinned(locked)
    cuda.close()
    return rows


def on_cpu(folder: Path, x: Array) -> dict[str, Any]:
    """Time the bare session and the runner with ONNX Runtime."""
    with enginery.load(folder, threads=1) as engine:
        name = next(iter(engine.inputs))
        session = engine._execution._session
        found: dict[str, Any] = {
            "bare session": microseconds(lambda: session.run(None, {name: x})),
            "runner, numpy to numpy": microseconds(lambda: engine({name: x})),
        }
    found["overhead"] = {
        "of the runner over the bare session": round(
            found["runner, numpy to numpy"]["median"] - found["bare session"]["median"], 2
        )
    }
    return found


def main() -> None:
    """Run the bench."""
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("result", type=Path)
    asked.add_argument("--runtime", choices=("tensorrt", "onnxruntime"), default="tensorrt")
    asked.add_argument("--precision", default="fp16")
    asked.add_argument("--seconds", type=float, default=120, help="time limit of what is timed, after the build")
    options = asked.parse_args()
    work = Path(tempfile.mkdtemp())
    result: dict[str, Any] = {
        "command": f"python bench/runner.py RESULT.json --runtime {options.runtime} --precision {options.precision}",
        "host": {key: value for key, value in probe_host().to_json().items() if key != "name"},
        "unit": "microseconds of whole calls on the host's clock, each ended by a synchronisation",
        "batches": {},
    }

    def keep() -> None:
        options.result.parent.mkdir(parents=True, exist_ok=True)
        options.result.write_text(json.dumps(result, indent=1) + "\n", "utf-8")

    try:
        folder = published(work, options.runtime, options.precision)
        result["engine"] = "/".join(folder.parts[-3:])
        end = time.monotonic() + options.seconds
        generator = np.random.default_rng(0)
        for batch in BATCHES:
            if time.monotonic() > end:
                result["stopped"] = f"after {options.seconds:g} s"
                break
            x = generator.uniform(0, 1, (batch, 1, 8, 8)).astype(np.float32)
            result["batches"][batch] = (on_gpu if options.runtime == "tensorrt" else on_cpu)(folder, x)
            print(batch, json.dumps(result["batches"][batch].get("overhead")), flush=True)
            keep()
        if options.runtime == "tensorrt" and time.monotonic() < end:
            result["staging"] = staging()
        keep()
    finally:
        shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    main()
