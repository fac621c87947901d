"""Timing caches in the store: one for each TensorRT version and kind of device, lent to a build and taken back from it.

timing/<runtime>-<version>/<digest>.cache     one line with the SHA-256 of the rest: the cache, as TensorRT serialises it
timing/<runtime>-<version>/<digest>.json      what the digest in the name is of: versions, driver and device, for people

Builders that share a store may finish at once: each writes by compare and swap, and where another was faster merges the two, by
TensorRT itself. A cache only makes builds faster, so that what the store refuses is said in the record, and never fails a build.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from artifacts.errors import ArtifactError, NotFoundError
from artifacts.host import Gpu, Host
from artifacts.keys import canonical_json
from artifacts.refs import digest_bytes
from artifacts.store import Store
from recipes.engine_stages import RUNTIME_PACKAGES
from recipes.steps import Step
from tasks.errors import TaskError
from tasks.gpus import visible
from tasks.process import Limits, run_stage

TIMING_CACHE: Final = "timing.cache"
_TRIES: Final = 5
_MERGE: Final = "tasks.engines.trt_timing:merge"


@dataclass(frozen=True)
class TimingPlace:
    """What a cache is of: nothing else may be lent to a build, or merged with what it measured.

    Besides what TensorRT compares (its version and the device's properties) this is the driver, in full, which compiles some
    of the kernels that are timed, and the flavour of CUDA that the runtime was built with.
    """

    runtime: str
    version: str
    cuda: str | None
    os: str
    arch: str
    driver: str | None
    compute_capability: str
    device: Mapping[str, Any]

    @property
    def stem(self) -> str:
        """Where it lies in a store, without the ending."""
        return f"timing/{self.runtime}-{self.version}/{digest_bytes(canonical_json(asdict(self)))}"


# Merges two caches (what the store has, what a build made) into bytes; None where TensorRT refuses, with its words.
Combine = Callable[[bytes, bytes], tuple[bytes | None, str]]


@dataclass
class LentCache:
    """One build's use of the cache at a place: `lend` before, `take_back` after; `facts` say what came of it."""

    store: Store
    place: TimingPlace
    facts: dict[str, Any] = field(default_factory=dict)
    _lent: bytes | None = None

    def lend(self, target: Path) -> bool:
        """Write the store's cache to a file, where there is one; return whether there was."""
        started = time.monotonic()
        self.facts["place"] = f"{self.place.stem}.cache"
        try:
            self._lent = _unframed(self.store.read(f"{self.place.stem}.cache"))
            if self._lent is None:
                self.facts["not_lent"] = "it is damaged"
            else:
                target.write_bytes(self._lent)
        except NotFoundError:
            pass
        except ArtifactError as err:
            self.facts["not_lent"] = str(err)
        self.facts["lend_seconds"] = round(time.monotonic() - started, 3)
        return self._lent is not None

    def take_back(self, made: Path, facts: Mapping[str, Any], combine: Combine) -> None:
        """Put what a build made (a file, and the stage's own facts about it) into the store, merged with what is there.

        `facts`: `used` and `reloads` as tasks.engines.trt_timing has them.
        """
        started = time.monotonic()
        try:
            self.facts["kept"] = self._take_back(made, facts, combine)
        except (ArtifactError, TaskError) as err:
            self.facts["kept"] = f"no: {err}"
        self.facts["take_back_seconds"] = round(time.monotonic() - started, 3)

    def _take_back(self, made: Path, facts: Mapping[str, Any], combine: Combine) -> str:
        if not made.exists():
            return "no: the build made none"
        if not facts.get("reloads"):
            # Kept, it would be refused by every build that follows.
            return f"no: it cannot be loaded again ({facts.get('reload_refused', 'not tried')})"
        data = made.read_bytes()
        # What the build was given is in what it made, unless it was refused.
        base = self._lent if facts.get("used") else None
        for _try in range(_TRIES):
            try:
                framed, version = self.store.read_versioned(f"{self.place.stem}.cache")
            except NotFoundError:
                if self.store.write(f"{self.place.stem}.cache", _framed(data), if_absent=True):
                    self._describe()
                    return "the first"
                continue
            there = _unframed(framed)
            if there == data:
                return "nothing new"
            if there is None:
                merged, how = data, "instead of what was damaged"
            elif there == base:
                merged, how = data, "with what was lent"
            elif there == self._lent:
                merged, how = data, "instead of what was refused"
            else:
                combined, said = combine(there, data)
                if combined is None:
                    return f"no: {said}"
                merged, how = combined, "merged with what another build had kept meanwhile"
            if self.store.write(f"{self.place.stem}.cache", _framed(merged), if_version=version):
                return how
        return "no: others kept theirs at the same time, again and again"

    def _describe(self) -> None:
        """Write what the cache is of beside it, for people: nothing reads it."""
        document = {"schema": 1, **asdict(self.place)}
        self.store.write(f"{self.place.stem}.json", json.dumps(document, indent=1, sort_keys=True).encode() + b"\n")


def _framed(data: bytes) -> bytes:
    return digest_bytes(data).encode() + b"\n" + data


def _unframed(framed: bytes) -> bytes | None:
    """Return a cache without its digest, or None where it is not whole: TensorRT parses it in native code."""
    stated, _newline, data = framed.partition(b"\n")
    return data if stated == digest_bytes(data).encode() else None


def lent_cache(store: Store, step: Step, gpu: Gpu | None, host: Host) -> LentCache | None:
    """Return the cache that a step may use on a GPU; None where it has no use for one, or its recipe pins another."""
    action = step.action
    if action is None or gpu is None or step.stage != "compile" or action.params.get("reproducible"):
        return None
    if TIMING_CACHE in step.inputs:
        return None
    runtime, tools = action.params["runtime"], action.toolchain
    version = tools.get(RUNTIME_PACKAGES[runtime], host.runtimes.get(runtime))
    if version is None:
        return None
    place = TimingPlace(
        runtime=runtime,
        version=version,
        cuda=tools.get("cuda"),
        os=host.os,
        arch=host.arch,
        driver=host.driver,
        compute_capability=gpu.compute_capability,
        device=gpu.device(),
    )
    return LentCache(store, place)


def combine_in_child(folder: Path, limits: Limits, gpu: Gpu | None) -> Combine:
    """Return what merges two caches by TensorRT, in a process of its own that works in new folders inside of `folder`."""

    def combine(there: bytes, made: bytes) -> tuple[bytes | None, str]:
        work = Path(tempfile.mkdtemp(dir=folder))
        inputs = {"base.cache": work / "base.cache", "more.cache": work / "more.cache"}
        for path, data in zip(inputs.values(), (there, made), strict=True):
            path.write_bytes(data)
        output = work / "out"
        output.mkdir()
        result = run_stage("compile", {}, inputs, output, limits=limits, entry=_MERGE, variables=visible(gpu))
        merged = (output / TIMING_CACHE).read_bytes() if TIMING_CACHE in result.outputs else None
        return merged, str(result.facts.get("refused"))

    return combine
