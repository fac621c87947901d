"""Fresh plans that builds share through their store: what one machine has planned, another of its profile need not.

A profile is everything that decides a plan besides files and objects: the planner's code, and the host, but for its name, its
processor and which GPUs of a kind it has. An entry is found by the recipe's bytes; it holds in every checkout in which the files
that the recipe names are the same, and where every object that the plan was made from is the very one.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from artifacts.errors import ArtifactError
from artifacts.fresh_plans import FreshPlans
from artifacts.host import Host
from artifacts.refs import digest_bytes, digest_file
from artifacts.store import Store
from recipes.digests import Digests
from recipes.traces import FileTrace, trace_of
from tasks.toolchain import probe_host, version

if TYPE_CHECKING:
    from recipes.plan import Plan
    from tasks.session import BuildSession

_LAYOUT: Final = 2
CODE: Final = ("artifacts", "recipes", "tasks")


@dataclass
class SharedPlans:
    """The fresh plans of one store, for these targets (none: all that the recipes have), on one host. Nothing of it raises."""

    store: Store
    targets: tuple[str, ...] = ()
    host: Host = field(default_factory=probe_host)
    warn: Callable[[str], None] = lambda _message: None
    _offered: dict[str, dict[str, Any]] = field(default_factory=dict)

    def recall(self, recipes: Iterable[Path], digests: Digests) -> dict[Path, dict[str, Any]]:
        """Return the entries of recipes of which all but the store's objects is as it was."""
        names = {recipe: name for recipe in recipes if (name := self._name(recipe)) is not None}
        if not names:
            return {}
        try:
            found = self._plans.read(set(names.values()))
        except ArtifactError:
            return {}
        return {
            recipe: found[name]
            for recipe, name in names.items()
            if name in found and self._holds(found[name], recipe, digests)
        }

    def offer(self, session: BuildSession, plan: Plan, objects: Mapping[str, Any], latest: Mapping[str, Any]) -> None:
        """Take a fresh plan, for `share`; `objects` and `latest` are those of this store alone."""
        from tasks.report import plan_report

        recipe, trace = session.loaded.path, trace_of(session.loaded, session.files)
        name = self._name(recipe)
        if trace is None or name is None or session.selection.targets != self.targets or session.host != self.host:
            return
        folder = _folder(recipe)
        moves = _is_plain(folder, trace.below(folder))
        self._offered[name] = {
            "folder": None if moves else folder,
            "cpu": session.host.cpu,
            "versions": session.versions_read(),
            "trace": (trace.below(folder) if moves else trace).to_json(),
            "objects": dict(objects),
            "latest": dict(latest),
            "report": plan_report(plan),
        }

    def share(self) -> None:
        """Leave what was offered in the store."""
        offered, self._offered = self._offered, {}
        try:
            if offered:
                self._plans.add(offered)
        except ArtifactError:
            return

    def _holds(self, entry: Any, recipe: Path, digests: Digests) -> bool:
        try:
            steps, folder = entry["report"]["steps"], _folder(recipe)
            trace = FileTrace.from_json(entry["trace"])
            if (
                entry["folder"] is None
            ):  # no recipe names a whole path: the same words lead to the same places in every checkout
                known = _is_plain(folder, trace) and trace.above(folder).holds(digests)
            else:
                known = entry["folder"] == folder and trace.holds(digests)
            return (
                known
                and all(isinstance(entry["report"][part], kind) for part, kind in _PARTS.items())
                and all(isinstance(entry[part], dict) for part in ("objects", "latest"))
                # The processor counts where something was timed on it.
                and (entry["cpu"] == self.host.cpu or all(step["stage"] != "benchmark" for step in steps))
                and all(version(package) == found for package, found in entry["versions"].items())
            )
        except (KeyError, TypeError, ValueError, AttributeError):
            return False

    def _name(self, recipe: Path) -> str | None:
        try:
            return digest_bytes(json.dumps([digest_file(recipe), *self.targets]).encode())
        except OSError:
            return None

    @cached_property
    def _plans(self) -> FreshPlans:
        return FreshPlans(self.store, _profile(self.host), self.warn)


_PARTS: Final = {"recipe": str, "status": int, "steps": list, "engines": list}


def _folder(recipe: Path) -> str:
    return str(recipe.absolute().parent)  # links stay, and what is above them


def _is_plain(folder: str, trace: FileTrace) -> bool:
    """Tell whether a relative trace means the same files here by its words as for the kernel: no link may stand before `..`."""
    if trace.leaves:
        return os.path.realpath(folder) == folder
    return ".." not in folder.split("/")


def _profile(here: Host) -> str:
    """Return a digest of what decides a plan besides files and objects, and besides what entries themselves say."""
    host: dict[str, Any] = {name: value for name, value in here.to_json().items() if name not in ("name", "cpu")}
    host["gpus"] = [{name: value for name, value in gpu.items() if name != "uuid"} for gpu in host["gpus"]]
    top = Path(__file__).resolve().parents[1]
    code = [
        f"{package}/{path.name} {digest_file(path)}"
        for package in CODE
        for path in sorted((top / package).glob("*.py"))
    ]
    found = [_LAYOUT, host, platform.python_version(), version("pydantic"), version("pyyaml"), code]
    return digest_bytes(json.dumps(found, sort_keys=True).encode())[:32]
