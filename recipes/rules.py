"""Rules over several values of a recipe whose shape is right: pure, all broken ones at once."""

from __future__ import annotations

import math
import posixpath
from collections.abc import Callable, Iterator
from typing import Final

from recipes.choosing import candidates_of
from recipes.includes import is_code_reference
from recipes.nodes import Key, near
from recipes.options import PINS, options_of, place_of, stated_pins, stated_plugins
from recipes.parts import check_parts, part_recipe, place_in, place_in_whole, whole_recipe
from recipes.schema import (
    EXACTNESS,
    GPUS,
    PRECISIONS,
    QUANTIZED,
    Asked,
    Calibration,
    Dataset,
    OnnxSource,
    PaddleSource,
    Precision,
    Recipe,
    Tensor,
    TorchSource,
    size_bytes,
)
from recipes.shapes import batch_axis, tensor_shape
from recipes.targets import check_targets, refusal

Found = Iterator[tuple[Key, str]]

METRICS: Final = ("top1", "exact-match", "cer", "map")

# Facts: toolchain.md section 1. dynamo silently stays at 18 below it; opset 22 is the last that onnx 1.17 checks, and
# the graphs of both exporters at 23 were refused by it.
DYNAMO_FLOOR: Final = 18
OPSET_CEILING: Final = 22
# paddle2onnx 2.1.0 aborts its process at 22 ("The Opset Version must be between 7 and 21").
PADDLE_OPSET_CEILING: Final = 21
# QuantizeLinear has an axis from there on.
INT8_FLOOR: Final = 13

_INTEGERS: Final = {
    "int64": (-(1 << 63), (1 << 63) - 1), "int32": (-(1 << 31), (1 << 31) - 1),
    "uint8": (0, 255), "int8": (-128, 127), "bool": (0, 1),
}  # fmt: skip


_BYTES: Final = {"float32": 4, "float16": 2, "int64": 8, "int32": 4, "uint8": 1, "int8": 1, "bool": 1}


def check(recipe: Recipe) -> list[tuple[Key, str]]:
    """Return every broken rule as (path, message), in the order of the schema."""
    rules: tuple[Callable[[Recipe], Found], ...] = (
        _source, _export, _inputs, _outputs, _profiles, _extents, _precision, _calibration, _acceptance, _benchmark, check_targets, _plugins, _pins,
        _publish,
    )  # fmt: skip
    if not recipe.parts:
        found = [found for rule in rules for found in rule(recipe)]
        if recipe.acceptance.together is not None:
            found.append((("acceptance", "together"), "is for a model in parts: state acceptance.metric"))
        return found
    found = list(check_parts(recipe))
    whole = whole_recipe(recipe)
    if whole is not None and recipe.acceptance.together is not None:
        found += [(place_in_whole(at), what) for rule in (_inputs, _acceptance) for at, what in rule(whole)]
        found += _path(("acceptance", "together", "run"), recipe.acceptance.together.run)
    if not any("auto" in what for _at, what in found):
        for name in recipe.parts:
            own = part_recipe(recipe, name)
            found += [(place_in(recipe, name, at), what) for rule in rules for at, what in rule(own)]
    return list(dict.fromkeys(found))


def asked_precisions(recipe: Recipe) -> tuple[Precision, ...]:
    """Return every precision that some target asks for, before any fallback; for `auto` those that it tries."""
    asked = [
        precision
        for target in recipe.targets
        for word in target.precision or recipe.precision.build
        for precision in (candidates_of(recipe, target) if word == "auto" else (word,))
    ]
    return tuple(dict.fromkeys(asked))


def path_fault(path: str, *, remote: bool = False) -> str | None:
    """Say what is wrong with the spelling of a path, or None."""
    if "://" in path:
        if not remote:
            return f"{path!r} is an address; this is read from a file beside the recipe"
        scheme, _, rest = path.partition("://")
        bucket, _, key = rest.partition("/")
        if scheme != "s3" or not bucket or not key or key.endswith("/"):
            return f"{path!r} cannot be fetched (allowed: a path relative to the recipe, s3://bucket/key)"
        return None
    if path.startswith(("/", "~")) or path[1:3] in (":\\", ":/"):
        return f"{path!r} is absolute, and so true on one machine only; write it relative to the recipe"
    if "\\" in path:
        return f"{path!r} has backslashes; write / between folders"
    return None


def _source(recipe: Recipe) -> Found:
    source = recipe.source
    if isinstance(source, OnnxSource):
        yield from _path(("source", "model", "file"), source.model.file, remote=True)
        return
    if isinstance(source, PaddleSource):
        yield from _paddle(source)
    if source.model is not None:
        yield from _path(("source", "model"), source.model)
    if source.weights is not None:
        yield from _path(("source", "weights", "file"), source.weights.file, remote=True)
    for index, glob in enumerate(source.include):
        yield from _path(("source", "include", index), glob)


def _paddle(source: PaddleSource) -> Found:
    if source.graph is None:
        if source.model is None:
            yield ("source",), "paddle needs one of model (file.py:callable) and graph (a saved .json or .pdmodel)"
        if source.params is not None:
            yield ("source", "params"), "has no effect: it goes with graph; a callable's weights are source.weights"
        return
    if source.model is not None:
        yield ("source", "graph"), "a source has one of model and graph, and this one states both"
    for key in ("arguments", "weights", "include", "seed"):
        if key in source.model_fields_set:
            yield (
                ("source", key),
                "is for a callable (source.model); a saved graph has its own weights, in source.params",
            )
    if posixpath.splitext(source.graph.file)[1] not in (".json", ".pdmodel"):
        yield ("source", "graph", "file"), f"{source.graph.file} is no saved graph (allowed: .json, .pdmodel)"
    if source.graph.file.startswith("s3://") and source.params is None:
        yield ("source",), "params is required beside a remote graph, and missing"
    for key in ("graph", "params"):
        file = getattr(source, key)
        if file is not None:
            yield from _path(("source", key, "file"), file.file, remote=True)


def _path(at: Key, path: str, *, remote: bool = False) -> Found:
    fault = path_fault(path, remote=remote)
    if fault is not None:
        yield at, fault


def _export(recipe: Recipe) -> Found:
    opset, torch = recipe.export.opset, isinstance(recipe.source, TorchSource)
    if opset is None:
        return
    if opset > OPSET_CEILING:
        yield ("export", "opset"), f"{opset} is later than the onnx package checks (allowed: 11 to {OPSET_CEILING})"
    elif isinstance(recipe.source, PaddleSource) and opset > PADDLE_OPSET_CEILING:
        yield ("export", "opset"), f"paddle2onnx writes opset {PADDLE_OPSET_CEILING} at most, found {opset}: lower it"
    elif torch and recipe.export.exporter == "dynamo" and opset < DYNAMO_FLOOR:
        what = f"the dynamo exporter writes opset {DYNAMO_FLOOR} and later, found {opset}"
        yield ("export", "opset"), f"{what}: raise it, or set export.exporter to torchscript"


def _inputs(recipe: Recipe) -> Found:
    if not recipe.inputs:
        yield ("inputs",) if "inputs" in recipe.model_fields_set else (), "inputs is required, and missing"
    for name, tensor in recipe.inputs.items():
        at: Key = ("inputs", name)
        if not name.strip():
            yield at, "an input needs a name"
        yield from _bounds(at, tensor)


def _bounds(at: Key, tensor: Tensor) -> Found:
    whole = _INTEGERS.get(tensor.dtype)
    low = tensor.low if tensor.low is not None else (-1.0 if whole is None else 0.0)
    high = tensor.high if tensor.high is not None else 1.0
    limits = whole if whole is not None else (-65504, 65504) if tensor.dtype == "float16" else None
    for key, value in (("low", tensor.low), ("high", tensor.high)):
        if value is not None and whole is not None and value != int(value):
            yield (*at, key), f"{value:g} is not a whole number, and the input is {tensor.dtype}"
        elif value is not None and limits is not None and not limits[0] <= value <= limits[1]:
            yield (*at, key), f"{value:g} does not fit {tensor.dtype} (allowed: {limits[0]} to {limits[1]})"
    if low > high or (low == high and whole is None):
        stated = "low" if tensor.low is not None else "high"
        side = "" if tensor.low is not None and tensor.high is not None else " (a default)"
        yield (*at, stated), f"low {low:g} must be less than high {high:g}{side}"


def _outputs(recipe: Recipe) -> Found:
    outputs = recipe.outputs
    if outputs is None:
        if not isinstance(recipe.source, OnnxSource):
            yield (
                (),
                f"outputs is required for {recipe.source.framework}, and missing: the names of the outputs, in order",
            )
        return
    if not outputs:
        yield ("outputs",), "expected at least one name"
    for index, name in enumerate(outputs):
        if not name.strip():
            yield ("outputs", index), "an output needs a name"
        elif name in outputs[:index]:
            yield ("outputs", index), f"{name!r} is named twice"
        elif name in recipe.inputs:
            yield ("outputs", index), f"{name!r} is the name of an input too"


def _profiles(recipe: Recipe) -> Found:
    axes = recipe.axes
    if not axes:
        if recipe.profiles:
            yield ("profiles",), "no input has a dynamic axis: name one in a shape, or leave the profiles out"
        return
    if not recipe.profiles:
        yield (), f"profiles is required: [min, opt, max] of the dynamic axes {', '.join(axes)}"
    for name, ranges in recipe.profiles.items():
        at: Key = ("profiles", name)
        if not name.strip() or "/" in name:
            yield at, f"{name!r} cannot name a profile: it is empty, or has a '/' in it"
        missing = [axis for axis in axes if axis not in ranges]
        if missing:
            yield at, f"[min, opt, max] of {', '.join(missing)} missing (the inputs' dynamic axes: {', '.join(axes)})"
        for axis, (least, best, most) in ranges.items():
            if axis not in axes:
                yield (*at, axis), f"no input has an axis {axis!r} ({near(axis, axes)}allowed: {', '.join(axes)})"
            elif not least <= best <= most:
                yield (*at, axis), f"expected min <= opt <= max, found {[least, best, most]}"
    for axis in axes:
        tops = [ranges[axis][2] for ranges in recipe.profiles.values() if axis in ranges]
        if tops and max(tops) == 1:
            first = next(name for name, ranges in recipe.profiles.items() if axis in ranges)
            yield ("profiles", first, axis), f"{axis} is 1 in every profile: write 1 in the shape, or allow more"


def _extents(recipe: Recipe) -> Found:
    """Refuse inputs that no stage could hold: parity is measured at each profile's max, in a process of `build.memory`."""
    allowed = size_bytes(recipe.build.memory)
    for name, ranges in recipe.profiles.items() or [("", {})]:
        tops = {axis: most for axis, (_least, _best, most) in ranges.items()}
        shapes = {
            key: tensor_shape(tensor, tops)
            for key, tensor in recipe.inputs.items()
            if all(isinstance(axis, int) or axis in tops for axis in tensor.shape)
        }
        sizes = {key: math.prod(shape) * _BYTES[recipe.inputs[key].dtype] for key, shape in shapes.items()}
        if sum(sizes.values()) > allowed:
            largest = max(sizes, key=sizes.__getitem__)
            at: Key = ("profiles", name) if recipe.profiles else ("inputs", largest, "shape")
            where = f"{recipe.inputs[largest].dtype} {shapes[largest]}"
            what = f"the inputs at max take {sum(sizes.values()) / 2**30:,.0f} GiB ({largest}: {where})"
            yield at, f"{what}, and build.memory allows a stage {recipe.build.memory}: lower max, or raise it"


def _precision(recipe: Recipe) -> Found:
    plan = recipe.precision
    asked = asked_precisions(recipe)
    places = [(target, gpu) for target in recipe.targets for gpu in target.gpus if gpu in GPUS[target.runtime]]
    for precision, chain in plan.fallback.items():
        at: Key = ("precision", "fallback", precision)
        if precision not in asked:
            yield at, f"no target is built in {precision}, so this never applies (built: {', '.join(asked)})"
        if not chain:
            yield at, "expected at least one precision; leave the key out where nothing may take its place"
        for index, other in enumerate(chain):
            before = chain[index - 1] if index else precision
            if other == precision or other in chain[:index]:
                yield (*at, index), f"{other} is in this chain already"
            elif EXACTNESS[other] < EXACTNESS[before]:
                yield (*at, index), f"{other} is lower than {before}; a fallback leads to a higher precision"
            elif places and all(refusal(target.runtime, gpu, other, target.version) for target, gpu in places):
                yield (*at, index), f"no target can be built in {other}"
    yield from _auto(recipe)
    quantized = [precision for precision in asked if precision in QUANTIZED]
    if quantized and plan.calibration is None:
        at = ("precision", "build") if {*quantized, "auto"} & set(plan.build) else ("targets",)
        yield at, f"{quantized[0]} needs precision.calibration: data that its ranges are found on"
    if plan.int8 == "calibrator" and not quantized:
        yield ("precision", "int8"), f"has no effect: nothing is built in int8 (built: {', '.join(asked)})"
    if quantized and recipe.export.opset is not None and recipe.export.opset < INT8_FLOOR:
        what = f"int8 needs opset {INT8_FLOOR} or later (scales for each channel), found {recipe.export.opset}"
        yield ("export", "opset"), what
    lowered = {*asked, *(other for precision in asked for other in plan.fallback.get(precision, ()))} - {"fp32", "tf32"}
    if plan.keep and not lowered:
        yield ("precision", "keep"), f"has no effect: everything is built in {', '.join(asked)}, and so stays fp32"
    reachable = {*quantized, *(other for chain in plan.fallback.values() for other in chain if other in QUANTIZED)}
    if plan.keeps_auto and not reachable:
        yield ("precision", "keep"), f"auto has no effect: it chooses for int8 and fp8 (built: {', '.join(asked)})"
    if plan.keeps_auto and plan.int8 == "calibrator":
        yield ("precision", "keep"), "auto measures ranges in the graph: leave precision.int8 at qdq"
    for index, glob in enumerate(plan.keep):
        if not glob.strip():
            yield ("precision", "keep", index), "an empty glob matches no node"


def _auto(recipe: Recipe) -> Found:
    plan = recipe.precision
    places: list[tuple[Key, list[Asked]]] = [
        (("targets", index, "precision"), target.precision)
        for index, target in enumerate(recipe.targets)
        if target.precision is not None
    ]
    own = len(places) == len(recipe.targets)
    places += [] if own else [(("precision", "build"), plan.build)]
    for at, words in places:
        if "auto" in words and len(words) > 1:
            yield at, "auto stands alone: what it tries goes under precision.candidates"
    if not any("auto" in words for _at, words in places):
        for key in ("candidates", "optimization_levels", "budget"):
            if getattr(plan, key) is not None:
                yield ("precision", key), "has no effect: no target asks for the precision auto"
        return
    runtimes = {target.runtime for target in recipe.targets if "auto" in (target.precision or plan.build)}
    for index, precision in enumerate(plan.candidates or ()):
        if all(precision not in PRECISIONS[runtime] for runtime in runtimes):
            yield ("precision", "candidates", index), f"no target that asks for auto can be built in {precision}"
    if plan.optimization_levels is not None and runtimes == {"onnxruntime"}:
        yield ("precision", "optimization_levels"), "has no effect: ONNX Runtime has no such levels"


def _calibration(recipe: Recipe) -> Found:
    calibration = recipe.precision.calibration
    if calibration is None:
        return
    at: Key = ("precision", "calibration")
    yield from _dataset(at, calibration, recipe, None)
    if "percentile" in calibration.model_fields_set and calibration.method != "percentile":
        yield (*at, "percentile"), f"has no effect with method {calibration.method}; set method to percentile"
    if calibration.method == "percentile" and recipe.precision.int8 == "calibrator":
        what = "TensorRT has calibrators for entropy and minmax, none for percentile (or set precision.int8 to qdq)"
        yield (*at, "method"), what
    metric = recipe.acceptance.metric
    if metric is not None:
        yield from _held_out(calibration, metric.data)


def _held_out(calibration: Calibration, labelled: Dataset) -> Found:
    one, other = (posixpath.normpath(path) for path in (calibration.data, labelled.data))
    at: Key = ("acceptance", "metric", "data", "data")
    if one == other:
        if not is_code_reference(one) or calibration.arguments == labelled.arguments:
            yield at, "is the calibration data too: the gate must be held out"
    elif other.startswith(f"{one}/") or one.startswith(f"{other}/"):
        yield at, f"overlaps the calibration data ({calibration.data}): the gate must be held out"


def _dataset(at: Key, data: Dataset, recipe: Recipe, labels: str | None) -> Found:
    yield from _path((*at, "data"), data.data)
    code = is_code_reference(data.data)
    names = [*recipe.inputs, *([labels] if labels is not None else [])]
    for name in data.fields:
        if name not in names:
            yield (*at, "fields", name), f"no such input ({near(name, names)}allowed: {', '.join(names)})"
    if not code:
        for key in ("arguments", "include"):
            if getattr(data, key):
                yield (*at, key), f"is for a Python callable (file.py:callable), and data is {data.data!r}"
    elif data.sha256 is not None:
        yield (*at, "sha256"), "is for a single file; a callable's code is digested with what it imports"
    if data.images is not None:
        if code or posixpath.splitext(data.data)[1] in (".npz", ".npy"):
            yield (*at, "images"), f"is for a folder of images, and data is {data.data!r}"
        else:
            yield from _images((*at, "images"), data, recipe)
    for index, glob in enumerate(data.include):
        yield from _path((*at, "include", index), glob)


def _images(at: Key, data: Dataset, recipe: Recipe) -> Found:
    spec = data.images
    if spec is None:
        return
    channels = 1 if spec.color == "gray" else 3
    for key, values in (("mean", spec.mean), ("std", spec.std)):
        if len(values) not in (1, channels):
            yield (*at, key), f"expected 1 or {channels} numbers ({spec.color}), found {len(values)}"
        if key == "std" and any(value <= 0 for value in values):
            yield (*at, key), "must be greater than 0"
    names = list(recipe.inputs)
    if spec.input is not None and spec.input not in names:
        yield (*at, "input"), f"no such input ({near(spec.input, names)}allowed: {', '.join(names)})"
        return
    if len(names) > 1:
        yield at, f"a folder of images fills one input, and the model has {len(names)}: use .npz files or a callable"
        return
    tensor = recipe.inputs[names[0]]
    expected = [channels, *spec.size]
    fits = len(tensor.shape) == 4 and all(
        isinstance(axis, str) or axis == size for axis, size in zip(tensor.shape[1:], expected, strict=True)
    )
    if tensor.dtype != "float32" or not fits:
        shape = ", ".join(str(axis) for axis in tensor.shape)
        yield (
            at,
            f"images become [N, {channels}, {spec.size[0]}, {spec.size[1]}] float32, {names[0]} is [{shape}] {tensor.dtype}",
        )


def _acceptance(recipe: Recipe) -> Found:
    built = dict.fromkeys(asked_precisions(recipe))
    built |= {other: None for precision in list(built) for other in recipe.precision.fallback.get(precision, ())}
    built["fp32"] = None  # the exported and simplified graphs are judged as fp32, whatever is built
    for precision, parity in recipe.acceptance.parity.items():
        at: Key = ("acceptance", "parity", precision)
        if precision not in built:
            yield at, f"nothing is built in {precision} (built: {', '.join(built)})"
        if parity.relative_l2 is None and parity.max_abs is None and parity.cosine is None:
            yield at, "states no bound, so anything would pass (allowed: relative_l2, max_abs, cosine)"
    metric = recipe.acceptance.metric
    if metric is None:
        return
    at = ("acceptance", "metric")
    yield from _dataset((*at, "data"), metric.data, recipe, metric.labels)
    if is_code_reference(metric.name):
        yield from _path((*at, "name"), metric.name)
    elif metric.name not in METRICS:
        yield (
            (*at, "name"),
            f"unknown metric {metric.name!r} ({near(metric.name, METRICS)}allowed: {', '.join(METRICS)}, file.py:callable)",
        )
    elif metric.name != "cer":  # which exceeds 1 where more is read than there is
        yield from _fractions(at, metric.floor, metric.max_drop, metric.name)
    if metric.name in METRICS and metric.better is not None and metric.lower_is_better != (metric.name == "cer"):
        yield (
            (*at, "better"),
            f"{metric.name} is good where it is {'low' if metric.name == 'cer' else 'high'}: leave it out",
        )
    elif metric.lower_is_better and metric.floor is not None:
        yield (
            (*at, "floor"),
            f"{metric.name} is good where it is low: state ceiling, the greatest value that is acceptable",
        )
    elif not metric.lower_is_better and metric.ceiling is not None:
        yield (*at, "ceiling"), f"{metric.name} is good where it is high: state floor, or better: lower"
    if metric.floor is None and metric.max_drop is None and metric.ceiling is None:
        bound = "ceiling" if metric.lower_is_better else "floor"
        yield at, f"states neither {bound} nor max_drop, so anything would pass"
    if metric.labels in recipe.inputs:
        yield (*at, "labels"), f"{metric.labels!r} is the name of an input"
    outputs = recipe.outputs
    if metric.output is not None and outputs is not None and metric.output not in outputs:
        yield (*at, "output"), f"no such output ({near(metric.output, outputs)}allowed: {', '.join(outputs)})"
    elif metric.name == "map" and metric.output is not None:
        yield (*at, "output"), "map judges the outputs boxes, scores and classes together: leave it out"
    missing = [name for name in ("boxes", "scores") if metric.name == "map" and name not in (outputs or (name,))]
    if missing:
        yield (*at, "name"), f"map judges outputs named boxes, scores and classes; missing here: {', '.join(missing)}"


def _fractions(at: Key, floor: float | None, max_drop: float | None, name: str) -> Found:
    for key, value, top in (("floor", floor, 1.0), ("max_drop", max_drop, 1.0)):
        if value is not None and not 0 <= value <= top:
            hint = f"; write {value / 100:g}" if 1 < value <= 100 else ""
            yield (*at, key), f"{name} is a fraction between 0 and 1, found {value:g}{hint}"
        elif key == "max_drop" and value == top:
            yield (*at, key), "a drop of 1 is all there is, so anything would pass; one point is 0.01"


def _plugins(recipe: Recipe) -> Found:
    for at, plugins in stated_plugins(recipe):
        for index, plugin in enumerate(plugins):
            yield from _path((*at, index, "file"), plugin.file, remote=True)
            if plugin.sha256 in (other.sha256 for other in plugins[:index]):
                yield (*at, index, "sha256"), "the same library is named twice"


def _pins(recipe: Recipe) -> Found:
    for at, _option, pinned in stated_pins(recipe):
        yield from _path((*at, "file"), pinned.file, remote=True)
    for index, target in enumerate(recipe.targets):
        options = options_of(recipe, target)
        asked = target.precision or recipe.precision.build
        if target.runtime != "tensorrt":
            continue
        for option in PINS:
            if getattr(options, option) is None:
                continue
            at = place_of(recipe, index, option)
            if len(target.gpus) > 1:
                yield at, f"is of one kind of GPU, and the target is for {', '.join(target.gpus)}: state one"
            if len(asked) > 1 and (option == "layers" or options.reproducible):
                yield (
                    at,
                    f"is of one engine, and the target is built in {', '.join(asked)}: state one in targets[].precision",
                )


def _benchmark(recipe: Recipe) -> Found:
    asked = recipe.benchmark
    if asked is None:
        return
    if not isinstance(recipe.source, TorchSource):
        for index, name in enumerate(asked.compare):
            if name.startswith("torch"):
                yield (
                    ("benchmark", "compare", index),
                    f"{name} needs a torch source, and this one is {recipe.source.framework}",
                )
    if asked.batches is None:
        return
    axis = batch_axis(recipe)
    if axis is None:
        what = "the inputs share no dynamic axis that they begin with, so there is no batch to change: leave it out"
        yield ("benchmark", "batches"), what
        return
    ranges = [profile[axis] for profile in recipe.profiles.values() if axis in profile]
    for index, size in enumerate(asked.batches):
        if ranges and not any(low <= size <= high for low, _opt, high in ranges):
            spans = ", ".join(f"{low} to {high}" for low, _opt, high in ranges)
            yield ("benchmark", "batches", index), f"no profile admits {axis} {size} (they span {spans})"


def _publish(recipe: Recipe) -> Found:
    to = recipe.publish.to
    if to is not None and (not to.strip() or ("://" in to and not to.startswith(("s3://", "file://")))):
        yield ("publish", "to"), f"{to!r} is no store (allowed: a folder, s3://bucket/prefix)"
