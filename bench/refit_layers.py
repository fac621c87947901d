"""Which layers a TensorRT version refits rightly: small networks, each compiled, refitted and compared with ONNX Runtime.

    python bench/refit_layers.py RESULT.json [--only NAME,...]       # on a GPU host, about two minutes

Each network is compiled by the product's stage with one set of weights and refitted by the product's stage with another, all in
this process (TensorRT starts once). What comes out is compared with what ONNX Runtime computes with the old and the new weights;
a plan that is refitted with the weights it has must not change. RESULT.json is written after each network.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from synthetic import Net

from tasks import halves
from tasks.engines import trt_refit
from tasks.engines.cuda import device_properties
from tasks.engines.trt import compile_plan
from tasks.engines.trt_run import PlanRunner
from tasks.errors import TaskError
from tasks.stage import StageRequest, StageResult

IMAGE, ROWS = ["batch", 1, 16, 16], ["batch", 32]


def conv(net: Net, x: str, into: int, out: int, *, relu: bool = True) -> str:
    """A convolution of 3 by 3 with a bias that is not zero."""
    kernel, bias = net.random(out, into, 3, 3, fan=9 * into), net.random(out, fan=8)
    y = net.add("Conv", x, kernel, bias, kernel_shape=[3, 3], pads=[1, 1, 1, 1])
    return net.add("Relu", y) if relu else y


def dense(net: Net, x: str, into: int, out: int) -> str:
    """A Gemm as PyTorch exports a linear layer."""
    return net.add("Gemm", x, net.random(out, into, fan=into), net.random(out, fan=8), transB=1)


def pooled(net: Net, x: str) -> str:
    """The mean over height and width, as rows."""
    return net.add("Flatten", net.add("GlobalAveragePool", x))


NETWORKS: dict[str, tuple[list, list, Callable[[Net], str]]] = {
    "conv": (IMAGE, ["batch", 16, 16, 16], lambda net: conv(net, "x", 1, 16, relu=False)),
    "conv relu": (IMAGE, ["batch", 16, 16, 16], lambda net: conv(net, "x", 1, 16)),
    "conv conv": (IMAGE, ["batch", 16, 16, 16], lambda net: conv(net, conv(net, "x", 1, 8), 8, 16)),
    "wide conv": (["batch", 64, 16, 16], ["batch", 64, 16, 16], lambda net: conv(net, "x", 64, 64)),
    "gemm": (ROWS, ["batch", 10], lambda net: dense(net, "x", 32, 10)),
    "pool gemm": (["batch", 32, 8, 8], ["batch", 10], lambda net: dense(net, pooled(net, "x"), 32, 10)),
    "conv pool gemm": (IMAGE, ["batch", 10], lambda net: dense(net, pooled(net, conv(net, "x", 1, 16)), 16, 10)),
    "linear": (ROWS, ["batch", 10], lambda net: net.linear("x", 32, 10)),
}


def graph(name: str, seed: int, precision: str, folder: Path) -> tuple[Path, onnx.ModelProto]:
    """Write a typed graph; return its path and the fp32 one."""
    shape, output, make = NETWORKS[name]
    net = Net("small", shape, seed)
    model = onnx.load(net.save(make(net), output, folder / f"{seed}" / "fp32.onnx"))
    typed = halves.to_half(model, "fp16", set(), native=False).model if precision == "fp16" else model
    path = folder / f"{seed}" / "model.onnx"
    onnx.save(typed, path)
    return path, model


def run(stage: Callable[[StageRequest], StageResult], params: dict, inputs: dict, folder: Path) -> StageResult:
    """Run a stage here."""
    folder.mkdir(parents=True)
    return stage(StageRequest("refit", params, inputs, folder))


def distance(values: Any, right: Any) -> float:
    """Return the relative L2 distance."""
    return float(np.linalg.norm(values.astype(np.float64) - right) / np.linalg.norm(right))


def study(name: str, precision: str, level: int | None, folder: Path) -> dict[str, Any]:
    """Compile, refit and compare one network; what fails is a result too."""
    shape = NETWORKS[name][0]
    (old, old_model), (new, new_model) = (graph(name, seed, precision, folder) for seed in (0, 7))
    corners = {corner: [batch, *shape[1:]] for corner, batch in (("min", 1), ("opt", 4), ("max", 8))}
    params = {
        "runtime": "tensorrt", "gpu": device_properties()["compute_capability"], "precision": precision, "tf32": False,
        "profiles": [{"name": "one", "inputs": {"x": corners}}], "workspace": None, "optimization_level": level,
        "hardware_compatibility": "none", "version_compatible": False, "refit": "weights",
    }  # fmt: skip
    x = np.random.default_rng(1).uniform(0, 1, corners["opt"]).astype(np.float32)

    def right(model: onnx.ModelProto) -> Any:
        session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        return session.run(None, {"x": x})[0]

    def executed(made: Path) -> Any:
        runner = PlanRunner(made / "model.plan", None)
        try:
            return runner({"x": x})["y"]
        finally:
            runner.close()

    row: dict[str, Any] = {}
    try:
        base = folder / "base"
        compiled = run(compile_plan, params, {"model.onnx": old}, base)
        listing = json.loads((base / "layers.json").read_text())["Layers"]
        row["layers"] = [str(layer.get("Name") if isinstance(layer, dict) else layer)[:120] for layer in listing]
        row["tactics"] = [str(layer.get("TacticName"))[:120] for layer in listing if isinstance(layer, dict)]
        row["refit"] = compiled.facts["refit"]
        row["warnings"] = compiled.facts["warnings"][:5]
        row["compiled_from_old"] = distance(executed(base), right(old_model))
        files = {"model.plan": base / "model.plan", "refit.safetensors": base / "refit.safetensors"}
        for title, path in (("same", old), ("new", new)):
            refitted = run(trt_refit.run, params, {"model.onnx": path, **files}, folder / title)
            values = executed(folder / title)
            row[title] = {
                "from_old": distance(values, right(old_model)),
                "from_new": distance(values, right(new_model)),
                "warnings": refitted.facts["warnings"][:5],
            }
    except (TaskError, OSError) as err:
        row["error"] = str(err)[:1500]
    return row


def main() -> None:
    """Run the bench."""
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("result", type=Path)
    asked.add_argument("--only", default=",".join(NETWORKS))
    options = asked.parse_args()
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as work:
        for name in options.only.split(","):
            for precision, level in (("fp16", 1), ("fp16", None), ("fp32", 1)):
                title, begun = f"{name}, {precision}, level {level}", time.monotonic()
                found[title] = study(name, precision, level, Path(work, title.replace(" ", "_")))
                found[title]["seconds"] = round(time.monotonic() - begun, 2)
                options.result.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n", "utf-8")
                print(title, json.dumps({**found[title], "tactics": None})[:600], flush=True)


if __name__ == "__main__":
    main()
