"""Which recipes a change of files touches: each that reads a changed file now, or read it before the change.

What a recipe reads is known from `load` and `gather`, which run none of it, together with every place where it looks for a
file. That tells of the state before the change too: of the files that were read then, take the first that differs. All
that led to it is unchanged and leads to its place now as well, where it is found changed, or looked for in vain.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path, PurePath
from typing import Final

from recipes.bundle import matching
from recipes.files import ARRAY_SUFFIXES, IMAGE_SUFFIXES, CodeBundle, DatasetFiles, LocalFile, RecipeFiles
from recipes.loader import LoadedRecipe

_LINKS: Final = 40  # as Linux follows (path_resolution(7))


@dataclass(frozen=True)
class Changes:
    """What changed below a folder: absolute paths, each with how (added, changed, deleted).

    A path may be of a link, or of a folder that is known as a whole (a repository in the repository).
    """

    top: Path
    kinds: Mapping[str, str]

    @cached_property
    def deleted(self) -> tuple[str, ...]:
        """The paths that are gone."""
        return tuple(path for path, kind in self.kinds.items() if kind == "deleted")


@dataclass
class Reads:
    """What a recipe reads: files (found or looked for), folders of samples, and globs with the folder they begin in.

    `stated` has those files whose content the recipe states by its digest, so that a change of them is one of the recipe.
    """

    files: set[str] = field(default_factory=set)
    folders: set[str] = field(default_factory=set)
    globs: set[tuple[str, Path]] = field(default_factory=set)
    stated: set[str] = field(default_factory=set)


def reads_of(loaded: LoadedRecipe, files: RecipeFiles) -> Reads:
    """Return everything on disk that `load` and `gather` read, or looked for."""
    reads = Reads({os.path.abspath(path) for path in loaded.digests})  # noqa: PTH100  links stay
    digests = {str(node.value) for path, node in loaded.root.walk() if path[-1:] == ("sha256",)}
    for entry in fields(files):
        _add(getattr(files, entry.name), reads, digests)
    return reads


def touching(reads: Reads, changes: Changes) -> dict[str, str]:
    """Return the changed paths that concern what was read, each with how it changed, sorted."""
    found = {path for file in reads.files for path in _ways(file) if path in changes.kinds}
    for folder in reads.folders:
        found |= {path for path in _ways(folder) if path in changes.kinds}
        inside = f"{os.path.realpath(folder)}/"
        found |= {path for path in changes.kinds if path.startswith(inside) and _is_sample(path)}
    if reads.globs and changes.deleted:
        found |= set(_matched_before(reads.globs, changes))
    return {path: changes.kinds[path] for path in sorted(found)}


def _add(value: object, reads: Reads, digests: Collection[str]) -> None:
    if isinstance(value, LocalFile):
        if "://" not in value.address:  # what lies elsewhere changes with the digest that the recipe states
            path = os.path.abspath(value.address)  # noqa: PTH100
            reads.files.add(path)
            if value.digest in digests:
                reads.stated.add(path)
    elif isinstance(value, CodeBundle):
        paths = (*value.members.values(), *(value.looked_for or ()))
        reads.files.update(os.path.abspath(path) for path in paths)  # noqa: PTH100
        reads.globs.update(value.globs)
    elif isinstance(value, DatasetFiles):
        data = os.path.abspath(value.path)  # noqa: PTH100
        if value.code is not None:
            _add(value.code, reads, digests)
        elif value.format == "npz":
            reads.files.add(data)
            if value.digest in digests:
                reads.stated.add(data)
        else:
            reads.folders.add(data)
            for parent, _folders, names in os.walk(data):
                reads.files.update(path for name in names if _is_sample(path := f"{parent}/{name}"))
    elif isinstance(value, RecipeFiles):  # of a part
        for entry in fields(value):
            _add(getattr(value, entry.name), reads, digests)
    elif isinstance(value, (tuple, Mapping)):
        for part in value.values() if isinstance(value, Mapping) else value:
            _add(part, reads, digests)


def _is_sample(path: str) -> bool:
    return PurePath(path).suffix.lower() in IMAGE_SUFFIXES | ARRAY_SUFFIXES


def _ways(path: str) -> Iterator[str]:
    """Yield a path and the folders above it, as written and wherever links on the way lead."""
    left, links = [path], 0
    while left:
        parts = [part for part in left.pop().split("/") if part]
        current = ""
        for index, part in enumerate(parts):
            current = os.path.normpath(f"{current}/{part}")
            yield current
            if links < _LINKS and os.path.islink(current):  # noqa: PTH114  of thousands
                links += 1
                target = os.path.join(os.path.dirname(current), os.readlink(current))  # noqa: PTH115, PTH118, PTH120
                left.append("/".join([os.path.normpath(target), *parts[index + 1 :]]))
                break


def _matched_before(globs: set[tuple[str, Path]], changes: Changes) -> Iterator[str]:
    """Yield the deleted paths that a glob took, by matching it in a folder that holds nothing else."""
    with tempfile.TemporaryDirectory() as name:
        ghosts = Path(os.path.realpath(name))
        for path in changes.deleted:
            ghost = ghosts / Path(path).relative_to(changes.top)
            ghost.parent.mkdir(parents=True, exist_ok=True)
            ghost.touch()
        for pattern, folder in globs:
            real = Path(os.path.realpath(folder))
            if not real.is_relative_to(changes.top):
                continue
            there = ghosts / real.relative_to(changes.top)
            there.mkdir(parents=True, exist_ok=True)
            for match in matching(pattern, there):
                if match.is_relative_to(ghosts):
                    yield str(changes.top / match.relative_to(ghosts))
