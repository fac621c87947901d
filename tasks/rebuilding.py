"""Rebuild what a rollout asks of this host, and judge each engine by its gates and by the speed of what it replaces."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any, Final, TypeVar

from artifacts.catalog import EngineCatalog, EngineId
from artifacts.errors import IntegrityError, NotFoundError, StoreError
from artifacts.promotion import compare_speed, objections
from artifacts.rollouts import Rebuild, Rollout, read_rollout
from artifacts.store import Store
from tasks.drift import change_there, instant
from tasks.parameters import RETRIES
from tasks.patience import patiently

T = TypeVar("T")

_ALIVE_SECONDS: Final = 60.0
# Builds the targets of a recipe (file, targets) and returns the report of that build.
Build = Callable[[str, list[str]], Awaitable[dict[str, Any]]]
_Judged = tuple[Rebuild, dict[str, Any]]  # and what is known of it afterwards


async def rebuild_due(store: Store, rollout: str, host: str, build: Build) -> dict[str, list[dict[str, Any]]]:
    """Rebuild what is asked of a host, recipe by recipe, for as long as the rollout allows; return what became of it.

    What `build` raises is no verdict on an engine: it stays asked for, and a later look asks again.
    """
    done: set[tuple[str, str, str]] = set()
    judged: list[_Judged] = []
    while together := await _surely(partial(_go_on, store, rollout, host, done, judged)):
        done |= {one.key for one in together}
        judged = await _together(store, rollout, host, together, build)
    member = (await _surely(partial(read_rollout, store, rollout))).members.get(host)
    rebuilds = member.rebuilds if member is not None else ()
    return {
        "rebuilt": [
            {"recipe": one.recipe, "target": one.target, "state": one.state, "engine": one.engine, "reason": one.reason}
            for one in rebuilds
            if one.key in done
        ]
    }


def _go_on(
    store: Store, rollout: str, host: str, done: Collection[tuple[str, str, str]], judged: Sequence[_Judged]
) -> list[Rebuild]:
    """Say what became of engines, choose what this host builds next and mark it so, in one write: nobody else takes the same."""
    chosen: list[Rebuild] = []

    def go_on(found: Rollout) -> Rollout:
        now = time.time()
        for one, fields in judged:
            found = found.marked(host, one.key, instant(), since=now, **fields)
        chosen[:] = found.turn(host, now, done)
        return found.alive(host, {one.key for one in chosen}, now) if chosen else found

    change_there(store, rollout, go_on)
    return chosen


async def _together(store: Store, rollout: str, host: str, rebuilds: list[Rebuild], build: Build) -> list[_Judged]:
    """Build what one recipe has to rebuild, and return the verdict on each engine."""
    targets = list(dict.fromkeys(one.target for one in rebuilds))
    try:
        async with _alive(store, rollout, host, rebuilds):
            report = await build(rebuilds[0].file, targets)
            catalog = EngineCatalog(store)
            return [(one, await _surely(partial(verdict, catalog, one, report))) for one in rebuilds]
    except BaseException:
        keys = {one.key for one in rebuilds}
        with contextlib.suppress(Exception):
            change_there(store, rollout, lambda found: found.requested(host, keys, time.time()))
        raise


async def _surely(call: Callable[[], T]) -> T:
    """Call in a thread, and again where the store does not answer: hours of compilation are not to be lost by that."""
    return await asyncio.to_thread(patiently, call, RETRIES)


@contextlib.asynccontextmanager
async def _alive(store: Store, rollout: str, host: str, rebuilds: list[Rebuild]) -> AsyncIterator[None]:
    """Say every minute that these are being built: else all that is asked of this host counts as lost, and is asked for again."""
    keys = {one.key for one in rebuilds}

    async def say() -> None:
        while True:
            await asyncio.sleep(_ALIVE_SECONDS)
            change = partial(change_there, store, rollout, lambda found: found.alive(host, keys, time.time()))
            with contextlib.suppress(StoreError):  # the next minute says it too
                await asyncio.to_thread(change)

    saying = asyncio.ensure_future(say())
    try:
        yield
    finally:
        saying.cancel()
        with contextlib.suppress(asyncio.CancelledError, Exception):
            await saying


def built_or_raise(document: Any) -> dict[str, Any]:
    """Return the report of a build; raise what it raised instead, or RuntimeError where no worker took what it asked for."""
    if isinstance(document, BaseException):
        raise document
    found: dict[str, Any] = document
    if waits := [f"{one['target']}: {one['why']}" for one in found.get("pools", ()) if one["state"] == "waiting"]:
        raise RuntimeError("; ".join(waits))
    return found


def verdict(catalog: EngineCatalog, rebuild: Rebuild, report: dict[str, Any]) -> dict[str, Any]:
    """Judge an engine of a build's report: published, its gates, and no slower than what it replaces by promotion's share.

    Returns what is known of the rebuild afterwards: state, engine and reason.
    """
    runtime, _colon, gpu = rebuild.target.partition(":")
    engines = [
        one
        for one in report["engines"]
        if (one["runtime"], one["gpu"], one["precision"]["asked"]) == (runtime, gpu, rebuild.asked)
    ]
    if not engines:
        return {"state": "failed", "reason": "the recipe does not ask for it any more"}
    engine = engines[0]
    if engine["path"] is None:
        return {"state": "failed", "reason": _reason(engine, rebuild.target, report)}
    name = EngineId(*str(engine["path"]).removeprefix("engines/").split("/"))
    manifest = catalog.effective(name)
    replaced = None
    if rebuild.replaces not in (None, str(name)):
        with contextlib.suppress(NotFoundError, IntegrityError):
            replaced = catalog.manifest(EngineId(*str(rebuild.replaces).split("/")))
    speed = compare_speed(manifest, replaced)
    against = objections(manifest.verification, speed)
    # Where an engine cannot be executed no build executes it: that is told, and promotion is what forbids it.
    blocking = [one.text for one in against if one.waiver != "unexecuted"]
    if blocking:
        return {"state": "failed", "engine": str(name), "reason": "; ".join(blocking)}
    told = [one.text for one in against]
    told += [f"{speed.slower_by:+.1%} at the median"] if speed is not None else ["its speed is not compared"]
    return {"state": "passed", "engine": str(name), "reason": "; ".join(told)}


def _reason(engine: Mapping[str, Any], target: str, report: Mapping[str, Any]) -> str:
    """Say why an engine was not built: of a step that it needs why that one failed, and of a pool what its worker said."""
    why = str(engine["why"] or f"it is not built: {engine['state']}")
    told = [
        f"{step['id']}: {'; '.join(step['why'])}"
        for step in report.get("steps", ())
        if step["state"] == "failed" and why == f"needs {step['id']}, which failed"
    ]
    told += [one["why"] for one in report.get("pools", ()) if (one["target"], one["state"]) == (target, "failed")]
    return "; ".join([why, *told])
