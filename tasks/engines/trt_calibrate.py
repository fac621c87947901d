"""TensorRT's own int8 calibration (8.6 and, weakly typed, 10): a cache of scales, found once and used by every build.

TensorRT calibrates inside of a build. This one is made for that alone, at a low optimisation level, and what it would
build is not kept: the compilation proper gets the cache as an input, so that other options or profiles do not calibrate again.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Mapping
from typing import Any, Final

from artifacts.refs import BYTES
from tasks.datasets import Array, batches, without_held_out
from tasks.engines.cuda import Cuda, find_device
from tasks.engines.trt_adapter import adapter, require
from tasks.engines.trt_log import Log, Report
from tasks.engines.trt_network import add_profiles, parse
from tasks.engines.trt_plugins import load_plugins, plugin_files
from tasks.engines.trt_settings import Settings
from tasks.engines.trt_types import as_type
from tasks.errors import BackendError
from tasks.onnx_files import GRAPH, load_graph, opset_of
from tasks.stage import StageRequest, StageResult

CACHE: Final = "calibration.cache"
CALIBRATORS: Final = {"entropy": "IInt8EntropyCalibrator2", "minmax": "IInt8MinMaxCalibrator"}
_LEAST_SCALE: Final = 2.0**-126  # of normal float32 numbers: what is smaller divides by zero on the way
_MISFIT: Final = "the calibration data and the recipe's inputs do not agree"


def run(request: StageRequest) -> StageResult:
    """Calibrate "model.onnx" (fp32) on "dataset.safetensors" for a device of params["gpu"].

    params: gpu, method (entropy, minmax), batch, tensors. Writes "calibration.cache". Facts: runtime_version, method,
    samples, batch, tensors (how many have a scale), constant (tensors without one: they were zero on all data, so what
    takes them stays fp32), plugins, log_lines. Raises BackendError with TensorRT's own words.
    """
    import tensorrt as trt
    from safetensors.numpy import load_file

    params = request.params
    require(trt, "int8", opset_of(load_graph(request.inputs[GRAPH], weights=False)), "weak")
    data = load_file(str(request.inputs["dataset.safetensors"]))
    if params.get("held_out"):
        data = without_held_out(data)
    feeds = Feeds(data, params["tensors"], params["batch"])
    log = Log(request.report, folder=str(request.inputs[GRAPH].parent))
    plugins = load_plugins(trt, plugin_files(request.inputs))
    device = find_device(params["gpu"])
    cuda = Cuda(device["index"])
    try:
        cache = _calibrate(trt, log, cuda, feeds, request)
    finally:
        cuda.close()
    kept, constant = without_zero_scales(cache)
    (request.output_dir / CACHE).write_bytes(kept)
    return StageResult(
        {CACHE: BYTES},
        {
            "runtime_version": trt.__version__,
            "method": params["method"],
            "samples": feeds.samples,
            "batch": feeds.batch,
            "tensors": kept.count(b"\n") - 1,
            "constant": constant,
            "plugins": plugins,
            "log_lines": log.lines,
        },
    )


class Feeds:
    """Batches of one size over all samples: TensorRT takes no other, and to leave some out would change the ranges."""

    def __init__(self, data: Mapping[str, Array], tensors: Mapping[str, Mapping[str, Any]], batch: int) -> None:
        """Choose the batch: the largest divisor of the number of samples up to `batch`, or what a fixed first axis says."""
        self._data, self._tensors = data, tensors
        self.samples = min((len(data[name]) for name in tensors if name in data), default=0)
        fixed = {extent for tensor in tensors.values() for extent in tensor["shape"][:1] if isinstance(extent, int)}
        divisors = (size for size in range(min(batch, max(self.samples, 1)), 0, -1) if self.samples % size == 0)
        self.batch = max(fixed, default=0) or next(divisors, 1)

    def __iter__(self) -> Iterator[dict[str, Array]]:
        """Yield the inputs of every batch. Raises BackendError("bad data") for an input that is missing."""
        for _samples, inputs in batches(self._data, self._tensors, self.batch):
            yield inputs

    def profile(self) -> dict[str, Any]:
        """Return the one shape that calibration runs at, as a profile."""
        first = next(iter(self))
        shapes = {name: list(array.shape) for name, array in first.items()}
        return {
            "name": "calibration",
            "inputs": {name: {"min": shape, "opt": shape, "max": shape} for name, shape in shapes.items()},
        }


def without_zero_scales(cache: bytes) -> tuple[bytes, list[str]]:
    """Return a calibration cache without the tensors that have no usable scale, and their names.

    A line is "tensor: " and the bits of a float32 in hex without leading zeros (the code of 8.6 that writes it: zero is
    "0"), after a first line that names the version and the method. A tensor that the cache does not name makes TensorRT
    leave what takes it in fp32; one with a scale of zero ends it with an assertion (8.6:
    `weightConvertors.cpp::quantizeBiasCommon`). Raises BackendError("bad data") for another text.
    """
    # Not `splitlines`: names of tensors may hold what Python takes for the end of a line, as U+001E.
    header, *lines = cache.decode("utf-8", "surrogateescape").removesuffix("\n").split("\n")
    kept, constant = [header], []
    for line in lines:
        name, separator, bits = line.rpartition(": ")
        try:
            scale = struct.unpack("!f", struct.pack("!I", int(bits, 16)))[0]
        except (ValueError, struct.error) as err:
            raise BackendError(
                "bad data", f"a line of the calibration cache is {line[:80]!r}", "this is another format; report it"
            ) from err
        usable = separator and math.isfinite(scale) and abs(scale) >= _LEAST_SCALE
        if usable:
            kept.append(line)
        else:
            constant.append(name)
    return ("\n".join(kept) + "\n").encode("utf-8", "surrogateescape"), constant


def calibrator(trt: Any, method: str) -> Any:
    """Return TensorRT's class for a method. Raises BackendError("version mismatch") where a version has none."""
    base = getattr(trt, CALIBRATORS[method], None)
    if base is None:
        raise BackendError(
            "version mismatch",
            f"TensorRT {trt.__version__} has no {CALIBRATORS[method]}",
            "set precision.int8 to qdq, or build with TensorRT 8.6, or 10 with build.typing: weak",
        )
    return base


def cache_reader(trt: Any, method: str, cache: bytes) -> Any:
    """Return a calibrator that has a cache and no data; `asked` says that TensorRT wanted data all the same."""
    base = calibrator(trt, method)

    class Reader(base):  # type: ignore[misc, valid-type]  # its type is known only at run time
        def __init__(self) -> None:
            base.__init__(self)
            self.asked = False

        def get_batch_size(self) -> int:
            return 1

        def get_batch(self, _names: list[str]) -> list[int]:
            self.asked = True
            return []

        def read_calibration_cache(self) -> bytes:
            return cache

        def write_calibration_cache(self, _cache: Any) -> None:
            """Keep nothing: the cache is an input."""

    return Reader()


def _data_feeder(trt: Any, method: str, cuda: Cuda, feeds: Feeds, types: Mapping[str, str], report: Report) -> Any:
    """Return a calibrator that feeds data; `cache` is what TensorRT wrote, `error` what went wrong here.

    Nothing may be raised into TensorRT, which would end the process.
    """
    base = calibrator(trt, method)

    class Feeder(base):  # type: ignore[misc, valid-type]  # its type is known only at run time
        def __init__(self) -> None:
            base.__init__(self)
            self.cache: bytes | None = None
            self.error: Exception | None = None
            self._batches = iter(feeds)
            self._memory: dict[str, int] = {}
            self._fed = 0

        def get_batch_size(self) -> int:
            return feeds.batch

        def get_batch(self, names: list[str]) -> list[int]:
            try:
                batch = next(self._batches, None)
                if batch is None:
                    return []
                arrays = {name: as_type(batch[name], types[name], f"calibration input {name}") for name in names}
                for name, array in arrays.items():
                    if name not in self._memory:
                        self._memory[name] = cuda.allocate(array.nbytes)
                    cuda.upload(self._memory[name], array)
                cuda.synchronize()
            except Exception as err:  # noqa: BLE001  kept, and raised when TensorRT has returned
                self.error = err
                return []
            self._fed += feeds.batch
            report(None, f"calibrating, {self._fed} of {feeds.samples} samples")
            return [self._memory[name] for name in names]

        def read_calibration_cache(self) -> None:
            return None

        def write_calibration_cache(self, cache: Any) -> None:
            self.cache = bytes(cache)

    return Feeder()


def _calibrate(trt: Any, log: Log, cuda: Cuda, feeds: Feeds, request: StageRequest) -> bytes:
    logger = log.for_runtime(trt)
    try:
        builder = trt.Builder(logger)
    except TypeError as err:  # "pybind11::init(): factory function returned nullptr"
        raise log.failure(f"TensorRT {trt.__version__} does not start", otherwise="no device") from err
    network, parser = parse(trt, logger, log, builder, request.inputs[GRAPH], "weak")
    config = builder.create_builder_config()
    settings = Settings(trt, log, config)
    for flag in adapter(trt, "weak").type_flags(trt, network, request.inputs[GRAPH], {"precision": "int8"}):
        settings.flag(flag)
    settings.flag("TF32", on=False)
    # Not 0: what 8.6 asserts of its timing cache (`context.optimizationLevel > 0`) need not hold in a calibration there.
    settings.attribute("builder_optimization_level", 1)
    profile = add_profiles(trt, log, builder, network, config, [feeds.profile()])[0]
    if not config.set_calibration_profile(profile):
        raise log.failure(f"TensorRT {trt.__version__}: {_MISFIT}", otherwise="bad profile")
    types = {tensor.name: tensor.dtype.name for tensor in map(network.get_input, range(network.num_inputs))}
    feeder = _data_feeder(trt, request.params["method"], cuda, feeds, types, request.report)
    config.int8_calibrator = feeder
    before = len(log.errors)
    builder.build_serialized_network(network, config)  # what it returns does not matter once there is a cache
    if feeder.error is not None:
        raise feeder.error
    if feeder.cache is None:
        raise log.failure(f"TensorRT {trt.__version__} does not calibrate the graph", since=before)
    del config, parser, network, builder
    return bytes(feeder.cache)
