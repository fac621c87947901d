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

from pydantic import ConfigDict, Field, ValidationError, model_validator

from artifacts.errors import IntegrityError
from artifacts.manifest_base import Digest, Extents, Instant, Name, Part, Seconds, Size
from artifacts.manifest_benchmark import BenchmarkFacts
from artifacts.manifest_gates import Verification
from artifacts.manifest_precision import CalibrationFacts, PrecisionFacts
from artifacts.refs import ArtifactRef
from artifacts.store import is_relative_path

MANIFEST_SCHEMA: Final = 1
PARTS_SCHEMA: Final = 2
FALLBACK_SCHEMA: Final = 3
EXPORTED_PROGRAM: Final = "exported program"
MANIFEST_NAME: Final = "manifest.json"


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
