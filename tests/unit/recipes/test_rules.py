"""Rules over several values: each one broken on its own, at the path to mend, with what is allowed."""

from __future__ import annotations

import pytest

from recipes.nodes import dotted
from recipes.rules import check
from recipes.schema import GPUS, PRECISIONS
from recipes.targets import opset_ceiling, refusal
from tests.unit.recipes.recipe_text import recipe


def found(tmp_path, change):
    return [f"{dotted(path)}: {what}" for path, what in check(recipe(tmp_path, change))]


def test_a_good_recipe_breaks_no_rule(tmp_path):
    assert found(tmp_path, lambda _d: None) == []


def static(d):
    d["inputs"] = {"image": {"shape": [1, 1, 8, 8]}}
    d["profiles"] = {}


def onnx(d, **export):
    d.update(source={"framework": "onnx", "model": {"file": "m.onnx"}}, export=export)


def images(d, **spec):
    d["precision"]["calibration"] = {"data": "photos", "images": {"size": [16, 8], "color": "gray"} | spec}


def target(d, **fields):
    d["targets"] = [{"runtime": "tensorrt", "gpus": ["sm89"], "precision": ["fp16"]} | fields]
    d["precision"]["fallback"] = {}


PIN = {"file": "pinned", "sha256": "a" * 64}

BROKEN = {
    # profiles
    "axis missing": (lambda d: d["profiles"]["bulk"].pop("height"), "profiles.bulk: [min, opt, max] of height missing (the inputs' dynamic axes: batch, height)"),
    "axis unknown": (lambda d: d["profiles"]["bulk"].update(hieght=[1, 2, 3]), "profiles.bulk.hieght: no input has an axis 'hieght' (did you mean 'height'? allowed: batch, height)"),
    "min above opt": (lambda d: d["profiles"]["bulk"].update(batch=[8, 4, 16]), "profiles.bulk.batch: expected min <= opt <= max, found [8, 4, 16]"),
    "opt above max": (lambda d: d["profiles"]["bulk"].update(batch=[1, 32, 16]), "profiles.bulk.batch: expected min <= opt <= max, found [1, 32, 16]"),
    "no profiles": (lambda d: d.update(profiles={}), ": profiles is required: [min, opt, max] of the dynamic axes batch, height"),
    "profiles for nothing": (lambda d: d["inputs"]["image"].update(shape=[1, 1, 8, 8]), "profiles: no input has a dynamic axis: name one in a shape, or leave the profiles out"),
    "axis always 1": (lambda d: [p.update(batch=[1, 1, 1]) for p in d["profiles"].values()], "profiles.online.batch: batch is 1 in every profile: write 1 in the shape, or allow more"),
    "profile name": (lambda d: d["profiles"].update({"a/b": d["profiles"]["bulk"]}), "profiles.a/b: 'a/b' cannot name a profile"),
    # inputs and outputs
    "low above high": (lambda d: d["inputs"]["image"].update(low=1.0, high=0.0), "inputs.image.low: low 1 must be less than high 0"),
    "low equal high": (lambda d: d["inputs"]["image"].update(low=1.0, high=1.0), "inputs.image.low: low 1 must be less than high 1"),
    "low above default": (lambda d: d["inputs"]["image"].update(low=5.0), "inputs.image.low: low 5 must be less than high 1 (a default)"),
    "high below default": (lambda d: d["inputs"]["image"].update(high=-5.0), "inputs.image.high: low -1 must be less than high -5 (a default)"),
    "not whole": (lambda d: d["inputs"]["image"].update(dtype="int64", high=1.5), "inputs.image.high: 1.5 is not a whole number, and the input is int64"),
    "out of range": (lambda d: d["inputs"]["image"].update(dtype="uint8", high=256.0), "inputs.image.high: 256 does not fit uint8 (allowed: 0 to 255)"),
    "half range": (lambda d: d["inputs"]["image"].update(dtype="float16", high=1e6), "inputs.image.high: 1e+06 does not fit float16 (allowed: -65504 to 65504)"),
    "nameless input": (lambda d: d["inputs"].update({" ": d["inputs"]["image"]}), "inputs. : an input needs a name"),
    "no outputs": (lambda d: d.pop("outputs"), ": outputs is required for torch, and missing: the names of the outputs, in order"),
    "empty outputs": (lambda d: d.update(outputs=[]), "outputs: expected at least one name"),
    "nameless output": (lambda d: d.update(outputs=[""]), "outputs[0]: an output needs a name"),
    "output twice": (lambda d: d.update(outputs=["a", "a"]), "outputs[1]: 'a' is named twice"),
    "output is input": (lambda d: d.update(outputs=["image"]), "outputs[0]: 'image' is the name of an input too"),
    # export
    "dynamo 17": (lambda d: d.update(export={"opset": 17}), "export.opset: the dynamo exporter writes opset 18 and later, found 17: raise it, or set export.exporter to torchscript"),
    "dynamo 23": (lambda d: d.update(export={"opset": 23}), "export.opset: 23 is later than the onnx package checks (allowed: 11 to 22)"),
    "torchscript 23": (lambda d: d.update(export={"opset": 23, "exporter": "torchscript"}), "export.opset: 23 is later than the onnx package checks (allowed: 11 to 22)"),
    "onnx 23": (lambda d: onnx(d, opset=23), "export.opset: 23 is later than the onnx package checks (allowed: 11 to 22)"),
    # paths
    "absolute model": (lambda d: d["source"].update(model="/opt/m.py:build"), "source.model: '/opt/m.py:build' is absolute, and so true on one machine only; write it relative to the recipe"),
    "home": (lambda d: d["source"].update(weights={"file": "~/w.pt"}), "source.weights.file: '~/w.pt' is absolute, and so true on one machine only; write it relative to the recipe"),
    "drive": (lambda d: d["source"].update(weights={"file": "C:\\w.pt"}), "source.weights.file: 'C:\\\\w.pt' is absolute"),
    "backslash": (lambda d: d["source"].update(weights={"file": "a\\w.pt"}), "source.weights.file: 'a\\\\w.pt' has backslashes; write / between folders"),
    "https": (lambda d: d["source"].update(weights={"file": "https://x/w.pt"}), "source.weights.file: 'https://x/w.pt' cannot be fetched (allowed: a path relative to the recipe, s3://bucket/key)"),
    "s3 without key": (lambda d: onnx(d) or d["source"].update(model={"file": "s3://b/", "sha256": "0" * 64}), "source.model.file: 's3://b/' cannot be fetched"),
    "absolute include": (lambda d: d["source"].update(include=["ok/*.txt", "/etc/*"]), "source.include[1]: '/etc/*' is absolute"),
    "remote data": (lambda d: d["precision"]["calibration"].update(data="s3://b/c.npz"), "precision.calibration.data: 's3://b/c.npz' is an address; this is read from a file beside the recipe"),
    "absolute metric": (lambda d: d["acceptance"]["metric"].update(name="/m.py:score"), "acceptance.metric.name: '/m.py:score' is absolute"),
    "absolute data include": (lambda d: d["precision"].update(calibration={"data": "d.py:load", "include": ["/x"]}), "precision.calibration.include[0]: '/x' is absolute"),
    # precision
    "int8 without data": (lambda d: d["precision"].pop("calibration"), "precision.build: int8 needs precision.calibration: data that its ranges are found on"),
    "auto beside others": (lambda d: d["precision"].update(build=["auto", "fp16"], fallback={}), "precision.build: auto stands alone: what it tries goes under precision.candidates"),
    "auto of a target beside others": (lambda d: d["targets"][1].update(precision=["fp32", "auto"]), "targets[1].precision: auto stands alone"),
    "candidates of nothing": (lambda d: d["precision"].update(candidates=["fp16"]), "precision.candidates: has no effect: no target asks for the precision auto"),
    "budget of nothing": (lambda d: d["precision"].update(budget="5m"), "precision.budget: has no effect: no target asks for the precision auto"),
    "candidate of no target": (lambda d: d["targets"][1].update(precision=["auto"]) or d["precision"].update(candidates=["fp32", "bf16"]), "precision.candidates[1]: no target that asks for auto can be built in bf16"),
    "levels of onnxruntime": (lambda d: d["targets"][1].update(precision=["auto"]) or d["precision"].update(optimization_levels=[3, 5]), "precision.optimization_levels: has no effect: ONNX Runtime has no such levels"),
    "auto without a candidate": (lambda d: d.update(targets=[{"runtime": "tensorrt-rtx", "gpus": ["sm75"], "precision": ["auto"]}]) or d["precision"].update(candidates=["int8"], fallback={}), "targets[0].gpus[0]: auto has no candidate for sm75: TensorRT-RTX does not compile int8 for sm75 (Turing); allowed: fp16"),
    "int8 candidate without data": (lambda d: (d["targets"].pop(0) and d["targets"][0].update(precision=["auto"])) or d["precision"].update(candidates=["int8"], build=["fp16"], fallback={}, calibration=None), "targets: int8 needs precision.calibration: data that its ranges are found on"),
    "int8-fp16 without data": (lambda d: d["precision"].update(build=["int8-fp16"], fallback={}, calibration=None) or d["targets"].pop(), "precision.build: int8-fp16 needs precision.calibration: data that its ranges are found on"),
    "int8 of a target": (lambda d: d["precision"].update(build=["fp16"], fallback={}, calibration=None), "targets: int8 needs precision.calibration: data that its ranges are found on"),
    "fallback to itself": (lambda d: d["precision"].update(fallback={"fp16": ["fp16"]}), "precision.fallback.fp16[0]: fp16 is in this chain already"),
    "fallback twice": (lambda d: d["precision"].update(fallback={"int8": ["fp16", "fp16"]}), "precision.fallback.int8[1]: fp16 is in this chain already"),
    "fallback downwards": (lambda d: d["precision"].update(fallback={"fp16": ["int8"]}), "precision.fallback.fp16[0]: int8 is lower than fp16; a fallback leads to a higher precision"),
    "chain downwards": (lambda d: d["precision"].update(fallback={"int8": ["fp32", "fp16"]}), "precision.fallback.int8[1]: fp16 is lower than fp32; a fallback leads to a higher precision"),
    "fallback of nothing": (lambda d: d["precision"].update(fallback={"bf16": ["fp32"]}), "precision.fallback.bf16: no target is built in bf16, so this never applies (built: int8, fp16, fp32)"),
    "empty fallback": (lambda d: d["precision"].update(fallback={"int8": []}), "precision.fallback.int8: expected at least one precision; leave the key out where nothing may take its place"),
    "fallback nowhere": (lambda d: d.update(targets=[{"runtime": "onnxruntime", "precision": ["int8"]}], precision=d["precision"] | {"fallback": {"int8": ["bf16"]}}), "precision.fallback.int8[0]: no target can be built in bf16"),
    "empty keep": (lambda d: d["precision"].update(keep=["/a/*", ""]), "precision.keep[1]: an empty glob matches no node"),
    "auto of halves": (lambda d: d["precision"].update(build=["fp16"], fallback={}, keep="auto") or d["targets"][1].update(precision=["fp32"]), "precision.keep: auto has no effect: it chooses for int8 and fp8 (built: fp16, fp32)"),
    "auto of the calibrator": (lambda d: [target(d, version="8.6.1.6", precision=["int8"]), d.update(export={"opset": 17, "exporter": "torchscript"}), d["precision"].update(int8="calibrator", keep="auto")], "precision.keep: auto measures ranges in the graph: leave precision.int8 at qdq"),
    "keep of nothing": (lambda d: d.update(precision={"build": ["fp32"], "keep": ["/a/*"]}, targets=[{"runtime": "onnxruntime"}]), "precision.keep: has no effect: everything is built in fp32, and so stays fp32"),
    "int8 at 12": (lambda d: d.update(export={"opset": 12, "exporter": "torchscript"}), "export.opset: int8 needs opset 13 or later (scales for each channel), found 12"),
    # data
    "percentile unused": (lambda d: d["precision"]["calibration"].update(percentile=99.0), "precision.calibration.percentile: has no effect with method entropy; set method to percentile"),
    "gate on calibration data": (lambda d: d["acceptance"]["metric"].update(data={"data": "./data/calibration.npz"}), "acceptance.metric.data.data: is the calibration data too: the gate must be held out"),
    "gate on the same callable": (lambda d: [d["precision"].update(calibration={"data": "d.py:load"}), d["acceptance"]["metric"].update(data={"data": "d.py:load"})], "acceptance.metric.data.data: is the calibration data too: the gate must be held out"),
    "gate inside": (lambda d: [d["precision"].update(calibration={"data": "samples"}), d["acceptance"]["metric"].update(data={"data": "samples/test"})], "acceptance.metric.data.data: overlaps the calibration data (samples): the gate must be held out"),
    "unknown field": (lambda d: d["precision"]["calibration"].update(fields={"imag": "x"}), "precision.calibration.fields.imag: no such input (did you mean 'image'? allowed: image)"),
    "arguments of a file": (lambda d: d["precision"]["calibration"].update(arguments={"split": "x"}), "precision.calibration.arguments: is for a Python callable (file.py:callable), and data is 'data/calibration.npz'"),
    "include of a file": (lambda d: d["precision"]["calibration"].update(include=["x"]), "precision.calibration.include: is for a Python callable"),
    "digest of a callable": (lambda d: d["precision"].update(calibration={"data": "d.py:load", "sha256": "0" * 64}), "precision.calibration.sha256: is for a single file; a callable's code is digested with what it imports"),
    "images of a file": (lambda d: d["precision"]["calibration"].update(images={"size": [8, 8]}), "precision.calibration.images: is for a folder of images, and data is 'data/calibration.npz'"),
    "images of a callable": (lambda d: images(d) or d["precision"]["calibration"].update(data="d.py:load"), "precision.calibration.images: is for a folder of images, and data is 'd.py:load'"),
    "mean": (lambda d: images(d, mean=[0.5, 0.5, 0.5]), "precision.calibration.images.mean: expected 1 or 1 numbers (gray), found 3"),
    "std zero": (lambda d: images(d, std=[0.0]), "precision.calibration.images.std: must be greater than 0"),
    "images input": (lambda d: images(d, input="imag"), "precision.calibration.images.input: no such input (did you mean 'image'? allowed: image)"),
    "images channels": (lambda d: images(d, color="rgb"), "precision.calibration.images: images become [N, 3, 16, 8] float32, image is [batch, 1, height, 8] float32"),
    "images size": (lambda d: images(d, size=[16, 16]), "precision.calibration.images: images become [N, 1, 16, 16] float32, image is [batch, 1, height, 8] float32"),
    "images type": (lambda d: images(d) or d["inputs"]["image"].update(dtype="uint8"), "precision.calibration.images: images become [N, 1, 16, 8] float32, image is [batch, 1, height, 8] uint8"),
    "images rank": (lambda d: images(d) or d["inputs"]["image"].update(shape=["batch", "height"]), "precision.calibration.images: images become [N, 1, 16, 8] float32, image is [batch, height] float32"),
    "images of two inputs": (lambda d: images(d) or d["inputs"].update(mask={"shape": ["batch"]}), "precision.calibration.images: a folder of images fills one input, and the model has 2: use .npz files or a callable"),
    # acceptance
    "parity of nothing": (lambda d: d["acceptance"].update(parity={"bf16": {"cosine": 0.9}}), "acceptance.parity.bf16: nothing is built in bf16 (built: int8, fp16, fp32)"),
    "parity without bounds": (lambda d: d["acceptance"].update(parity={"fp16": {}}), "acceptance.parity.fp16: states no bound, so anything would pass (allowed: relative_l2, max_abs, cosine)"),
    "metric name": (lambda d: d["acceptance"]["metric"].update(name="topl"), "acceptance.metric.name: unknown metric 'topl' (did you mean 'top1'? allowed: top1, exact-match, cer, map, file.py:callable)"),
    "metric output": (lambda d: d["acceptance"]["metric"].update(output="logit"), "acceptance.metric.output: no such output (did you mean 'logits'? allowed: logits)"),
    "map of logits": (lambda d: d["acceptance"]["metric"].update(name="map"), "acceptance.metric.name: map judges outputs named boxes, scores and classes; missing here: boxes, scores"),
    "map of one output": (lambda d: [d.update(outputs=["boxes", "scores"]), d["acceptance"]["metric"].update(name="map", output="boxes")], "acceptance.metric.output: map judges the outputs boxes, scores and classes together: leave it out"),
    "metric labels": (lambda d: d["acceptance"]["metric"].update(labels="image"), "acceptance.metric.labels: 'image' is the name of an input"),
    "floor of errors": (lambda d: d["acceptance"]["metric"].update(name="cer", floor=0.1), "acceptance.metric.floor: cer is good where it is low: state ceiling, the greatest value that is acceptable"),
    "ceiling of a share": (lambda d: d["acceptance"]["metric"].update(ceiling=0.1), "acceptance.metric.ceiling: top1 is good where it is high: state floor, or better: lower"),
    "errors that are good": (lambda d: (d["acceptance"]["metric"].pop("floor"), d["acceptance"]["metric"].update(name="cer", ceiling=1.0, better="higher")), "acceptance.metric.better: cer is good where it is low: leave it out"),
    "metric without bounds": (lambda d: d["acceptance"]["metric"].pop("floor"), "acceptance.metric: states neither floor nor max_drop, so anything would pass"),
    "percent": (lambda d: d["acceptance"]["metric"].update(floor=97.0), "acceptance.metric.floor: top1 is a fraction between 0 and 1, found 97; write 0.97"),
    "drop in points": (lambda d: d["acceptance"]["metric"].update(max_drop=1.0), "acceptance.metric.max_drop: a drop of 1 is all there is, so anything would pass; one point is 0.01"),
    "drop of 2": (lambda d: d["acceptance"]["metric"].update(max_drop=2.0), "acceptance.metric.max_drop: top1 is a fraction between 0 and 1, found 2; write 0.02"),
    "negative floor": (lambda d: d["acceptance"]["metric"].update(floor=-1.0), "acceptance.metric.floor: top1 is a fraction between 0 and 1, found -1"),
    # benchmark
    "torch of onnx": (lambda d: onnx(d) or d.update(benchmark={"compare": ["onnxruntime", "torch-compile"]}), "benchmark.compare[1]: torch-compile needs a torch source, and this one is onnx"),
    "batch outside": (lambda d: d.update(benchmark={"batches": [1, 512]}), "benchmark.batches[1]: no profile admits batch 512 (they span 1 to 4, 1 to 256)"),
    "no batch axis": (lambda d: static(d) or d.update(benchmark={"batches": [1]}), "benchmark.batches: the inputs share no dynamic axis that they begin with, so there is no batch to change: leave it out"),
    # targets
    "gpu missing": (lambda d: d["targets"][0].pop("gpus"), "targets[0]: gpus is required for tensorrt-rtx, and missing (allowed: sm75, sm80, sm86, sm89, sm120, sm121)"),
    "gpu unknown": (lambda d: d["targets"][0].update(gpus=["sm88"]), "targets[0].gpus[0]: tensorrt-rtx does not build for 'sm88' (did you mean 'sm"),
    "card": (lambda d: d["targets"][0].update(gpus=["A100"]), "targets[0].gpus[0]: tensorrt-rtx does not build for 'A100' (did you mean 'sm80'? allowed:"),
    "card with maker": (lambda d: d["targets"][0].update(gpus=["NVIDIA GeForce RTX 4090"]), "(did you mean 'sm89'? allowed:"),
    "capability": (lambda d: d["targets"][0].update(gpus=["8.6"]), "targets[0].gpus[0]: tensorrt-rtx does not build for '8.6' (did you mean 'sm86'? allowed:"),
    "underscore": (lambda d: d["targets"][0].update(gpus=["sm_120"]), "targets[0].gpus[0]: tensorrt-rtx does not build for 'sm_120' (did you mean 'sm120'? allowed:"),
    "hopper": (lambda d: d["targets"][0].update(gpus=["H100"]), "targets[0].gpus[0]: tensorrt-rtx does not build for 'H100' (sm90 takes runtime: tensorrt; allowed:"),
    "gpu of onnxruntime": (lambda d: d["targets"][1].update(gpus=["cuda"]), "targets[1].gpus[0]: onnxruntime does not build for 'cuda' (allowed: cpu)"),
    "gpu twice": (lambda d: d["targets"][0].update(gpus=["sm89", "sm89"]), "targets[0].gpus[1]: tensorrt-rtx for sm89 is asked for above already"),
    "target twice": (lambda d: d["targets"].append({"runtime": "tensorrt-rtx", "gpus": ["sm120", "sm89"]}), "targets[2].gpus[1]: tensorrt-rtx for sm89 is asked for by targets[0] already"),
    "precision of a runtime": (lambda d: d["targets"][1].update(precision=["fp32", "bf16"]), "targets[1].precision[1]: onnxruntime has no precision bf16 (allowed: fp32, fp16, int8, int8-fp16, int8-dynamic)"),
    "precision by default": (lambda d: d["precision"].update(build=["bf16", "int8"]) or d["targets"][1].pop("precision"), "targets[1]: onnxruntime has no precision bf16 (allowed: fp32, fp16, int8, int8-fp16, int8-dynamic), and precision.build asks for it: state this target's own precision"),
    "precision twice": (lambda d: d["targets"][1].update(precision=["fp32", "fp32"]), "targets[1].precision[1]: fp32 is named twice"),
    "turing fp32": (lambda d: d["targets"].append({"runtime": "tensorrt-rtx", "gpus": ["sm75"], "precision": ["fp16", "fp32"]}), "targets[2].precision[1]: TensorRT-RTX does not compile fp32 for sm75 (Turing); allowed: fp16"),
    "turing int8": (lambda d: d["targets"][0].update(gpus=["sm75"]), "targets[0]: TensorRT-RTX does not compile int8 for sm75 (Turing); allowed: fp16, and precision.build asks for it"),
    "turing tf32": (lambda d: target(d, gpus=["sm75"], precision=["tf32"]), "targets[0].precision[0]: sm75 (Turing) has no tf32; it begins with sm80"),
    "bf16 of 8.6": (lambda d: target(d, version="8.6.0", precision=["bf16"]), "targets[0].precision[0]: TensorRT 8.6.0 has no bf16; it begins with TensorRT 10"),
    "blackwell of 8.6": (lambda d: target(d, version="8.6.0", gpus=["sm120"]), "targets[0].gpus[0]: TensorRT 8.6.0 is older than sm120; it needs TensorRT 10"),
    "part of a version": (lambda d: target(d, version="10.9"), "targets[0].version: '10.9' is not a full version, such as 10.16.1.11"),
    "no version": (lambda d: target(d, version="latest"), "targets[0].version: 'latest' is not a full version"),
    "opset of 8.6": (lambda d: target(d, version="8.6.1.6"), "targets[0]: TensorRT 8.6.1.6 reads ONNX up to opset 17, the graph gets 18: set export.opset to 17 and export.exporter to torchscript"),
    "default opset of 8.6": (lambda d: target(d, version="8.6.1.6") or d.pop("export"), "targets[0]: TensorRT 8.6.1.6 reads ONNX up to opset 17, the graph gets 18: set"),
    "opset of 10.0": (lambda d: target(d, version="10.0.1.6") or onnx(d, opset=21), "targets[0]: TensorRT 10.0.1.6 reads ONNX up to opset 20, the graph gets 21: set export.opset to 20"),
    "compatibility of rtx": (lambda d: d.update(build={"hardware_compatibility": "ampere+"}), "build.hardware_compatibility: TensorRT-RTX has no hardware compatibility; its engines name their GPUs (allowed: none)"),
    "version compatibility of rtx": (lambda d: d.update(build={"version_compatible": True}), "build.version_compatible: TensorRT-RTX cannot build version-compatible engines; leave it out"),
    "ampere+ with turing": (lambda d: target(d, gpus=["sm75"]) or d.update(build={"hardware_compatibility": "ampere+"}), "build.hardware_compatibility: ampere+ leaves out sm75 (Turing), which is a target"),
    "same capability before 10.9": (lambda d: target(d, version="10.8.0.43") or d.update(build={"hardware_compatibility": "same-compute-capability"}), "build.hardware_compatibility: same-compute-capability begins with TensorRT 10.9, and a target asks for 10.8.0.43"),
    "stripped before 10": (lambda d: [target(d, version="8.6.1.6"), d.update(export={"opset": 17, "exporter": "torchscript"}, build={"refit": "stripped"})], "build.refit: stripped plans begin with TensorRT 10.0, and a target asks for 8.6.1.6 (allowed: none, weights)"),
    "refit of lean plans of 8.6": (lambda d: [target(d, version="8.6.1.6"), d.update(export={"opset": 17, "exporter": "torchscript"}, build={"refit": "weights", "version_compatible": True})], "build.refit: TensorRT 8.6 does not refit version-compatible plans, and a target asks for 8.6.1.6: leave one of the two out"),
    "refit of a DLA of 8.6": (lambda d: [target(d, version="8.6.1.6", gpus=["sm87"], precision=["fp16"]), d.update(export={"opset": 17, "exporter": "torchscript"}, build={"refit": "weights", "dla": {"core": 0}})], "build.refit: TensorRT 8.6 does not refit what runs on the DLA, and a target asks for 8.6.1.6: leave one of the two out"),
    "weak on 11": (lambda d: [target(d, version="11.4.0.106"), d.update(build={"typing": "weak"})], "build.typing: weak typing ended with TensorRT 10, and a target asks for 11.4.0.106 (allowed: strong)"),
    "weak on RTX": (lambda d: d.update(build={"typing": "weak"}), "build.typing: TensorRT-RTX knows strongly typed networks only (weak: TensorRT 8.6, or 10)"),
    "weak with native io": (lambda d: [target(d, build={"typing": "weak"}), d["precision"].update(io="native")], "precision.io: native is the typed graph's own type, and build.typing: weak compiles the fp32 graph"),
    "cublas on 11": (lambda d: [target(d, version="11.4.0.106"), d.update(build={"tactic_sources": ["jit-convolutions", "cublas"]})], "build.tactic_sources: cublas ended with TensorRT 10, and a target asks for 11.4.0.106"),
    "tactics of RTX": (lambda d: d.update(build={"tactic_sources": []}), "build.tactic_sources: TensorRT-RTX times no tactics when it builds; state it for the targets of the runtime tensorrt, under targets[].build"),
    "own options of RTX": (lambda d: d["targets"][0].update(build={"sparsity": True}), "targets[0].build.sparsity: TensorRT-RTX chooses kernels on the user's GPU"),
    "options of onnxruntime": (lambda d: d["targets"][1].update(build={"workspace": "1GiB"}), "targets[1].build: has no effect: ONNX Runtime takes none of these options"),
    "timing cache for RTX": (lambda d: d["targets"][0].update(build={"timing_cache": PIN}), "targets[0].build.timing_cache: TensorRT-RTX times no tactics when it builds"),
    "reproducible RTX": (lambda d: d["targets"][0].update(build={"reproducible": True}), "targets[0].build.reproducible: TensorRT-RTX chooses kernels on the user's GPU"),
    "layers of RTX": (lambda d: d["targets"][0].update(build={"layers": PIN}), "targets[0].build.layers: TensorRT-RTX's plans are listed on the user's GPU only"),
    "timing cache at level 0": (lambda d: target(d, build={"timing_cache": PIN, "optimization_level": 0}), "targets[0].build.timing_cache: optimization_level 0 takes no timing cache"),
    "reproducible at level 0": (lambda d: target(d, build={"reproducible": True, "optimization_level": 0}), "targets[0].build.reproducible: optimization_level 0 takes no timing cache"),
    "timing cache of several": (lambda d: [target(d, gpus=["sm89", "sm90"]), d.update(build={"timing_cache": PIN})], "build.timing_cache: is of one kind of GPU, and the target is for sm89, sm90: state one"),
    "replay of several": (lambda d: target(d, precision=["fp16", "fp32"], build={"timing_cache": PIN, "reproducible": True}), "targets[0].build.timing_cache: is of one engine, and the target is built in fp16, fp32: state one in targets[].precision"),
    "layers of several": (lambda d: target(d, precision=["fp16", "fp32"], build={"layers": PIN}), "targets[0].build.layers: is of one engine"),
    "nothing compared": (lambda d: [target(d, version="10.7.0.23", build={"timing_cache": PIN, "reproducible": True})], "targets[0].build.reproducible: timing caches whose table of tactics can be compared begin with TensorRT 10.8, and a target asks for 10.7.0.23: state build.layers"),
    "absolute pin": (lambda d: target(d, build={"timing_cache": PIN | {"file": "/x"}}), "targets[0].build.timing_cache.file: '/x' is absolute"),
    "sparsity on turing": (lambda d: target(d, gpus=["sm75"], build={"sparsity": True}), "targets[0].build.sparsity: sm75 (Turing) has no kernels for sparse weights; they begin with sm80"),
    "streaming on 8.6": (lambda d: [target(d, version="8.6.1.6"), d.update(export={"opset": 17, "exporter": "torchscript"}, build={"weight_streaming": True})], "build.weight_streaming: weight streaming begins with TensorRT 10.0, and a target asks for 8.6.1.6"),
    "weak streaming": (lambda d: [target(d), d.update(build={"weight_streaming": True, "typing": "weak"})], "build.weight_streaming: weight streaming takes strongly typed networks: leave build.typing at strong"),
    "dla in a data centre": (lambda d: [target(d), d.update(build={"dla": {}})], "build.dla: sm89 has no DLA (allowed: sm87, which is Orin)"),
    "dla between": (lambda d: [target(d, gpus=["sm87"], version="10.16.1.11"), d.update(build={"dla": {}})], "build.dla: DLA is there up to TensorRT 10.7 and from 11.4.1, and a target asks for 10.16.1.11"),
    "calibrator of RTX": (lambda d: d["precision"].update(int8="calibrator"), "precision.int8: tensorrt-rtx has no int8 calibrator (TensorRT 8.6, or 10 with build.typing: weak): leave precision.int8 at qdq, or state other precisions"),
    "calibrator of 11": (lambda d: [target(d, version="11.4.0.106", precision=["int8"]), d["precision"].update(int8="calibrator")], "precision.int8: TensorRT 11.4.0.106 has no calibrators"),
    "calibrator of strong 10": (lambda d: [target(d, version="10.16.1.11", precision=["int8"]), d["precision"].update(int8="calibrator")], "precision.int8: TensorRT 10.16.1.11 calibrates weakly typed networks only: set build.typing to weak"),
    "calibrator of nothing": (lambda d: [target(d), d["precision"].update(build=["fp16"], int8="calibrator")], "precision.int8: has no effect: nothing is built in int8 (built: fp16)"),
    "calibrator of percentiles": (lambda d: [target(d, precision=["int8"]), d["precision"].update(int8="calibrator"), d["precision"]["calibration"].update(method="percentile")], "precision.calibration.method: TensorRT has calibrators for entropy and minmax, none for percentile"),
    "plugin twice": (lambda d: [target(d), d.update(build={"plugins": [{"file": "a.so", "sha256": "0" * 64}, {"file": "b.so", "sha256": "0" * 64}]})], "build.plugins[1].sha256: the same library is named twice"),
    "plugin elsewhere": (lambda d: target(d, build={"plugins": [{"file": "/opt/a.so", "sha256": "0" * 64}]}), "targets[0].build.plugins[0].file: '/opt/a.so' is absolute"),
    "plugins of RTX": (lambda d: d.update(build={"plugins": [{"file": "a.so", "sha256": "0" * 64}]}), "build.plugins: TensorRT-RTX has no plugin layers"),
    "refit of nothing": (lambda d: d.update(build={"refit": "weights"}), "build.refit: has no effect: only engines of the runtime tensorrt can be refitted, and no target is of it"),
    # publish
    "store": (lambda d: d.update(publish={"to": "gs://bucket"}), "publish.to: 'gs://bucket' is no store (allowed: a folder, s3://bucket/prefix)"),
    "empty store": (lambda d: d.update(publish={"to": " "}), "publish.to: ' ' is no store (allowed: a folder, s3://bucket/prefix)"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_rule_is_told_at_its_path(tmp_path, name):
    change, message = BROKEN[name]
    faults = found(tmp_path, change)
    assert any(message in fault and fault.index(message) in (0, fault.find("(did")) for fault in faults), faults


FINE = {
    "static shapes": static,
    "constant integer input": lambda d: d["inputs"]["image"].update(dtype="int64", low=1.0, high=1.0),
    "torchscript 13": lambda d: d.update(export={"opset": 13, "exporter": "torchscript"}),
    "onnx without outputs": lambda d: onnx(d) or d.pop("outputs"),
    "onnx at 13": lambda d: onnx(d, opset=13),
    "fp16 to bf16 to fp32": lambda d: d.update(targets=d["targets"][:1], precision=d["precision"] | {"build": ["fp16"], "fallback": {"fp16": ["bf16", "fp32"]}}),
    "same callable, other arguments": lambda d: [
        d["precision"].update(calibration={"data": "d.py:load", "arguments": {"split": "train"}}),
        d["acceptance"]["metric"].update(data={"data": "d.py:load", "arguments": {"split": "test"}}),
    ],
    "neighbouring folders": lambda d: [d["precision"].update(calibration={"data": "samples"}), d["acceptance"]["metric"].update(data={"data": "samples-test"})],
    "one axis of size 1 in one profile": lambda d: d["profiles"]["online"].update(batch=[1, 1, 1]),
    "images": images,
    "images of any height": lambda d: images(d, size=[32, 8], mean=[0.5], std=[0.5], input="image"),
    "own metric above 1": lambda d: d["acceptance"]["metric"].update(name="own.py:bleu", floor=30.0, max_drop=1.0),
    "labels among the fields": lambda d: d["acceptance"]["metric"]["data"].update(fields={"label": "y", "image": "x"}),
    "same GPU of two versions": lambda d: [target(d, version="10.16.1.11"), d["targets"].append({"runtime": "tensorrt", "gpus": ["sm89"], "precision": ["fp16"], "version": "11.4.0.106"})],
    "turing in fp16": lambda d: d["targets"].append({"runtime": "tensorrt-rtx", "gpus": ["sm75"], "precision": ["fp16"]}),
    "a fallback that one target has": lambda d: d["precision"].update(fallback={"int8": ["bf16", "fp32"]}),
    "8.6 at 17": lambda d: [target(d, version="8.6.1.6"), d.update(export={"opset": 17, "exporter": "torchscript"})],
    "8.6 on Hopper": lambda d: [target(d, version="8.6.0", gpus=["sm90"]), d.update(export={"opset": 17, "exporter": "torchscript"})],
    "same capability from 10.9": lambda d: [target(d, version="10.9.0.34"), d.update(build={"hardware_compatibility": "same-compute-capability"})],
    "a recording build": lambda d: target(d, precision=["fp16", "fp32"], gpus=["sm89", "sm90"], build={"reproducible": True}),
    "a replayed build": lambda d: target(d, version="10.16.1.11", build={"reproducible": True, "timing_cache": PIN}),
    "a replayed build of 10.7": lambda d: target(d, version="10.7.0.23", build={"reproducible": True, "timing_cache": PIN, "layers": PIN}),
    "a pinned cache of several precisions": lambda d: target(d, precision=["fp16", "fp32"], build={"timing_cache": PIN}),
    "own options of a target": lambda d: [target(d, build={"typing": "weak", "sparsity": True, "tactic_sources": ["cudnn"], "auxiliary_streams": 2, "device_class": "jetson"}), d["targets"].append({"runtime": "tensorrt-rtx", "gpus": ["sm89"], "precision": ["fp16"]})],
    "a target takes an option back": lambda d: [target(d, build={"weight_streaming": True}), d["targets"].append({"runtime": "tensorrt-rtx", "gpus": ["sm89"], "precision": ["fp16"], "build": {"sparsity": False}})],
    "dla on orin": lambda d: [target(d, gpus=["sm87"], version="8.6.1.6"), d.update(export={"opset": 17, "exporter": "torchscript"}, build={"dla": {"core": 1, "gpu_fallback": False}})],
    "calibrator of 8.6": lambda d: [target(d, version="8.6.1.6", precision=["int8"]), d["precision"].update(int8="calibrator"), d.update(export={"opset": 17, "exporter": "torchscript"})],
    "calibrator of weak 10": lambda d: [target(d, version="10.16.1.11", precision=["int8"], build={"typing": "weak"}), d["precision"].update(int8="calibrator")],
    "plugins": lambda d: target(d, build={"plugins": [{"file": "a.so", "sha256": "0" * 64}, {"file": "s3://bucket/b.so", "sha256": "1" * 64}]}),
    "refit where it can be": lambda d: [target(d), d["targets"].append({"runtime": "tensorrt-rtx", "gpus": ["sm89"], "precision": ["fp16"]}), d.update(build={"refit": "stripped"})],
    "publish to a folder": lambda d: d.update(publish={"to": "../engines"}),
    "publish to s3": lambda d: d.update(publish={"to": "s3://bucket/engines"}),
    "parity of a fallback": lambda d: d["acceptance"].update(parity={"fp32": {"max_abs": 1e-3}, "fp16": {"cosine": 0.9}}),
    "parity of fp32, which exported graphs are judged as": lambda d: [target(d), d["acceptance"].update(parity={"fp32": {"max_abs": 1e-3}})],
    "remote weights": lambda d: d["source"].update(weights={"file": "s3://b/w.pt", "sha256": "0" * 64}),
    "percentile": lambda d: d["precision"]["calibration"].update(method="percentile", percentile=99.9),
}  # fmt: skip


@pytest.mark.parametrize("name", FINE)
def test_what_is_meant_is_not_refused(tmp_path, name):
    assert found(tmp_path, FINE[name]) == []


def test_all_broken_rules_are_told_at_once(tmp_path):
    def change(d):
        d.pop("outputs")
        d["profiles"]["bulk"].update(batch=[8, 4, 16])
        d["targets"][0].update(gpus=["sm88", "T5"])

    assert len(found(tmp_path, change)) == 4


def test_every_combination_that_runtimes_offer_is_known():
    """What the schema offers is either built somewhere or refused with a reason."""
    for runtime, gpus in GPUS.items():
        for precision in PRECISIONS[runtime]:
            assert any(refusal(runtime, gpu, precision) is None for gpu in gpus)
    assert (
        refusal("onnxruntime", "cpu", "tf32")
        == "onnxruntime has no precision tf32 (allowed: fp32, fp16, int8, int8-fp16, int8-dynamic)"
    )
    assert refusal("tensorrt", "sm75", "fp32") is None
    assert refusal("tensorrt", "sm89", "bf16", "10.16.1.11") is None


@pytest.mark.parametrize("precision", ["fp8", "fp8-fp16"])
def test_fp8_begins_with_ada_and_tensorrt_10(precision):
    for gpu in ("sm89", "sm90", "sm120"):
        assert refusal("tensorrt", gpu, precision, "10.16.1.11") is None
    assert refusal("tensorrt-rtx", "sm121", precision) is None
    assert "sm86 has no fp8; it begins with sm89 (Ada), allowed: sm89, sm120, sm121" in str(
        refusal("tensorrt-rtx", "sm86", precision)
    )
    assert refusal("tensorrt", "sm89", precision, "8.6.1") == "TensorRT 8.6.1 has no fp8; it begins with TensorRT 10"
    assert "onnxruntime has no precision" in str(refusal("onnxruntime", "cpu", precision))
    assert "tensorrt has no precision int8-dynamic" in str(refusal("tensorrt", "sm90", "int8-dynamic"))


def test_opset_ceilings(tmp_path):
    def ceiling(**fields):
        asked = recipe(tmp_path, lambda d: target(d, **fields)).targets[0]
        return opset_ceiling(asked.runtime, asked.version)

    assert ceiling(version="8.6.0") == 17
    assert ceiling(version="10.1.0.27") == 20
    assert ceiling(version="10.16.1.11") is None
    assert ceiling() is None


@pytest.mark.parametrize(
    ("precision", "version", "typing", "refused"),
    [
        ("bf16", "10.1.0.27", "strong", True),
        ("bf16", "10.1.0.27", "weak", False),  # the compiler gets the fp32 graph
        ("bf16", "10.2.0.19", "strong", False),
        ("fp16", "10.1.0.27", "strong", False),
        ("int8-fp16", "10.1.0.27", "strong", False),  # opset 19 of 20
    ],
)
def test_a_typed_graph_whose_opset_a_version_does_not_read_is_told_before_anything_runs(
    tmp_path, precision, version, typing, refused
):
    def change(d):
        target(d, version=version, precision=[precision], build={"typing": typing})

    said = "TensorRT 10.1.0.27 reads ONNX up to opset 20, and a graph in bf16 has opset 22 or later"
    faults = [fault for fault in found(tmp_path, change) if "a graph in" in fault]
    assert faults == ([f"targets[0].precision[0]: {said}"] if refused else [])
