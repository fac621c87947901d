"""Engines of parts, published from simulated builds: parts that are one graph are one blob; all parts are visible, or none."""

from __future__ import annotations

import itertools
import os
import signal
import sys
from dataclasses import replace
from typing import ClassVar

import pytest

from artifacts.cache import blob_path
from artifacts.catalog import EngineCatalog
from artifacts.folder import FolderStore
from artifacts.refs import digest_bytes
from tests.unit.recipes.simulated import FILES
from tests.unit.tasks.test_publish import Builder, killed_builds

RECIPE = """
enginery: 1
name: twins
source: {framework: torch, model: 'model.py:build', weights: {file: weights.safetensors}}
profiles: {default: {batch: [1, 1, 4]}}
parts:
  left: {inputs: {image: {shape: [batch, 3]}}, outputs: [logits]}
  right: {inputs: {image: {shape: [batch, 3]}}, outputs: [logits]}
  other: {module: other, inputs: {image: {shape: [batch, 4]}}, outputs: [logits]}
precision: {build: [fp16]}
targets: [{runtime: tensorrt-rtx, gpus: [sm89]}]
"""
OWN = replace(FILES, calibration=None, labelled=None)


class Parted(Builder):
    """A simulated build of three parts, of which two are the same graph."""

    outputs: ClassVar[dict[str, dict]] = {}

    def plan(self, made, files=FILES, targets=()):
        del files
        return super().plan(made, replace(OWN, parts=dict.fromkeys(made.parts, OWN)), targets)

    def run(self, step):
        record = super().run(step)
        if step.stage in ("export", "outliers"):  # of one module, whichever part it is
            self.outputs[step.id] = record.outputs
            return replace(record, outputs=self.outputs[step.id.replace("right", "left")])
        return record


def build_and_die(folder, limit):
    """Build an engine of three parts, and die by SIGKILL when it publishes and a name changes for the `limit`-th time."""
    changes = itertools.count(1)
    publishing = []

    def watch(event, arguments):
        if event in ("os.rename", "os.link", "os.mkdir", "os.remove") and str(folder) in str(arguments):
            publishing.extend([event] if "engines" in str(arguments) else [])
            if publishing and next(changes) == limit:
                os.kill(os.getpid(), signal.SIGKILL)

    builder = Parted(folder=folder, text=RECIPE)
    sys.addaudithook(watch)
    builder.build_all()


def visible(folder):
    """Return which files of which parts are visible, each checked."""
    store = FolderStore(folder / "store")
    found = []
    for manifest in EngineCatalog(store, pytest.fail).manifests():
        for name, entry in manifest.files.items():
            assert digest_bytes(store.read(f"engines/{manifest.identity}/{name}")) == entry.digest
        found.append({name for name in manifest.files if name.endswith("model.plan")})
    return found


ALL = {"left/model.plan", "right/model.plan", "other/model.plan"}


def test_parts_share_fetched_weights_and_those_that_are_one_graph_are_one_blob(tmp_path):
    builder = Parted(folder=tmp_path, text=RECIPE)
    planned = builder.build_all()
    assert [step for step in builder.built if step.startswith("fetch")] == ["fetch:code", "fetch:weights"]
    assert visible(tmp_path) == [ALL]
    (manifest,) = EngineCatalog(builder.store).manifests()
    left, right, other = (manifest.files[f"{name}/model.plan"] for name in ("left", "right", "other"))
    assert left.digest == right.digest != other.digest
    compiled = [step for step in planned.steps if step.stage == "compile"]
    assert len({step.action.key for step in compiled}) == 2
    blobs = {blob_path(entry.digest) for entry in (left, right, other)}
    assert all(builder.store.info(blob) is not None for blob in blobs)
    assert len(blobs) == 2


@pytest.mark.parametrize("step", [7, pytest.param(1, marks=pytest.mark.long)])
def test_killed_between_its_parts_an_engine_is_not_visible_and_the_next_build_publishes_all(tmp_path, step):
    kills = 0
    for folder, completed in killed_builds(tmp_path, build_and_die, step):
        found = visible(folder)
        assert found in ([], [ALL])
        if completed:
            assert found == [ALL]
            continue
        kills += not found
        Parted(folder=folder, text=RECIPE).build_all()
        assert visible(folder) == [ALL]
    assert kills > 8 // step
