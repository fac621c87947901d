"""Manifest, versions 1 to 3: what an engine is, what it may run on, where it came from, what was measured.

Written once, strictly, beside the engine's files; read for ever: within a version, keys that this
release does not know are ignored, so a constraint that a reader must not ignore needs a new version.
Version 2 is written for engines of several graphs alone: each is described under `parts`, as version 1
describes an engine, and a reader of version 1 must not take one of them for the whole. Version 3 is
written for fallbacks alone, which a reader must not take for engines; they may have parts, too.
Names, never numbers, stand for precisions, types and GPUs. See docs/manifest.md.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Final, Literal, NoReturn, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from artifacts.errors import IntegrityError
from artifacts.refs import ArtifactRef
from artifacts.store import is_relative_path

MANIFEST_SCHEMA: Final = 1
PARTS_SCHEMA: Final = 2
FALLBACK_SCHEMA: Final = 3
EXPORTED_PROGRAM: Final = "exported program"
MANIFEST_NAME: Final = "manifest.json"

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+-]{0,126}$")]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Size = Annotated[int, Field(ge=0)]
Seconds = Annotated[float, Field(ge=0)]
Instant = Annotated[
    str,
    Field(
        pattern=r"^[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}(\.[0-9]+)?Z$", description="RFC 3339, in UTC."
    ),
]
Extents = tuple[Annotated[int, Field(ge=0)], ...]


class Part(BaseModel):
    """Base of every part: nothing is coerced, nothing changes later, no NaN; unknown keys are ignored."""

    model_config = ConfigDict(extra="ignore", strict=True, frozen=True, allow_inf_nan=False)


PartT = TypeVar("PartT", bound=Part)


class Identity(Part):
    """Which engine this is; the three names are its path in a store."""

    recipe: Name
    target: Name = Field(description="Runtime, its version, and GPU: tensorrt-rtx-1.7.1.116-sm89.")
    build: Name = Field(description="Precision and the first 16 digits of the publish action's key.")
    created: Instant

    def __str__(self) -> str:
        return f"{self.recipe}/{self.target}/{self.build}"


class DeviceFacts(Part):
    """The GPU that an engine was compiled on, as TensorRT compares it when it loads a plan; null: not known.

    Source: developer guide, "Engine Compatibility"; on another device of the compute capability the plan may be slow, fail
    or hang. Sizes are in bytes.
    """

    name: str | None = None
    memory_bytes: int | None = None
    sm_count: int | None = Field(default=None, description="Streaming multiprocessors.")
    bus_width_bits: int | None = None
    l2_bytes: int | None = None
    shared_memory_per_block: int | None = None
    shared_memory_per_block_optin: int | None = None
    shared_memory_per_sm: int | None = None
    texture_alignment: int | None = None
    integrated: bool | None = None
    ecc: bool | None = None


class Compatibility(Part):
    """What may load the engine. Facts: TensorRT developer guide, engine compatibility."""

    runtime: str = Field(description="tensorrt-rtx, tensorrt or onnxruntime.")
    runtime_version: str = Field(description="The full version; an engine loads on this very one.")
    gpus: Annotated[tuple[str, ...], Field(min_length=1)] = Field(description="Compute capabilities (sm89), or cpu.")
    os: str
    arch: str
    driver_minimum: str | None = Field(default=None, description="Least driver version, where one is known.")
    device: DeviceFacts | None = Field(
        default=None, description="What a GPU must be like besides; null: any of the compute capability."
    )
    plugins: tuple[Name, ...] = Field(
        default=(), description="Which of the files are plugin libraries, to be loaded before the plan."
    )
    dla_core: int | None = Field(default=None, description="Core of the accelerator that the plan was made for.")


class FileEntry(Part):
    """One file of the engine."""

    digest: Digest = Field(description="SHA-256.")
    size: Size = Field(description="Bytes.")
    media_type: str

    @property
    def ref(self) -> ArtifactRef:
        """The file's reference."""
        return ArtifactRef(self.digest, self.size, self.media_type)


class TensorFacts(Part):
    """One input or output: its element type, and its sizes or names of dynamic axes."""

    dtype: str
    shape: tuple[int | str | None, ...] | None = Field(description="null: not known; an axis may be unknown too.")


class Corners(Part):
    """Shapes of one input in one profile."""

    min: Extents
    opt: Extents
    max: Extents


class Profile(Part):
    """One optimisation profile: the shapes that the engine accepts, and the one it is fastest at."""

    name: str
    inputs: dict[str, Corners]


class Refused(Part):
    """A precision that was tried and did not pass its gates."""

    precision: str
    reasons: tuple[str, ...]


class CandidateFacts(Part):
    """One way to build the engine that was considered, where the fastest was asked for."""

    name: str = Field(description="Precision, and the optimisation level where several were tried: fp16-o5.")
    precision: str
    optimization_level: int | None
    passed: bool | None = Field(description="null: it was not tried, for the reason given.")
    reasons: tuple[str, ...]
    p50_ms: float | None = Field(description="Geometric mean of the p50 latency over the cases; null: not measured.")
    graph: bool | None = Field(description="Whether that is with a CUDA graph.")
    chosen: bool


class QuantizedFacts(Part):
    """How much is int8 or fp8; null: not known (engines are listed by the runtime tensorrt alone)."""

    nodes: int | None = Field(description="Nodes of the typed graph that take Q/DQ pairs.")
    of_nodes: int | None = Field(description="Its convolutions and matrix products.")
    layers: int | None = Field(default=None, description="Layers of the engine that multiply in int8 or fp8.")
    of_layers: int | None = Field(default=None, description="All of its layers that multiply.")


class PrecisionFacts(Part):
    """The precision that was asked for, the one that was given, and what became of those between."""

    asked: str
    given: str
    wish: tuple[str, ...] = Field(description="The recipe's precisions for this target, most wanted first.")
    tried: tuple[Refused, ...]
    kept: tuple[str, ...] = Field(description="Names of the ONNX nodes that were kept in fp32.")
    quantized: QuantizedFacts | None = Field(
        default=None, description="Of int8 and fp8: how much of the graph, and of the engine, really is."
    )
    kept_why: dict[str, str] = Field(
        default_factory=dict, description="Where keep: auto was asked for: why each node was kept, by its name."
    )
    outliers: tuple[str, ...] = Field(
        default=(), description="Tensors that overflow float16 on the data seen: nodes that give or take them are kept."
    )
    candidates: tuple[CandidateFacts, ...] = Field(
        default=(), description="Where auto was asked for: every candidate, in the order in which they were tried."
    )
    io: str = Field(description="Type of float inputs and outputs: float32, or native (that of the precision).")


class WorstTensor(Part):
    """The tensor that its int8 range serves least."""

    tensor: str
    clipped: float = Field(description="Share of the values beyond the range.")
    snr_db: float | None = Field(description="Signal over rounding error, in decibels; null: no error, or no signal.")


class CalibrationFacts(Part):
    """What the int8 ranges were found on."""

    digest: Digest = Field(description="Content of the calibration set.")
    samples: int | None
    method: str | None
    report: str | None = Field(
        default=None, description="Which of the files says what each tensor's range costs, the worst first."
    )
    worst: WorstTensor | None = Field(default=None, description="The first of that report.")


class ParityFacts(Part):
    """Distance from the source framework's outputs, the worst over outputs and shapes; null: not finite."""

    relative_l2: float | None
    max_abs: float | None
    cosine: float | None
    non_finite: int = Field(description="How many NaN and Inf the outputs held.")


class CaseFacts(Part):
    """Parity at one shape."""

    name: str
    relative_l2: float | None
    max_abs: float | None
    cosine: float | None


class MetricFacts(Part):
    """The recipe's own measure on its held-out data, of this engine and of its source."""

    name: str
    value: float | None
    source: float | None
    samples: int | None = None


class Measured(Part):
    """What was measured by running something; `executed` false says that it was not run, and why."""

    executed: bool
    reason: str | None = None
    parity: ParityFacts | None = None
    cases: tuple[CaseFacts, ...] = ()
    data: ParityFacts | None = Field(
        default=None, description="Parity on the metric's held-out data; int8 is judged by it where it was measured."
    )
    data_of: str | None = Field(
        default=None,
        description="What `data` was measured on where that is not the metric's: held-out calibration data.",
    )
    metric: MetricFacts | None = None

    @model_validator(mode="after")
    def _says_what_it_is(self) -> Measured:
        if self.executed and self.parity is None:
            raise ValueError("executed, but without a measure of parity")
        if not self.executed and not self.reason:
            raise ValueError("not executed, but without a reason")
        return self


class ParityGate(Part):
    """Bounds on parity; null: no bound."""

    relative_l2: float | None
    max_abs: float | None
    cosine: float | None


class MetricGate(Part):
    """Bounds on the recipe's metric; null: no bound."""

    name: str
    floor: float | None
    max_drop: float | None
    ceiling: float | None = None
    lower_is_better: bool = Field(default=False, description="Whether it is a rate of errors: max_drop is a rise then.")


class Gates(Part):
    """What was demanded of the precision that was given."""

    parity: ParityGate
    metric: MetricGate | None


class Verification(Part):
    """What was demanded and what was found: of the graph (in ONNX Runtime), and of the engine itself."""

    gates: Gates
    passed: bool = Field(description="Whether everything that was executed passed the gates.")
    graph: Measured
    engine: Measured


class Percentiles(Part):
    """Times of single runs, in milliseconds; percentiles are interpolated linearly between `runs` samples."""

    p50: float
    p90: float
    p99: float
    mean: float
    runs: int


class TimedCase(Part):
    """How fast one shape is, run in one way. See docs/benchmarks.md."""

    name: str
    profile: str
    batch: int = Field(description="Samples in one run.")
    graph: bool = Field(description="Whether runs were replayed as a CUDA graph.")
    steady: bool = Field(
        description="Whether the warm-up ended because times were steady, and not because of its limit."
    )
    warm_up_runs: int
    latency_ms: Percentiles = Field(description="Wall time of one run, inputs and outputs where it computes.")
    end_to_end_ms: Percentiles = Field(description="Wall time of one run with the copies from and to the host.")
    device_ms: Percentiles | None = Field(description="Time by the device's own clock; null: none was read.")
    throughput: float = Field(description="Samples a second, runs started one behind another, without copies.")
    copy_share: float | None = Field(description="Part of end_to_end's p50 that copies take; null: nothing is copied.")
    gpu_memory_bytes: int | None = Field(description="Memory of the device in use because of this process.")


class DeviceState(Part):
    """A device before or after it was timed; null: not told."""

    load_1min: float | None = Field(default=None, description="Load average of the host.")
    sm_mhz: int | None = None
    memory_mhz: int | None = None
    power_state: str | None = None
    slowed_by: tuple[str, ...] | None = Field(default=None, description="Why clocks are lowered, as NVML says.")
    temperature_c: int | None = None
    power_w: float | None = None


class Clocks(Part):
    """The device before the first case and after the last."""

    before: DeviceState
    after: DeviceState


class Timed(Part):
    """What was timed, with which version, on which device. `error` says why there is nothing where there is nothing."""

    version: str | None = None
    device: str | None = Field(default=None, description="Name of the GPU, or of the processor.")
    clocks: Clocks | None = None
    host_memory_bytes: int | None = Field(default=None, description="Peak of the process.")
    provider: str | None = Field(default=None, description="Of ONNX Runtime: which execution provider.")
    cases: tuple[TimedCase, ...] = ()


class Compared(Timed):
    """What people would use instead, timed in the same run."""

    name: str = Field(description="torch, torch-fp16, torch-compile or onnxruntime.")
    error: str | None = None
    dtype: str | None = None
    compile_seconds: float | None = None
    ratios: dict[str, float] = Field(
        default_factory=dict, description="Case -> its p50 latency over the engine's: above 1 the engine is faster."
    )


class TimingRule(Part):
    """When a time counted, in seconds and parts; docs/benchmarks.md says how they are used."""

    seconds: float
    window_seconds: float
    window_runs: int
    windows: int
    tolerance: float
    most_samples: int
    least_samples: int


class BenchmarkFacts(Timed):
    """How fast the engine is, and what it was compared with."""

    key: Digest = Field(description="The benchmark action's key.")
    rule: TimingRule
    compared: tuple[Compared, ...] = ()


class StepFacts(Part):
    """One stage that the engine came through."""

    id: str
    stage: str
    key: Digest = Field(description="The action's key.")
    toolchain: dict[str, Any] = Field(description="Full versions of the tools that enter the key.")
    seconds: Seconds = Field(description="Wall time that it took, whenever that was.")
    started: str
    reused: bool = Field(description="Whether an earlier build had made it.")
    host: str | None = Field(description="Where it ran.")


class GitFacts(Part):
    """The commit of the folder that the recipe lies in."""

    commit: str
    dirty: bool = Field(description="Tracked files were changed, or the recipe itself was not tracked.")


class HostFacts(Part):
    """The machine that published the engine."""

    name: str
    os: str
    arch: str
    driver: str | None


class RefittedFrom(Part):
    """The compiled plan that the engine's weights were put into."""

    compilation: Digest = Field(description="Key of the action that compiled it.")
    plan: Digest = Field(description="SHA-256 of that plan.")
    engine: str | None = Field(default=None, description="The engine that it was published as, where it was.")


class Provenance(Part):
    """Where the engine came from."""

    key: Digest = Field(description="The publish action's key.")
    recipe_digest: Digest = Field(description="SHA-256 of the merged recipe as canonical JSON.")
    recipe_text: str = Field(description="The recipe as merged with what it includes, as YAML.")
    source: dict[str, Digest] = Field(description="What the model was made of: code, weights or graph, by file name.")
    git: GitFacts | None
    host: HostFacts
    enginery: str = Field(description="Version of Enginery.")
    steps: tuple[StepFacts, ...]
    refitted_from: RefittedFrom | None = Field(
        default=None, description="Where the plan was not compiled for these weights, but refitted with them."
    )


class ProviderFacts(Part):
    """One execution provider of ONNX Runtime, and its options as that takes them; {cache} stands for a folder to write to."""

    name: str
    options: dict[str, str]


class SavedFacts(Part):
    """A source model that was saved: its form, and the order of what it takes and gives."""

    form: str = Field(
        description="exported program (torch.export), TorchScript (scripted or traced), Paddle inference model (.json, .pdmodel), ONNX."
    )
    inputs: tuple[str, ...] = Field(description="Names, in the order in which it takes them.")
    outputs: tuple[str, ...] = Field(description="Names, in the order in which it gives them.")
    refused: tuple[str, ...] = Field(default=(), description="Forms that are wanted more, and why it is not of those.")


class FallbackFacts(Part):
    """What is served where the engine of a target cannot be built, and how."""

    kind: str = Field(
        description="onnx: an ONNX graph for ONNX Runtime of the version that verified it, or a later one. source: the model as "
        "its own framework runs it, without the code that made it."
    )
    instead_of: tuple[str, ...] = Field(description="Targets of the recipe that asked for it: tensorrt-rtx:sm89.")
    providers: dict[str, tuple[ProviderFacts, ...]] = Field(
        default_factory=dict,
        description="By part (empty name: the only graph): providers, the most wanted first; those that a host lacks are left out.",
    )

    saved: dict[str, SavedFacts] = Field(
        default_factory=dict, description="Of the kind source, by part (empty name: the only graph): in which form."
    )

    def of_part(self, name: str) -> FallbackFacts:
        """Return what is said of one part, as of an only graph."""
        saved = {"": self.saved[name]} if name in self.saved else {}
        return self.model_copy(update={"providers": {"": self.providers.get(name, ())}, "saved": saved})


class PartFacts(Part):
    """One graph of an engine that has several: what version 1 says of an engine's only one."""

    plan: str = Field(description="Which of the files a runtime loads: PART/NAME.")
    inputs: dict[str, TensorFacts]
    outputs: dict[str, TensorFacts]
    profiles: tuple[Profile, ...]
    precision: PrecisionFacts
    calibration: CalibrationFacts | None
    verification: Verification
    benchmark: BenchmarkFacts | None = None
    refitted_from: RefittedFrom | None = None


class Manifest(Part):
    """The document that is published beside an engine's files, as manifest.json."""

    model_config = ConfigDict(title="Enginery manifest, version 1")

    schema_version: Literal[1, 2, 3] = Field(alias="schema", description="Checked before anything else.")
    identity: Identity
    compatibility: Compatibility
    plan: str = Field(description="Which of the files a runtime loads; empty where there are parts.")
    files: dict[str, FileEntry]
    inputs: dict[str, TensorFacts]
    outputs: dict[str, TensorFacts]
    profiles: tuple[Profile, ...]
    precision: PrecisionFacts
    calibration: CalibrationFacts | None
    verification: Verification
    benchmark: BenchmarkFacts | None = Field(default=None, description="null: its speed was not measured.")
    provenance: Provenance
    parts: dict[Name, PartFacts] = Field(
        default_factory=dict,
        description="Version 2: the graphs by name. Inputs, outputs and profiles are theirs; `verification` sums theirs up.",
    )
    fallback: FallbackFacts | None = Field(
        default=None, description="Version 3: it is no engine, but served for lack of one."
    )

    @model_validator(mode="after")
    def _files_are_plain_names(self) -> Manifest:
        parts = self.schema_version == PARTS_SCHEMA or (self.schema_version == FALLBACK_SCHEMA and bool(self.parts))
        if bool(self.parts) != parts or (self.fallback is None) == (self.schema_version == FALLBACK_SCHEMA):
            what = "a fallback" if self.fallback is not None else "an engine"
            raise ValueError(f"schema {self.schema_version} of {what} with {len(self.parts)} parts")
        for name in self.files:
            folder, _slash, plain = name.rpartition("/")
            if folder not in ("", *self.parts) or "/" in plain or not is_relative_path(name) or name == MANIFEST_NAME:
                raise ValueError(f"{name!r} cannot be the name of an engine's file")
        for plan in [part.plan for part in self.parts.values()] or [self.plan]:
            if plan not in self.files:
                raise ValueError(f"the plan {plan!r} is not among the files")
        for name in self.compatibility.plugins:
            if name not in self.files:
                raise ValueError(f"the plugin library {name!r} is not among the files")
        return self

    @property
    def size(self) -> int:
        """Bytes of all files together."""
        return sum(entry.size for entry in self.files.values())

    def part(self, name: str) -> Manifest:
        """Return one part's manifest, as if it were an engine of its own: names of files without the part's folder.

        Raises KeyError.
        """
        part = self.parts[name]
        own = {
            file.removeprefix(f"{name}/"): entry
            for file, entry in self.files.items()
            if file.startswith(f"{name}/") or "/" not in file
        }
        calibration = part.calibration
        if calibration is not None and calibration.report is not None:
            calibration = calibration.model_copy(update={"report": calibration.report.removeprefix(f"{name}/")})
        return self.model_copy(
            update={
                "schema_version": MANIFEST_SCHEMA if self.fallback is None else FALLBACK_SCHEMA,
                "fallback": self.fallback.of_part(name) if self.fallback is not None else None,
                "parts": {},
                "plan": part.plan.removeprefix(f"{name}/"),
                "files": own,
                **{
                    field: getattr(part, field)
                    for field in ("inputs", "outputs", "profiles", "precision", "verification", "benchmark")
                },
                "calibration": calibration,
            }
        )  # fmt: skip

    def to_json(self) -> dict[str, Any]:
        """Return the manifest as JSON values; optional parts that it does not have are left out."""
        document = self.model_dump(mode="json", by_alias=True)
        if not self.precision.candidates:
            del document["precision"]["candidates"]
        for described in (document, *document["parts"].values()):
            # What was added to version 1 is written where it says something.
            graph, engine = (described["verification"][name] for name in ("graph", "engine"))
            precision = described["precision"]
            for found, name in (
                (precision, "kept_why"),
                (precision, "quantized"),
                (graph, "data_of"),
                (engine, "data_of"),
            ):
                if not found[name]:
                    del found[name]
        if self.fallback is not None and not self.fallback.saved:
            del document["fallback"]["saved"]
        optional = {name for name, part in type(self).model_fields.items() if not part.is_required()}
        return {name: part for name, part in document.items() if part not in (None, {}) or name not in optional}

    def to_bytes(self) -> bytes:
        """Serialise the manifest as indented JSON, for people who read the store."""
        return json.dumps(self.to_json(), indent=1, ensure_ascii=False, allow_nan=False).encode() + b"\n"

    @classmethod
    def from_bytes(cls, data: bytes) -> Manifest:
        """Read a manifest back; the version is checked before anything else.

        Raises IntegrityError where it is not JSON, is of a version that this release cannot read, or lacks
        something that its version demands.
        """
        try:
            document = json.loads(data, parse_constant=_refuse_constant)
        except (ValueError, RecursionError) as err:
            raise IntegrityError(f"manifest is not JSON: {err}") from err
        if not isinstance(document, dict) or "schema" not in document:
            raise IntegrityError('manifest: no schema version (expected an object with "schema": 1)')
        found = document["schema"]
        if type(found) is not int or not MANIFEST_SCHEMA <= found <= FALLBACK_SCHEMA:
            newer = type(found) is int and found > FALLBACK_SCHEMA
            advice = "written by a newer Enginery; upgrade this one" if newer else "not a manifest of Enginery"
            raise IntegrityError(
                f"manifest: schema {found!r}, this release reads {MANIFEST_SCHEMA} to {FALLBACK_SCHEMA} ({advice})"
            )
        try:
            return cls.model_validate_json(data)
        except ValidationError as err:
            first = err.errors(include_url=False, include_context=False)[0]
            where = ".".join(str(part) for part in first["loc"]) or "manifest"
            more = f" (and {err.error_count() - 1} more)" if err.error_count() > 1 else ""
            raise IntegrityError(f"manifest: {where}: {first['msg']}{more}") from err


def manifest_schema() -> dict[str, Any]:
    """Return the JSON Schema of manifests, as published in docs/manifest-v1.schema.json."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Manifest.model_json_schema()}


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")
