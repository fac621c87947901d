"""Refit against rebuild, for a ViT-B/16 encoder (384 pixels) in fp16 on the GPU that is here, as a build does both.

    python bench/refit.py RESULT.json [--layers 12] [--width 768] [--level 3] [--seconds 240]

Compiles the model with build.refit, changes every weight, refits three times and rebuilds; times are those of the steps'
records, so copying, hashing and storing are in them. Outputs of what was refitted are compared on one input with ONNX
Runtime's (fp32, on the CPU) and with those of what was rebuilt. If there is time, the model is compiled without build.refit,
to see what that costs at run time. No step goes on after `--seconds`, and results are written after every step.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from artifacts.cache import ActionCache
from artifacts.folder import FolderStore
from artifacts.keys import Action
from artifacts.records import ActionRecord
from artifacts.refs import ONNX, ArtifactRef, digest_file
from recipes.steps import Step
from tasks import halves
from tasks.errors import BackendError
from tasks.process import Limits
from tasks.run import StepRunner

PATCH, PIXELS = 16, 384
TOKENS = (PIXELS // PATCH) ** 2
MEMORY = 64 << 30
AFTERWARDS = 15  # seconds kept for what follows a rebuild
RUNS, WARM = 100, 20


def vision_transformer(seed: int, layers: int, width: int) -> onnx.ModelProto:
    """Return a ViT encoder with random weights: patches, blocks of attention and a perceptron, a last normalisation."""
    draw = np.random.default_rng(seed)
    heads = width // 64
    weights: list[TensorProto] = []
    nodes: list[onnx.NodeProto] = []

    def weight(name: str, *shape: int, scale: float = 0.02, around: float = 0.0) -> str:
        values = around + scale * draw.standard_normal(shape, np.float32)
        weights.append(numpy_helper.from_array(values.astype(np.float32), name))
        return name

    def constant(name: str, value: Any) -> str:
        weights.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def add(op: str, inputs: list[str], name: str, **attributes: Any) -> str:
        nodes.append(helper.make_node(op, inputs, [f"{name}_out"], name=name, **attributes))
        return f"{name}_out"

    def linear(x: str, name: str, rows: int, columns: int) -> str:
        product = add("MatMul", [x, weight(f"{name}.weight", rows, columns)], f"{name}/matmul")
        return add("Add", [product, weight(f"{name}.bias", columns)], f"{name}/add")

    def norm(x: str, name: str) -> str:
        inputs = [x, weight(f"{name}.gain", width, around=1.0), weight(f"{name}.shift", width)]
        return add("LayerNormalization", inputs, name, axis=-1)

    split, merged = (
        constant("split", np.array([0, TOKENS, heads, 64])),
        constant("merged", np.array([0, TOKENS, width])),
    )
    root, two = constant("root", np.float32(8)), constant("two", np.float32(2**0.5))
    one, half = constant("one", np.float32(1)), constant("half", np.float32(0.5))
    kernel = weight("patch.weight", width, 3, PATCH, PATCH)
    x = add("Conv", ["image", kernel, weight("patch.bias", width)], "patch", strides=[PATCH, PATCH])
    x = add("Reshape", [x, constant("flat", np.array([0, width, TOKENS]))], "flatten")
    x = add("Transpose", [x], "tokens", perm=[0, 2, 1])
    x = add("Add", [x, weight("positions", 1, TOKENS, width)], "positions/add")
    for index in range(layers):
        at = f"block{index}"
        n = norm(x, f"{at}/norm1")
        q, k, v = (
            add("Reshape", [linear(n, f"{at}/{name}", width, width), split], f"{at}/{name}/split") for name in "qkv"
        )
        q, v = (add("Transpose", [y], f"{at}/{name}/turn", perm=[0, 2, 1, 3]) for name, y in (("q", q), ("v", v)))
        k = add("Transpose", [k], f"{at}/k/turn", perm=[0, 2, 3, 1])
        scores = add("Div", [add("MatMul", [q, k], f"{at}/scores"), root], f"{at}/scale")
        mixed = add("MatMul", [add("Softmax", [scores], f"{at}/softmax", axis=-1), v], f"{at}/mix")
        mixed = add("Reshape", [add("Transpose", [mixed], f"{at}/turn", perm=[0, 2, 1, 3]), merged], f"{at}/merge")
        x = add("Add", [x, linear(mixed, f"{at}/o", width, width)], f"{at}/residual1")
        h = linear(norm(x, f"{at}/norm2"), f"{at}/up", width, 4 * width)
        e = add("Add", [add("Erf", [add("Div", [h, two], f"{at}/gelu1")], f"{at}/gelu2"), one], f"{at}/gelu3")
        h = add("Mul", [add("Mul", [h, e], f"{at}/gelu4"), half], f"{at}/gelu5")
        x = add("Add", [x, linear(h, f"{at}/down", 4 * width, width)], f"{at}/residual2")
    last = norm(x, "last")
    nodes.append(helper.make_node("Identity", [last], ["features"], name="features"))
    inputs = [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 3, PIXELS, PIXELS])]
    outputs = [helper.make_tensor_value_info("features", TensorProto.FLOAT, ["batch", TOKENS, width])]
    made = helper.make_graph(nodes, "vit", inputs, outputs, weights)
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


class Bench:
    """Runs steps against one store, and keeps what they took."""

    def __init__(self, folder: Path, result: Path, params: Mapping[str, Any], deadline: float) -> None:
        """`folder` is for the store; `result` is written after every step; `deadline` is of `time.monotonic`."""
        self.folder, self.result, self.params, self.deadline = folder, result, params, deadline
        self.store = FolderStore(folder / "store")
        self.cache = ActionCache(self.store)
        self.found: dict[str, Any] = {}

    @property
    def left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.monotonic()

    def note(self, name: str, value: Any) -> None:
        """Keep a result."""
        self.found[name] = value
        self.result.write_text(json.dumps(self.found, indent=1, sort_keys=True) + "\n", "utf-8")
        print(name, json.dumps(value)[:400], flush=True)

    def graph(self, seed: int, layers: int, width: int) -> ArtifactRef:
        """Store a typed graph."""
        path = self.folder / f"{seed}.onnx"
        model = halves.to_half(vision_transformer(seed, layers, width), "fp16", set(), native=False).model
        path.write_bytes(model.SerializeToString(deterministic=True))
        ref = ArtifactRef(digest_file(path), path.stat().st_size, ONNX)
        self.cache.put_blob(path, ref)
        return ref

    def step(
        self, name: str, stage: str, inputs: Mapping[str, ArtifactRef], *, run: int = 0, **params: Any
    ) -> ActionRecord:
        """Run one step; `run` makes a repetition another action."""
        digests = {name: ref.digest for name, ref in inputs.items()}
        action = Action(stage, 1, {**self.params, **params}, digests, {"run": run})
        limits = Limits(timeout_s=max(self.left - AFTERWARDS, 1), memory_bytes=MEMORY)
        runner = StepRunner(self.store, self.cache, limits, producer={})
        record, _made = runner.run(Step(f"{stage}:{name}", stage, "run", action=action, inputs=inputs))
        facts = {
            key: record.facts.get(key)
            for key in (
                "seconds",
                "size",
                "refit",
                "phases",
                "weights",
                "constants",
                "bytes",
                "warnings",
                "peak_memory_bytes",
                "runtime_version",
            )
        }
        facts["device"] = record.facts["device"]["name"]
        self.note(name, {"wall_seconds": record.seconds, **facts})
        return record

    def time(self, name: str, record: ActionRecord, image: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Run a plan with a CUDA graph; keep the median in ms (with copies to and from the device); return what it gives."""
        from tasks.engines.trt_run import PlanRunner

        path = self.folder / f"{name}.plan"
        self.cache.get_blob(record.outputs["model.plan"], path)
        runner = PlanRunner(path, None, graphs=True)
        try:
            took = []
            for _ in range(WARM + RUNS):
                begin = time.perf_counter()
                features = runner({"image": image})["features"]
                took.append((time.perf_counter() - begin) * 1000)
            self.note(f"{name}_ms", {"median": float(np.median(took[WARM:])), "runs": RUNS})
        finally:
            runner.close()
        return features


def on_the_cpu(model: onnx.ModelProto, image: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return what ONNX Runtime computes on the CPU."""
    import onnxruntime

    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    values: np.ndarray[Any, Any] = session.run(None, {"image": image})[0]
    return values


def distance(values: np.ndarray[Any, Any], right: np.ndarray[Any, Any]) -> float:
    """Return the relative L2 distance."""
    return float(np.linalg.norm(values.astype(np.float64) - right) / np.linalg.norm(right))


def main() -> None:
    """Run the bench."""
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("result", type=Path)
    asked.add_argument("--layers", type=int, default=12)
    asked.add_argument("--width", type=int, default=768)
    asked.add_argument("--level", type=int, default=None, help="optimisation level; default: the compiler's own")
    asked.add_argument("--seconds", type=float, default=240)
    options = asked.parse_args()
    deadline = time.monotonic() + options.seconds
    from tasks.engines.cuda import device_properties

    image = {"min": [1, 3, PIXELS, PIXELS], "opt": [1, 3, PIXELS, PIXELS], "max": [8, 3, PIXELS, PIXELS]}
    params = {
        "runtime": "tensorrt", "gpu": device_properties()["compute_capability"], "precision": "fp16", "tf32": False,
        "profiles": [{"name": "one", "inputs": {"image": image}}], "workspace": None, "optimization_level": options.level,
        "hardware_compatibility": "none", "version_compatible": False, "refit": "weights",
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), options.result, params, deadline)
        bench.note("model", {"layers": options.layers, "width": options.width, "level": options.level})
        first, second = (bench.graph(seed, options.layers, options.width) for seed in (0, 1))
        base = bench.step("compiled", "compile", {"model.onnx": first})
        if "refit.safetensors" not in base.outputs:
            raise SystemExit(f"the plan cannot be refitted: {base.facts['refit']}")
        inputs = {"model.onnx": second, **{name: base.outputs[name] for name in ("model.plan", "refit.safetensors")}}
        refits = [bench.step(f"refitted_{run}", "refit", inputs, run=run) for run in range(3)]
        x = np.random.default_rng(2).standard_normal((1, 3, PIXELS, PIXELS), np.float32)
        outputs = {name: bench.time(name, record, x) for name, record in (("base", base), ("refitted", refits[0]))}
        right = on_the_cpu(vision_transformer(1, options.layers, options.width), x)
        away = {name: distance(values, right) for name, values in outputs.items()}
        bench.note("relative_l2_from_onnxruntime_with_the_new_weights", away)
        times = sorted(record.seconds for record in refits)
        begun = time.monotonic()
        try:
            rebuilt = bench.step("rebuilt", "compile", {"model.onnx": second})
        except BackendError as err:
            bench.note("rebuilt", {"error": str(err)[:1000], "stopped_after": time.monotonic() - begun})
            bench.note("refit_share_of_rebuild", {"median_at_most": times[1] / (time.monotonic() - begun)})
            return
        shares = {"best": times[0] / rebuilt.seconds, "median": times[1] / rebuilt.seconds}
        bench.note("refit_share_of_rebuild", shares)
        outputs["rebuilt"] = bench.time("rebuilt", rebuilt, x)
        away = {name: distance(values, outputs["rebuilt"]) for name, values in outputs.items()}
        bench.note("relative_l2_from_rebuilt", away)
        if bench.left < 1.2 * rebuilt.seconds + AFTERWARDS:
            bench.note("without_refit", {"not_run": f"{bench.left:.0f} s were left"})
            return
        try:
            plain = bench.step("without_refit", "compile", {"model.onnx": second}, refit="none")
        except BackendError as err:
            bench.note("without_refit", {"error": str(err)[:1000]})
        else:
            bench.time("without_refit", plain, x)


if __name__ == "__main__":
    main()
