"""Recipe schema, version 1: strict, frozen, and the only description of what a recipe may say.

Every rule that needs one value is a constraint of its field here; rules over several values are in `rules`, and the
loader adds file and line to both. Paths are relative to the file that states them, and use `/`.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

SCHEMA_VERSION: Final = 1

NAME_PATTERN: Final = r"^[a-z0-9][a-z0-9._-]{0,62}$"
AXIS_PATTERN: Final = r"^[a-z][a-z0-9_]*$"
SHA256_PATTERN: Final = r"^[0-9a-f]{64}$"
CODE_PATTERN: Final = r"^[^:]+\.py:[A-Za-z_][A-Za-z0-9_]*$"
SIZE_PATTERN: Final = r"^[1-9][0-9]{0,8}(MiB|GiB)$"
PART_PATTERN: Final = r"^[a-z][a-z0-9_-]{0,30}$"
IDENTIFIER_PATTERN: Final = r"^[A-Za-z_][A-Za-z0-9_]*$"
DURATION_PATTERN: Final = r"^[1-9][0-9]{0,8}[smh]$"

Precision = Literal["fp32", "tf32", "fp16", "bf16", "fp8", "fp8-fp16", "int8", "int8-fp16", "int8-dynamic"]
# `auto` stands for the fastest of several that passes its gates; it is asked for alone, and never given.
Asked = Literal["fp32", "tf32", "fp16", "bf16", "fp8", "fp8-fp16", "int8", "int8-fp16", "int8-dynamic", "auto"]
Runtime = Literal["tensorrt-rtx", "tensorrt", "onnxruntime"]
Contender = Literal["torch", "torch-fp16", "torch-compile", "onnxruntime"]
DType = Literal["float32", "float16", "int64", "int32", "bool", "uint8", "int8"]
DeviceClass = Literal["data-center", "workstation", "jetson"]
TacticSource = Literal["cublas", "cublas-lt", "cudnn", "edge-mask-convolutions", "jit-convolutions"]
Sha256 = Annotated[str, Field(pattern=SHA256_PATTERN)]
Axis = Annotated[str, Field(pattern=AXIS_PATTERN)]
Extent = Annotated[int, Field(ge=1, le=1 << 31)]
Range = Annotated[list[Extent], Field(min_length=3, max_length=3)]
RelativePath = Annotated[str, Field(min_length=1, max_length=400)]
CodeReference = Annotated[str, Field(pattern=CODE_PATTERN)]

# What each runtime can build for, and in which precision. TensorRT-RTX: facts/tensorrt.md sections 1 and 2
# (its ComputeCapability enum, and the builds that were tried); fp32 GEMM and bf16 do not compile for sm75.
GPUS: Final[dict[str, tuple[str, ...]]] = {
    "tensorrt-rtx": ("sm75", "sm80", "sm86", "sm89", "sm120", "sm121"),
    "tensorrt": ("sm75", "sm80", "sm86", "sm87", "sm89", "sm90", "sm100", "sm103", "sm110", "sm120", "sm121"),
    "onnxruntime": ("cpu",),
}
PRECISIONS: Final[dict[str, tuple[Precision, ...]]] = {
    "tensorrt-rtx": ("fp32", "tf32", "fp16", "bf16", "fp8", "fp8-fp16", "int8", "int8-fp16"),
    "tensorrt": ("fp32", "tf32", "fp16", "bf16", "fp8", "fp8-fp16", "int8", "int8-fp16"),
    "onnxruntime": ("fp32", "fp16", "int8", "int8-fp16", "int8-dynamic"),
}
# How much of fp32 a precision keeps. fp16 and bf16 trade range for digits, so neither is above the other.
EXACTNESS: Final[dict[Precision, int]] = {
    "int8": 0, "int8-fp16": 0, "int8-dynamic": 0, "fp8": 0, "fp8-fp16": 0, "fp16": 1, "bf16": 1, "tf32": 2, "fp32": 3
}  # fmt: skip
# Those that need calibrated ranges: Q/DQ pairs in an fp32 graph, or in a half one.
INT8: Final[tuple[Precision, ...]] = ("int8", "int8-fp16")
FP8: Final[tuple[Precision, ...]] = ("fp8", "fp8-fp16")
# Those whose other nodes compute in float16, which ends at 65504.
FLOAT16: Final[tuple[Precision, ...]] = ("fp16", "int8-fp16", "fp8-fp16")
QUANTIZED: Final[tuple[Precision, ...]] = (*INT8, *FP8)


class Model(BaseModel):
    """Base of every part of a recipe: unknown keys are faults, nothing is coerced, nothing changes later."""

    # Deferred: building every part on its own, besides within Recipe, costs 40 ms at start-up.
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, defer_build=True)


class FileReference(Model):
    """A file by path (relative to the recipe) or `s3://` address; a remote one needs its digest."""

    file: RelativePath = Field(description="Path relative to the recipe, or s3://bucket/key.")
    sha256: Sha256 | None = Field(default=None, description="SHA-256 of the file; a mismatch stops the build.")

    @model_validator(mode="after")
    def _remote_needs_digest(self) -> FileReference:
        if self.file.startswith("s3://") and self.sha256 is None:
            raise ValueError("a remote file needs its sha256 (planning reads no network)")
        return self


class TorchSource(Model):
    """A PyTorch module, returned by a callable of the recipe's own code."""

    framework: Literal["torch"] = Field(description="PyTorch.")
    model: CodeReference = Field(description="file.py:callable, relative to the recipe; it returns a torch.nn.Module.")
    arguments: dict[str, Any] = Field(
        default_factory=dict, description="Keyword arguments of the callable (JSON values)."
    )
    weights: FileReference | None = Field(
        default=None, description="Weights: .safetensors, or a .pt/.pth read with weights_only=True."
    )
    include: list[RelativePath] = Field(
        default_factory=list,
        description="Further files the code reads or imports dynamically, as globs relative to the recipe.",
    )
    seed: int = Field(default=0, ge=0, description="Seed of the initialisation, for models without a weights file.")


class OnnxSource(Model):
    """An ONNX file; external data beside it is found and taken along."""

    framework: Literal["onnx"] = Field(description="An ONNX graph.")
    model: FileReference = Field(description="The graph; it stands for its external data too.")


class PaddleSource(Model):
    """A PaddlePaddle model: a Layer that a callable of the recipe's code returns, or a static graph that was saved."""

    framework: Literal["paddle"] = Field(description="PaddlePaddle.")
    model: CodeReference | None = Field(
        default=None,
        description="file.py:callable, relative to the recipe; it returns a paddle.nn.Layer after its eval().",
    )
    arguments: dict[str, Any] = Field(
        default_factory=dict, description="Keyword arguments of the callable (JSON values)."
    )
    weights: FileReference | None = Field(
        default=None, description="Weights: .safetensors, or a .pdparams that holds arrays and nothing else."
    )
    include: list[RelativePath] = Field(
        default_factory=list,
        description="Further files the code reads or imports dynamically, as globs relative to the recipe.",
    )
    seed: int = Field(default=0, ge=0, description="Seed of the initialisation, for models without a weights file.")
    graph: FileReference | None = Field(
        default=None, description="Instead of a callable: .json (Paddle 3) or .pdmodel (Paddle 2), of paddle.jit.save."
    )
    params: FileReference | None = Field(
        default=None, description="The graph's weights; default: the .pdiparams of its name beside it."
    )


Source = Annotated[TorchSource | PaddleSource | OnnxSource, Field(discriminator="framework")]


Rewrite = Literal["drop-moves", "plain-softmax", "fold-scales", "merge-projections", "decompose-layernorm"]


class Export(Model):
    """How the source becomes one simplified fp32 ONNX graph."""

    opset: int | None = Field(
        default=None, ge=11, le=23, description="ONNX opset; default 18 for torch and paddle, unchanged for onnx."
    )
    exporter: Literal["dynamo", "torchscript"] = Field(
        default="dynamo", description="Which PyTorch exporter: dynamo writes opset 18 and later, torchscript any."
    )
    simplifier: Literal["onnxsim", "onnxslim", "none"] = Field(
        default="onnxsim", description="What folds and fuses the graph; its result is compared with the exported one."
    )
    rewrites: list[Rewrite] | None = Field(
        default=None,
        description="What brings the graph into forms that compilers fuse; default [drop-moves, plain-softmax], [] without a simplifier.",
    )


class Tensor(Model):
    """One input of the model."""

    dtype: DType = Field(default="float32", description="Type of the elements, as the source takes them.")
    shape: list[Extent | Axis] = Field(min_length=0, max_length=8, description="Sizes, or names of dynamic axes.")
    low: float | None = Field(
        default=None, description="Least value of the seeded inputs used for parity (default -1, or 0 for integers)."
    )
    high: float | None = Field(
        default=None, description="Greatest value of the seeded inputs used for parity (default 1)."
    )


class ImageFolder(Model):
    """How a folder of images becomes an array NCHW float32."""

    size: Annotated[list[Extent], Field(min_length=2, max_length=2)] = Field(description="[height, width] in pixels.")
    resize: Literal["stretch", "shorter-side-crop", "letterbox"] = Field(
        default="stretch", description="How an image of another shape is brought to the size."
    )
    color: Literal["rgb", "bgr", "gray"] = Field(default="rgb", description="Order of the channels; gray has one.")
    scale: float = Field(default=1.0 / 255.0, gt=0, description="Pixels are multiplied by this, then normalised.")
    mean: list[float] = Field(
        default_factory=lambda: [0.0], description="Subtracted after scaling: one number, or one for each channel."
    )
    std: list[float] = Field(
        default_factory=lambda: [1.0], description="Divided by after that: one number, or one for each channel."
    )
    input: str | None = Field(default=None, description="Which input the images are; default: the only one.")


class Dataset(Model):
    """Samples: an .npz, a folder of .npy/.npz (one sample each), a folder of images, or a Python callable."""

    data: RelativePath = Field(description="Path relative to the recipe, or file.py:callable.")
    sha256: Sha256 | None = Field(default=None, description="SHA-256 of a single-file set.")
    arguments: dict[str, Any] = Field(
        default_factory=dict, description="Keyword arguments of a callable (JSON values)."
    )
    include: list[RelativePath] = Field(
        default_factory=list,
        description="Further files that a callable reads or imports dynamically, as globs relative to the recipe.",
    )
    fields: dict[str, str] = Field(
        default_factory=dict, description="Input (or label) name -> array name, where they differ."
    )
    images: ImageFolder | None = Field(default=None, description="Preprocessing, for a folder of images.")
    samples: int | None = Field(default=None, ge=1, description="How many samples to take; default all.")
    order: Literal["sequential", "shuffled"] = Field(
        default="sequential", description="Which ones: the first, or a seeded choice."
    )
    seed: int = Field(default=0, ge=0, description="Seed of the shuffled order.")


class Calibration(Dataset):
    """Representative inputs for int8 ranges; real data, never the held-out set of the gate."""

    method: Literal["entropy", "minmax", "percentile"] = Field(
        default="entropy", description="How the range of a tensor is found from its values."
    )
    percentile: float = Field(
        default=99.99, gt=50.0, le=100.0, description="Part of the values, in percent, that the range holds."
    )
    batch: int = Field(default=8, ge=1, description="Samples in one calibration run; memory grows with it.")


def _listed(value: Any) -> Any:
    return [value] if value == "auto" else value


def _or_auto(schema: dict[str, Any]) -> None:
    """Let editors know that the word `auto` may stand in place of the list; each rule holds for one of the types alone."""
    choices = schema.pop("anyOf", None)
    for choice in choices or ():
        schema.update({name: value for name, value in choice.items() if name != "type"})
    schema["type"] = ["array", "string", *(["null"] if choices else [])]
    schema["pattern"] = "^auto$"


# `auto` may stand among globs too: what they match is kept, and what else has to be is found.
KeepList = Annotated[list[str], BeforeValidator(_listed)]
AskedList = Annotated[list[Asked], BeforeValidator(_listed)]


class PrecisionPlan(Model):
    """Which precisions to build, how ranges are found, and what gives way to what."""

    build: AskedList = Field(
        default=["fp32"],
        min_length=1,
        description="Most wanted first; auto: the fastest of the candidates that passes its gates.",
        json_schema_extra=_or_auto,
    )
    candidates: list[Precision] | None = Field(
        default=None, min_length=1, description="What auto tries, in order; default: all that a target can have."
    )
    optimization_levels: list[Annotated[int, Field(ge=0, le=5)]] | None = Field(
        default=None, min_length=1, description="Levels of the compiler that auto tries each candidate at."
    )
    budget: str | None = Field(
        default=None,
        pattern=DURATION_PATTERN,
        description="How long one build looks for the fastest; default: no limit.",
    )
    fallback: dict[Precision, list[Precision]] = Field(
        default_factory=dict, description="What takes a precision's place, in order, when its gate fails."
    )
    keep: KeepList = Field(
        default_factory=list,
        description="Name globs of ONNX nodes that stay fp32; auto: those that int8 or fp8 costs most, as few as the gates need.",
        json_schema_extra=_or_auto,
    )
    io: Literal["float32", "native"] = Field(default="float32", description="Type of float inputs and outputs.")
    calibration: Calibration | None = Field(default=None, description="The data that int8 ranges are found on.")
    int8: Literal["qdq", "calibrator"] = Field(
        default="qdq",
        description="qdq: ranges in the graph, for every runtime; calibrator: TensorRT 8.6's and 10's own (tensorrt only).",
    )

    @property
    def keep_globs(self) -> list[str]:
        """What of `keep` names nodes."""
        return [glob for glob in self.keep if glob != "auto"]

    @property
    def keeps_auto(self) -> bool:
        """Whether the layers that int8 and fp8 leave high are to be found."""
        return "auto" in self.keep

    @field_validator("build", "candidates", "optimization_levels")
    @classmethod
    def _unique(cls, value: list[Any] | None) -> list[Any] | None:
        if value is not None and len(set(value)) != len(value):
            raise ValueError("the same precision is named twice")
        return value


class Parity(Model):
    """Largest distance from the source framework's outputs, over every output: on seeded inputs and the metric's data.

    For int8, where there is labelled data, it holds on that alone: seeded inputs leave the calibrated ranges.
    """

    relative_l2: float | None = Field(default=None, gt=0, description="Greatest |y - x| / |x| (Euclidean norms).")
    max_abs: float | None = Field(default=None, gt=0, description="Greatest absolute difference of one element.")
    cosine: float | None = Field(default=None, ge=-1, le=1, description="Least cosine similarity.")


class Metric(Model):
    """The recipe's own measure on labelled, held-out data, and how much of it may be lost."""

    name: str = Field(
        description="top1, exact-match, cer, map, or file.py:callable taking (outputs, labels) and returning a float."
    )
    data: Dataset = Field(description="Labelled data that calibration and training have not seen.")
    labels: str = Field(default="label", description="Array of the data set that holds the labels.")
    output: str | None = Field(default=None, description="Which output is judged; default: the first.")
    better: Literal["higher", "lower"] | None = Field(
        default=None, description="Which values are good; default: lower for cer, higher for all others."
    )
    floor: float | None = Field(default=None, description="Least acceptable value, where higher is better.")
    ceiling: float | None = Field(default=None, description="Greatest acceptable value, where lower is better.")
    max_drop: float | None = Field(default=None, ge=0, description="Largest acceptable loss from the source framework.")

    @property
    def lower_is_better(self) -> bool:
        """Whether it is a rate of errors."""
        return (self.better or ("lower" if self.name == "cer" else "higher")) == "lower"


class Together(Metric):
    """What the parts of a model do together, run one after the other by the recipe's own code, on labelled data."""

    run: CodeReference = Field(
        description="file.py:callable taking (parts, inputs): parts['NAME'](input=array) returns arrays by output name, "
        "inputs has one batch; it returns arrays by output name, with one row for each sample."
    )
    inputs: dict[str, Tensor] = Field(min_length=1, description="What the callable is given: name -> type and shape.")


class Acceptance(Model):
    """Gates: a precision that fails one is not published."""

    parity: dict[Precision, Parity] = Field(default_factory=dict, description="Overrides of the defaults by precision.")
    metric: Metric | None = Field(default=None, description="A gate on labelled data.")
    together: Together | None = Field(
        default=None,
        description="A gate on what the parts of a model do together; where it fails, the least exact part gives way.",
    )


class PartPrecision(Model):
    """What one part is built in, where that differs from what the engine is asked in; the rest is the recipe's."""

    build: dict[Precision, Precision] = Field(
        default_factory=dict, description="Precision that the engine is asked in -> what this part is built in instead."
    )
    fallback: dict[Precision, list[Precision]] | None = Field(
        default=None, description="Instead of precision.fallback, for this part alone."
    )
    keep: KeepList | None = Field(default=None, description="Instead of precision.keep.", json_schema_extra=_or_auto)
    io: Literal["float32", "native"] | None = Field(default=None, description="Instead of precision.io.")
    calibration: Calibration | None = Field(
        default=None, description="The data that this part's int8 ranges are found on."
    )


class Part(Model):
    """One graph of a model that becomes several: what it says stands before what the recipe says."""

    source: Source | None = Field(
        default=None,
        description="Where this part comes from, instead of the recipe's source: a file or model of its own.",
    )
    module: Annotated[str, Field(pattern=IDENTIFIER_PATTERN)] | None = Field(
        default=None,
        description="Callable in the file of source.model that takes the model, and returns the module to export; "
        "default: the model's attribute of the part's name, or the model itself where the part has its own source.",
    )
    inputs: dict[str, Tensor] = Field(
        min_length=1, description="Input name -> type and shape: the names of forward's parameters."
    )
    outputs: list[str] = Field(min_length=1, description="Names of the outputs, in order.")
    profiles: dict[str, dict[Axis, Range]] | None = Field(
        default=None, description="As for a recipe; default: the recipe's, for the axes that this part has."
    )
    export: Export | None = Field(default=None, description="Instead of the recipe's.")
    precision: PartPrecision | None = Field(default=None, description="What differs from the recipe's.")
    acceptance: Acceptance | None = Field(
        default=None, description="This part's own gates; parity bounds that it does not state are the recipe's."
    )


class Plugin(Model):
    """A shared library of TensorRT plugins: code that runs in the compiler and wherever the engine does."""

    file: RelativePath = Field(description="Path relative to the recipe, or s3://bucket/key.")
    sha256: Sha256 = Field(description="SHA-256 of the library: what is not named by its digest is not loaded.")


class Pinned(Model):
    """A file that an earlier build made, by its digest."""

    file: RelativePath = Field(description="Path relative to the recipe, or s3://bucket/key.")
    sha256: Sha256 = Field(description="SHA-256 of the file.")


class Dla(Model):
    """The deep learning accelerator of a Jetson, which takes layers off the GPU."""

    core: int = Field(default=0, ge=0, le=7, description="Which of the accelerator's cores.")
    gpu_fallback: bool = Field(default=True, description="Whether layers that it cannot run may run on the GPU.")


class Options(Model):
    """Options of the compiler, for every target, or for one that states its own."""

    device_class: DeviceClass = Field(
        default="data-center",
        description="How much scratch memory there is by default: all, or 2GiB (workstation), 256MiB (jetson).",
    )
    workspace: str | None = Field(default=None, pattern=SIZE_PATTERN, description="Scratch memory on the GPU.")
    optimization_level: int | None = Field(
        default=None, ge=0, le=5, description="How long the compiler searches; default: its own."
    )
    typing: Literal["strong", "weak"] = Field(
        default="strong",
        description="weak: the compiler gets the fp32 graph, and may lower any part of it (tensorrt 8.6 and 10 only).",
    )
    sparsity: bool = Field(
        default=False, description="Whether kernels for 2:4 sparse weights are tried (tensorrt only)."
    )
    tactic_sources: list[TacticSource] | None = Field(
        default=None, description="Where kernels may come from; default: what the version takes (tensorrt only)."
    )
    hardware_compatibility: Literal["none", "ampere+", "same-compute-capability"] = Field(
        default="none", description="Which other GPUs an engine may run on, at a cost in speed (tensorrt only)."
    )
    version_compatible: bool = Field(
        default=False, description="Whether later TensorRT versions may load the engine (tensorrt only)."
    )
    refit: Literal["none", "weights", "stripped"] = Field(
        default="none",
        description="Whether new weights may be put into the engine; stripped: it is stored without any (tensorrt only).",
    )
    weight_streaming: bool = Field(
        default=False,
        description="Whether weights may stay in host memory, and come when they are needed (tensorrt 10 and later).",
    )
    auxiliary_streams: int | None = Field(
        default=None, ge=0, le=64, description="Most streams beside the caller's that one run may use (tensorrt only)."
    )
    plugins: list[Plugin] = Field(
        default_factory=list, description="Libraries of operators that TensorRT lacks (tensorrt only)."
    )
    timing_cache: Pinned | None = Field(
        default=None,
        description="What TensorRT measured for an earlier build, in place of what the store holds (tensorrt only).",
    )
    reproducible: bool = Field(
        default=False,
        description="Choose the same kernels again: those of timing_cache; without one, record it (tensorrt only).",
    )
    layers: Pinned | None = Field(
        default=None, description="The layers.json of an earlier build, which the engine's must equal (tensorrt only)."
    )
    dla: Dla | None = Field(default=None, description="Run on a Jetson's accelerator (tensorrt for sm87 only).")


class Target(Model):
    """What engines are for. `gpus` names compute capabilities; `onnxruntime` takes [cpu]."""

    runtime: Runtime = Field(description="What executes the engine.")
    gpus: list[str] = Field(
        default_factory=lambda: ["cpu"], min_length=1, description="Compute capabilities, such as sm89, or cpu."
    )
    version: str | None = Field(
        default=None, description="Full runtime version; default: the one installed where it compiles."
    )
    precision: AskedList | None = Field(
        default=None, description="Instead of precision.build.", json_schema_extra=_or_auto
    )
    build: Options | None = Field(default=None, description="Options of the compiler that differ from build.")
    fallback: Literal["onnx", "source", "none"] | None = Field(
        default=None, description="Instead of the recipe's: what is served where this target's engine cannot be built."
    )


class Build(Options):
    """Options of the compiler, and limits of its process."""

    timeout: str = Field(default="60m", pattern=DURATION_PATTERN, description="Time limit of each stage.")
    memory: str = Field(default="16GiB", pattern=SIZE_PATTERN, description="Memory limit of each stage's process.")


class Benchmark(Model):
    """How fast the engine is, measured where it can be executed, beside what people would use instead."""

    batches: list[Extent] | None = Field(
        default=None,
        min_length=1,
        description="Sizes of the batch axis, each measured in every profile that admits it; default: opt of each.",
    )
    compare: list[Contender] = Field(
        default_factory=list, description="What is measured beside the engine in the same run, where it is installed."
    )
    seconds: float = Field(
        default=5.0, gt=0, le=600, description="Time limit of measuring one shape in one way, warm-up included."
    )

    @field_validator("batches", "compare")
    @classmethod
    def _unique(cls, value: list[Any] | None) -> list[Any] | None:
        if value is not None and len(set(value)) != len(value):
            raise ValueError("the same one is named twice")
        return value


class Publish(Model):
    """Where engines go besides the store that the build uses."""

    to: str | None = Field(
        default=None, description="Another store: a folder relative to the recipe, or s3://bucket/prefix."
    )


class Recipe(Model):
    """One model: where it comes from, what must stay true of it, and which engines it becomes."""

    enginery: Literal[1] = Field(description="Version of the recipe schema.")
    name: str = Field(pattern=NAME_PATTERN, description="Name of the model: engines are published under it.")
    description: str = Field(default="", description="What the model does, for people; no key depends on it.")
    source: Source = Field(description="Where the model comes from. Not needed where every part states its own.")
    export: Export = Field(default_factory=Export, description="How it becomes an ONNX graph.")
    parts: dict[Annotated[str, Field(pattern=PART_PATTERN)], Part] = Field(
        default_factory=dict,
        description="Part name -> one graph of the model; they are published as one engine. Instead of inputs and outputs.",
    )
    inputs: dict[str, Tensor] = Field(
        default_factory=dict,
        description="Input name -> type and shape; for torch and paddle the names of forward's parameters. "
        "Required without parts.",
    )
    outputs: list[str] | None = Field(
        default=None, description="Names of the outputs, in order; required for torch and paddle."
    )
    profiles: dict[str, dict[Axis, Range]] = Field(
        default_factory=dict,
        description="Profile name -> dynamic axis -> [min, opt, max]; the compiler gets them by name.",
    )
    precision: PrecisionPlan = Field(default_factory=PrecisionPlan, description="Which number formats, and how.")
    acceptance: Acceptance = Field(default_factory=Acceptance, description="What must hold before publishing.")
    targets: list[Target] = Field(min_length=1, description="What engines are built for.")
    build: Build = Field(default_factory=Build, description="Options and limits of the build.")
    benchmark: Benchmark | None = Field(default=None, description="Whether speed is measured; default: it is not.")
    fallback: Literal["onnx", "source", "none"] = Field(
        default="none",
        description="What is published for targets whose engine cannot be built: onnx, the fp32 graph for ONNX Runtime with its "
        "providers; source, the model as its framework runs it without the recipe's code.",
    )
    driver: Literal["ignore", "branch", "exact"] = Field(default="branch", description="Which driver changes rebuild.")
    publish: Publish = Field(default_factory=Publish, description="Where engines go.")

    @model_validator(mode="before")
    @classmethod
    def _source_of_parts(cls, document: Any) -> Any:
        """Where every part has a source of its own, the first one's stands for the recipe's: nothing is made of it."""
        parts = document.get("parts") if isinstance(document, dict) and "source" not in document else None
        found = (
            [part.get("source") for part in parts.values() if isinstance(part, dict)] if isinstance(parts, dict) else []
        )
        return {**document, "source": found[0]} if found and all(found) and len(found) == len(parts or ()) else document

    @property
    def has_own_sources(self) -> bool:
        """Whether every part states where it comes from, so that the recipe's source is nobody's."""
        return bool(self.parts) and all(part.source is not None for part in self.parts.values())

    @property
    def axes(self) -> tuple[str, ...]:
        """Names of the dynamic axes, in the order in which the inputs name them."""
        names = (axis for tensor in self.inputs.values() for axis in tensor.shape if isinstance(axis, str))
        return tuple(dict.fromkeys(names))


def size_bytes(text: str) -> int:
    """Turn `512MiB` or `4GiB` into bytes."""
    match = re.fullmatch(r"([0-9]+)(MiB|GiB)", text)
    if match is None:
        raise ValueError(f"{text!r} is not a size (write 512MiB or 4GiB)")
    return int(match[1]) << (20 if match[2] == "MiB" else 30)


def duration_seconds(text: str) -> int:
    """Turn `90s`, `30m` or `2h` into seconds."""
    match = re.fullmatch(r"([0-9]+)([smh])", text)
    if match is None:
        raise ValueError(f"{text!r} is not a duration (write 90s, 30m or 2h)")
    return int(match[1]) * {"s": 1, "m": 60, "h": 3600}[match[2]]


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema (2020-12) of a recipe file, for editors.

    It covers what a YAML language server can check: keys, types, bounds and the words that are allowed. `include` is
    part of it, since files state it. It holds for whole recipes, and not for bases, which may leave anything out.
    """
    schema = Recipe.model_json_schema()
    schema["properties"]["include"] = {
        "description": "Shared bases, relative to this file; later ones win, and this file wins over all of them.",
        "anyOf": [
            {"type": "string", "minLength": 1},
            {"type": "array", "items": {"type": "string", "minLength": 1}},
        ],
        "title": "Include",
    }
    schema["properties"]["enginery"]["type"] = "integer"
    schema["required"] = [name for name in schema["required"] if name != "source"]
    schema["anyOf"] = [{"required": ["source"]}, {"required": ["parts"]}]
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": f"urn:enginery:recipe:{SCHEMA_VERSION}",
        **schema,
        "title": f"Enginery recipe, version {SCHEMA_VERSION}",
    }
