"""What serving code imports: which engine may this host load, its files, checked, in a local folder, and a runner of it.

    from enginery.client import load, pull, resolve
    from artifacts.store import open_store

    store = open_store("s3://engines/prod")
    chosen = resolve(store, "digits").best
    with load(pull(store, chosen, Path("/var/cache/engines"))) as engine:
        logits = engine(image=batch)["logits"]

Imports no framework and no Prefect. A plan is executable code: nothing is handed out, or to a
runtime, before its digest is checked, and its signature where there is a trust policy: the `trust` of a call, else the
file that `ENGINERY_TRUST` names (docs/trust.md). Only `trust=UNCHECKED` switches that off.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from artifacts.catalog import EngineCatalog, EngineId
from artifacts.errors import IntegrityError, NotFoundError, RefusedError, StoreError, TrustError
from artifacts.files import check_chunks, create_file, file_chunks, make_folders, open_regular, sync_file, sync_folder
from artifacts.manifest import MANIFEST_NAME, Manifest
from artifacts.refs import digest_bytes, require_match
from artifacts.resolve import Request, Resolution, refusals
from artifacts.resolve import resolve as choose
from artifacts.scratch import held_folder, locked_folder, sweep
from artifacts.signing import SIGNATURE_BYTES, SIGNATURE_NAME
from artifacts.store import Store
from enginery.trusting import Unchecked, trust_of
from tasks.toolchain import probe_host

if TYPE_CHECKING:
    from artifacts.trust import Trust
    from tasks.runner import Runner


_PULLING: Final = ".pulling"
# Is given an engine's manifest, and its signature where there is one; raises where they are not to be trusted.
TrustCheck = Callable[[bytes, bytes | None], None]


@dataclass(frozen=True)
class PulledEngine:
    """An engine in a local folder, its bytes checked; `plan` is the file that the runtime loads. Not to be written to.

    `plan` is the folder itself where the engine has parts.
    """

    folder: Path
    plan: Path
    manifest: Manifest


def resolve(
    store: Store,
    recipe: str,
    request: Request | None = None,
    *,
    trust: Trust | Unchecked | None = None,
    warn: Callable[[str], None] = lambda _message: None,
) -> Resolution:
    """Choose the best published engine of a recipe that may be loaded; `request` defaults to what this host is.

    Its `best` is None where none fits, and its candidates say why. Raises StoreError, IntegrityError for a damaged
    channel, and PolicyError; damaged manifests are passed over, and `warn` is told.
    """
    judge = trust_of(trust)
    catalog = EngineCatalog(store, warn, judge.believes if judge is not None else None)
    wanted = request if request is not None else Request.of_host(probe_host())
    builds, pinned = _channel(store, recipe, wanted.channel, judge)
    stored = {EngineId.of(manifest.identity): (manifest, data) for manifest, data in catalog.stored_manifests(recipe)}

    def distrust(manifest: Manifest) -> tuple[str, ...]:
        engine = EngineId.of(manifest.identity)
        data = stored[engine][1]
        expected = pinned.get(engine.target)
        if expected is not None and expected != digest_bytes(data):
            return (f"its manifest is not the one that was promoted to {wanted.channel}",)
        if judge is not None:
            try:
                judge.check_engine(manifest, data, catalog.signatures(engine, data), wanted.channel)
            except TrustError as err:
                return (str(err),)
        return ()

    return choose([manifest for manifest, _data in stored.values()], wanted, builds, distrust=distrust)


def pull(
    store: Store,
    engine: Manifest | EngineId,
    to: Path,
    *,
    channel: str | None = None,
    trust: Trust | Unchecked | None = None,
) -> PulledEngine:
    """Bring an engine to `to`/<recipe>/<target>/<build>, whole or not at all, and check every byte, and who signed it.

    Several processes may pull into one folder: one brings it, the others find it. What is there already is checked
    again, and brought again where it does not match. `channel` is the one that the engine was resolved by. Raises
    NotFoundError, StoreError, IntegrityError, also where a Manifest is not what is published now (but for reports and what was
    measured since, without a channel, which names one manifest alone), and TrustError before anything is brought.
    """
    name = EngineId.of(engine.identity) if isinstance(engine, Manifest) else engine
    judge = trust_of(trust)
    catalog = EngineCatalog(store)
    data = catalog.manifest_bytes(name)
    manifest = catalog.read_manifest(name, data)
    if isinstance(engine, Manifest) and _matters(engine, whole=channel is not None) != _matters(
        manifest, whole=channel is not None
    ):
        raise IntegrityError(f"{name} of {store.uri} was published anew since it was resolved; do it again")
    signatures = catalog.signatures(name, data)
    by = judge.check_engine(manifest, data, signatures, channel) if judge is not None else min(signatures, default=None)
    # Absolute at once: the working directory may change while the engine is in use.
    folder = to.absolute() / name.recipe / name.target / name.build
    try:
        make_folders(folder.parent)
        # A folder of its own: what is swept there must never be the user's.
        with locked_folder(to.absolute() / _PULLING, "pull") as private:
            if not _is_whole(folder, manifest, data):
                _bring(catalog, name, manifest, data, folder, private)
            _put_signature(folder, signatures.get(by) if by is not None else None, private)
    except OSError as err:
        raise StoreError(f"{folder}: {err.strerror or err}; free some space, or give another folder") from err
    return PulledEngine(folder, folder / manifest.plan, manifest)


def load(
    engine: PulledEngine | Path | str,
    *,
    trust: TrustCheck | Unchecked | None = None,
    device: int | None = None,
    graphs: bool = True,
    threads: int | None = None,
) -> Runner:
    """Load a pulled engine into this process, and return what runs it: `load(folder)(image=array)["logits"]`.

    A fallback (`manifest.fallback`) is loaded with those of its execution providers that this ONNX Runtime has; what they keep
    goes to DIR.cache beside its folder. A source model (`fallback.kind` "source") runs in its own framework.
    One of several parts gives them by name, all of them loaded: `load(folder)["encoder"](image=array)["states"]`.

    `engine` is its folder, or its plan inside of it. Before a byte of it reaches a runtime: `trust` is asked about the
    manifest and its signature, every file's digest is compared with the manifest, and the host with what the engine needs.
    `device` is the index of a CUDA device (default: the first that fits), `graphs` allows CUDA graphs, `threads` bounds the
    threads of ONNX Runtime. Raises NotFoundError where there is no manifest; IntegrityError for damage; RefusedError where
    this host may not load it, or its gates did not pass; whatever `trust` raises; and BackendError as the runtime fails.
    """
    from tasks.runner import PartedRunner, brings_host_code, open_runner

    whole = folder = engine.folder if isinstance(engine, PulledEngine) else _engine_folder(Path(engine))
    manifest = check(folder, trust=trust)
    reasons = refusals(manifest, Request.of_host(probe_host()), {})
    if reasons:
        raise RefusedError(str(manifest.identity), reasons, "enginery resolve says which engine fits here")
    plugins = [folder / name for name in manifest.compatibility.plugins]

    def opened(folder: Path, manifest: Manifest) -> Runner:
        return open_runner(
            _plan_bytes(folder, manifest),
            manifest,
            device=device,
            graphs=graphs,
            threads=threads,
            host_code=brings_host_code(manifest),
            plugins=plugins,
            cache=_cache(whole) if manifest.fallback is not None else None,
        )

    if not manifest.parts:
        return opened(folder, manifest)
    parts: dict[str, Runner] = {}
    try:
        for name in manifest.parts:
            parts[name] = opened(folder / name, manifest.part(name))
    except BaseException:
        for part in parts.values():
            part.close()
        raise
    return PartedRunner(parts, manifest)


def check(folder: Path, *, trust: TrustCheck | Unchecked | None = None) -> Manifest:
    """Return the manifest of a pulled engine after asking `trust` about it and comparing every file with it.

    Raises NotFoundError where there is no manifest, IntegrityError naming the file that is damaged or gone, and whatever
    `trust` raises.
    """
    try:
        with open_regular(folder / MANIFEST_NAME) as stream:
            data = stream.read()
    except StoreError as err:
        if (folder / MANIFEST_NAME).exists():
            raise
        raise NotFoundError(str(folder), MANIFEST_NAME) from err
    judge = trust_of(trust)
    if judge is not None:
        judge(data, _signature(folder / SIGNATURE_NAME))
    try:
        manifest = Manifest.from_bytes(data)
    except IntegrityError as err:
        raise IntegrityError(f"{folder / MANIFEST_NAME}: {err}") from err
    for name, entry in manifest.files.items():
        try:
            with open_regular(folder / name) as stream:
                check_chunks(file_chunks(stream), entry.ref, str(folder / name))
        except (OSError, StoreError) as err:
            raise IntegrityError(f"{folder / name}: cannot be read: {err}; pull the engine again") from err
    return manifest


def _signature(path: Path) -> bytes | None:
    """Return what lies at a signature's path, as far as a signature can be long; None where nothing does."""
    try:
        with path.open("rb") as stream:
            return stream.read(SIGNATURE_BYTES)
    except OSError:
        return None


def _matters(manifest: Manifest, *, whole: bool) -> object:
    """Return what of a manifest may not change between its choice and its use: not `whole`, what is measured later may."""
    if whole:
        return manifest
    runs = {part.plan for part in manifest.parts.values()} or {manifest.plan}
    files = {file: entry for file, entry in manifest.files.items() if file in runs or not file.endswith(".json")}
    described = manifest.model_dump(include={"identity", "compatibility", "inputs", "outputs", "profiles", "fallback"})
    parts = {name: part.model_dump(include={"inputs", "outputs", "profiles"}) for name, part in manifest.parts.items()}
    return described, runs, files, parts


def _engine_folder(path: Path) -> Path:
    return path.parent if path.is_file() else path


def _cache(folder: Path) -> Path | None:
    """Return a folder beside a pulled fallback for what its providers keep; None where none can be made."""
    path = folder.with_name(f"{folder.name}.cache")
    try:
        make_folders(path)
    except (OSError, StoreError):
        return None
    return path


def _plan_bytes(folder: Path, manifest: Manifest) -> Path | bytes:
    """Return the very bytes that match the digest; the plan's path where a runtime reads other files beside it."""
    path, entry = folder / manifest.plan, manifest.files[manifest.plan]
    beside = any(other.startswith(f"{manifest.plan}.") for other in manifest.files)
    if beside or manifest.compatibility.runtime == "paddle":  # which has its weights in a file of their own
        return path
    data = path.read_bytes()
    require_match(str(path), entry.ref, digest_bytes(data), len(data))
    return data


def _channel(
    store: Store, recipe: str, name: str | None, judge: Trust | None
) -> tuple[dict[str, str], dict[str, str | None]]:
    """Return the build, and its manifest's digest, that a channel names for each target; what is not trusted names none."""
    builds: dict[str, str] = {}
    pinned: dict[str, str | None] = {}
    if name is not None:
        from artifacts.channels import channels_of
        from artifacts.seen import believed

        for channel in channels_of(store, recipe, name):
            move = channel.head.move
            try:
                if judge is not None:
                    move = believed(
                        store, channel, lambda head: judge.check_move(head.statement, head.signature, recipe, name)
                    ).head.move
            except TrustError as err:
                builds[move.target] = f"nothing that may be trusted: {err}"  # no build has spaces in its name
            else:
                builds[move.target], pinned[move.target] = move.build, move.manifest
    return builds, pinned


def _put_signature(folder: Path, signature: bytes | None, private: Path) -> None:
    """Keep the signature that was checked beside the manifest, or none."""
    path = folder / SIGNATURE_NAME
    if signature is None:
        path.unlink(missing_ok=True)
    elif not path.is_file() or path.read_bytes() != signature:
        with held_folder(private) as temporary:
            with create_file(temporary / SIGNATURE_NAME, 0o644) as stream:
                stream.write(signature)
                sync_file(stream)
            (temporary / SIGNATURE_NAME).replace(path)


def _bring(
    catalog: EngineCatalog, name: EngineId, manifest: Manifest, data: bytes, folder: Path, private: Path
) -> None:
    sweep(private)
    with held_folder(private) as temporary:
        whole = temporary / "engine"
        whole.mkdir()
        for file, entry in manifest.files.items():
            (whole / file).parent.mkdir(exist_ok=True)  # a part's own
            catalog.fetch(name, file, entry, whole / file)
            with (whole / file).open("rb") as stream:
                os.fsync(stream.fileno())
        for part in manifest.parts:
            sync_folder(whole / part)
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
