"""Steps run against a folder store: what is fetched is what was planned, or nothing is recorded."""

from __future__ import annotations

import numpy as np
import pytest

from artifacts.cache import ActionCache
from artifacts.errors import StoreError
from artifacts.folder import FolderStore
from artifacts.keys import Action
from artifacts.refs import digest_bytes, digest_file
from recipes.digests import Digests
from recipes.errors import RecipeError
from recipes.files import DatasetFiles, LocalFile, dataset_members
from recipes.steps import Step
from tasks.process import Limits
from tasks.run import StepRunner

TENSORS = {"x": {"dtype": "float32", "shape": ["batch", 2]}}


@pytest.fixture
def runner(tmp_path):
    store = FolderStore(tmp_path / "store")
    return StepRunner(store, ActionCache(store), Limits(60, 4 << 30), producer={})


def fetch(local, name, digest, params):
    return Step("fetch:it", "fetch", "run", local=local, action=Action("fetch", 1, params, {name: digest}))


def dataset(files, name):
    params = {
        "kind": "dataset", "format": files.format, "entry": None, "arguments": {}, "fields": {}, "names": ["x"],
        "label": None, "images": None, "samples": None, "order": "sequential", "seed": 0, "tensors": TENSORS,
    }  # fmt: skip
    return fetch(files, name, files.digest, params)


def recorded(runner, step):
    return runner.cache.lookup(step.stage, step.action.key)


def test_an_npz_that_changed_since_the_plan_is_not_recorded_under_the_old_key(runner, tmp_path):
    path = tmp_path / "data.npz"
    np.savez(path, x=np.zeros((20, 2), np.float32))
    step = dataset(DatasetFiles("npz", digest_file(path), path), "data.npz")
    np.savez(path, x=np.ones((20, 2), np.float32))
    with pytest.raises(RecipeError, match=r"data\.npz: changed since the build was planned"):
        runner.run(step)
    assert recorded(runner, step) is None
    path.unlink()
    with pytest.raises(RecipeError, match="changed since the build was planned"):
        runner.run(step)


def test_a_folder_that_changed_since_the_plan_is_not_recorded_under_the_old_key(runner, tmp_path):
    folder = tmp_path / "samples"
    folder.mkdir()
    for index in range(2):
        np.save(folder / f"{index}.npy", np.full(2, index, np.float32))
    digest = Digests().files(dataset_members(folder, images=False))
    step = dataset(DatasetFiles("arrays", digest, folder), "data")
    record, built = runner.run(step)
    assert built
    assert record.facts["samples"] == 2

    again = FolderStore(tmp_path / "again")
    other = StepRunner(again, ActionCache(again), runner.limits, producer={})
    np.save(folder / "1.npy", np.full(2, 7, np.float32))
    with pytest.raises(RecipeError, match="samples: changed since the build was planned"):
        other.run(step)
    assert recorded(other, step) is None


def test_a_file_that_changed_since_the_plan_is_the_recipes_fault(runner, tmp_path):
    path = tmp_path / "weights.safetensors"
    path.write_bytes(b"before")
    local = LocalFile(path.name, digest_bytes(b"before"), 6, str(path))
    step = fetch(local, local.name, local.digest, {"kind": "file"})
    path.write_bytes(b"after!")
    with pytest.raises(RecipeError, match="changed since the build was planned"):
        runner.run(step)
    assert recorded(runner, step) is None


def test_what_the_store_lacks_at_a_remote_address_is_the_recipes_fault(runner, s3_store_uri):
    local = LocalFile("weights.safetensors", digest_bytes(b"x"), -1, f"{s3_store_uri}/weights.safetensors")
    with pytest.raises(RecipeError, match="no such object"):
        runner.run(fetch(local, local.name, local.digest, {"kind": "file"}))


def test_cancelling_ends_the_wait_for_another_builder(runner, tmp_path):
    """Another process that builds the same may take hours; Ctrl-C here must not wait for it."""
    path = tmp_path / "weights.safetensors"
    path.write_bytes(b"before")
    local = LocalFile(path.name, digest_bytes(b"before"), 6, str(path))
    step = fetch(local, local.name, local.digest, {"kind": "file"})
    with FolderStore(tmp_path / "store").lock(f"fetch-{step.action.key}"):
        runner.cancel.set()
        with pytest.raises(StoreError, match="gave up waiting"):
            runner.run(step)
    assert recorded(runner, step) is None
