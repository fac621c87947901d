r"""The portable part of the pipeline: what runs once, whatever the number of targets.

fetch > export > simplify > calibrate > type > verify
        reference (the source's own outputs)  /
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Final

from recipes.files import CodeBundle, DatasetFiles, RecipeFiles
from recipes.gates import metric_gate, parity_bounds
from recipes.options import PINS, may_refit, stated_plugins
from recipes.schema import (
    FLOAT16,
    FP8,
    QUANTIZED,
    Benchmark,
    Calibration,
    Dataset,
    Metric,
    OnnxSource,
    Options,
    PaddleSource,
    Precision,
    Recipe,
    Tensor,
    TorchSource,
)
from recipes.shapes import benchmark_cases, parity_cases, profile_shapes, random_cases, trace_shapes
from recipes.steps import Output, Step, Steps

DEFAULT_OPSET: Final = 18
EVALUATION_BATCH: Final = 32
# What made no engine slower by more than 2 % where it was measured (docs/tensorrt.md).
REWRITES: Final = ("drop-moves", "plain-softmax")
RANDOM_CASES: Final = 3
# The package of CPUs and that of GPUs: whichever is installed makes the model.
PADDLE: Final = ("paddlepaddle", "paddlepaddle-gpu")
_FRAMEWORKS: Final[Mapping[str, tuple[str, ...]]] = {"onnx": ("onnxruntime",), "paddle": PADDLE, "torch": ("torch",)}
Version = Callable[[str], str | None]


@dataclass
class Pipeline:
    """Describes the portable steps of one recipe to `steps`; every method adds its steps once and returns what they make."""

    recipe: Recipe
    files: RecipeFiles
    version: Version
    steps: Steps
    part: str = ""  # which part of the model this is, where it has any
    module: str | None = None  # what makes the part of the model: a callable beside that of the model
    own: bool = False  # whether the part has a source of its own
    calibrated: bool = False  # whether anything that is planned reads the calibration data
    together: list[Pipeline] = field(default_factory=list)  # of all parts, where the model has any
    profiles: list[dict[str, Any]] = field(init=False)
    tensors: dict[str, Any] = field(init=False)
    interface: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        self.profiles = profile_shapes(self.recipe)
        self.tensors = {name: dict(tensor) for name, tensor in self.recipe.inputs.items()}
        # Without the range of seeded inputs, which only stages that draw such inputs depend on.
        self.interface = interface_of(self.recipe.inputs)

    @property
    def metric(self) -> Metric | None:
        """What is measured on labelled data: of the graph, or of all parts together where this is of the whole."""
        given = self.recipe.acceptance
        return given.together if self.recipe.parts else given.metric

    # ---- what comes from outside -------------------------------------------------------------------------------

    def id(self, stage: str, subject: str = "") -> str:
        """Return a step's id: the stage, the part where the model has any, the subject where there is one."""
        return ":".join(filter(None, (stage, self.part, subject)))

    def versions(self, *packages: str) -> dict[str, str | None]:
        """Return the full version of each package, None where it is not installed."""
        return {package: self.version(package) for package in sorted(packages)}

    def code(self, step_id: str, bundle: CodeBundle) -> Output:
        """Bring code of the recipe."""
        params = {"kind": "code", "members": dict(bundle.digests)}
        local = (bundle, {"code.tar": bundle.digest})
        return Output(self.steps.add(step_id, params=params, local=local), "code.tar")

    @cached_property
    def source_files(self) -> list[Output]:
        """Bring what the source is made of: code, weights, graphs."""
        found: list[Output] = []
        if self.files.code is not None:
            found.append(self.code(self.id("fetch", "code") if self.own else "fetch:code", self.files.code))
        # External data is named below the graph that it belongs to: its own name may be any, also that of a subject.
        named = [("weights", self.files.weights)] + [
            ("model" if file.name == "model.onnx" else f"model/{file.name}", file) for file in self.files.model
        ]
        for subject, file in named:
            if file is not None:
                step_id = self.id("fetch", subject) if self.own else f"fetch:{subject}"
                step = self.steps.add(step_id, params={"kind": "file"}, local=(file, {file.name: file.digest}))
                found.append(Output(step, file.name))
        return found

    def dataset(self, subject: str, spec: Dataset, files: DatasetFiles, label: str | None) -> Output:
        """Read and check a data set."""
        together = self.recipe.acceptance.together if self.recipe.parts else None
        tensors = self.interface if together is None else interface_of(together.inputs)
        names = sorted({*tensors, *([label] if label is not None else [])})
        params = {
            "kind": "dataset",
            "format": files.format,
            "entry": files.code.entry if files.code is not None else None,
            "arguments": spec.arguments,
            "fields": spec.fields,
            "names": names,
            "label": label,
            "images": dict(spec.images) if spec.images is not None else None,
            "samples": spec.samples,
            "order": spec.order,
            "seed": spec.seed,
            "tensors": tensors,
        }
        name = {"npz": "data.npz", "callable": "code.tar"}.get(files.format, "data")
        toolchain = self.versions("numpy", *(("pillow",) if files.format == "images" else ()))
        if files.code is not None:
            toolchain |= self.versions(*files.code.packages)
        step = self.steps.add(
            self.id("fetch", subject), params=params, toolchain=toolchain, local=(files, {name: files.digest})
        )
        return Output(step, "dataset.safetensors")

    @cached_property
    def data(self) -> list[Step]:
        """Return the steps that read and check the data sets, of all parts: no source runs before they passed."""
        return [step for one in self.together or [self] for step in one.own_data()]

    def own_data(self) -> list[Step]:
        """Return those of this part."""
        found = []
        spec, metric = self.recipe.precision.calibration, self.metric
        if self.calibrated and spec is not None and self.files.calibration is not None:
            found.append(self.calibration_data(spec, self.files.calibration).step)
        if metric is not None and self.files.labelled is not None:
            found.append(self.dataset("labelled", metric.data, self.files.labelled, metric.labels).step)
        return found

    # ---- portable stages ---------------------------------------------------------------------------------------

    def source_params(self) -> dict[str, Any]:
        """Return what stages that run the source are told of it."""
        source = self.recipe.source
        common = {"framework": source.framework, "tensors": self.tensors, "outputs": self.recipe.outputs}
        if isinstance(source, TorchSource | PaddleSource):
            entry = self.files.code.entry if self.files.code is not None else ""
            made = self.part and (not self.own or self.module is not None)
            part = {"part": self.part, "module": self.module} if made else {}
            return common | {"entry": entry, "arguments": source.arguments, "seed": source.seed, **part}
        return common

    def _source_toolchain(self, *packages: str) -> dict[str, Any]:
        code = self.files.code.packages if self.files.code is not None else ()
        return self.versions(*packages, *code)

    @cached_property
    def export(self) -> Step:
        """Export the source to ONNX. Exporters see one sample shape, so profiles enter only through it."""
        export = self.recipe.export
        if isinstance(self.recipe.source, OnnxSource):
            params = self.source_params() | {"opset": export.opset}
            return self.steps.add(
                self.id("export"),
                params=params,
                inputs=self.source_files,
                toolchain=self._source_toolchain("onnx"),
                gates=self.data,
            )
        if isinstance(self.recipe.source, PaddleSource):
            params = self.source_params() | {
                "opset": export.opset or DEFAULT_OPSET,
                "trace": trace_shapes(self.recipe),
            }
            toolchain = self._source_toolchain(*PADDLE, "paddle2onnx", "onnx")
            return self.steps.add(
                self.id("export"), params=params, inputs=self.source_files, toolchain=toolchain, gates=self.data
            )
        params = self.source_params() | {
            "exporter": export.exporter,
            "opset": export.opset or DEFAULT_OPSET,
            "trace": trace_shapes(self.recipe),
        }
        toolchain = self._source_toolchain("torch", "onnxscript", "onnx")
        return self.steps.add(
            self.id("export"), params=params, inputs=self.source_files, toolchain=toolchain, gates=self.data
        )

    @cached_property
    def explain(self) -> Step | None:
        """Find what the exporter took from its sample input; None for a graph that is its own source.

        Added only where the exported graph failed: it exports the model once more for each dynamic axis.
        """
        export = self.export
        if isinstance(self.recipe.source, OnnxSource) or export.action is None:
            return None
        return self.steps.add(
            self.id("explain", "export"),
            params={**export.action.params, "cases": parity_cases(self.recipe)},
            inputs=[*self.source_files, *graph_files(export, folder="graph")],
            toolchain=export.action.toolchain,
        )

    @cached_property
    def save(self) -> Step:
        """Keep the source as its framework runs it without the recipe's code; it needs no ONNX, and so no exporter."""
        onnx = isinstance(self.recipe.source, OnnxSource)
        cases = {"trace": trace_shapes(self.recipe), "cases": parity_cases(self.recipe)}
        return self.steps.add(
            self.id("save"),
            params=self.source_params() | ({} if onnx else cases),
            inputs=self.source_files,
            toolchain=self._source_toolchain("onnx") if onnx else self.reference_toolchain(),
            gates=self.data,
        )

    def verify_saved(self, executor: str) -> Step:
        """Measure what `save` made as `verify` does a graph: its framework runs it, in a process without the recipe's model."""
        params, own = self.measure("fallback")
        return self.steps.add(
            self.id("verify", "source"),
            params={**params, "executor": executor},
            inputs=[*saved_files(self.save), self.reference, *self.labelled],
            toolchain=self.serving_toolchain() | own,
            measured={"saved": self.save.facts},
        )

    def serving_toolchain(self) -> dict[str, Any]:
        """Return the versions that what a saved source gives depends on: of its framework, and of none of the recipe's code."""
        return self.versions(*_FRAMEWORKS[self.recipe.source.framework], "numpy")

    @cached_property
    def reference(self) -> Output:
        """Keep the source framework's own outputs on seeded inputs, at min, opt and max of every profile."""
        params = self.source_params() | {"kind": "parity", "cases": parity_cases(self.recipe), "input_seed": 0}
        step = self.steps.add(
            self.id("reference", "parity"),
            params=params,
            inputs=self.source_files,
            toolchain=self.reference_toolchain(),
            gates=self.data,
        )
        return Output(step, "reference.safetensors")

    @cached_property
    def labelled(self) -> list[Output]:
        """Bring the held-out data, the source framework's outputs on it, and the code of the recipe's own metric."""
        metric = self.recipe.acceptance.metric
        if metric is None or self.files.labelled is None:
            return []
        data = self.dataset("labelled", metric.data, self.files.labelled, metric.labels)
        params = self.source_params() | {
            "kind": "dataset",
            "tensors": self.interface,
            "batch": self.evaluation_batch,
        }
        step = self.steps.add(
            self.id("reference", "labelled"),
            params=params,
            inputs=[*self.source_files, data],
            toolchain=self.reference_toolchain(),
            gates=self.data,
        )
        code = [self.code(self.id("fetch", "metric"), self.files.metric)] if self.files.metric is not None else []
        return [data, Output(step, "outputs.safetensors"), *code]

    @property
    def spared(self) -> dict[str, Any]:
        """Say to calibration to leave samples out, where there is no labelled data to judge its ranges by."""
        return {"held_out": True} if self.recipe.acceptance.metric is None else {}

    def held_out(self, precision: Precision | None) -> list[Output]:
        """Return what int8 and fp8 are judged by where there is no labelled data: the source on calibration samples kept out."""
        spec, files = self.recipe.precision.calibration, self.files.calibration
        if precision not in QUANTIZED or self.recipe.acceptance.metric is not None or spec is None or files is None:
            return []
        params = self.source_params() | {
            "kind": "held-out",
            "tensors": self.interface,
            "batch": self.evaluation_batch,
        }
        step = self.steps.add(
            self.id("reference", "held-out"),
            params=params,
            inputs=[*self.source_files, self.calibration_data(spec, files)],
            toolchain=self.reference_toolchain(),
            gates=self.data,
        )
        return [Output(step, "held-out.safetensors")]

    @cached_property
    def evaluation_batch(self) -> int:
        """Return how many samples run at once on labelled data: as many as the first axis of every input admits."""
        largest = EVALUATION_BATCH
        for tensor in self.recipe.inputs.values():
            first = tensor.shape[0] if tensor.shape else 1
            if isinstance(first, str):
                largest = min(largest, max(profile[first][2] for profile in self.recipe.profiles.values()))
            else:
                largest = min(largest, first)
        return largest

    def reference_toolchain(self) -> dict[str, Any]:
        """Return the versions that the source's outputs depend on."""
        return self._source_toolchain(*_FRAMEWORKS[self.recipe.source.framework], "numpy")

    @cached_property
    def simplify(self) -> Step:
        """Simplify the exported graph, comparing the two inside the profiles."""
        simplifier = self.recipe.export.simplifier
        asked = self.recipe.export.rewrites
        rewrites = asked if asked is not None else () if simplifier == "none" else REWRITES
        params = {
            "simplifier": simplifier,
            **({"rewrites": list(rewrites)} if rewrites else {}),
            "profiles": self.profiles,
            "cases": [*parity_cases(self.recipe)[:1], *random_cases(self.recipe, RANDOM_CASES)],
            "tensors": self.tensors,
            "input_seed": 1,
            **self._custom,
        }
        packages = ("onnx", "onnxruntime", *(() if simplifier == "none" else (simplifier,)))
        return self.steps.add(
            self.id("simplify"), params=params, inputs=graph_files(self.export), toolchain=self.versions(*packages)
        )

    def calibration_data(self, spec: Calibration, files: DatasetFiles) -> Output:
        """Bring the samples that int8 ranges are found on."""
        return self.dataset("calibration", spec, files, None)

    @property
    def _custom(self) -> dict[str, Any]:
        """Say to stages that run graphs in ONNX Runtime that it may lack operators, where some target has plugins."""
        return {"plugins": True} if any(plugins for _at, plugins in stated_plugins(self.recipe)) else {}

    def plugins(self, options: Options) -> list[Output]:
        """Bring the libraries of plugins that the options name, checked against their digests."""
        files = [self.files.plugins[digest] for digest in sorted({plugin.sha256 for plugin in options.plugins})]
        return [
            Output(
                self.steps.add(f"fetch:{file.name}", params={"kind": "file"}, local=(file, {file.name: file.digest})),
                file.name,
            )
            for file in files
        ]

    def pins(self, options: Options) -> list[Output]:
        """Bring what the options pin of an earlier build, checked against its digest."""
        stated = [(name, pinned) for name in PINS if (pinned := getattr(options, name)) is not None]
        files = [self.files.pins[name, pinned.sha256] for name, pinned in stated]
        return [
            Output(
                self.steps.add(
                    f"fetch:{file.name}-{file.digest[:16]}",
                    params={"kind": "file"},
                    local=(file, {file.name: file.digest}),
                ),
                file.name,
            )
            for file in files
        ]

    def calibrate(self, precision: Precision, spec: Calibration, files: DatasetFiles) -> Output:
        """Find the range of every tensor that may be quantised; kept layers do not enter, so changing them re-uses it.

        Entropy weighs the 128 levels of int8, which fp8 has not: its ranges are the least and greatest values then.
        """
        data = self.calibration_data(spec, files)
        own = precision in FP8 and spec.method == "entropy"
        params = {
            "method": "minmax" if own else spec.method,
            **self.spared,
            "percentile": spec.percentile if spec.method == "percentile" else None,
            "batch": spec.batch,
            "tensors": self.interface,
        }
        toolchain = self.versions("onnx", "onnxruntime", "numpy")
        step = self.steps.add(
            self.id("calibrate", "fp8" if own else ""),
            params=params,
            inputs=[*graph_files(self.simplify), data],
            toolchain=toolchain,
        )
        return Output(step, "ranges.json")

    @cached_property
    def outliers(self) -> Output:
        """Find the tensors that leave float16's range on what the reference saw, and on calibration data where there is any."""
        spec, files = self.recipe.precision.calibration, self.files.calibration
        data = [self.calibration_data(spec, files)] if spec is not None and files is not None else []
        params = {"batch": spec.batch, "tensors": self.interface} if spec is not None else {}
        step = self.steps.add(
            self.id("outliers"),
            params={**params, **self._custom},
            inputs=[*graph_files(self.simplify), self.reference, *data],
            toolchain=self.versions("onnx", "onnxruntime", "numpy"),
        )
        return Output(step, "outliers.json")

    def calibration_digest(self) -> str | None:
        """Return the content digest of the calibration data, where there is any."""
        return self.files.calibration.digest if self.files.calibration is not None else None

    def kept(self, precision: Precision) -> Output:
        """Find the layers that a precision costs most, and leave as few of them high as its gates need."""
        spec, files = self.recipe.precision.calibration, self.files.calibration
        if spec is None or files is None:
            raise ValueError(f"{precision}: there is no calibration data")
        measure, toolchain = self.measure("graph")
        given = self.recipe.acceptance
        step = self.steps.add(
            self.id("sensitivity", precision),
            params={
                "precision": precision,
                "keep": self.recipe.precision.keep_globs,
                "io": self.recipe.precision.io,
                "bounds": dict(parity_bounds(given, precision)),
                "gate": metric_gate(given),
                "measure": measure,
            },
            inputs=[
                *graph_files(self.simplify),
                self.calibrate(precision, spec, files),
                *([self.outliers] if precision in FLOAT16 else []),
                self.reference,
                *self.labelled,
                *self.held_out(precision),
            ],
            toolchain=self.versions("onnx", "onnxruntime", "numpy") | toolchain,
        )
        return Output(step, "keep.json")

    def typed(self, precision: Precision) -> Step:
        """Write the precision into the graph."""
        inputs = graph_files(self.simplify)
        spec, files = self.recipe.precision.calibration, self.files.calibration
        if precision in QUANTIZED and spec is not None and files is not None:
            inputs.append(self.calibrate(precision, spec, files))
        if precision in FLOAT16:
            inputs.append(self.outliers)
        if precision in QUANTIZED and self.recipe.precision.keeps_auto:
            inputs.append(self.kept(precision))
        full = precision in ("fp32", "tf32")
        params = {
            "precision": "fp32" if full else precision,
            "keep": [] if full else self.recipe.precision.keep_globs,
            "io": "float32" if full else self.recipe.precision.io,
            **({"structure": True} if may_refit(self.recipe) else {}),
        }
        # tf32 is a flag of the compiler: its graph is the fp32 one.
        name = "fp32" if full else precision
        return self.steps.add(
            self.id("type", name), params=params, inputs=inputs, toolchain=self.versions("onnx", "onnxruntime")
        )

    def verify(
        self,
        step_id: str,
        subject: str,
        graph: Step,
        *,
        tf32: bool = False,
        plan_name: str = "model.onnx",
        executor: Mapping[str, Any] | None = None,
        device: Mapping[str, Any] | None = None,
        plugins: Sequence[Output] = (),
        precision: Precision | None = None,
    ) -> Step:
        """Measure one graph's (or plan's) parity with the source, and the recipe's metric on the held-out data.

        `precision` is what it was typed or built as: where there is no labelled data, int8 and fp8 are measured on held-out
        calibration samples too. `tf32` rounds as an engine may that is allowed TF32, since the graph of one is the fp32 graph. A plan is run by its own runtime: `executor` has the parameters of that, `device` what it runs with and on, `plugins` the libraries it needs.
        """
        params, own = self.measure(subject)
        params |= {**({"tf32": True} if tf32 else {}), **(executor or {})}
        toolchain = self.versions("onnx", "onnxruntime", "numpy") if device is None else self.versions("numpy")
        toolchain |= {**(device or {}), **own}
        inputs = [*graph_files(graph, plan_name), *plugins, self.reference, *self.labelled, *self.held_out(precision)]
        return self.steps.add(step_id, params=params, inputs=inputs, toolchain=toolchain)

    def measure(self, subject: str) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the parameters of a comparison with the source, and the versions that its metric depends on."""
        metric, own = self.metric, self.files.metric
        params: dict[str, Any] = {
            "subject": subject,
            "executor": "onnxruntime",
            "batch": self.evaluation_batch,
            "metric": None,
            "tensors": self.interface,
            **(self._custom if subject == "graph" else {}),
        }
        if metric is None:
            return params, {}
        params["metric"] = {
            "name": metric.name if own is None else "callable",
            "entry": own.entry if own is not None else None,
            "label": metric.labels,
            "output": metric.output,
        }
        counted_by = {"cer": "rapidfuzz", "map": "pycocotools"}
        packages = [*(own.packages if own is not None else ())]
        packages += [counted_by[metric.name]] if metric.name in counted_by else []
        return params, self.versions(*packages)

    def benchmark(
        self,
        step_id: str,
        engine: Sequence[Output],
        gate: Step,
        *,
        executor: Mapping[str, Any],
        device: Mapping[str, Any],
        compare: Sequence[str],
    ) -> Step:
        """Time an engine that passed `gate`, and beside it the source (`compare`), in one run on one device.

        `executor` has the parameters of what runs the engine, `device` what it runs with and on. What is compared enters
        only where it is asked for: the source's files in a folder `source`, its simplified graph in a folder `graph`.
        """
        asked = self.recipe.benchmark or Benchmark.model_construct()
        params: dict[str, Any] = {
            **executor,
            "cases": benchmark_cases(self.recipe),
            "tensors": self.tensors,
            "input_seed": 2,
            "seconds": asked.seconds,
            "compare": list(compare),
        }
        inputs, toolchain = list(engine), {**self.versions("numpy"), **device}
        if "onnxruntime" in compare:
            inputs += graph_files(self.simplify, folder="graph")
            toolchain |= self.versions("onnxruntime", "onnxruntime-gpu")
        if any(name.startswith("torch") for name in compare):
            params["source"] = self.source_params()
            inputs += [replace(output, folder="source") for output in self.source_files]
            toolchain |= self._source_toolchain("torch")
        return self.steps.add(step_id, params=params, inputs=inputs, toolchain=toolchain, gates=[gate])


def saved_files(step: Step) -> list[Output]:
    """Return the files of a saved source model, which names them when it has run: one, or a graph and its weights."""
    return [Output(step, name) for name in (sorted(step.record.outputs) if step.record is not None else ("model",))]


def interface_of(inputs: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return inputs as stages get them that do not draw any."""
    return {name: {"dtype": tensor.dtype, "shape": tensor.shape} for name, tensor in inputs.items()}


def graph_files(step: Step, name: str = "model.onnx", folder: str = "") -> list[Output]:
    """Return the files of the graph (or plan) that a step makes: one, and its external data where it has any."""
    data = f"{name}.data"
    has_data = step.record is not None and data in step.record.outputs
    return [Output(step, name, folder), *([Output(step, data, folder)] if has_data else [])]
