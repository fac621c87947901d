"""The `publish` stage: a compiled engine and its manifest become visible in the store, and in another where asked.

It runs in the parent process, since it only copies and writes inside of stores. The files are copied
first and the manifest is written last, so that a build that dies at any instant publishes nothing.
"""

from __future__ import annotations

import datetime as dt
import os
import time
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from artifacts.cache import ActionCache, record_path
from artifacts.errors import NotFoundError
from artifacts.host import Host
from artifacts.records import ActionRecord
from artifacts.refs import ArtifactRef, digest_bytes
from artifacts.store import Store, open_store
from recipes.plan import EnginePlan
from recipes.steps import Step

if TYPE_CHECKING:
    from artifacts.manifest import Manifest
    from recipes.loader import LoadedRecipe

# A URI for whoever runs builds here: builder.id in the engines' provenance.
BUILDER_ID: Final = "ENGINERY_BUILDER_ID"


def publish_engine(
    step: Step,
    engine: EnginePlan,
    steps: Sequence[Step],
    recipe: LoadedRecipe,
    host: Host,
    store: Store,
    *,
    built: Collection[str] = (),
) -> ActionRecord:
    """Publish a compiled and verified engine, also where the recipe's `publish.to` says; return the action's record.

    `steps` are the plan's, with the records of all that the engine came through; `built` names those that this build
    ran itself. A relative `publish.to` is a folder beside the recipe. Where `ENGINERY_SIGN_KEY` names a key, it signs the
    engine. Raises StoreError, SigningError and IntegrityError.
    """
    # Manifest models take 0.15 s to import, which a build that publishes nothing must not pay.
    from artifacts.catalog import EngineCatalog, EngineId
    from artifacts.manifest import Manifest
    from artifacts.signing import signer_from_environment
    from tasks.engine_manifest import engine_manifest

    if step.action is None:
        raise ValueError(f"{step.id}: its inputs are not known yet")
    begin = time.perf_counter()
    now = dt.datetime.now(dt.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
    catalog = EngineCatalog(store)
    described = _with_provenance(engine_manifest(step, engine, steps, recipe, host, now, built), store)
    data = catalog.publish(described, signer_from_environment())
    manifest = Manifest.from_bytes(data)
    identity = EngineId.of(manifest.identity)
    to = step.action.params["to"]
    other = other_store(to, recipe.path)
    if other is not None and other.uri != store.uri:
        catalog.send(identity, EngineCatalog(other))
    _forget_if_gone(step.stage, step.action.key, store)
    return ActionRecord(
        preimage=step.action.preimage(),
        outputs={},
        facts={
            "path": identity.path,
            "build": identity.build,
            "to": to,
            "manifest": digest_bytes(data),
            "files": {name: entry.size for name, entry in manifest.files.items()},
        },
        seconds=time.perf_counter() - begin,
        started=now,
        producer={"host": host.name, "os": host.os},
    )


def _with_provenance(manifest: Manifest, store: Store) -> Manifest:
    """Store the provenance that follows from a manifest as a blob, and return the manifest that names it too."""
    from artifacts.manifest import FileEntry
    from artifacts.provenance import PROVENANCE_TYPE, provenance_name, provenance_of

    data = provenance_of(manifest, os.environ.get(BUILDER_ID))
    ref = ArtifactRef(digest_bytes(data), len(data), PROVENANCE_TYPE)
    with store.scratch() as folder:
        (folder / "provenance").write_bytes(data)
        ActionCache(store).put_blob(folder / "provenance", ref)
    entry = FileEntry(digest=ref.digest, size=ref.size, media_type=ref.media_type)
    return manifest.model_copy(update={"files": {**manifest.files, provenance_name(ref.digest): entry}})


def other_store(to: str | None, recipe: Path) -> Store | None:
    """Open what `publish.to` names, a relative folder beside the recipe; nothing is touched yet. Raises StoreError."""
    if to is None:
        return None
    return open_store(to if "://" in to or to.startswith("~") else str(recipe.resolve().parent / to))


def is_published(record: ActionRecord, store: Store) -> bool:
    """Tell whether what a publish record names is in a store still: the very manifest, and files of their sizes."""
    path = record.facts["path"]
    try:
        data = store.read(f"{path}/manifest.json")
    except NotFoundError:
        return False
    if digest_bytes(data) != record.facts["manifest"]:
        return False
    infos = {name: store.info(f"{path}/{name}") for name in record.facts["files"]}
    return all(info is not None and info.size == record.facts["files"][name] for name, info in infos.items())


def _forget_if_gone(stage: str, key: str, store: Store) -> None:
    """Drop an earlier record whose engine was lost or damaged: it would win over the new one, and never hold again."""
    earlier = ActionCache(store).lookup(stage, key)
    if earlier is not None and not is_published(earlier, store):
        store.delete(record_path(stage, key))
