"""Engines for other servers: a Triton model repository, its engines fetched and checked as `pull` does, written whole."""

from __future__ import annotations

import filecmp
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from artifacts.errors import StoreError
from artifacts.files import create_file, make_folders, sync_file, sync_folder
from artifacts.manifest import MANIFEST_NAME
from artifacts.scratch import held_folder, locked_folder, sweep
from artifacts.signing import SIGNATURE_NAME
from artifacts.store import Store
from enginery.client import PulledEngine, pull
from enginery.triton import PAPERS, Served, TritonModel, Wishes, triton_models

if TYPE_CHECKING:
    from artifacts.trust import Trust
    from enginery.trusting import Unchecked

CONFIG: Final = "config.pbtxt"
_OLD: Final = "old-"


@dataclass(frozen=True)
class ExportedModel:
    """One model of a repository: its folder, the engines it serves, and whether it was there already, byte for byte."""

    folder: Path
    engines: tuple[str, ...]
    kept: bool


def export_triton(
    store: Store,
    recipes: Sequence[Sequence[Served]],
    to: Path,
    *,
    wishes: Wishes | None = None,
    channel: str | None = None,
    trust: Trust | Unchecked | None = None,
    pulled: Callable[[PulledEngine], None] = lambda _engine: None,
) -> list[ExportedModel]:
    """Write a Triton model repository at `to` from the engines that were resolved for each recipe: one for each kind of GPU.

    Every engine is pulled first, so all that `pull` refuses is refused here, and nothing is written then. A repository that is
    not there appears as a whole; in one that is, each model is exchanged as a whole, and models of others stay. Raises what
    `pull` does, RefusedError where Triton cannot serve an engine, and StoreError; IntegrityError where an engine was published anew
    since it was resolved.
    """
    models = [model for served in recipes for model in triton_models(served, wishes or Wishes())]
    twice = {model.name for model in models if sum(other.name == model.name for other in models) > 1}
    if twice:
        raise StoreError(
            f"two models would be named {', '.join(sorted(twice))}; export them into repositories of their own"
        )
    to = to.resolve() if to.is_symlink() else to.absolute()  # what is renamed has to be on one disk
    if to.is_mount():
        raise StoreError(
            f"{to} is a mount point, which no folder can take the place of: give one in it ({to / 'repository'})"
        )
    try:
        make_folders(to.parent)
        # Beside the repository, on its disk: Triton takes each folder in it for a model.
        with locked_folder(to.parent / f".{to.name}.exporting", "export") as private:
            _put_back(private, to)
            sweep(private)
            with held_folder(private) as temporary:
                engines = {str(one.engine.identity): one.engine for served in recipes for one in served}
                found = {
                    name: pull(store, engine, temporary / "engines", channel=channel, trust=trust)
                    for name, engine in engines.items()
                }
                for engine in found.values():
                    pulled(engine)
                fresh = temporary / "repository"
                fresh.mkdir(mode=0o755)
                for model in models:
                    _write(fresh / model.name, model, found)
                sync_folder(fresh)
                return _place(fresh, to, models, temporary)
    except OSError as err:
        raise StoreError(f"{to}: {err.strerror or err}; free some space, or give another folder") from err


def left_models(exported: Sequence[ExportedModel]) -> list[Path]:
    """Return models beside these that are of a recipe of theirs, and were not written now: of a part that it lost, maybe."""
    recipes = {engine.partition("/")[0] for one in exported for engine in one.engines}
    written = {one.folder for one in exported}
    return sorted(
        {
            path.parents[2]
            for root in {folder.parent for folder in written}
            for path in root.glob(f"*/{PAPERS}/*/{MANIFEST_NAME}")
            if path.parents[2] not in written and _recipe(path) in recipes
        }
    )


def _write(folder: Path, model: TritonModel, found: Mapping[str, PulledEngine]) -> None:
    """Write one model's folder; files are linked from the engines that were pulled, on the same disk."""
    folder.mkdir()
    papers = {
        f"{PAPERS}/{one.manifest.identity.target}/{name}": one.folder / name
        for one in (found[engine] for engine in _engines(model))
        for name in (MANIFEST_NAME, SIGNATURE_NAME)
        if (one.folder / name).exists()
    }
    served = {place: found[engine].folder / file for place, (engine, file) in model.files.items()}
    for place, source in {**served, **papers}.items():
        path = folder / place
        path.parent.mkdir(parents=True, exist_ok=True)
        _link(source, path)
    with create_file(folder / CONFIG, 0o644) as stream:
        stream.write(model.config.encode())
        sync_file(stream)
    for inner, _folders, _files in os.walk(folder):
        sync_folder(Path(inner))


def _link(source: Path, path: Path) -> None:
    try:
        path.hardlink_to(source)
    except OSError:  # a file system without hard links, or with too many of this file
        import shutil

        shutil.copyfile(source, path)
        with path.open("rb") as stream:
            os.fsync(stream.fileno())


def _place(fresh: Path, to: Path, models: Sequence[TritonModel], temporary: Path) -> list[ExportedModel]:
    """Put what was written in its place by renaming."""
    if not to.exists():
        fresh.rename(to)
        sync_folder(to.parent)
        return [ExportedModel(to / model.name, _engines(model), kept=False) for model in models]
    for model in models:
        papers, recipe = to / model.name / PAPERS, _engines(model)[0].partition("/")[0]
        if not papers.parent.exists():
            continue
        if not papers.is_dir():
            raise StoreError(f"{papers.parent} was not written by enginery export; move it away, or give another --out")
        others = {other for path in papers.glob(f"*/{MANIFEST_NAME}") if (other := _recipe(path)) != recipe}
        if others:
            raise StoreError(
                f"{papers.parent} is of {', '.join(sorted(others))}, not of {recipe}; move it away, or give another --out"
            )
    done = []
    for model in models:
        place = to / model.name
        kept = place.is_dir() and _alike(place, fresh / model.name)
        if not kept:
            try:
                if place.exists():
                    place.rename(temporary / f"{_OLD}{model.name}")
                (fresh / model.name).rename(place)
            except BaseException:
                _put_back(temporary.parent, to)
                raise
        done.append(ExportedModel(place, _engines(model), kept))
    sync_folder(to)
    return done


def _put_back(private: Path, to: Path) -> None:
    """Put models back that were taken out of a repository where nothing came in their place: an export was interrupted."""
    for old in private.glob(f"*/{_OLD}*"):
        place = to / old.name.removeprefix(_OLD)
        if to.is_dir() and not place.exists():
            old.rename(place)


def _recipe(manifest: Path) -> str:
    try:
        return str(json.loads(manifest.read_bytes())["identity"]["recipe"])
    except (OSError, ValueError, KeyError, TypeError):
        return f"an unknown recipe ({manifest.relative_to(manifest.parents[2])} cannot be read)"


def _engines(model: TritonModel) -> tuple[str, ...]:
    return tuple(dict.fromkeys(engine for engine, _file in model.files.values()))


def _alike(first: Path, second: Path) -> bool:
    """Tell whether two folders hold the same files with the same bytes."""
    names = [sorted(str(path.relative_to(root)) for path in root.rglob("*")) for root in (first, second)]
    return names[0] == names[1] and all(
        filecmp.cmp(first / name, second / name, shallow=False) for name in names[0] if (first / name).is_file()
    )
