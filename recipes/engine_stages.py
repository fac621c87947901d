"""What one engine takes beyond the portable stages: compiling, calibrating on its device, executing, timing.

Pure, as the planner is: each method describes a step, with nothing of other targets, and no name or path, in its key.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from artifacts.host import Host
from recipes.options import compile_params, uses_calibrator
from recipes.pipeline import Pipeline, graph_files
from recipes.plan import EnginePlan
from recipes.refitting import Compilation
from recipes.schema import Precision, Target
from recipes.steps import Output, Step
from recipes.support import support_step
from recipes.targets import typed_precision

# The package whose version enters the keys of what a runtime compiles, and the name of the file it makes.
RUNTIME_PACKAGES: Final = {"tensorrt-rtx": "tensorrt_rtx", "tensorrt": "tensorrt", "onnxruntime": "onnxruntime"}
PLAN_NAMES: Final = {"tensorrt-rtx": "model.plan", "tensorrt": "model.plan", "onnxruntime": "model.onnx"}
CUDA_FLAVOURS: Final = ("cu11", "cu12", "cu13")


@dataclass(frozen=True)
class EngineStages:
    """Describes the steps of engines of one graph (a recipe's, or a part's) on a host."""

    pipeline: Pipeline
    host: Host

    def waits(self, target: Target, gpu: str) -> str | None:
        """Say what a host needs to compile this, or None if this host can."""
        needed = f"{target.runtime} {target.version}" if target.version is not None else target.runtime
        device = f" and an {gpu} GPU" if target.runtime == "tensorrt" else ""
        installed = self.host.runtimes.get(target.runtime)
        if installed is None:
            return f"needs a host with {needed}{device}; {target.runtime} is not installed here"
        if target.version not in (None, installed):
            return f"needs a host with {needed}{device}; {installed} is installed here"
        if device and not self.host.has_gpu(gpu):
            return f"needs a host with {needed}{device}; no such GPU is here"
        return None

    def typed(self, engine: EnginePlan, precision: Precision) -> Precision:
        """Return the precision of the graph that the compiler gets: a higher one where it is to lower the graph itself."""
        return typed_precision(
            self.pipeline.recipe, engine.runtime, engine.options, engine.runtime_version or None, precision
        )

    def portable_gates(self) -> list[Step]:
        """Measure the untyped graphs: where they differ from the source, no precision can be right."""
        export, simplify = self.pipeline.export, self.pipeline.simplify
        return [
            self.pipeline.verify(self.pipeline.id("verify", "export"), "graph", export),
            self.pipeline.verify(self.pipeline.id("verify", "simplify"), "graph", simplify),
        ]

    def support(self, engine: EnginePlan, target: Target, waiting: str | None) -> Step | None:
        """Ask the target's runtime which nodes it refuses, where it is here; else what is known of its version."""
        toolchain = {RUNTIME_PACKAGES[target.runtime]: engine.runtime_version}
        return support_step(self.pipeline, target, here=waiting is None, toolchain=toolchain)

    def compilation(self, engine: EnginePlan, precision: Precision, judged: Sequence[Step]) -> Compilation:
        """Describe compiling for one GPU once what is `judged` has passed; nothing of other targets, and no name or path, enters the key."""
        params: dict[str, Any] = {"runtime": engine.runtime, "gpu": engine.gpu}
        if engine.runtime != "onnxruntime":  # which takes any shape, and none of the options
            params |= {
                "tf32": precision == "tf32",
                "profiles": self.pipeline.profiles,
                **compile_params(engine.options, engine.runtime),
            }
        inputs = graph_files(self.pipeline.typed(engine.typed or precision))
        gates = [*self.portable_gates(), *judged, *([engine.support] if engine.support is not None else [])]
        if engine.runtime == "tensorrt":
            # Which of a graph's types a weakly typed builder may use is a flag of it; the tactics are those of the device.
            params["precision"] = precision
            inputs += [*self.pipeline.plugins(engine.options), *self.pipeline.pins(engine.options)]
            calibrator = uses_calibrator(self.pipeline.recipe, engine.runtime, precision)
            if precision == "int8-fp16" and engine.typed == "int8":
                keep = self.pipeline.recipe.precision.keep_globs
                params |= {"keep": keep} if keep else {}
            if calibrator or engine.options.typing == "weak":
                keep = self.pipeline.recipe.precision.keep_globs
                params |= {"typing": "weak", **({"keep": keep} if keep and precision not in ("fp32", "tf32") else {})}
            calibration = self.pipeline.recipe.precision.calibration
            if calibrator and calibration is not None:
                params["calibrator"] = calibration.method
                inputs.append(self._calibrate(engine, gates))
        return Compilation(
            ":".join(filter(None, (self.pipeline.part, engine.runtime, engine.gpu, f"{precision}{engine.variant}"))),
            params=params,
            inputs=inputs,
            toolchain=self._compiler(engine),
            gates=gates,
        )

    def _calibrate(self, engine: EnginePlan, gates: list[Step]) -> Output:
        """Let TensorRT find int8 ranges on the device; its cache serves every later compilation of the graph."""
        spec, files = self.pipeline.recipe.precision.calibration, self.pipeline.files.calibration
        if spec is None or files is None:
            raise ValueError(f"{engine.target}: there is no calibration data")
        step = self.pipeline.steps.add(
            self.pipeline.id("calibrate", f"{engine.runtime}:{engine.gpu}"),
            params={
                "runtime": engine.runtime,
                "gpu": engine.gpu,
                "method": spec.method,
                "batch": spec.batch,
                **self.pipeline.spared,
                "tensors": self.pipeline.interface,
            },
            inputs=[
                *graph_files(self.pipeline.typed("fp32")),
                *self.pipeline.plugins(engine.options),
                self.pipeline.calibration_data(spec, files),
            ],
            toolchain=self._compiler(engine),
            gates=gates,
        )
        return Output(step, "calibration.cache")

    def _compiler(self, engine: EnginePlan) -> dict[str, Any]:
        """Return what a compilation depends on besides its parameters and inputs."""
        package = RUNTIME_PACKAGES[engine.runtime]
        toolchain = {package: engine.runtime_version, "os": self.host.os, "arch": self.host.arch}
        if engine.runtime != "onnxruntime":
            # One version is released for several major versions of CUDA, as packages of that name.
            found = [flavour for flavour in CUDA_FLAVOURS if self.pipeline.version(f"{package}_{flavour}") is not None]
            toolchain["cuda"] = ",".join(found)
        return toolchain | (self.device(engine) if engine.runtime == "tensorrt" else {})

    def device(self, engine: EnginePlan) -> dict[str, Any]:
        """Return what of this host an engine that is compiled (or executed) on it depends on."""
        recipe = self.pipeline.recipe
        gpu = self.host.gpu(engine.gpu)
        portable = engine.options.hardware_compatibility != "none"
        driver = {"exact": self.host.driver, "branch": self.host.driver_branch, "ignore": None}[recipe.driver]
        return {"device": gpu.device() if gpu is not None and not portable else None, "driver": driver}

    def execute(self, engine: EnginePlan, precision: Precision, *, again: bool = False) -> Step | None:
        """Verify the compiled engine itself, where this host can execute it; `again`, where a refitted one failed."""
        if engine.compile is None or engine.runtime == "tensorrt-rtx":
            return None
        subject = f"{engine.runtime}:{engine.gpu}:{precision}{engine.variant}" + (":compiled" if again else "")
        step_id = self.pipeline.id("verify", subject)
        if engine.runtime == "onnxruntime":
            return self.pipeline.verify(step_id, "engine", engine.compile, precision=precision)
        return self.pipeline.verify(
            step_id,
            "engine",
            engine.compile,
            plan_name=PLAN_NAMES[engine.runtime],
            executor=self.executor(engine),
            plugins=self.pipeline.plugins(engine.options),
            device={RUNTIME_PACKAGES[engine.runtime]: engine.runtime_version, **self.device(engine)},
            precision=precision,
        )

    def benchmark(self, engine: EnginePlan) -> Step | None:
        """Time an engine that was executed here, where the recipe asks for it."""
        asked = self.pipeline.recipe.benchmark
        return self.timed(engine, compare=asked.compare) if asked is not None else None

    def timed(self, engine: EnginePlan, *, compare: Sequence[str] = ()) -> Step | None:
        """Time an engine that was executed here, beside what it is compared with."""
        if engine.compile is None or engine.engine_verify is None:
            return None
        gpu = self.host.gpu(engine.gpu)  # also where the engine may run on others: a time is that of one device
        on_gpu = {**self.device(engine), "device": gpu.device() if gpu is not None else None}
        device = on_gpu if engine.runtime == "tensorrt" else {"cpu": self.host.cpu, "os": self.host.os}
        return self.pipeline.benchmark(
            self.pipeline.id(
                "benchmark",
                f"{engine.runtime}:{engine.gpu}:{engine.given}{engine.variant}"
                + (":compared" if engine.chosen is not None else ""),
            ),
            self.files(engine, engine.compile),
            engine.engine_verify,
            executor=self.executor(engine),
            device={RUNTIME_PACKAGES[engine.runtime]: engine.runtime_version, **device},
            compare=compare,
        )

    def files(self, engine: EnginePlan, compiled: Step) -> list[Output]:
        """Return what a runtime loads: the plan, and its libraries of plugins."""
        plugins = self.pipeline.plugins(engine.options) if engine.runtime == "tensorrt" else ()
        return [*graph_files(compiled, PLAN_NAMES[engine.runtime]), *plugins]

    def executor(self, engine: EnginePlan) -> dict[str, Any]:
        """Return the parameters of what runs an engine itself."""
        if engine.runtime == "onnxruntime":
            return {"executor": "onnxruntime", "gpu": "cpu"}
        return {
            "executor": engine.runtime,
            "gpu": engine.gpu,
            "version_compatible": engine.options.version_compatible,
            **({"dla_core": engine.options.dla.core} if engine.options.dla is not None else {}),
        }
