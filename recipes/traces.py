"""What was read of the files that a recipe names, so that a later look can tell, without parsing any, that it is the same.

A trace holds where `load` and `gather` would read the same bytes and look in vain in the same places: then they would
return the same, since both depend on nothing else (but their own code).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipes.digests import Digests

if TYPE_CHECKING:
    from recipes.files import RecipeFiles
    from recipes.loader import LoadedRecipe


@dataclass
class FileTrace:
    """Files by path, with their SHA-256; folders of samples, with `images` and the digest of all; where files were looked for.

    Paths are absolute and as they were opened: their links, and what is above those, are followed again.
    """

    files: dict[str, str] = field(default_factory=dict)
    folders: dict[str, tuple[bool, str]] = field(default_factory=dict)
    looked_for: dict[str, bool] = field(default_factory=dict)

    def holds(self, digests: Digests) -> bool:
        """Tell whether everything is as it was; small files are read again, large ones known by `digests`."""
        try:
            return (
                all(os.path.isfile(path) == found for path, found in self.looked_for.items())  # noqa: PTH113  of hundreds
                and all(digests.file(Path(path)) == digest for path, digest in self.files.items())
                and all(_digest(Path(path), images, digests) == known for path, (images, known) in self.folders.items())
            )
        except (OSError, ValueError):
            return False

    def below(self, folder: str) -> FileTrace:
        """Return the trace with paths relative to a recipe's folder, so that it can be looked at where the folder lies elsewhere."""
        inside = f"{folder}/"
        return self._moved(
            lambda path: path.removeprefix(inside) if path.startswith(inside) else os.path.relpath(path, folder)
        )

    def above(self, folder: str) -> FileTrace:
        """Return a trace that is relative with paths below this folder; links on the way to what is above lead elsewhere."""
        return self._moved(lambda path: f"{folder}/{path}")

    @property
    def leaves(self) -> bool:
        """Whether a relative trace has a path that leads out of its folder."""
        return any(path.split("/", 1)[0] == ".." for path in (*self.files, *self.folders, *self.looked_for))

    def _moved(self, move: Callable[[str], str]) -> FileTrace:
        return FileTrace(
            {move(path): known for path, known in self.files.items()},
            {move(path): known for path, known in self.folders.items()},
            {move(path): known for path, known in self.looked_for.items()},
        )

    def to_json(self) -> dict[str, Any]:
        """Return the trace as JSON values."""
        folders = {path: list(known) for path, known in self.folders.items()}
        return {"files": self.files, "folders": folders, "looked_for": self.looked_for}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> FileTrace:
        """Read back what `to_json` wrote; raise KeyError, TypeError or ValueError for much else."""
        folders = {path: (bool(images), str(digest)) for path, (images, digest) in value["folders"].items()}
        return cls(dict(value["files"]), folders, dict(value["looked_for"]))


def trace_of(loaded: LoadedRecipe, files: RecipeFiles) -> FileTrace | None:
    """Return what `load` and `gather` read and looked for, or None where that cannot be told (globs, unknown kinds)."""
    trace = FileTrace({_absolute(path): digest for path, digest in loaded.digests.items()})
    known = all(_added(getattr(files, entry.name), trace) for entry in fields(files))
    return trace if known else None


def _absolute(path: str | Path) -> str:
    # Not abspath, by which `link/../file` would be another file than the one that is opened.
    return os.path.join(os.getcwd(), path)  # noqa: PTH109, PTH118  of thousands


def _added(value: object, trace: FileTrace) -> bool:
    """Add what one part of a recipe's files was read from; False for what is not known."""
    from recipes.files import CodeBundle, DatasetFiles, LocalFile

    if isinstance(value, LocalFile):
        if "://" not in value.address:  # what lies elsewhere is known by the digest that the recipe states
            trace.files[_absolute(value.address)] = value.digest
        return True
    if isinstance(value, CodeBundle):
        if value.looked_for is None or value.globs:
            return False
        for name, path in value.members.items():
            trace.files[_absolute(path)] = value.digests[name]
        trace.looked_for.update({_absolute(path): found for path, found in value.looked_for.items()})
        return True
    if isinstance(value, DatasetFiles):
        if value.code is not None:
            return _added(value.code, trace)
        data = _absolute(value.path)
        if value.format in ("images", "arrays"):
            trace.folders[data] = (value.format == "images", value.digest)
        else:
            trace.files[data] = value.digest
        return True
    if isinstance(value, (tuple, Mapping)):
        parts = value.values() if isinstance(value, Mapping) else value
        return all(_added(part, trace) for part in parts)
    return value is None


def _digest(folder: Path, images: bool, digests: Digests) -> str | None:
    """Return the digest of a folder of samples as `gather` makes it, or None where it has samples of the other kind too."""
    from recipes.files import dataset_members

    members = dataset_members(folder, images=images)
    return digests.files(members) if members and not dataset_members(folder, images=not images) else None
