"""What a build leaves in Prefect's UI: tables, progress and links as artifacts, and what its stages say as logs of their runs.

Enters: the report of a build, its store, and what running steps say. Nothing here may cost a build: what Prefect refuses is a
warning in the run's log.
"""

from __future__ import annotations

import json
import logging
import os
import re
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any, Final

from prefect.artifacts import (
    acreate_link_artifact,
    acreate_markdown_artifact,
    acreate_progress_artifact,
    acreate_table_artifact,
    aupdate_progress_artifact,
)
from prefect.logging import get_logger

from artifacts.catalog import EngineCatalog
from tasks.progress import Progress
from tasks.report import figures

if TYPE_CHECKING:
    from uuid import UUID

    from artifacts.manifest import Manifest
    from artifacts.store import Store

BAR_SECONDS: Final = "ENGINERY_BAR_SECONDS"
_LONG_SECONDS: Final = 5.0
_UPDATE_SECONDS: Final = 2.0
_LINKS: Final = 32
_LONGEST_ANSWER: Final = 20_000
_SEVERITY: Final = re.compile(r"\[(verbose|info|warning|error|internal_error)\] ", re.IGNORECASE)
_LEVELS: Final = {
    "verbose": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
    "internal_error": logging.ERROR,
}
_Log = Callable[[int, str], None]


def level_of(line: str) -> int:
    """Return the level at which a line of a stage's process is logged: TensorRT's severity, Python's warnings, tracebacks."""
    found = _SEVERITY.match(line)
    if found is not None:
        return _LEVELS[found[1].lower()]
    if re.match(r"Traceback \(most recent|(\w+\.)*\w+(Error|Exception): ", line):
        return logging.ERROR
    return logging.WARNING if re.search(r"\b\w*Warning: ", line) else logging.INFO


@cache
def _seconds(text: str) -> float:
    """Return how long a stage takes before it has a bar; what is no number is told once, and costs no stage."""
    try:
        return float(text)
    except ValueError:
        get_logger("shown").warning("%s=%s is no number of seconds: %g is used", BAR_SECONDS, text, _LONG_SECONDS)
        return _LONG_SECONDS


@dataclass
class ProgressShown:
    """The bar of one stage: made when the stage has taken long and says how far it is, moved every two seconds.

    Long is five seconds, or as many as the variable ENGINERY_BAR_SECONDS says. Where a stage fails its bar stays where it was.
    """

    step: str
    began: float
    long: float = field(default_factory=lambda: _seconds(os.environ.get(BAR_SECONDS) or str(_LONG_SECONDS)))
    latest: Progress | None = None
    _bar: UUID | None = None
    _moved: float = 0.0
    _at: float = -1.0

    async def move(self, *, done: bool = False) -> None:
        """Bring the bar to where the stage is; to its end where the stage is `done` and well."""
        now, fraction = time.monotonic(), self.latest.fraction if self.latest is not None else None
        if done and (self._bar is not None or fraction is not None):
            fraction = 1.0
        if fraction is None or fraction == self._at or now - self.began < self.long:
            return
        if not done and now - self._moved < _UPDATE_SECONDS:
            return
        self._moved, self._at = now, fraction
        text = f"{self.step}: {self.latest.text}" if self.latest is not None and self.latest.text else self.step
        percent = 100.0 * min(1.0, max(0.0, fraction))
        if self._bar is None:
            self._bar = await acreate_progress_artifact(percent, artifact_key("progress", self.step), text)
        else:
            await aupdate_progress_artifact(self._bar, percent, text)


def artifact_key(*parts: str) -> str:
    """Return a key as Prefect takes them: small letters, digits and single dashes."""
    return re.sub(r"[^a-z0-9]+", "-", "-".join(parts).lower()).strip("-")


async def leave_stages(document: Mapping[str, Any], log: _Log) -> None:
    """Leave the table of a build's stages in the flow run that is under way; what fails is logged."""
    recipe = document["recipe"]
    rows = stage_rows(document["steps"])
    await _leave([acreate_table_artifact(rows, artifact_key("stages", recipe), f"Stages of {recipe}, and why")], log)


async def leave_engines(document: Mapping[str, Any], store: Store, log: _Log) -> None:
    """Leave what a build knows of its engines, and links to their manifests; of a fleet's build also what pools did."""
    recipe = document["recipe"]
    made: list[Awaitable[object]] = []
    if rows := document.get("pools"):
        key = artifact_key("pools", recipe)
        made.append(acreate_table_artifact(list(rows), key, f"What was asked of work pools for {recipe}"))
    try:
        before = previous_manifests(document, EngineCatalog(store))
        text = engines_markdown(document, before)
        made.append(acreate_markdown_artifact(text, artifact_key("engines", recipe), f"Engines of {recipe}"))
    except Exception as err:  # noqa: BLE001  the build is done, whatever its store says now
        log(logging.WARNING, f"the engines before this build cannot be read: {err}")
    for engine in [engine for engine in document["engines"] if engine["path"]][:_LINKS]:
        name = f"{engine['target']} {engine['precision']['asked']}"
        link, key = f"{document['store']}/{engine['path']}/manifest.json", artifact_key("manifest", recipe, name)
        made.append(acreate_link_artifact(link, name, key, f"Manifest of {recipe} for {name}"))
    await _leave(made, log)


async def leave_answer(command: str, document: Any, log: _Log) -> None:
    """Leave what a command has printed: a list of rows as a table, else as text, of which the first part where it is long."""
    key, title = artifact_key(command), f"What enginery {command} printed"
    if isinstance(document, list):
        await _leave([acreate_table_artifact(document, key, title)], log)
        return
    text = json.dumps(document, indent=2, ensure_ascii=False)
    more = f"\n... ({len(text)} characters)" if len(text) > _LONGEST_ANSWER else ""
    await _leave([acreate_markdown_artifact(f"```json\n{text[:_LONGEST_ANSWER]}{more}\n```", key, title)], log)


async def _leave(made: Sequence[Awaitable[object]], log: _Log) -> None:
    for one in made:
        try:
            await one
        except Exception as err:  # noqa: BLE001  of many kinds, and the work is done
            log(logging.WARNING, f"Prefect did not take an artifact: {err}")


def stage_rows(steps: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the table of stages: those that ran first, in their order, then what was cached."""
    ordered = sorted(steps, key=lambda step: step["state"] == "cached")
    return [
        {
            "stage": step["stage"],
            "subject": step["subject"],
            "state": step["state"],
            "seconds": step["seconds"] if step["state"] == "built" else None,
            "why": "; ".join(step["why"]),
        }
        for step in ordered
    ]


def previous_manifests(document: Mapping[str, Any], catalog: EngineCatalog) -> dict[tuple[str, str, str], Manifest]:
    """Return the manifest of the build before, by runtime, GPU and precision asked for; of any version of the runtime."""
    found: dict[tuple[str, str, str], Manifest] = {}
    manifests = sorted(catalog.manifests(document["recipe"]), key=lambda one: one.identity.created)
    for engine in document["engines"]:
        target = re.compile(rf"{re.escape(engine['runtime'])}-[0-9][^-]*-{re.escape(engine['gpu'])}")
        asked = engine["precision"]["asked"]
        for manifest in manifests:
            same = target.fullmatch(manifest.identity.target) and manifest.precision.asked == asked
            if same and manifest.identity.build != engine["build"]:
                found[engine["runtime"], engine["gpu"], asked] = manifest
    return found


def engines_markdown(document: Mapping[str, Any], before: Mapping[tuple[str, str, str], Manifest]) -> str:
    """Return a Markdown table of engines, each figure beside that of the build before (in brackets; -: not measured)."""
    lines = [
        f"### {document['recipe']}",
        "",
        "| engine | precision | state | size, bytes | parity (rel. L2) | p50, ms | published |",
        "|---|---|---|---|---|---|---|",
    ]
    for engine in document["engines"]:
        asked, given = engine["precision"]["asked"], engine["precision"]["given"]
        old = before.get((engine["runtime"], engine["gpu"], asked))
        size, parity, p50 = figures(old) if old is not None else (None, None, None)
        timing = engine["benchmark"] or {}
        cells = (
            engine["target"],
            asked if given in (asked, None) else f"{given} (asked {asked})",
            engine["state"] if engine["state"] == "cached" else f"{engine['state']}: {engine['why']}",
            _beside(engine["size"], size, "d", known=old is not None),
            _beside(engine["parity"], parity, ".1e", known=old is not None),
            _beside(timing.get("p50_ms"), p50, ".3f", known=old is not None),
            f"`{engine['path']}`" if engine["path"] else "",
        )
        lines.append(f"| {' | '.join(' '.join(cell.replace('|', chr(92) + '|').split()) for cell in cells)} |")
    lines += [
        "",
        "In brackets: the build before, of the same target and precision.",
        "",
        f"Store: `{document['store']}`",
    ]
    return "\n".join(lines)


def _beside(now: float | None, then: float | None, spec: str, *, known: bool) -> str:
    told = "-" if now is None else format(now, spec)
    return f"{told} ({'-' if then is None else format(then, spec)})" if known else told
