"""Peak memory of every stage on a graph with external data: a stack of linear layers, `--gib` of fp32 weights.

    python bench/big_model.py --gib 3 --out bench/results/big_model.json

Each stage runs in a process of its own, as in a build; its peak is the resident memory of that process as the kernel counts it
(ru_maxrss of the child, so that pages of mapped files count too), and is told as a multiple of the weights. Stages that load the graph
may take 2.5 times the weights, the others 1.2 times: `--check` fails where one takes more.
"""

from __future__ import annotations

import argparse
import datetime as dt
import importlib.metadata
import importlib.util
import json
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np
from onnx import TensorProto, helper
from safetensors.numpy import save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tasks.onnx_files import DATA, GRAPH
from tasks.process import Limits, run_stage

WIDTH: Final = 4096
TENSORS: Final = {"x": {"dtype": "float32", "shape": ["batch", WIDTH], "low": -1.0, "high": 1.0}}
CASES: Final = [{"name": f"online/{name}", "shapes": {"x": [size, WIDTH]}} for name, size in (("min", 1), ("max", 4))]
PROFILES: Final = [{"name": "online", "inputs": {"x": {"min": [1, WIDTH], "opt": [2, WIDTH], "max": [4, WIDTH]}}}]
COMPILE: Final = {
    "workspace": 1 << 30,
    "optimization_level": None,
    "hardware_compatibility": "none",
    "version_compatible": False,
}
# What a stage may take, as a multiple of the weights: where the graph has to be loaded by a runtime, and elsewhere.
LOADS: Final = 2.5
ELSEWHERE: Final = 1.2
VERSIONS: Final = ("onnx", "onnxruntime", "onnxsim", "numpy")


def write_model(folder: Path, size: int) -> int:
    """Write about `size` bytes of weights as a stack of MatMul, Add and Relu, a layer at a time; return the exact bytes."""
    layers = max(1, size // (4 * WIDTH * WIDTH))
    draw, offset, weights, nodes = np.random.default_rng(0), 0, [], []
    with (folder / DATA).open("wb") as data:
        for layer in range(layers):
            for name, shape in ((f"w{layer}", (WIDTH, WIDTH)), (f"b{layer}", (WIDTH,))):
                array = draw.standard_normal(shape, np.float32) * np.float32((2 / WIDTH) ** 0.5)
                data.write(array.tobytes())
                tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=shape)
                tensor.data_location = TensorProto.EXTERNAL
                for key, value in (("location", DATA), ("offset", offset), ("length", array.nbytes)):
                    tensor.external_data.add(key=key, value=str(value))
                weights.append(tensor)
                offset += array.nbytes
            source = f"y{layer - 1}" if layer else "x"
            nodes += [
                helper.make_node("MatMul", [source, f"w{layer}"], [f"m{layer}"], f"layer{layer}/matmul"),
                helper.make_node("Identity", [f"m{layer}"], [f"i{layer}"], f"layer{layer}/identity"),
                helper.make_node("Add", [f"i{layer}", f"b{layer}"], [f"a{layer}"], f"layer{layer}/add"),
                helper.make_node("Relu", [f"a{layer}"], [f"y{layer}"], f"layer{layer}/relu"),
            ]
    shape = ["batch", WIDTH]
    graph = helper.make_graph(
        nodes,
        "big",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(f"y{layers - 1}", TensorProto.FLOAT, shape)],
        weights,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    (folder / GRAPH).write_bytes(model.SerializeToString())
    return offset


def measured(stage: str, params: dict[str, Any], inputs: dict[str, Path], folder: Path) -> dict[str, Any]:
    """Run a stage and return its peak, seconds and facts; what it wrote is in `folder`."""
    folder.mkdir()
    begin = time.perf_counter()
    result = run_stage(stage, params, inputs, folder, limits=Limits(3600, 20 << 30, 2), entry="bench.big_model:within")
    return {"seconds": round(time.perf_counter() - begin, 1), **dict(result.facts)}


def stored(request: Any) -> Any:
    """Do what fetching a file and publishing one do with its bytes: into a store with its digest, across to another, out of it again."""
    from artifacts.cache import blob_path
    from artifacts.refs import ONNX_DATA, ArtifactRef, digest_file
    from artifacts.store import open_store
    from tasks.stage import StageResult

    for name, path in request.inputs.items():
        ref = ArtifactRef(digest_file(path), path.stat().st_size, ONNX_DATA)
        here, there = (open_store(str(request.output_dir / side)) for side in ("here", "there"))
        here.put_file(blob_path(ref.digest), path, ref)
        here.copy(blob_path(ref.digest), f"engines/{name}")
        here.get_file(f"engines/{name}", ref, request.output_dir / f"{name}.sent")
        there.put_file(f"engines/{name}", request.output_dir / f"{name}.sent", ref)
        there.get_file(f"engines/{name}", ref, request.output_dir / f"{name}.pulled")
    return StageResult({}, {})


def within(request: Any) -> Any:
    """Run the stage's own function in this process, and add the process's peak to its facts."""
    from dataclasses import replace
    from importlib import import_module

    from tasks.stage import STAGES

    module, _, function = STAGES.get(request.stage, "bench.big_model:stored").partition(":")
    result = getattr(import_module(module), function)(request)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return replace(result, facts={"peak": peak})


def document(gib: float, size: int, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return what was measured so far, with what it was measured with."""
    return {
        "command": f"python bench/big_model.py --gib {gib:g}",
        "date": dt.datetime.now(dt.timezone.utc).strftime("%Y-%m-%d"),
        "versions": {package: importlib.metadata.version(package) for package in VERSIONS},
        "weight_bytes": size,
        "stages": rows,
    }


Run = Callable[[str, str, float, dict[str, Any], dict[str, Path]], None]
Files = Callable[[str], dict[str, Path]]


def portable(run: Run, files: Files, folder: Path) -> None:
    """Measure what was measured first: from the export to halves and ONNX Runtime's engine."""
    source = {"framework": "onnx", "tensors": TENSORS, "outputs": None}
    run("export", "export", ELSEWHERE, source | {"opset": None}, files("source"))
    parity = source | {"kind": "parity", "cases": CASES, "input_seed": 0}
    run("reference", "reference", LOADS, parity, files("source"))
    simplify = {"simplifier": "onnxsim", "cases": CASES, "tensors": TENSORS, "input_seed": 1}
    run("simplify", "simplify", LOADS, simplify, files("export"))
    shutil.rmtree(folder / "export")
    run("check", "check", LOADS, {"runtime": "tensorrt-rtx", "by": "parser"}, files("simplify"))
    common = {"keep": [], "io": "float32"}
    run("type fp32", "type", ELSEWHERE, common | {"precision": "fp32"}, files("simplify"))
    references = {"reference.safetensors": folder / "reference" / "reference.safetensors"}
    verify = {"subject": "graph", "executor": "onnxruntime", "batch": 4, "metric": None, "tensors": TENSORS}
    run("verify fp32", "verify", LOADS, verify, files("type fp32") | references)
    run("compile onnxruntime", "compile", LOADS, {"runtime": "onnxruntime", "gpu": "cpu"}, files("type fp32"))
    shutil.rmtree(folder / "compile onnxruntime")
    shutil.rmtree(folder / "type fp32")
    run("outliers", "outliers", LOADS, {}, files("simplify") | references)
    (folder / "outliers" / "outliers.json").write_text("{}")
    typed = files("simplify") | {"outliers.json": folder / "outliers" / "outliers.json"}
    run("type fp16", "type", ELSEWHERE, common | {"precision": "fp16"}, typed)
    run("verify fp16", "verify", LOADS, verify, files("type fp16") | references)


def typed(run: Run, files: Files, folder: Path) -> None:
    """Measure what moves the files, TensorRT-RTX's compilation of halves, calibration, and the other precisions, from the source's graph."""
    common = {"keep": [], "io": "float32"}
    (folder / "outliers.json").write_text("{}")
    outliers = {"outliers.json": folder / "outliers.json"}
    verify = {"subject": "graph", "executor": "onnxruntime", "batch": 4, "metric": None, "tensors": TENSORS}
    parity = {
        "framework": "onnx",
        "tensors": TENSORS,
        "outputs": None,
        "kind": "parity",
        "cases": CASES,
        "input_seed": 0,
    }
    if not (folder / "reference").is_dir():
        run("reference", "reference", LOADS, parity, files("source"))
    references = {"reference.safetensors": folder / "reference" / "reference.safetensors"}
    if not (folder / "type fp16").is_dir():
        run("type fp16", "type", ELSEWHERE, common | {"precision": "fp16"}, files("source") | outliers)
    if importlib.util.find_spec("tensorrt_rtx") is not None:
        rtx = {"runtime": "tensorrt-rtx", "gpu": "sm89", "tf32": False, "profiles": PROFILES, **COMPILE}
        run("compile tensorrt-rtx", "compile", LOADS, rtx, files("type fp16"))
        plan = {"model.plan": folder / "compile tensorrt-rtx" / "model.plan"}
        run("publish", "store", ELSEWHERE, {}, plan)
        shutil.rmtree(folder / "compile tensorrt-rtx")
        shutil.rmtree(folder / "publish")
    shutil.rmtree(folder / "type fp16")
    run("fetch", "store", ELSEWHERE, {}, files("source"))
    shutil.rmtree(folder / "fetch")
    draw = np.random.default_rng(0)
    (folder / "data").mkdir()
    save_file({"x": draw.uniform(-1, 1, (16, WIDTH)).astype(np.float32)}, folder / "data" / "dataset.safetensors")
    data = {"dataset.safetensors": folder / "data" / "dataset.safetensors"}
    params = {"method": "entropy", "percentile": None, "batch": 4, "tensors": TENSORS}
    run("calibrate", "calibrate", LOADS, params, files("source") | data)
    ranges = {"ranges.json": folder / "calibrate" / "ranges.json"}
    for precision in ("int8", "int8-fp16", "fp8", "bf16"):
        half = {"outliers.json": outliers["outliers.json"]} if precision == "int8-fp16" else {}
        given = files("source") | (ranges if precision != "bf16" else {}) | half
        run(f"type {precision}", "type", ELSEWHERE, common | {"precision": precision}, given)
        if precision in ("int8", "bf16"):
            run(f"verify {precision}", "verify", LOADS, verify, files(f"type {precision}") | references)
        shutil.rmtree(folder / f"type {precision}")


def main() -> int:
    """Measure every stage, print a table, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=3.0)
    parser.add_argument("--out", type=Path)
    parser.add_argument(
        "--only",
        choices=("portable", "typed"),
        help="some stages alone: the others keep the rows that --out has of them",
    )
    parser.add_argument("--check", action="store_true")
    asked = parser.parse_args()
    rows: list[dict[str, Any]] = []
    before = json.loads(asked.out.read_text())["stages"] if asked.only and asked.out and asked.out.is_file() else []
    with tempfile.TemporaryDirectory(prefix="enginery-big-") as name:
        folder = Path(name)
        (folder / "source").mkdir()
        size = write_model(folder / "source", int(asked.gib * (1 << 30)))
        print(f"{size / (1 << 30):.2f} GiB of weights")

        def files(made: str) -> dict[str, Path]:
            return {path.name: path for path in (folder / made).iterdir() if path.name.startswith(GRAPH)}

        def run(what: str, stage: str, most: float, params: dict[str, Any], inputs: dict[str, Path]) -> None:
            row = measured(stage, params, inputs, folder / what)
            row = {"stage": what, "weights": round(row["peak"] / size, 2), "most": most, **row}
            rows.append(row)
            if asked.out is not None:
                kept = [one for one in before if one["stage"] not in {made["stage"] for made in rows}]
                asked.out.write_text(json.dumps(document(asked.gib, size, kept + rows), indent=1) + "\n")
            print(
                f"{what:<22} {row['peak'] / (1 << 30):6.2f} GiB  {row['weights']:5.2f} of {most}  {row['seconds']:7.1f} s"
            )

        if asked.only != "typed":
            portable(run, files, folder)
        if asked.only != "portable":
            typed(run, files, folder)
    over = [row["stage"] for row in rows if row["weights"] > row["most"]]
    if over:
        print(f"more than allowed: {', '.join(over)}")
    return 1 if asked.check and over else 0


if __name__ == "__main__":
    sys.exit(main())
