"""Time an engine that lies in a store: its files are fetched and checked, its own recipe says at which shapes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

from pydantic import ValidationError

from artifacts.catalog import EngineCatalog, EngineId
from artifacts.manifest import Manifest
from recipes.schema import Benchmark, Recipe, duration_seconds, size_bytes
from recipes.shapes import batch_axis, benchmark_cases
from tasks.errors import BackendError
from tasks.gpus import gpu_held, visible
from tasks.process import Limits, run_stage
from tasks.runner import brings_host_code, merged_recipe

_SEED: Final = 2


def time_engine(
    catalog: EngineCatalog,
    manifest: Manifest,
    *,
    batches: Sequence[int] | None,
    seconds: float,
    say: Callable[[str], None] = lambda _text: None,
) -> dict[str, Any]:
    """Return the facts of the `benchmark` stage, of the engine alone.

    `batches` are sizes of the batch axis (None: opt of each profile), `seconds` the limit of each shape. Raises
    BackendError ("bad profile" for batches that no profile admits), StoreError and IntegrityError.
    """
    try:
        recipe = Recipe.model_validate(merged_recipe(manifest))
    except ValidationError as err:
        words = f"its recipe is none that this release reads: {err.errors(include_url=False)[0]['msg']}"
        raise BackendError("bad data", words, "time it with the Enginery that published it") from err
    asked = Benchmark(batches=list(batches) if batches else None, seconds=seconds)
    recipe = recipe.model_copy(update={"benchmark": asked})
    cases = benchmark_cases(recipe)
    found = {case["batch"] for case in cases}
    missing = [size for size in batches or () if size not in found]
    if missing:
        why = "its inputs share no batch axis" if batch_axis(recipe) is None else "no profile admits them"
        words = f"it cannot be run at batch {', '.join(map(str, missing))}: {why}"
        raise BackendError("bad profile", words, "ask for a batch inside of a profile (enginery show ENGINE)")
    runtime, capability = manifest.compatibility.runtime, manifest.compatibility.gpus[0]
    params = {
        "executor": runtime,
        "gpu": capability,
        "version_compatible": brings_host_code(manifest),
        "dla_core": manifest.compatibility.dla_core,
        "cases": cases,
        "tensors": {name: dict(tensor) for name, tensor in recipe.inputs.items()},
        "input_seed": _SEED,
        "seconds": seconds,
        "compare": [],
    }
    with catalog.store.scratch() as folder:
        files = {name: folder / "engine" / name for name in manifest.files}
        (folder / "engine").mkdir()
        for name, entry in manifest.files.items():
            catalog.fetch(EngineId.of(manifest.identity), name, entry, files[name])
        output = folder / "output"
        output.mkdir()
        with gpu_held(params, waits=lambda: say("waiting for a GPU")) as gpu:
            result = run_stage(
                "benchmark",
                params,
                files,
                output,
                limits=Limits(duration_seconds(recipe.build.timeout), size_bytes(recipe.build.memory)),
                on_progress=lambda _fraction, text: say(text),
                variables=visible(gpu),
            )
    return {name: value for name, value in result.facts.items() if name != "compared"}
