"""What pools built, in a build's report: by manifests, also of engines with parts, and where one cannot be read."""

from __future__ import annotations

from typing import Any

from artifacts.catalog import EngineId
from artifacts.errors import IntegrityError
from artifacts.manifest import Manifest
from tasks.report import figures, lacking, pooled_report
from tests.engines import make_manifest, manifest_document, parts_document

ENGINE = {"target": "t", "runtime": "tensorrt", "gpu": "sm90", "precision": {"asked": "fp16", "given": None}}
POOL = {"target": "tensorrt:sm90", "state": "built", "why": "", "engines": ["engines/m/t/gone", "engines/m/t/b"]}


def parted() -> Manifest:
    """Return the manifest of an engine of two parts, of 10 and 20 bytes, the second of which is less exact."""
    document = parts_document("encoder", "decoder")
    (entry,) = [one for name, one in manifest_document()["files"].items() if name == manifest_document()["plan"]]
    files = {f"{name}/model.plan": {**entry, "size": size} for name, size in (("encoder", 10), ("decoder", 20))}
    manifest = make_manifest({**document, "files": files, "precision.asked": "fp16"})
    graph = manifest.parts["decoder"].verification.graph
    assert graph.parity is not None
    parity = graph.parity.model_copy(update={"relative_l2": 0.5})
    verification = manifest.verification.model_copy(update={"graph": graph.model_copy(update={"parity": parity})})
    decoder = manifest.parts["decoder"].model_copy(update={"verification": verification})
    parts = {**manifest.parts, "decoder": decoder}
    precision = manifest.precision.model_copy(update={"given": "fp16"})
    parts = {name: one.model_copy(update={"precision": precision}) for name, one in parts.items()}
    return manifest.model_copy(update={"parts": parts})


def test_an_engine_of_parts_is_told_by_all_of_them_and_a_damaged_one_beside_it_is_passed_over():
    assert figures(parted()) == (30, 0.5, None)

    def read(engine: EngineId) -> Manifest:
        if engine.build == "gone":
            raise IntegrityError("the manifest is damaged")
        return parted()

    (row,) = pooled_report([ENGINE], [POOL], read)
    assert (row["state"], row["size"], row["parity"]) == ("cached", 30, 0.5)
    assert lacking([row], [POOL]) == []
    alone: dict[str, Any] = {**POOL, "engines": ["engines/m/t/gone"]}
    (row,) = pooled_report([ENGINE], [alone], read)
    assert (row["state"], row["why"]) == ("failed", "the manifest is damaged")
    assert lacking([row], [alone]) == ["t fp16 (the manifest is damaged)"]
    assert lacking([row], [{**alone, "state": "failed"}]) == []  # told of the pool
