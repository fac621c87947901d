"""Execute an engine that was published without having been executed, and attest what was found.

What is compared with is in the store already: the manifest names the actions that the engine came through, and the records of
those name the reference, the labelled data and the metric's code. The engine runs as the `verify` stage of a build runs it, in
a process of its own, and is judged by the gates that its manifest states.
"""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Mapping
from typing import Any, Final

from artifacts.attestation import Attestation
from artifacts.cache import ActionCache, blob_path, record_path
from artifacts.catalog import EngineCatalog, EngineId
from artifacts.errors import IntegrityError, NotFoundError, StoreError
from artifacts.host import Gpu, Host
from artifacts.keys import Action
from artifacts.leases import Lease, leased
from artifacts.manifest import DeviceFacts, HostFacts, Manifest
from artifacts.manifest_gates import Measured
from artifacts.records import ActionRecord
from artifacts.refs import BYTES, ArtifactRef, digest_bytes
from artifacts.resolve import Request, refusals
from artifacts.signing import signer_from_environment
from recipes.gates import judge_by
from recipes.schema import Build, duration_seconds, size_bytes
from recipes.steps import STAGE_VERSIONS, Step
from tasks.process import Limits
from tasks.progress import Listener, Progress
from tasks.run import StepRunner
from tasks.runner import brings_host_code, merged_recipe
from tasks.toolchain import BACKENDS, version

_REFERENCE: Final = "reference.safetensors"
_HELD_OUT: Final = "held-out.safetensors"
_NEEDED: Final = (_REFERENCE, "dataset.safetensors", "outputs.safetensors", "code.tar", _HELD_OUT)


def _quiet(_progress: Progress) -> None:
    """Listen to nothing."""


def why_not_here(manifest: Manifest, host: Host) -> tuple[str, ...]:
    """Return why this host cannot execute an engine; whether its gates passed is no reason."""
    if manifest.parts:
        return ("it has several parts, which are executed by a build on such a host, and not later",)
    if manifest.fallback is not None and manifest.fallback.kind == "source":
        return ("it is a source model for its own framework, which the build that saves it executes, and not later",)
    passed = manifest.verification.model_copy(update={"passed": True})
    return refusals(manifest.model_copy(update={"verification": passed}), Request.of_host(host), {})


def execute(catalog: EngineCatalog, engine: EngineId, host: Host, *, listen: Listener = _quiet) -> Attestation:
    """Execute a published engine on this host, which `why_not_here` has nothing against; keep and return what was found.

    An execution that ends in an error attests nothing. Raises StoreError naming what is gone that the comparison needs,
    TaskError as the execution fails, IntegrityError for damage.
    """
    # Garbage collectors keep what an engine that is in use came through.
    with leased(catalog.store, f"verify {engine}", [str(engine)]) as lease:
        return _execute(catalog, engine, host, listen, lease)


def _execute(catalog: EngineCatalog, engine: EngineId, host: Host, listen: Listener, lease: Lease) -> Attestation:
    data = catalog.manifest_bytes(engine)
    manifest = catalog.read_manifest(engine, data)
    step = verify_step(catalog, engine, manifest, host)
    build = merged_recipe(manifest).get("build") or {}
    limits = Limits(
        timeout_s=duration_seconds(build.get("timeout", Build.model_fields["timeout"].default)),
        memory_bytes=size_bytes(build.get("memory", Build.model_fields["memory"].default)),
    )
    runner = StepRunner(
        catalog.store,
        ActionCache(catalog.store, catalog.warn, lambda: lease),
        limits,
        producer={"host": host.name, "os": host.os},
        listen=listen,
        host=host,
    )
    record, _made = runner.run(step)
    attestation = _attestation(record, manifest, digest_bytes(data), engine, host)
    return catalog.attest(engine, attestation, signer_from_environment())


def verify_step(catalog: EngineCatalog, engine: EngineId, manifest: Manifest, host: Host) -> Step:
    """Return the step that measures a published engine itself on this host, as a build here would.

    Its key is that of a build where the recipe's `driver` is left at `branch` and the engine is of one kind of device, so that
    neither measures again what the other has. Raises StoreError naming the record or the blob that is gone.
    """
    measured = _measured_before(catalog, engine, manifest)
    compatibility = manifest.compatibility
    executor: dict[str, Any] = {"executor": compatibility.runtime}
    packages = ["onnx", "onnxruntime", "numpy"]
    device: dict[str, Any] = {}
    if compatibility.runtime != "onnxruntime":
        gpu = _gpu(manifest, host)
        executor |= {"gpu": gpu.compute_capability, "version_compatible": brings_host_code(manifest)}
        if compatibility.dla_core is not None:
            executor["dla_core"] = compatibility.dla_core
        packages = ["numpy"]
        device = {BACKENDS[compatibility.runtime]: compatibility.runtime_version}
        device |= {"device": gpu.device(), "driver": host.driver.partition(".")[0] if host.driver else None}
    inputs = {name: entry.ref for name, entry in manifest.files.items() if _is_run(name, manifest)}
    inputs |= _references(catalog, engine, measured)
    _restore(catalog, engine, manifest)
    before = measured.preimage
    own = {name: found for name, found in before["toolchain"].items() if name not in ("onnx", "onnxruntime", "numpy")}
    params = {
        **{name: value for name, value in before["params"].items() if name != "tf32"},
        "subject": "engine",
        **executor,
    }
    toolchain = {
        **{name: version(name) for name in packages},
        **device,
        **{name: version(name) for name in own if name not in device},
    }
    digests = {name: ref.digest for name, ref in inputs.items()}
    action = Action("verify", STAGE_VERSIONS["verify"], params, digests, toolchain)
    return Step(f"verify:{engine}", "verify", "run", action=action, inputs=inputs)


def _attestation(record: ActionRecord, manifest: Manifest, digest: str, engine: EngineId, host: Host) -> Attestation:
    on_gpu = manifest.compatibility.runtime != "onnxruntime"
    gpu = _gpu(manifest, host) if on_gpu else None
    gates = manifest.verification.gates
    verdict = judge_by(record.facts, gates.parity, gates.metric, manifest.precision.given)
    return Attestation(
        schema=1,
        engine=str(engine),
        manifest=digest,
        created=dt.datetime.now(dt.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        key=record.key,
        host=HostFacts(name=host.name, os=host.os, arch=host.arch, driver=host.driver),
        device=DeviceFacts(**gpu.device()) if gpu is not None else None,
        gpu=gpu.compute_capability if gpu is not None else "cpu",
        runtime_version=manifest.compatibility.runtime_version,
        passed=verdict.passed,
        reasons=verdict.reasons,
        measured=Measured.model_validate_json(json.dumps(dict(record.facts), allow_nan=False)),
        enginery=version("enginery") or "unknown",
    )


def _measured_before(catalog: EngineCatalog, engine: EngineId, manifest: Manifest) -> ActionRecord:
    """Return a record of a comparison of the same model with its source: it names the reference, the data, the metric.

    Every verification of a recipe compares with the same, whichever graph it is of; but of an int8 engine, some may have
    held-out calibration samples to compare with too, and such a one comes first.
    """
    found = None
    keys = [step.key for step in manifest.provenance.steps if step.stage == "verify"]
    for key in keys:
        path = record_path("verify", key)
        try:
            record = ActionRecord.from_bytes(catalog.store.read(path))
        except NotFoundError:
            continue
        except IntegrityError as err:
            catalog.warn(f"{path}: {err}; passed over")
            continue
        inputs = record.preimage.get("inputs", {})
        if record.key == key and _REFERENCE in inputs and (found is None or _HELD_OUT in inputs):
            found = record
    if found is not None:
        return found
    names = ", ".join(record_path("verify", key) for key in keys) or "none is named"
    raise _gone(catalog, engine, f"every record of its verification ({names})")


def _references(catalog: EngineCatalog, engine: EngineId, measured: ActionRecord) -> dict[str, ArtifactRef]:
    """Return what the comparison reads besides the engine. Raises StoreError where a blob of it is gone."""
    found: dict[str, ArtifactRef] = {}
    inputs: Mapping[str, str] = measured.preimage["inputs"]
    for name in _NEEDED:
        if name in inputs:
            info = catalog.store.info(blob_path(inputs[name]))
            if info is None:
                raise _gone(catalog, engine, f"{name} ({blob_path(inputs[name])})")
            found[name] = ArtifactRef(inputs[name], info.size, BYTES)
    return found


def _restore(catalog: EngineCatalog, engine: EngineId, manifest: Manifest) -> None:
    """Bring back blobs of the engine's files that are gone from the cache: the engine has copies of its own."""
    for name, entry in manifest.files.items():
        if catalog.store.info(blob_path(entry.digest)) is None:
            catalog.store.copy(f"{engine.path}/{name}", blob_path(entry.digest))


def _is_run(name: str, manifest: Manifest) -> bool:
    """Tell whether a file is what runs: the plan, its external data, or a library of plugins."""
    return name == manifest.plan or name.startswith(f"{manifest.plan}.") or name in manifest.compatibility.plugins


def _gpu(manifest: Manifest, host: Host) -> Gpu:
    """Return the GPU of this host that an engine runs on: one as it was built on before any other."""
    needs = manifest.compatibility
    fitting = [gpu for gpu in host.gpus if gpu.compute_capability in needs.gpus]
    if not fitting:
        raise StoreError(f"{manifest.identity} is for {' or '.join(needs.gpus)}, which this host has not")
    built_on = needs.device.model_dump(exclude_none=True) if needs.device is not None else {}
    return max(fitting, key=lambda gpu: sum(getattr(gpu, name) == value for name, value in built_on.items()))


def _gone(catalog: EngineCatalog, engine: EngineId, what: str) -> StoreError:
    return StoreError(
        f"{engine} cannot be verified: {what} is gone from {catalog.store.uri}; build its recipe there again, which makes "
        "what is missing"
    )
