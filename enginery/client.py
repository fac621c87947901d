"""What serving code imports: which engine may this host load, and its files, checked, in a local folder.

    from enginery.client import pull, resolve
    from artifacts.store import open_store

    store = open_store("s3://engines/prod")
    chosen = resolve(store, "digits").best
    engine = pull(store, chosen, Path("/var/cache/engines"))
    runtime.deserialize_cuda_engine(engine.plan.read_bytes())

Imports no framework and no Prefect. A plan is executable code: nothing is handed out before its
digest is checked.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from artifacts.catalog import EngineCatalog, EngineId
from artifacts.errors import IntegrityError, StoreError
from artifacts.files import check_chunks, create_file, file_chunks, make_folders, open_regular, sync_file, sync_folder
from artifacts.manifest import MANIFEST_NAME, Manifest
from artifacts.resolve import Request, Resolution
from artifacts.resolve import resolve as choose
from artifacts.scratch import held_folder, sweep
from artifacts.store import Store
from tasks.toolchain import probe_host

_PULLING: Final = ".pulling"


@dataclass(frozen=True)
class PulledEngine:
    """An engine in a local folder, its bytes checked; `plan` is the file that the runtime loads. Not to be written to."""

    folder: Path
    plan: Path
    manifest: Manifest


def resolve(
    store: Store,
    recipe: str,
    request: Request | None = None,
    *,
    warn: Callable[[str], None] = lambda _message: None,
) -> Resolution:
    """Choose the best published engine of a recipe that may be loaded; `request` defaults to what this host is.

    Its `best` is None where none fits, and its candidates say why. Raises StoreError, and IntegrityError for a damaged
    channel; damaged manifests are passed over, and `warn` is told.
    """
    catalog = EngineCatalog(store, warn)
    wanted = request if request is not None else Request.of_host(probe_host())
    channels = catalog.channels(recipe, wanted.channel) if wanted.channel is not None else {}
    return choose(catalog.manifests(recipe), wanted, channels)


def pull(store: Store, engine: Manifest | EngineId, to: Path) -> PulledEngine:
    """Bring an engine to `to`/<recipe>/<target>/<build>, whole or not at all, and check every byte.

    Several processes may pull into one folder: one brings it, the others find it. What is there already is checked
    again, and brought again where it does not match. Raises NotFoundError, StoreError, IntegrityError.
    """
    name = EngineId.of(engine.identity) if isinstance(engine, Manifest) else engine
    catalog = EngineCatalog(store)
    data = catalog.manifest_bytes(name)
    manifest = catalog.read_manifest(name, data)
    # Absolute at once: the working directory may change while the engine is in use.
    folder = to.absolute() / name.recipe / name.target / name.build
    try:
        make_folders(folder.parent)
        # A folder of its own: what is swept there must never be the user's.
        with _locked(to.absolute() / _PULLING) as private:
            if not _is_whole(folder, manifest, data):
                _bring(catalog, name, manifest, data, folder, private)
    except OSError as err:
        raise StoreError(f"{folder}: {err.strerror or err}; free some space, or give another folder") from err
    return PulledEngine(folder, folder / manifest.plan, manifest)


def _bring(
    catalog: EngineCatalog, name: EngineId, manifest: Manifest, data: bytes, folder: Path, private: Path
) -> None:
    sweep(private)
    with held_folder(private) as temporary:
        whole = temporary / "engine"
        whole.mkdir()
        for file, entry in manifest.files.items():
            catalog.fetch(name, file, entry, whole / file)
            with (whole / file).open("rb") as stream:
                os.fsync(stream.fileno())
        with create_file(whole / MANIFEST_NAME, 0o644) as stream:
            stream.write(data)
            sync_file(stream)
        sync_folder(whole)
        if folder.exists():
            folder.rename(temporary / "damaged")
        whole.rename(folder)
        sync_folder(folder.parent)


def _is_whole(folder: Path, manifest: Manifest, data: bytes) -> bool:
    try:
        if (folder / MANIFEST_NAME).read_bytes() != data:
            return False
        for name, entry in manifest.files.items():
            with open_regular(folder / name) as stream:
                check_chunks(file_chunks(stream), entry.ref, name)
    except (OSError, StoreError, IntegrityError):
        return False
    return True


@contextmanager
def _locked(folder: Path) -> Iterator[Path]:
    """Hold a folder's lock, which the kernel drops with its holder."""
    make_folders(folder)
    with (folder / "pull").open("wb") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield folder
