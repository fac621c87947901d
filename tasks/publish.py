"""The `publish` stage: what a build made becomes visible in the store, all at once, and in another where asked.

It runs in the parent process, since it only copies and writes inside of stores, when nothing else of the build is left to
run. Files are copied first, then manifests are written, and then the publication that makes all of them visible
(`artifacts.publications`), so that a build that dies at any instant publishes nothing.
"""

from __future__ import annotations

import datetime as dt
import os
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from artifacts.cache import ActionCache, record_path
from artifacts.errors import NotFoundError
from artifacts.host import Host
from artifacts.publications import marks_of, publication_path
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


def publish_engines(
    engines: Mapping[str, tuple[Step, EnginePlan]],
    steps: Sequence[Step],
    recipe: LoadedRecipe,
    host: Host,
    store: Store,
    *,
    built: Collection[str] = (),
    without: Mapping[str, str] | None = None,
) -> dict[str, ActionRecord]:
    """Publish compiled and verified engines together, also where the recipe's `publish.to` says; return records by key.

    `engines` are by key of their publish actions. `steps` are the plan's, with the records of all that the engines came
    through; `built` names those that this build ran itself, `without` the targets that are not among the engines, and why. A
    relative `publish.to` is a folder beside the recipe. Where `ENGINERY_SIGN_KEY` names a key, it signs the engines.
    Raises StoreError, SigningError and IntegrityError; nothing is visible then that was not before.
    """
    # Manifest models take 0.15 s to import, which a build that publishes nothing must not pay.
    from artifacts.catalog import EngineCatalog, EngineId
    from artifacts.signing import signer_from_environment
    from tasks.engine_manifest import engine_manifest

    begin = time.perf_counter()
    now = dt.datetime.now(dt.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
    catalog = EngineCatalog(store)
    manifests = [
        _with_provenance(engine_manifest(step, engine, steps, recipe, host, now, built), store)
        for step, engine in engines.values()
    ]
    published = catalog.publish_together(manifests, signer_from_environment(), without)
    names = [EngineId.of(manifest.identity) for manifest in manifests]
    (to,) = {None if step.action is None else step.action.params["to"] for step, _engine in engines.values()}
    other = other_store(to, recipe.path)
    if other is not None and other.uri != store.uri:
        catalog.send(names, EngineCatalog(other), without)
    records = {}
    for (key, (step, _engine)), engine, data in zip(engines.items(), names, published.manifests, strict=True):
        if step.action is None:
            raise ValueError(f"{step.id}: its inputs are not known yet")
        _forget_if_gone(step.stage, key, store)
        records[key] = ActionRecord(
            preimage=step.action.preimage(),
            outputs={},
            facts={
                "path": engine.path,
                "build": engine.build,
                "to": to,
                "manifest": digest_bytes(data),
                "publication": published.name,
                "files": {name: entry.size for name, entry in catalog.read_manifest(engine, data).files.items()},
            },
            seconds=time.perf_counter() - begin,
            started=now,
            producer={"host": host.name, "os": host.os},
        )
    return records


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
    """Tell whether what a publish record names is in a store still: the very manifest, visible, and files of their sizes."""
    path = record.facts["path"]
    try:
        data = store.read(f"{path}/manifest.json")
    except NotFoundError:
        return False
    if digest_bytes(data) != record.facts["manifest"]:
        return False
    # Its marks tell, not the record: in a mirror, or where a name was taken, it is published under another one.
    marks = [publication_path(path.split("/")[1], mark) for mark in marks_of(store, path)]
    if marks and all(store.info(publication) is None for publication in marks):
        return False
    infos = {name: store.info(f"{path}/{name}") for name in record.facts["files"]}
    return all(info is not None and info.size == record.facts["files"][name] for name, info in infos.items())


def _forget_if_gone(stage: str, key: str, store: Store) -> None:
    """Drop an earlier record whose engine was lost or damaged: it would win over the new one, and never hold again."""
    earlier = ActionCache(store).lookup(stage, key)
    if earlier is not None and not is_published(earlier, store):
        store.delete(record_path(stage, key))
