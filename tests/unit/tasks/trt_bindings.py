"""Import a TensorRT version's own Python bindings without its libraries, and say what our code finds in them.

Run in a process of its own: `python -m tests.unit.tasks.trt_bindings FOLDER GRAPH`, FOLDER being where
`pip install --no-deps --target FOLDER tensorrt-cu13-bindings==X` put them. The three libraries that the bindings are linked
with are replaced by stand-ins whose functions return null: enumerations, classes and signatures are real, nothing is built.
Prints one JSON document.
"""

from __future__ import annotations

import ctypes
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

# What our code uses of each class, besides enumerations, which it looks up by name.
MEMBERS = {
    "Builder": "create_network create_builder_config create_optimization_profile build_serialized_network num_DLA_cores",
    "INetworkDefinition": "num_layers get_layer num_inputs get_input num_outputs get_output",
    "ITensor": "name dtype shape is_shape_tensor",
    "IBuilderConfig": "set_flag clear_flag get_flag set_memory_pool_limit get_memory_pool_limit profiling_verbosity "
    "builder_optimization_level max_aux_streams hardware_compatibility_level set_tactic_sources get_tactic_sources "
    "create_timing_cache set_timing_cache get_timing_cache add_optimization_profile set_preview_feature "
    "get_preview_feature default_device_type DLA_core",
    "IOptimizationProfile": "set_shape",
    "ITimingCache": "serialize combine",
    "OnnxParser": "parse_from_file num_errors get_error",
    "ParserError": "code node desc",
    "Runtime": "deserialize_cuda_engine engine_host_code_allowed DLA_core",
    "IPluginRegistry": "load_library",
    "ICudaEngine": "num_io_tensors get_tensor_name get_tensor_mode get_tensor_dtype get_tensor_profile_shape "
    "num_optimization_profiles get_tensor_location create_execution_context create_engine_inspector serialize",
    "IExecutionContext": "set_optimization_profile_async set_input_shape get_tensor_shape set_tensor_address "
    "set_output_allocator get_max_output_size execute_async_v3 engine profiler",
    "EngineInspector": "get_engine_information",
    "Refitter": "get_all get_all_weights get_missing set_weights refit_cuda_engine max_threads",
    "IConvolutionLayer": "kernel bias",
    "IDeconvolutionLayer": "kernel bias",
    "IScaleLayer": "shift scale",
    "IConstantLayer": "weights",
    "ILogger": "log",
    "IProfiler": "report_layer_time",
}
# Of versions that calibrate, and of versions that stream weights.
CALIBRATION = {
    "IBuilderConfig": "int8_calibrator set_calibration_profile",
    "IInt8EntropyCalibrator2": "get_batch get_batch_size read_calibration_cache write_calibration_cache",
    "IInt8MinMaxCalibrator": "get_batch get_batch_size read_calibration_cache write_calibration_cache",
    "ILayer": "precision set_output_type",
}
# Of versions that refit from ONNX files, and of the one that has this layer.
REFITTING = {
    "OnnxParserRefitter": "refit_from_file num_errors get_error",
    "ICudaEngine": "create_serialization_config serialize_with_config",
    "ISerializationConfig": "clear_flag",
    "SerializationFlag": "EXCLUDE_WEIGHTS",
}
FULLY_CONNECTED = {"IFullyConnectedLayer": "kernel bias", "LayerType": "FULLY_CONNECTED"}
# Of versions whose timing cache can be edited: 10.8 and later.
EDITING = {"ITimingCache": "queryKeys query update", "TimingCacheValue": "tacticHash timingMSec"}
STREAMING = {"ICudaEngine": "streamable_weights_size weight_streaming_budget_v2 get_weight_streaming_automatic_budget"}
SOURCES = ("CUBLAS", "CUBLAS_LT", "CUDNN", "EDGE_MASK_CONVOLUTIONS", "JIT_CONVOLUTIONS")
SIGNATURES = {
    "IOptimizationProfile.set_shape": ["input", "min", "opt", "max"],
    "IBuilderConfig.set_timing_cache": ["cache", "ignore_mismatch"],
    "IBuilderConfig.create_timing_cache": ["serialized_timing_cache"],
    "ITimingCache.combine": ["input_cache", "ignore_mismatch"],
    "OnnxParser.parse_from_file": ["model"],
    "IExecutionContext.set_optimization_profile_async": ["profile_index", "stream_handle"],
}


def load(folder: Path):
    """Import the bindings of a folder over stand-ins for their libraries."""
    package = folder / "tensorrt_bindings"
    listed = subprocess.run(["ldd", package / "tensorrt.so"], text=True, capture_output=True, check=True).stdout
    missing = re.findall(r"(libnv\S+) => not found", listed)
    symbols = subprocess.run(
        ["nm", "-D", "--undefined-only", package / "tensorrt.so"], text=True, capture_output=True, check=True
    ).stdout
    names = re.findall(r" U ((?:create|get|init|shutdownProtobuf|_ZN\d+nv)\w+)$", symbols, re.MULTILINE)
    with tempfile.TemporaryDirectory() as made:
        source = Path(made, "stand_ins.c")
        source.write_text("".join(f"void *{name}(void) {{ return 0; }}\n" for name in names))
        for soname in missing:
            library = Path(made, soname)
            subprocess.run(["gcc", "-shared", "-fPIC", f"-Wl,-soname,{soname}", "-o", library, source], check=True)
            ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    sys.path.insert(0, str(folder))
    import tensorrt_bindings

    return tensorrt_bindings


def report(trt, graph: Path) -> dict:
    """Say what our code finds in a TensorRT module."""
    from tasks.engines import trt_adapter, trt_log, trt_replay
    from tasks.engines.trt import Build
    from tasks.engines.trt_settings import _FLAGS, _HARDWARE, _NO_EXTERNAL, _REFIT
    from tasks.errors import BackendError
    from tasks.stage import StageRequest

    chosen = trt_adapter.adapter(trt)

    def refusal(call, *arguments):
        try:
            call(*arguments)
        except BackendError as err:
            return [err.kind, err.message, err.advice]
        return None

    said = []
    log = trt_log.Log(lambda *progress: said.append(progress))
    log.for_runtime(trt).log(trt.ILogger.Severity.ERROR, "words")
    monitor = trt_log.progress_monitor(trt, log, lambda *progress: said.append(progress))
    if monitor is not None:
        monitor.phase_start("Building", None, 4)
        said.append(monitor.step_complete("Building", 1))
        monitor.phase_finish("Building")
    params = {"precision": "fp32", "workspace": None}
    request = StageRequest("compile", params, {"model.onnx": graph}, graph.parent)
    return {
        "version": trt.__version__,
        "adapter": type(chosen).__name__,
        "network_flags": chosen.network_flags(trt),
        "strongly_typed": 1 << int(getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", 60)),
        "missing": _missing(trt, MEMBERS),
        "missing for calibration": _missing(trt, CALIBRATION),
        "missing for streaming": _missing(trt, STREAMING),
        "missing for refitting": _missing(trt, REFITTING),
        "missing for fully connected": _missing(trt, FULLY_CONNECTED),
        "missing for editing": _missing(trt, EDITING),
        "replay flags": [
            [name, refusal(trt_adapter.named, trt, "BuilderFlag", name)]
            for name in trt_replay.replay_flags(trt, pinned=True)
        ],
        "creators": [name for name in ("plugin_creator_list", "all_creators") if hasattr(trt.IPluginRegistry, name)],
        "weak": _weak(trt),
        "calibrator": _calibrator(trt),
        "sources": {name: refusal(trt_adapter.named, trt, "TacticSource", name) for name in SOURCES},
        "preview": hasattr(trt.PreviewFeature, _NO_EXTERNAL),
        "dla": refusal(trt_adapter.named, trt, "DeviceType", "DLA"),
        "allocator": trt.IOutputAllocator.__doc__,
        "bare_contexts": hasattr(trt.ICudaEngine, "create_execution_context_without_device_memory")
        or "USER_MANAGED" in trt.ExecutionContextAllocationStrategy.__members__,
        "given_memory": [
            name for name in ("device_memory", "set_device_memory") if hasattr(trt.IExecutionContext, name)
        ],
        "device_memory": [
            name for name in ("device_memory_size", "device_memory_size_v2") if hasattr(trt.ICudaEngine, name)
        ],
        "signatures": {
            path: [name for name in names if f"{name}: " not in _documentation(trt, path)]
            for path, names in SIGNATURES.items()
        },
        "flags": {
            name: refusal(trt_adapter.named, trt, "BuilderFlag", name)
            for name in ["TF32", *_FLAGS.values(), *_REFIT["stripped"]]
        },
        "hardware": {
            name: refusal(trt_adapter.named, trt, "HardwareCompatibilityLevel", name) for name in _HARDWARE.values()
        },
        "members": [
            refusal(trt_adapter.named, trt, *pair)
            for pair in [
                ("MemoryPoolType", "WORKSPACE"),
                ("ProfilingVerbosity", "DETAILED"),
                ("LayerInformationFormat", "JSON"),
                ("TensorIOMode", "INPUT"),
                ("TensorLocation", "HOST"),
                ("TacticSource", "JIT_CONVOLUTIONS"),
                ("WeightsRole", "KERNEL"),
            ]
        ],
        "types": sorted(set(trt.DataType.__members__)),
        "bf16": refusal(trt_adapter.require, trt, "bf16", 22),
        "errors": log.errors,
        "said": said,
        "build": refusal(Build(trt, request).run, lambda: 1 << 30),
    }


def _missing(trt, wanted: dict[str, str]) -> list[str]:
    return [
        f"{name}.{member}"
        for name, members in wanted.items()
        for member in members.split()
        if not hasattr(getattr(trt, name, None), member)
    ]


def _weak(trt) -> list:
    from tasks.engines.trt_adapter import adapter
    from tasks.errors import BackendError

    try:
        chosen = adapter(trt, "weak")
    except BackendError as err:
        return [err.kind, err.message, err.advice]
    return [type(chosen).__name__, chosen.network_flags(trt), chosen.opset, list(chosen.precisions)]


def _calibrator(trt) -> list:
    """Make both kinds of our calibrators as the version's own types."""
    from tasks.engines.trt_calibrate import CALIBRATORS, cache_reader
    from tasks.errors import BackendError

    try:
        readers = [cache_reader(trt, method, b"cache") for method in CALIBRATORS]
    except BackendError as err:
        return [err.kind, err.message, err.advice]
    return [
        [
            isinstance(reader, getattr(trt, name)),
            reader.read_calibration_cache().decode(),
            reader.get_batch(["x"]),
            reader.asked,
        ]
        for name, reader in zip(CALIBRATORS.values(), readers, strict=True)
    ]


def _documentation(trt, path: str) -> str:
    owner, member = path.split(".")
    return getattr(getattr(trt, owner), member).__doc__


if __name__ == "__main__":
    sys.stdout.write(json.dumps(report(load(Path(sys.argv[1])), Path(sys.argv[2]))))
