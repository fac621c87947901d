"""What a timing cache saves, and when TensorRT refuses what it wrote itself. On a GPU host, about seven minutes:

    python bench/timing_cache.py RESULT.json [--seconds 560] [--only convolutions,attention,resnet50,vit]
    python bench/timing_cache.py RESULT.json --quick    # the questions that matter most, in 170 seconds

Every build and every probe is a process of its own, as in the product, and bounded. For each network (fp16, batch 1 to 8):

1. cold      built without a cache by the product's compile stage; whether the cache loads again in the same process
2. probes    in a fresh process: does the cache load plainly, after which preparation does it load
3. warm      built again in a fresh process with the cache, by the product's compile stage
4. prepared  where plain loading is refused: built again after the first preparation that made it load

Then whether a cache of a network without parts for the graph compiler (Myelin) loads once it also holds such a part: two
networks built one after the other with one cache. RESULT.json is written after each step.

`--quick` writes small caches of all three kinds and that of a ResNet-50 (fp16, batch 1, the compiler's own level), loads all
four in a fresh process, with and without the graph compiler at work there before, and rebuilds the ResNet-50 with its cache.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tasks.stage import StageRequest, StageResult

SECONDS = 170
SIDES = {"convolutions": 32, "attention": 64, "resnet50": 224, "vit": 224}
CACHE = "timing.cache"
# In this order in one process: what comes later may profit from what was before, so the first that loads is the cause.
PREPARATIONS = ("plain", "again", "plugins", "previews", "empty", "network", "myelin")


# ---- in the child -----------------------------------------------------------------------------------------------------------


def _session(request: StageRequest) -> tuple[Any, Any, Any, Any]:
    import tensorrt as trt

    from tasks.engines.trt_log import Log

    log = Log(request.report)
    logger = log.for_runtime(trt)
    return trt, log, logger, trt.Builder(logger)


def _build(request: StageRequest, path: Path, side: int, cache: Any, level: int = 1) -> Any:
    """Build a network with the bare API and a cache (None: an empty one); return the configuration."""
    trt, log, logger, builder = request.params["_session"]
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.EXPLICIT_BATCH))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(path)):
        raise RuntimeError([str(parser.get_error(index)) for index in range(parser.num_errors)])
    config = builder.create_builder_config()
    config.builder_optimization_level = level
    if hasattr(trt.BuilderFlag, "FP16"):
        config.set_flag(trt.BuilderFlag.FP16)
    profile = builder.create_optimization_profile()
    profile.set_shape("x", (1, 3, side, side), (1, 3, side, side), (8, 3, side, side))
    config.add_optimization_profile(profile)
    cache = cache if cache is not None else config.create_timing_cache(b"")
    config.set_timing_cache(cache, False)
    request.params.setdefault("_kept", []).append((config, cache))  # type: ignore[attr-defined]  # what refers to them is returned
    if builder.build_serialized_network(network, config) is None:
        raise RuntimeError(log.errors[-3:])
    return config


def prepare(request: StageRequest, name: str) -> None:
    """Do what may make a cache load: each touches another part of TensorRT."""
    trt, _log, logger, builder = request.params["_session"]
    if name == "plugins":
        trt.init_libnvinfer_plugins(logger, "")
    elif name == "empty":
        config = builder.create_builder_config()
        config.set_timing_cache(config.create_timing_cache(b""), False)
    elif name == "network":
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.EXPLICIT_BATCH))
        trt.OnnxParser(network, logger).parse_from_file(str(request.inputs["myelin.onnx"]))
    elif name == "myelin":
        _build(request, request.inputs["myelin.onnx"], SIDES["attention"], None)


def probe(request: StageRequest) -> StageResult:
    """Load a cache after each preparation; say what TensorRT says."""
    trt, log, _logger, builder = session = _session(request)
    request.params["_session"] = session  # type: ignore[index]
    data, found = request.inputs[CACHE].read_bytes(), {}
    for name in PREPARATIONS:
        started = time.monotonic()
        log.take_errors(0)
        prepare(request, name)
        config = builder.create_builder_config()
        if name == "previews":
            for feature in getattr(trt, "PreviewFeature", type("", (), {"__members__": {}})).__members__.values():
                config.set_preview_feature(feature, False)
        before = len(log.errors)
        cache = config.create_timing_cache(data)
        taken = cache is not None and config.set_timing_cache(cache, False)
        said = log.errors[before:]
        found[name] = {
            "loads": bool(taken and not said),
            "said": [words[:200] for words in said],
            "seconds": round(time.monotonic() - started, 2),
        }
    return StageResult({}, {"probes": found, "warnings": log.warnings[:10]})


def compile_prepared(request: StageRequest) -> StageResult:
    """The product's compilation after a preparation in the same process."""
    import tensorrt as trt

    from tasks.engines.cuda import Cuda
    from tasks.engines.trt import Build

    started = time.monotonic()
    session = _session(request)
    request.params["_session"] = session  # type: ignore[index]
    prepare(request, request.params["prepare"])
    prepared = round(time.monotonic() - started, 2)
    cuda = Cuda(0)
    outputs, facts = Build(trt, request).run(cuda.free_bytes)
    return StageResult(outputs, {**facts, "preparation_seconds": prepared})


def both(request: StageRequest) -> StageResult:
    """Build the network with Myelin parts, then the one without, with one cache; write what it holds then."""
    session = _session(request)
    request.params["_session"] = session  # type: ignore[index]
    first = _build(request, request.inputs["myelin.onnx"], SIDES["attention"], None)
    cache = first.get_timing_cache()
    second = _build(request, request.inputs["model.onnx"], SIDES["convolutions"], cache)
    (request.output_dir / CACHE).write_bytes(memoryview(second.get_timing_cache().serialize()))
    return StageResult({CACHE: "x"}, {})


def small_caches(request: StageRequest) -> StageResult:
    """Build both small networks, each with an own cache and then the one with that of the other; keep what each holds."""
    request.params["_session"] = _session(request)  # type: ignore[index]
    outputs, found = {}, {}

    def build(name: str, graph: str, side: str, cache: Any) -> Any:
        started = time.monotonic()
        cache = _build(request, request.inputs[graph], SIDES[side], cache).get_timing_cache()
        data = bytes(memoryview(cache.serialize()))
        (request.output_dir / f"{name}.cache").write_bytes(data)
        outputs[f"{name}.cache"] = "x"
        found[name] = {**_contents(data), **_loads(request, data), "seconds": round(time.monotonic() - started, 2)}
        return cache

    build("convolutions", "model.onnx", "convolutions", None)
    build("both", "model.onnx", "convolutions", build("attention", "myelin.onnx", "attention", None))
    return StageResult(outputs, {"same_process": found})


def probe_all(request: StageRequest) -> StageResult:
    """Load every cache in this process as it starts, and once more after the graph compiler has worked in it."""
    request.params["_session"] = _session(request)  # type: ignore[index]
    caches = {name: path.read_bytes() for name, path in request.inputs.items() if name.endswith(".cache")}
    fresh = {name: _loads(request, data) for name, data in caches.items()}
    prepare(request, "myelin")
    return StageResult({}, {"fresh": fresh, "after_myelin": {n: _loads(request, data) for n, data in caches.items()}})


def _loads(request: StageRequest, data: bytes) -> dict[str, Any]:
    _trt, log, _logger, builder = request.params["_session"]
    log.take_errors(0)
    config = builder.create_builder_config()
    cache = config.create_timing_cache(data)
    taken = cache is not None and config.set_timing_cache(cache, False)
    said = log.take_errors(0)
    del cache, config  # in this order
    return {"loads": bool(taken and not said), "said": [words[:200] for words in said]}


def _contents(data: bytes) -> dict[str, Any]:
    """What can be read of a cache: its size, both ends, and the text in it (Myelin's part is text, by its own words)."""
    text = [found.decode() for found in re.findall(rb"[\x20-\x7e\n]{8,}", data)]
    return {
        "size": len(data),
        "head": data[:96].hex(),
        "tail": data[-256:].hex(),
        "text": [t[:300] for t in text[-12:]],
    }


# ---- in the parent ----------------------------------------------------------------------------------------------------------


class Bench:
    def __init__(self, asked: argparse.Namespace, work: Path) -> None:
        from tasks.engines.cuda import device_properties, driver_version

        self.target, self.work, self.count = asked.result, work, 0
        self.deadline = time.monotonic() + (min(asked.seconds, SECONDS) if asked.quick else asked.seconds)
        self.device = device_properties()
        self.result: dict[str, Any] = {
            "command": " ".join(["python", *sys.argv]),
            "device": self.device,
            "cuda": driver_version(),
            "networks": {},
        }

    def keep(self) -> None:
        self.target.parent.mkdir(parents=True, exist_ok=True)
        self.target.write_text(json.dumps(self.result, indent=1, sort_keys=True) + "\n", "utf-8")

    def params(self, name: str) -> dict[str, Any]:
        corner = [3, SIDES[name], SIDES[name]]
        return {
            "runtime": "tensorrt",
            "gpu": self.device["compute_capability"],
            "precision": "fp16",
            "tf32": False,
            "profiles": [
                {"name": "p", "inputs": {"x": {"min": [1, *corner], "opt": [1, *corner], "max": [8, *corner]}}}
            ],
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

    def network(self, name: str, graph: Path, myelin: Path) -> None:
        row: dict[str, Any] = {}
        self.result["networks"][name] = row

        def step(title: str, facts: dict[str, Any]) -> None:
            kept = (
                "error",
                "not_run",
                "seconds",
                "stage_seconds",
                "timing_cache",
                "probes",
                "warnings",
                "preparation_seconds",
            )
            row[title] = {key: facts[key] for key in kept if key in facts}
            self.result.setdefault("tensorrt", facts.get("runtime_version"))
            print(name, title, json.dumps(row[title])[:1200], flush=True)
            self.keep()

        here, params = "bench.timing_cache", self.params(name)
        facts, folder = self.run("tasks.engines.trt:compile_plan", params, {"model.onnx": graph})
        step("cold", facts)
        cache = folder / CACHE
        if not cache.exists():
            return
        listing = (folder / "layers.json").read_text()
        row["layers_of_the_graph_compiler"] = listing.count("ForeignNode")
        data, uuid = cache.read_bytes(), bytes.fromhex(self.device["uuid"].removeprefix("GPU-").replace("-", ""))
        row["cache"] = {
            "size": len(data),
            "head": data[:96].hex(),
            "tail": data[-64:].hex(),
            "names_this_gpu": uuid in data or self.device["uuid"].encode() in data,
        }
        facts, _ = self.run(f"{here}:probe", params, {CACHE: cache, "myelin.onnx": myelin})
        step("probes", facts)
        facts, _ = self.run("tasks.engines.trt:compile_plan", params, {"model.onnx": graph, CACHE: cache})
        step("warm", facts)
        loads = [key for key, found in row["probes"].get("probes", {}).items() if found["loads"]]
        if loads and loads[0] != "plain":
            chosen = {**params, "prepare": loads[0]}
            inputs = {"model.onnx": graph, CACHE: cache, "myelin.onnx": myelin}
            step(f"prepared:{loads[0]}", self.run(f"{here}:compile_prepared", chosen, inputs)[0])

    def quick(self, convolutions: Path, myelin: Path, resnet50: Path) -> None:
        """Answer what matters most; what takes long comes late, and only where it can answer something."""
        here, row = "bench.timing_cache", self.result
        del row["networks"]
        params = self.params("resnet50")
        corner = [1, 3, SIDES["resnet50"], SIDES["resnet50"]]
        params["profiles"] = [{"name": "p", "inputs": {"x": {"min": corner, "opt": corner, "max": corner}}}]
        graphs = {"model.onnx": convolutions, "myelin.onnx": myelin}
        row["small"], folder = self.run(f"{here}:small_caches", params, graphs)
        self.keep()
        caches = {path.name: path for path in folder.glob("*.cache")}
        facts, folder = self.run("tasks.engines.trt:compile_plan", params, {"model.onnx": resnet50})
        row["cold"] = {key: facts.get(key) for key in ("error", "seconds", "stage_seconds", "phases", "timing_cache")}
        if (folder / CACHE).exists():
            caches["resnet50.cache"] = folder / CACHE
            row["resnet50"] = _contents((folder / CACHE).read_bytes())
            row["resnet50"]["layers_of_the_graph_compiler"] = (folder / "layers.json").read_text().count("ForeignNode")
        self.keep()
        row["probes"], _ = self.run(f"{here}:probe_all", params, {**caches, "myelin.onnx": myelin})
        self.keep()
        if row["probes"].get("fresh", {}).get("resnet50.cache", {}).get("loads"):
            inputs = {"model.onnx": resnet50, CACHE: caches["resnet50.cache"]}
            facts, _ = self.run("tasks.engines.trt:compile_plan", params, inputs)
            row["warm"] = {
                key: facts.get(key) for key in ("error", "seconds", "stage_seconds", "phases", "timing_cache")
            }
        self.keep()
        print(
            json.dumps({key: row.get(key) for key in ("small", "cold", "probes", "warm")}, indent=1)[:6000], flush=True
        )

    def mixed(self, convolutions: Path, myelin: Path) -> None:
        """Does a cache load that holds entries of both kinds of network?"""
        inputs = {"model.onnx": convolutions, "myelin.onnx": myelin}
        facts, folder = self.run("bench.timing_cache:both", self.params("convolutions"), inputs)
        row = {"built": facts}
        self.result["both_kinds_in_one_cache"] = row
        if (folder / CACHE).exists():
            row["size"] = (folder / CACHE).stat().st_size
            probes = {CACHE: folder / CACHE, "myelin.onnx": myelin}
            row["probes"] = self.run("bench.timing_cache:probe", self.params("convolutions"), probes)[0]
            warm = {"model.onnx": convolutions, CACHE: folder / CACHE}
            facts = self.run("tasks.engines.trt:compile_plan", self.params("convolutions"), warm)[0]
            row["warm"] = {key: facts[key] for key in ("seconds", "timing_cache", "error", "not_run") if key in facts}
        print("both", json.dumps(row)[:1200], flush=True)
        self.keep()


def half(path: Path) -> Path:
    """Type a graph as fp16, by the product's own code."""
    import onnx

    from tasks import halves

    target = path.with_name(f"{path.stem}-fp16.onnx")
    onnx.save(halves.to_half(onnx.load(path), "fp16", set(), native=False).model, target)
    return target


def main() -> None:
    import synthetic  # beside this file, which child processes import by another path

    parser = argparse.ArgumentParser()
    parser.add_argument("result", type=Path)
    parser.add_argument("--seconds", type=float, default=560)
    parser.add_argument("--only", default=",".join(SIDES))
    parser.add_argument("--quick", action="store_true")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        work = Path(made)
        makers: dict[str, Callable[[Path], Path]] = {
            "convolutions": synthetic.convolutions,
            "attention": lambda path: synthetic.vit(path, side=SIDES["attention"], layers=1, width=128, heads=2),
            "resnet50": synthetic.resnet50,
            "vit": synthetic.vit,
        }
        bench = Bench(asked, work)
        myelin = makers["attention"](work / "in" / "attention.onnx")
        convolutions = makers["convolutions"](work / "in" / "convolutions.onnx")
        if asked.quick:
            bench.quick(convolutions, myelin, half(makers["resnet50"](work / "in" / "resnet50.onnx")))
            return
        names = asked.only.split(",")
        for name in names:
            bench.network(name, half(makers[name](work / "in" / f"{name}.onnx")), myelin)
            if name == "attention":
                bench.mixed(convolutions, myelin)


if __name__ == "__main__":
    main()
