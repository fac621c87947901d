"""Manifests and published engines for tests, all made from the golden manifest."""

from __future__ import annotations

import copy
import hashlib
import json
from pathlib import Path
from typing import Any

from artifacts.cache import blob_path
from artifacts.manifest import Manifest
from artifacts.refs import ENGINE_PLAN, ONNX, ArtifactRef
from artifacts.store import Store
from tasks.toolchain import probe_host

GOLDEN = Path(__file__).parent / "golden" / "manifest-v1.json"


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def manifest_document(changes: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return the golden manifest as JSON values, with values replaced by dotted path."""
    document = json.loads(GOLDEN.read_bytes())
    for path, value in (changes or {}).items():
        part = document
        *parents, last = path.split(".")
        for name in parents:
            part = part[name]
        part[last] = copy.deepcopy(value)
    return document


def parts_document(*names: str) -> dict[str, Any]:
    """Return what makes of the golden manifest one of an engine of several graphs: values by dotted path, but for `files`."""
    document = manifest_document()
    own = ("inputs", "outputs", "profiles", "precision", "calibration", "verification")
    described = {field: document[field] for field in own}
    parts = {name: {"plan": f"{name}/model.plan", **described} for name in names}
    return {"schema": 2, "plan": "", "inputs": {}, "outputs": {}, "profiles": [], "calibration": None, "parts": parts}


def make_manifest(changes: dict[str, Any] | None = None) -> Manifest:
    return Manifest.from_bytes(json.dumps(manifest_document(changes)).encode())


def make_engine(store: Store, folder: Path, content: bytes = b"plan", **names: str) -> Manifest:
    """Store a plan's blob, and return the manifest of its engine, which is not published yet."""
    ref = ArtifactRef(hashlib.sha256(content).hexdigest(), len(content), ENGINE_PLAN)
    source = folder / f"source-{ref.digest}"
    source.write_bytes(content)
    store.put_file(blob_path(ref.digest), source, ref)
    changes: dict[str, Any] = {f"identity.{name}": value for name, value in names.items()}
    changes["files"] = {"model.plan": ref.to_json()}
    changes["provenance.key"] = digest("/".join(names.values()))
    return make_manifest(changes)


def make_onnx_engine(
    store: Store, folder: Path, graph: bytes, changes: dict[str, Any] | None = None, **names: str
) -> Manifest:
    """Store a graph's blob, and return the manifest of an engine for ONNX Runtime on this host, not published yet.

    By default it is the small network of tests.unit.tasks.small_graphs: x to y, with the golden manifest's profiles.
    """
    host = probe_host()
    version, names = host.runtimes["onnxruntime"], {"build": "fp16-a", **names}
    document = manifest_document()
    profiles = [
        {"name": profile["name"], "inputs": {"x": profile["inputs"]["image"]}} for profile in document["profiles"]
    ]
    ref = ArtifactRef(hashlib.sha256(graph).hexdigest(), len(graph), ONNX)
    source = folder / f"source-{ref.digest}"
    source.write_bytes(graph)
    store.put_file(blob_path(ref.digest), source, ref)
    return make_manifest(
        {
            "identity.target": f"onnxruntime-{version}-cpu",
            **{f"identity.{name}": value for name, value in names.items()},
            "compatibility.runtime": "onnxruntime",
            "compatibility.runtime_version": version,
            "compatibility.gpus": ["cpu"],
            "compatibility.os": host.os,
            "compatibility.arch": host.arch,
            "plan": "model.onnx",
            "files": {"model.onnx": ref.to_json()},
            "inputs": {"x": document["inputs"]["image"]},
            "outputs": {"y": document["outputs"]["logits"]},
            "profiles": profiles,
            "provenance.key": digest("/".join(names.values())),
            **(changes or {}),
        }
    )
