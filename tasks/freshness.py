"""Which targets are fresh on the hosts of a pool: told from the hosts that the store knows, so that nothing is asked of Prefect.

A worker of the portable pool cannot plan what a GPU's host would: the keys have that host's driver, device and runtime. Those
are in `hosts/` (`enginery watch` keeps them there). A target is fresh where the plans of all hosts of its pool that were seen
lately say so. Of hosts that nobody watches nothing is known, and their pool is asked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from artifacts.catalog import host_path
from artifacts.errors import IntegrityError
from artifacts.gathered import Gathered, gather
from artifacts.host import Host
from artifacts.hosts import VANISHED_SECONDS, host_ages, read_host
from artifacts.store import Store
from recipes.plan import EnginePlan, Plan
from recipes.pools import pools_of, portable_host
from tasks.parameters import RETRIES
from tasks.patience import patiently
from tasks.remembered import PlanMemory
from tasks.session import open_session
from tasks.toolchain import BACKENDS, probe_host


@dataclass(frozen=True)
class Freshness:
    """What of one recipe is fresh elsewhere. `versions` are those of the packages that portable stages were planned with.

    Of many recipes, `kinds` are the hosts that are known, and what was `gathered` of the store spares requests.
    """

    recipe: Path
    store: Store
    versions: Mapping[str, str | None]
    kinds: Sequence[Host] | None = None
    gathered: Gathered | None = None

    def published(self, runtime: str, gpu: str, pool: str) -> tuple[str, ...]:
        """Return the paths of a target's engines where each is published and fresh for each host of a pool; else none.

        Raises StoreError.
        """
        engines = [
            engine
            for host, planned in self._plans
            if pool in pools_of(host)
            for engine in planned
            if (engine.runtime, engine.gpu) == (runtime, gpu)
        ]
        facts = [engine.publish.facts if engine.publish is not None else None for engine in engines]
        if not all(engine.state == "cached" and found for engine, found in zip(engines, facts, strict=True)):
            return ()
        return tuple(dict.fromkeys(str(found["path"]) for found in facts if found))

    @cached_property
    def _plans(self) -> list[tuple[Host, tuple[EnginePlan, ...]]]:
        """The engines, as hosts of each kind would plan them."""
        kinds = patiently(partial(known_kinds, self.store), RETRIES) if self.kinds is None else self.kinds
        return [
            (host, engines_on(self.recipe, self.store, host, self.versions, gathered=self.gathered)) for host in kinds
        ]


def engines_on(
    recipe: Path,
    store: Store,
    host: Host,
    versions: Mapping[str, str | None],
    targets: Sequence[str] = (),
    *,
    gathered: Gathered | None = None,
) -> tuple[EnginePlan, ...]:
    """Return the engines of a recipe as another host would plan them; a store that does not answer is asked again.

    Raises RecipeError, StoreError.
    """
    runtimes = {BACKENDS[name]: found for name, found in host.runtimes.items() if name in BACKENDS}
    portable = {name: found for name, found in versions.items() if not name.startswith("tensorrt")}
    made = {**runtimes, **portable}
    session = open_session(recipe, store, targets=tuple(targets), host=host, versions=made, retries=RETRIES)
    if gathered is not None:
        session.see(gathered)
    return session.plan().engines


def portable_plans(recipes: Sequence[Path], store: Store) -> dict[Path, tuple[Plan, Freshness]]:
    """Return the plans that are known to be fresh on this host as one of the portable pool, and what is fresh elsewhere.

    Raises StoreError.
    """
    found = PlanMemory(store, host=portable_host(probe_host())).recall(recipes)
    if not found:
        return {}
    plans = {path: planned for path, one in found.items() if (planned := _planned(one.report)) is not None}
    far, kinds = not store.uri.startswith("file:"), known_kinds(store)
    gathered = gather(store, {planned.recipe for planned in plans.values()}) if far and kinds else None
    return {path: (planned, Freshness(path, store, {}, kinds, gathered)) for path, planned in plans.items()}


def _planned(report: Mapping[str, Any]) -> Plan | None:
    """Return what a fresh plan's report says of engines that wait for other hosts; its steps are done. None: it is no report."""
    try:
        waiting = [
            EnginePlan(one["target"], one["runtime"], one["runtime_version"], one["gpu"], "fp32", None, "waiting")
            for one in report["engines"]
            if one["state"] == "waiting"
        ]
        return Plan(str(report["recipe"]), (), tuple(waiting))
    except (KeyError, TypeError):
        return None


def known_host(store: Store, name: str) -> Host:
    """Return a host as it was seen last. Raises NotFoundError, StoreError, IntegrityError."""
    return read_host(store, host_path(name))[0].host


def known_kinds(store: Store) -> list[Host]:
    """Return the hosts that were seen lately, one of each kind: for those that are alike, one plan is enough. Raises StoreError."""
    kinds: dict[str, Host] = {}
    for path, age in sorted(host_ages(store).items()):
        if age > VANISHED_SECONDS:
            continue
        try:
            host = read_host(store, path)[0].host
        except IntegrityError:
            continue  # not known, and so it is asked
        alike = replace(host, name="", cpu=None, gpus=tuple(replace(gpu, uuid="") for gpu in host.gpus))
        kinds.setdefault(str(sorted(alike.to_json().items(), key=str)), host)
    return list(kinds.values())
