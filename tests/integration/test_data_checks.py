"""Data that does not fit is found before any source process starts."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from artifacts.store import open_store
from recipes.steps import Step
from tasks.drive import drive
from tasks.report import report
from tasks.session import BuildSession, Outcome, open_session
from tests.integration.building import RECIPES, copy_digits, fewer_engines

pytestmark = pytest.mark.slow


def outcomes(recipe: Path) -> tuple[dict[str, Outcome], BuildSession]:
    session = open_session(recipe, open_store(str(recipe.parent / "store")))

    async def run(step: Step, planned: Any) -> Outcome:
        return await asyncio.to_thread(session.ensure, step, planned)

    asyncio.run(drive(session, run))
    return dict(session.outcomes), session


def image(count: int = 64, **changes: Any) -> dict[str, np.ndarray]:
    with np.load(RECIPES / "digits" / "calibration.npz") as data:
        return {"image": data["image"][:count].copy(), **changes}


def with_nan() -> dict[str, np.ndarray]:
    arrays = image()
    arrays["image"][5, 0, 0, 0] = np.nan
    return arrays


FAULTS: dict[str, tuple[Callable[[], dict[str, np.ndarray]], str]] = {
    "wrong name": (lambda: {"picture": image()["image"]}, "has no array 'image' (it has: picture)"),
    "wrong type": (
        lambda: {"image": (image()["image"] * 255).astype(np.uint8)},
        "'image' is uint8, the input is float32",
    ),
    "wrong shape": (lambda: {"image": image()["image"][:, :, :, 0]}, "'image' has 3 axes [64, 1, 8], the input has 4"),
    "NaN": (with_nan, "'image' holds 1 NaN or infinite values"),
    "too few": (lambda: image(40), "64 samples were asked for, the data set has 40"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_bad_calibration_set_ends_the_build_before_any_source_runs(tmp_path: Path, fault: str):
    arrays, words = FAULTS[fault]
    recipe = copy_digits(tmp_path, fewer_engines)
    document = yaml.safe_load(recipe.read_text())
    document["precision"]["calibration"]["samples"] = 64
    recipe.write_text(yaml.safe_dump(document))
    np.savez(tmp_path / "digits" / "calibration.npz", **arrays())
    found, _session = outcomes(recipe)
    assert words in found["fetch:calibration"].message
    assert {step.partition(":")[0] for step, one in found.items() if one.state == "built"} == {"fetch"}


def test_data_that_looks_random_is_told_with_its_statistic(tmp_path: Path):
    recipe = copy_digits(tmp_path, fewer_engines)
    with np.load(RECIPES / "digits" / "heldout.npz") as data:  # ends the build too, so that no source runs
        np.savez(tmp_path / "digits" / "heldout.npz", image=data["image"][:, 0], label=data["label"])
    document = yaml.safe_load(recipe.read_text())
    document["precision"]["calibration"].pop("samples", None)
    recipe.write_text(yaml.safe_dump(document))
    noise = np.random.default_rng(0).normal(size=(200, 1, 8, 8)).astype(np.float32)
    np.savez(tmp_path / "digits" / "calibration.npz", image=noise)
    found, session = outcomes(recipe)
    assert "'image' has 3 axes [450, 8, 8], the input has 4" in found["fetch:labelled"].message
    (warning,) = next(
        step["warnings"] for step in report(session, session.plan())["steps"] if step["id"] == "fetch:calibration"
    )
    assert warning.startswith("image: looks like random noise, not data (neighbours along the last axis correlate by ")
