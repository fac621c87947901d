"""One engine of one model: from the exported graph to a plan, by the product's stages.

    python -m bench.models.variant MODEL BATCH VARIANT FOLDER --seconds 300

Reads FOLDER/MODEL/bBATCH/model.onnx and FOLDER/MODEL/{data,calibration}.npz; writes FOLDER/MODEL/bBATCH/VARIANT/: the typed
graph, the plan, its listing, and build.json. What is there already is not made again.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import shutil
import time
import traceback
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from tasks.halves import to_half
from tasks.process import Limits, run_stage
from tasks.rewrite import rewrite

REWRITES = ("drop-moves", "fold-scales", "merge-projections")
FUSED = ("drop-moves", "plain-softmax", "fold-scales", "merge-projections")


@dataclass(frozen=True)
class Variant:
    """How a graph is rewritten and typed, and what the compiler is told."""

    passes: tuple[str, ...] = ("drop-moves",)
    precision: str = "fp16"  # how the graph is typed; "weak" leaves it fp32 and sets the FP16 flag
    keep: str = ""  # "attention": products of two activations stay as they are in int8
    io: str = "float32"
    method: str = "minmax"
    params: dict[str, Any] = field(default_factory=dict)
    halves: bool = False  # what int8 leaves is typed fp16 in the graph, pairs and what they feed excepted


def _with(**params: Any) -> dict[str, Any]:
    return params


VARIANTS = {
    "fp16-bare": Variant(()),
    "weak-bare": Variant((), precision="weak"),
    "fp16-soft": Variant(("drop-moves", "plain-softmax")),
    "fp16-held": Variant(params=_with(half_layers=True)),
    "fp16-mha-held": Variant(FUSED, params=_with(half_layers=True)),
    "fp16-mha": Variant(FUSED),
    "fp16-mha-ln": Variant((*FUSED, "decompose-layernorm")),
    "weak-mha": Variant(FUSED, precision="weak"),
    "weak-mha-ln": Variant((*FUSED, "decompose-layernorm"), precision="weak"),
    "int8-mha": Variant(FUSED, precision="int8", keep="attention", params=_with(flags=["FP16"])),
    "int8-half": Variant(FUSED, precision="int8", keep="attention", params=_with(flags=["FP16"]), halves=True),
    "fp16": Variant(),
    "fp16-native": Variant(io="native"),
    "fp16-rw": Variant(REWRITES),
    "fp16-rw-ln": Variant((*REWRITES, "decompose-layernorm")),
    "fp16-rw-o5": Variant(REWRITES, params=_with(optimization_level=5)),
    "weak": Variant(precision="weak"),
    "weak-rw": Variant(REWRITES, precision="weak"),
    "weak-rw-ln": Variant((*REWRITES, "decompose-layernorm"), precision="weak"),
    "weak-o5": Variant(precision="weak", params=_with(optimization_level=5)),
    "weak-rw-o5": Variant(REWRITES, precision="weak", params=_with(optimization_level=5)),
    "int8": Variant(precision="int8", params=_with(flags=["FP16"])),
    "int8-o5": Variant(precision="int8", params=_with(flags=["FP16"], optimization_level=5)),
    "int8-only": Variant(precision="int8"),
    "int8-rw": Variant(REWRITES, precision="int8", keep="attention", params=_with(flags=["FP16"])),
    "int8-rw-o5": Variant(
        REWRITES, precision="int8", keep="attention", params=_with(flags=["FP16"], optimization_level=5)
    ),
    "int8-rw-all": Variant(REWRITES, precision="int8", params=_with(flags=["FP16"])),
    "int8-mlp": Variant(REWRITES, precision="int8", keep="attention+projections", params=_with(flags=["FP16"])),
}


@contextmanager
def alone(path: Path) -> Any:
    """Hold a lock while something that several variants share is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        yield


def folded(folder: Path) -> Path:
    """Fold what is constant in a static graph, with ONNX Runtime's basic level, and return the file of the result."""
    source, target = folder / "model.onnx", folder / "folded.onnx"
    with alone(folder / "folded.lock"):
        if not target.exists():
            import onnxruntime

            options = onnxruntime.SessionOptions()
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
            options.optimized_model_filepath = str(folder / "folded.tmp.onnx")
            onnxruntime.InferenceSession(
                str(source),
                options,
                providers=["CPUExecutionProvider"],
                # It would turn products of three axes into Gemm between Reshapes.
                disabled_optimizers=["MatMulAddFusion", "TransposeOptimizer"],
            )
            model = onnx.load(folder / "folded.tmp.onnx")
            standard = [opset for opset in model.opset_import if opset.domain in ("", "ai.onnx")]
            kept = [onnx.helper.make_opsetid(opset.domain, opset.version) for opset in standard]
            del model.opset_import[:]
            model.opset_import.extend(kept)
            model = onnx.shape_inference.infer_shapes(model)
            onnx.save(model, folder / "saved.tmp.onnx")
            (folder / "saved.tmp.onnx").rename(target)
            (folder / "folded.tmp.onnx").unlink()
    return target


def attention_products(model: onnx.ModelProto) -> list[str]:
    """Return the MatMuls of two activations."""
    constants = {tensor.name for tensor in model.graph.initializer}
    return [node.name for node in model.graph.node if node.op_type == "MatMul" and not constants & set(node.input)]


def kept_nodes(model: onnx.ModelProto, keep: str) -> list[str]:
    """Return the nodes that int8 leaves alone."""
    if not keep:
        return []
    found = attention_products(model)
    if keep == "attention+projections":
        found += [
            n.name for n in model.graph.node if n.op_type == "MatMul" and "fc" not in n.name and "dense" not in n.name
        ]
    return sorted(set(found))


class Maker:
    """Makes one variant; `facts` says what was done and how long it took."""

    def __init__(self, asked: argparse.Namespace) -> None:
        self.asked = asked
        self.variant = VARIANTS[asked.variant]
        self.model_folder = asked.folder / asked.model
        self.source = self.model_folder / f"b{asked.batch}"
        self.folder = self.source / asked.variant
        self.facts: dict[str, Any] = {
            "variant": asked.variant,
            "model": asked.model,
            "batch": asked.batch,
            "seconds": {},
        }
        self.limits = Limits(timeout_s=asked.seconds, memory_bytes=64 << 30, threads=asked.threads)

    def stage(self, name: str, params: dict[str, Any], inputs: dict[str, Path], entry: str | None = None) -> Any:
        output = self.folder / name
        for left in (output, output.with_name(f"{name}.tmp")):  # a run that was cut leaves its scratch folder
            shutil.rmtree(left, ignore_errors=True)
        output.mkdir(parents=True)
        started = time.monotonic()
        try:
            return run_stage(name, params, inputs, output, limits=self.limits, entry=entry)
        finally:
            self.facts["seconds"][name] = round(time.monotonic() - started, 1)

    def rewritten(self, folder: Path) -> Path:
        """Return the rewritten graph of one batch size."""
        target = folder / "rewritten" / ("-".join(self.variant.passes) or "plain") / "model.onnx"
        source = folded(folder)
        with alone(target.with_suffix(".lock")):
            if not target.exists():
                model = onnx.load(source)
                counts = rewrite(model, self.variant.passes)
                target.with_suffix(".json").write_text(json.dumps(counts))
                temporary = target.with_suffix(".tmp")
                onnx.save(model, temporary)
                temporary.rename(target)
        self.facts["rewritten"] = json.loads(target.with_suffix(".json").read_text())
        return target

    def ranges(self) -> Path:
        """Return calibrated ranges, found on the graph of the least batch: names do not depend on it."""
        least = min(int(path.name[1:]) for path in self.model_folder.glob("b[0-9]*"))
        graph = self.rewritten(self.model_folder / f"b{least}")
        target = graph.with_name(f"ranges-{self.variant.method}.json")
        with alone(target.with_suffix(".lock")):
            if not target.exists():
                from safetensors.numpy import save_file

                data = np.load(self.model_folder / "calibration.npz")["image"][:16]
                kept = len(data) // least * least
                save_file({"image": np.ascontiguousarray(data[:kept])}, target.with_suffix(".safetensors"))
                tensors = {"image": {"dtype": "float32", "shape": [least, *data.shape[1:]]}}
                params = {"tensors": tensors, "batch": least, "method": self.variant.method, "percentile": None}
                inputs = {"model.onnx": graph, "dataset.safetensors": target.with_suffix(".safetensors")}
                self.stage("calibrate", params, inputs)
                shutil.copyfile(self.folder / "calibrate" / "ranges.json", target)
        return target

    def typed(self) -> Path:
        """Return the typed graph."""
        graph = self.rewritten(self.source)
        if self.variant.precision in ("weak", "fp32"):
            return graph
        inputs = {"model.onnx": graph}
        keep: list[str] = []
        if self.variant.precision == "int8":
            inputs["ranges.json"] = self.ranges()
            keep = kept_nodes(onnx.load(graph), self.variant.keep)
            # Globs treat brackets as classes of characters.
            keep = [name.replace("[", "[[]") for name in keep]
        params = {"precision": self.variant.precision, "keep": keep, "io": self.variant.io}
        result = self.stage("type", params, inputs)
        self.facts["typed"] = {
            name: value if not isinstance(value, list) else len(value) for name, value in result.facts.items()
        }
        typed: Path = self.folder / "type" / "model.onnx"
        if self.variant.halves:
            self.halve(typed)
        return typed

    def halve(self, typed: Path) -> None:
        """Write fp16 into an int8 graph wherever no pair is: TensorRT 8.6 reads pairs of fp32 only."""
        model = onnx.load(typed)
        pairs = {name for node in model.graph.node if node.op_type == "DequantizeLinear" for name in node.output}
        keep = {node.name for node in model.graph.node if pairs & set(node.input)}
        result = to_half(model, "fp16", keep, native=False)
        self.facts["halved"] = {"casts": result.casts, "kept": len(keep)}
        onnx.save(result.model, typed)

    def compile(self, graph: Path) -> None:
        nodes = onnx.load(graph, load_external_data=False).graph.node
        self.facts["operators"] = dict(Counter(node.op_type for node in nodes).most_common())
        if self.asked.dry:
            return
        from tasks.engines.cuda import device_properties

        value = onnx.load(graph, load_external_data=False).graph.input[0]
        shape = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        weak = self.variant.precision == "weak"
        params = {
            "gpu": device_properties()["compute_capability"],
            "precision": "fp16" if weak else self.variant.precision,
            "tf32": False,
            "profiles": [{"name": "static", "inputs": {"image": dict.fromkeys(("min", "opt", "max"), shape)}}],
            "workspace": None,
            "optimization_level": None,
            "hardware_compatibility": "none",
            "version_compatible": False,
            **({"typing": "weak"} if weak else {}),
            **self.variant.params,
            "verbose_log": str(self.folder / "compile.log"),
        }
        inputs = {"model.onnx": graph}
        cache = self.model_folder / "timing" / f"b{self.asked.batch}.cache"
        if self.asked.timing_cache and cache.exists():
            inputs["timing.cache"] = cache
        result = self.stage("compile", params, inputs, entry="bench.models.compiling:compile_variant")
        kept = (
            "seconds",
            "settings",
            "layers",
            "timing_cache",
            "size",
            "warnings",
            "runtime_version",
            "inputs",
            "outputs",
        )
        self.facts["compile"] = {name: result.facts[name] for name in kept}
        self.facts["compile"]["warnings"] = [words[:300] for words in result.facts["warnings"][:8]]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("batch", type=int)
    parser.add_argument("variant", choices=list(VARIANTS))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--threads", type=int, default=4)
    parser.add_argument("--timing-cache", action="store_true")
    parser.add_argument("--dry", action="store_true", help="everything but the compilation")
    asked = parser.parse_args()
    maker = Maker(asked)
    maker.folder.mkdir(parents=True, exist_ok=True)
    try:
        maker.compile(maker.typed())
    except Exception as err:  # noqa: BLE001  # one variant that fails is a result
        maker.facts["error"] = f"{err}"[:2000]
        maker.facts["trace"] = traceback.format_exc()[-1500:]
    (maker.folder / "build.json").write_text(json.dumps(maker.facts, indent=1) + "\n")
    print(
        asked.model,
        asked.batch,
        asked.variant,
        maker.facts.get("error", "built")[:300],
        maker.facts["seconds"],
        flush=True,
    )


if __name__ == "__main__":
    main()
