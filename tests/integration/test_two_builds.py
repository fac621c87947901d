"""Two builds of one key at once, in processes of their own on one store: one compiles, the other waits and finds it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from artifacts.cache import ActionCache, blob_path
from artifacts.folder import FolderStore
from artifacts.refs import ONNX, ArtifactRef, digest_bytes
from tests.integration.building import environment
from tests.unit.tasks.small_graphs import cnn

ROOT = Path(__file__).resolve().parents[2]
# Both start to compile when both are ready: their imports take longer than the compilation.
BUILDER = """
import json, sys, time
from pathlib import Path
from artifacts.cache import ActionCache
from artifacts.folder import FolderStore
from artifacts.keys import Action
from artifacts.refs import ArtifactRef
from recipes.steps import Step
from tasks.process import Limits
from tasks.run import StepRunner

folder, name, ref = Path(sys.argv[1]), sys.argv[2], ArtifactRef(**json.loads(sys.argv[3]))
store = FolderStore(folder / "store")
profiles = [{"name": "p", "inputs": {"x": {corner: [1, 1, 8, 8] for corner in ("min", "opt", "max")}}}]
params = {
    "runtime": "tensorrt-rtx", "gpu": "sm89", "tf32": False, "profiles": profiles, "workspace": None,
    "optimization_level": None, "hardware_compatibility": "none", "version_compatible": False,
}
action = Action("compile", 1, params, {"model.onnx": ref.digest}, {})
said = []
runner = StepRunner(store, ActionCache(store), Limits(120, 8 << 30), {"host": name}, listen=said.append)
(folder / name).touch()
deadline = time.monotonic() + 60
while len(list(folder.glob("builder-*"))) < 2 and time.monotonic() < deadline:
    time.sleep(0.01)
record, built = runner.run(Step("compile:it", "compile", "run", action=action, inputs={"model.onnx": ref}))
print(json.dumps({
    "built": built, "key": action.key, "by": record.producer["host"], "plan": record.outputs["model.plan"].digest,
    "started": [progress.kind for progress in said].count("started"),
}))
"""


def test_of_two_builds_of_one_key_at_once_one_compiles(tmp_path):
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed (pip install 'enginery[tensorrt-rtx]')")
    data = cnn().SerializeToString()
    ref = ArtifactRef(digest_bytes(data), len(data), ONNX)
    (tmp_path / "model.onnx").write_bytes(data)
    store = FolderStore(tmp_path / "store")
    store.put_file(blob_path(ref.digest), tmp_path / "model.onnx", ref)
    builders = [
        subprocess.Popen(
            [sys.executable, "-c", BUILDER, str(tmp_path), f"builder-{number}", json.dumps(ref.to_json())],
            cwd=ROOT,
            env=environment(),
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    one, other = sorted(
        (json.loads(builder.communicate(timeout=120)[0]) for builder in builders), key=lambda d: d["built"]
    )
    assert (one["built"], one["started"]) == (False, 0)
    assert (other["built"], other["started"]) == (True, 1)
    assert {name: one[name] for name in ("key", "by", "plan")} == {name: other[name] for name in ("key", "by", "plan")}
    assert ActionCache(store).lookup("compile", one["key"]).producer == {"host": one["by"]}
    assert len(list(store.list("cache/actions/"))) == 1
