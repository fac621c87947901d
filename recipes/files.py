"""What a recipe names on disk: digests, code bundles and data sets, found without running any of it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Final, Literal

from recipes.digests import Digests
from recipes.errors import Fault, RecipeError
from recipes.includes import is_code_reference
from recipes.nodes import Key, beside
from recipes.onnx_data import NotOnnxError, external_locations, leads_out, location_fault
from recipes.options import PINS, stated_pins, stated_plugins
from recipes.schema import Dataset, FileReference, Metric, OnnxSource, PaddleSource, TorchSource

if TYPE_CHECKING:
    from recipes.loader import LoadedRecipe


@dataclass(frozen=True)
class LocalFile:
    """One file that a recipe names: the name it has among a stage's inputs, its SHA-256 and size in bytes.

    `address` is where it lies: a local path, or `s3://` for a remote one (whose size is -1: unknown).
    """

    name: str
    digest: str
    size: int
    address: str


@dataclass(frozen=True)
class CodeBundle:
    """A recipe's own code with every local module that it imports, as one deterministic tar.

    `digest` and `size` are the tar's; `entry` is `module:callable` inside it; `members` maps names in the tar to
    local files, `digests` to their SHA-256; `packages` are the installed packages that the code imports (top-level
    import names, standard library excepted). `looked_for` has every path at which a module was looked for, and whether
    a file was there (None: not known); `globs` the patterns that took further files, each with its folder.
    """

    digest: str
    size: int
    entry: str
    members: Mapping[str, Path]
    digests: Mapping[str, str]
    packages: tuple[str, ...]
    looked_for: Mapping[Path, bool] | None = field(default=None, compare=False, repr=False)
    globs: tuple[tuple[str, Path], ...] = field(default=(), compare=False, repr=False)


@dataclass(frozen=True)
class DatasetFiles:
    """A data set's content: an .npz, a folder of arrays or images (digest over sorted names and bytes), or code."""

    format: Literal["npz", "arrays", "images", "callable"]
    digest: str
    path: Path
    code: CodeBundle | None = None


@dataclass(frozen=True)
class RecipeFiles:
    """Everything that a recipe names, with content digests; plugins by theirs."""

    code: CodeBundle | None = None
    weights: LocalFile | None = None
    model: tuple[LocalFile, ...] = ()
    calibration: DatasetFiles | None = None
    labelled: DatasetFiles | None = None
    metric: CodeBundle | None = None
    plugins: Mapping[str, LocalFile] = field(default_factory=dict)
    pins: Mapping[tuple[str, str], LocalFile] = field(default_factory=dict)  # by option and digest
    parts: Mapping[str, RecipeFiles] = field(default_factory=dict)  # of each part: the shared files, and its own data
    run: CodeBundle | None = None  # what runs all parts together


# What the `fetch` stage reads from a folder (tasks/datasets.py): what is read has to be what is digested.
IMAGE_SUFFIXES: Final = frozenset((".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"))
ARRAY_SUFFIXES: Final = frozenset((".npy", ".npz"))
WEIGHTS_NAMES: Final[Mapping[str, str]] = {
    ".safetensors": "weights.safetensors",
    ".pt": "weights.pt",
    ".pth": "weights.pt",
}
PADDLE_WEIGHTS: Final[Mapping[str, str]] = {
    ".safetensors": "weights.safetensors",
    ".pdparams": "weights.pdparams",
}
_ELF: Final = b"\x7fELF"
_LFS_POINTER: Final = b"version https://git-lfs.github.com/spec/"


def gather(loaded: LoadedRecipe, digests: Digests | None = None) -> RecipeFiles:
    """Find and digest everything that a recipe names. Nothing of it is executed, and no network is used.

    Raises RecipeError with all faults at once: files that are missing (near misses named), are folders, empty or Git
    LFS pointers, have another digest than the recipe states, code that cannot be parsed or lacks the callable.
    """
    gatherer = _Gatherer(loaded, digests if digests is not None else Digests())
    files = gatherer.gather()
    gatherer.digests.save()
    if gatherer.faults:
        raise RecipeError(list(dict.fromkeys(gatherer.faults)))
    return files


def dataset_members(folder: Path, *, images: bool) -> list[tuple[str, Path]]:
    """Return the samples in a folder, at any depth, as (name relative to it, path), sorted by name.

    Those are the files with an image's suffix, or .npy and .npz; folders that are links are not entered.
    """
    suffixes = IMAGE_SUFFIXES if images else ARRAY_SUFFIXES
    found: list[tuple[str, Path]] = []
    for parent, _folders, names in os.walk(folder):
        for name in names:
            path = Path(parent, name)
            if path.suffix.lower() in suffixes and path.is_file():
                found.append((path.relative_to(folder).as_posix(), path))
    return sorted(found)


@dataclass
class _Gatherer:
    """Finds files and collects faults, each at the line that names the file."""

    loaded: LoadedRecipe
    digests: Digests
    faults: list[Fault] = field(default_factory=list)

    def gather(self) -> RecipeFiles:
        recipe = self.loaded.recipe
        plugins, pins = self._plugins(), self._pins()
        nothing: tuple[CodeBundle | None, LocalFile | None, tuple[LocalFile, ...]] = (None, None, ())
        shared = nothing if recipe.has_own_sources else self._source((), recipe.source)
        together = recipe.acceptance.together if recipe.parts else None
        data = (
            self._data((), "together" if together else "metric", None, together)
            if recipe.parts
            else self._data((), "metric", recipe.precision.calibration, recipe.acceptance.metric)
        )
        run = self._code(("acceptance", "together", "run"), together.run) if together is not None else None
        parts = {}
        for name, part in recipe.parts.items():
            at: Key = ("parts", name)
            source, own = (
                (recipe.source, shared) if part.source is None else (part.source, self._source(at, part.source))
            )
            if own[0] is not None and part.module is not None and not isinstance(source, OnnxSource) and source.model:
                reference = f"{source.model.rpartition(':')[0]}:{part.module}"
                self._code((*at, "module"), reference, source.include)
            calibration = part.precision.calibration if part.precision is not None else None
            metric = part.acceptance.metric if part.acceptance is not None else None
            parts[name] = RecipeFiles(*own, *self._data(at, "metric", calibration, metric), plugins, pins)
        return RecipeFiles(*shared, *data, plugins, pins, parts, run)

    def _source(
        self, at: Key, source: TorchSource | PaddleSource | OnnxSource
    ) -> tuple[CodeBundle | None, LocalFile | None, tuple[LocalFile, ...]]:
        """Return the code, the weights and the graph of a recipe's source, or of a part's; `at` leads to who states it."""
        at = (*at, "source")
        if isinstance(source, OnnxSource):
            return None, None, self._model((*at, "model", "file"), source.model)
        code, weights = None, None
        if source.model is not None:
            code = self._code((*at, "model"), source.model, source.include, (*at, "include"))
        if source.weights is not None:
            names, framework = (PADDLE_WEIGHTS if isinstance(source, PaddleSource) else WEIGHTS_NAMES), source.framework
            weights = self._weights((*at, "weights", "file"), source.weights, names, framework)
        return code, weights, self._paddle_graph(at, source) if isinstance(source, PaddleSource) else ()

    def _data(
        self, at: Key, gate: str, calibrating: Dataset | None, measured: Metric | None
    ) -> tuple[DatasetFiles | None, DatasetFiles | None, CodeBundle | None]:
        """Return the calibration data, the labelled data and the metric's code of a recipe, or of one part of it."""
        calibration = self._dataset((*at, "precision", "calibration"), calibrating)
        labelled, metric = None, None
        if measured is not None:
            here: Key = (*at, "acceptance", gate)
            labelled = self._dataset((*here, "data"), measured.data)
            if is_code_reference(measured.name):
                metric = self._code((*here, "name"), measured.name)
            self._held_out((*here, "data", "data"), calibration, labelled)
        return calibration, labelled, metric

    def _fault(self, at: Key, what: str) -> None:
        self.faults.append(self.loaded.fault(at, what))

    def _file(self, at: Key, name: str, stated: str | None) -> tuple[Path, str] | None:
        """Return a plain file that the recipe names, with its digest, or None with a fault."""
        path = self.loaded.folder / name
        try:
            if path.is_dir():
                self._fault(at, f"{name} is a folder; expected a file")
            elif not path.exists():
                self._fault(at, f"{name}: no such file{beside(path)}")
            elif not path.is_file():
                self._fault(at, f"{name} is not a regular file")
            else:
                return self._checked(at, path, name, stated)
        except OSError as err:
            self._fault(at, f"{name} cannot be read: {err.strerror}")
        return None

    def _checked(self, at: Key, path: Path, name: str, stated: str | None) -> tuple[Path, str] | None:
        size = path.stat().st_size
        with path.open("rb") as stream:
            start = stream.read(len(_LFS_POINTER))
        if size == 0:
            self._fault(at, f"{name} is empty")
        elif start == _LFS_POINTER:
            self._fault(at, f"{name} is a Git LFS pointer and not the file itself; fetch it: git lfs pull")
        else:
            digest = self.digests.file(path)
            if stated is None or stated == digest:
                return path, digest
            advice = "restore the file, or state the new digest if the change is meant"
            self._fault((*at[:-1], "sha256"), f"{name}: expected {stated}, found {digest}; {advice}")
        return None

    def _weights(self, at: Key, file: FileReference, names: Mapping[str, str], framework: str) -> LocalFile | None:
        name = names.get(PurePosixPath(file.file).suffix.lower())
        if name is None:
            allowed = ", ".join(names)
            advice = f"save the tensors with safetensors.{framework}.save_file"
            self._fault(at, f"{file.file}: weights of this kind are not read (allowed: {allowed}); {advice}")
        if file.file.startswith("s3://"):
            return LocalFile(name, file.sha256 or "", -1, file.file) if name is not None else None
        found = self._file(at, file.file, file.sha256)
        if found is None or name is None:
            return None
        return LocalFile(name, found[1], found[0].stat().st_size, str(found[0]))

    def _paddle_graph(self, at: Key, source: PaddleSource) -> tuple[LocalFile, ...]:
        """Find a saved graph and its weights, which lie beside it under its name unless the recipe says otherwise."""
        if source.graph is None:
            return ()
        beside_it = PurePosixPath(source.graph.file).with_suffix(".pdiparams").as_posix()
        params, key = (FileReference(file=beside_it), "graph") if source.params is None else (source.params, "params")
        files = []
        for of, file, suffix in (
            ("graph", source.graph, PurePosixPath(source.graph.file).suffix),
            (key, params, ".pdiparams"),
        ):
            if file.file.startswith("s3://"):
                files.append(LocalFile(f"model{suffix}", file.sha256 or "", -1, file.file))
            elif (found := self._file((*at, of, "file"), file.file, file.sha256)) is not None:
                files.append(LocalFile(f"model{suffix}", found[1], found[0].stat().st_size, str(found[0])))
        return tuple(files)

    def _model(self, at: Key, file: FileReference) -> tuple[LocalFile, ...]:
        if file.file.startswith("s3://"):  # one file: what lies beside it cannot be seen from here
            return (LocalFile("model.onnx", file.sha256 or "", -1, file.file),)
        found = self._file(at, file.file, file.sha256)
        if found is None:
            return ()
        path, digest = found
        try:
            locations = external_locations(path, digest, self.digests)
        except NotOnnxError as err:
            self._fault(at, f"{file.file} is no ONNX graph: {err}")
            return ()
        files = [LocalFile("model.onnx", digest, path.stat().st_size, str(path))]
        for location in locations:
            refused = location_fault(location)
            if refused is None and leads_out(path, location):
                refused = (
                    f"its external data {location!r} is a link out of the graph's folder; put the file itself there"
                )
            if refused is not None:
                self._fault(at, f"{file.file}: {refused}")
                continue
            data = self._file(at, str(PurePosixPath(file.file).parent / location), None)
            if data is not None:
                files.append(LocalFile(location, data[1], data[0].stat().st_size, str(data[0])))
        return tuple(files)

    def _plugins(self) -> dict[str, LocalFile]:
        """Find the libraries of plugins: each is named after its digest, so that its path enters no key."""
        files: dict[str, LocalFile] = {}
        for at, plugins in stated_plugins(self.loaded.recipe):
            for index, plugin in enumerate(plugins):
                name = f"plugin-{plugin.sha256[:16]}.so"
                if plugin.file.startswith("s3://"):
                    files[plugin.sha256] = LocalFile(name, plugin.sha256, -1, plugin.file)
                    continue
                here: Key = (*at, index, "file")
                found = self._file(here, plugin.file, plugin.sha256)
                if found is None:
                    continue
                path, digest = found
                with path.open("rb") as stream:
                    if stream.read(len(_ELF)) != _ELF:
                        self._fault(here, f"{plugin.file} is no shared library (it does not begin as ELF files do)")
                files[digest] = LocalFile(name, digest, path.stat().st_size, str(path))
        return files

    def _pins(self) -> dict[tuple[str, str], LocalFile]:
        """Find the files of earlier builds that are pinned; each has one name, so that its path enters no key."""
        files: dict[tuple[str, str], LocalFile] = {}
        for at, option, pinned in stated_pins(self.loaded.recipe):
            if pinned.file.startswith("s3://"):
                files[option, pinned.sha256] = LocalFile(PINS[option], pinned.sha256, -1, pinned.file)
                continue
            found = self._file((*at, "file"), pinned.file, pinned.sha256)
            if found is not None:
                path, digest = found
                files[option, digest] = LocalFile(PINS[option], digest, path.stat().st_size, str(path))
        return files

    def _code(
        self, at: Key, reference: str, include: Sequence[str] = (), include_at: Key | None = None
    ) -> CodeBundle | None:
        from recipes.bundle import collect  # which needs the dataclasses above

        name, _, function = reference.rpartition(":")
        try:
            return collect(self.loaded.folder / name, function, self.loaded.folder, include)
        except RecipeError as err:
            for fault in err.faults:
                if fault.line:  # a line of the code itself
                    self.faults.append(fault)
                elif fault.path == "include" and include_at is not None:
                    self._fault(include_at, fault.what)
                else:
                    self._fault(at, f"{fault.file} {fault.what}")
        except OSError as err:
            self._fault(at, f"{name} cannot be read: {err.strerror}")
        return None

    def _dataset(self, at: Key, data: Dataset | None) -> DatasetFiles | None:
        if data is None:
            return None
        here: Key = (*at, "data")
        if is_code_reference(data.data):
            code = self._code(here, data.data, data.include, (*at, "include"))
            file = self.loaded.folder / data.data.rpartition(":")[0]
            return DatasetFiles("callable", code.digest, file, code) if code is not None else None
        path = self.loaded.folder / data.data
        if os.path.isdir(path):  # noqa: PTH112  Path.is_dir raises for a name that is too long
            return self._folder(at, path, data)
        if path.suffix != ".npz" and os.path.isfile(path):  # noqa: PTH113  as above
            allowed = "an .npz, a folder of .npy, .npz or images, file.py:callable"
            self._fault(here, f"{data.data}: data of this kind are not read (allowed: {allowed})")
            return None
        found = self._file(here, data.data, data.sha256)
        return DatasetFiles("npz", found[1], found[0]) if found is not None else None

    def _folder(self, at: Key, path: Path, data: Dataset) -> DatasetFiles | None:
        here: Key = (*at, "data")
        if data.sha256 is not None:
            self._fault((*at, "sha256"), f"is for a single file, and {data.data} is a folder")
        images, arrays = dataset_members(path, images=True), dataset_members(path, images=False)
        members = images if data.images is not None else arrays
        if images and data.images is None and not arrays:
            what = "holds images: say how they become arrays, under images: (at least size: [height, width])"
            self._fault(here, f"{data.data} {what}")
        elif images and arrays:
            self._fault(here, f"{data.data} holds {len(images)} images and {len(arrays)} arrays; expected one kind")
        elif not members:
            kinds = sorted(IMAGE_SUFFIXES if data.images is not None else ARRAY_SUFFIXES)
            self._fault(here, f"{data.data} holds no samples (looked for {', '.join(kinds)})")
        else:
            try:
                digest = self.digests.files(members)
            except OSError as err:
                self._fault(here, f"{err.filename} cannot be read: {err.strerror}")
                return None
            return DatasetFiles("images" if data.images is not None else "arrays", digest, path)
        return None

    def _held_out(self, at: Key, calibration: DatasetFiles | None, labelled: DatasetFiles | None) -> None:
        if calibration is None or labelled is None or labelled.format == "callable":
            return
        if calibration.digest == labelled.digest:
            what = "has the same content as the calibration data; the gate must be held out"
            self._fault(at, f"{labelled.path.name} {what}")
