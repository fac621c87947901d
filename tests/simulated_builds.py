"""Builds without stages: records, blobs and engines as a build leaves them, of made-up bytes, in a real store."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from artifacts.cache import ActionCache, blob_path
from artifacts.host import Host
from artifacts.publications import mark_document, mark_path, publication_document, publication_path
from artifacts.records import ActionRecord
from artifacts.refs import BYTES, ArtifactRef, digest_bytes
from artifacts.store import Store
from recipes.plan import Plan
from recipes.steps import Step
from tasks.session import open_session

# A recipe of one tiny graph and eight engines; `name` tells it, and its graph, from others.
RECIPE = """
enginery: 1
name: {name}
source: {{framework: onnx, model: {{file: {name}.onnx}}}}
export: {{opset: 18}}
inputs: {{x: {{shape: [batch, 3, 32, 32]}}}}
profiles: {{online: {{batch: [1, 1, 8]}}}}
precision: {{build: [fp16]}}
targets:
  - {{runtime: tensorrt-rtx, gpus: [sm75, sm80, sm86, sm89, sm120, sm121]}}
  - {{runtime: onnxruntime, gpus: [cpu], precision: [fp32, fp16]}}
"""
_EXACT = {"relative_l2": 0.0, "max_abs": 0.0, "cosine": 1.0, "non_finite": 0}
_FACTS: dict[str, dict[str, Any]] = {
    "verify": {"executed": True, "parity": _EXACT, "data": None, "metric": None},
}
_OUTPUTS = {"reference": "reference.safetensors", "verify": None, "publish": None, "benchmark": None}


def write_recipe(folder: Path, name: str) -> Path:
    """Write the recipe of that name, and its graph."""
    (folder / f"{name}.onnx").write_bytes(f"the graph of {name}".encode())
    path = folder / f"{name}.yaml"
    path.write_text(RECIPE.format(name=name))
    return path


def simulate_build(recipe: Path, store: Store, scratch: Path, host: Host | None = None) -> Plan:
    """Leave a store as a build of this recipe does, and return the plan that is fresh then."""
    session = open_session(recipe, store, host=host)
    while (planned := session.plan()).ready:
        for step in planned.ready:
            record = _simulate(step, store, scratch)
            session._known[record.stage, record.key] = record  # as if this session had made it
    session = open_session(recipe, store, host=host)  # which looks every record up anew
    planned = session.plan()
    session.finish(planned)
    if not planned.fresh:
        raise AssertionError([(step.id, step.state, step.why) for step in planned.steps if step.state != "cached"])
    return planned


def _simulate(step: Step, store: Store, scratch: Path) -> ActionRecord:
    if step.action is None:
        raise AssertionError(step.id)
    facts = dict(_FACTS.get(step.stage, {}))
    name = _OUTPUTS.get(step.stage, "model.plan" if "tensorrt" in step.subject else "model.onnx")
    outputs = {}
    if name is not None:
        data = f"{name} of {step.action.key}".encode()
        if step.stage == "fetch" and step.local is not None:
            data = Path(step.local.address).read_bytes()  # type: ignore[union-attr]  # a file, in these recipes
        ref = ArtifactRef(digest_bytes(data), len(data), BYTES)
        blob = scratch / ref.digest
        blob.write_bytes(data)
        store.put_file(blob_path(ref.digest), blob, ref)
        blob.unlink()
        outputs[name] = ref
    if step.stage == "publish":
        facts |= _published(step, store)
    return ActionCache(store).put_record(
        ActionRecord(step.action.preimage(), outputs, facts, 1.0, "2026-01-01T00:00:00Z")
    )


def _published(step: Step, store: Store) -> dict[str, Any]:
    params = step.action.params if step.action is not None else {}
    build = f"{params['asked']}-{digest_bytes(repr(step.inputs).encode())[:16]}"
    path = f"engines/{params['recipe']}/{params['target']}/{build}"
    manifest, engine = f"the manifest of {path}".encode(), b"an engine"
    recipe, name = params["recipe"], digest_bytes(params["recipe"].encode())[:16]
    store.write(f"{path}/model.plan", engine)
    store.write(mark_path(path.removeprefix("engines/"), name), mark_document(recipe, name))
    store.write(f"{path}/manifest.json", manifest)
    store.write(publication_path(recipe, name), publication_document({}, {}))
    return {"path": path, "build": build, "manifest": digest_bytes(manifest), "files": {"model.plan": len(engine)}}
