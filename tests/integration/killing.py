"""Builds in processes that are killed: start one, wait for what it says, kill it, look at what is left."""

from __future__ import annotations

import contextlib
import hashlib
import re
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Condition, Thread

import psutil

from artifacts.cache import blob_path
from artifacts.catalog import EngineCatalog
from artifacts.folder import FolderStore
from artifacts.records import ActionRecord
from tests.integration.building import environment

_MARK = "ENGINERY_TEST_BUILD"
# How long the kernel and a dying server may take to be gone; what lives longer was left behind.
_GONE_SECONDS = 10.0


@dataclass
class Build:
    """A running `enginery build`; `ran` are the steps that it said it runs."""

    process: subprocess.Popen[str]
    mark: str
    lines: list[str] = field(default_factory=list)
    changed: Condition = field(default_factory=Condition)
    ended: bool = False

    @property
    def ran(self) -> list[str]:
        """The steps that the build said it runs."""
        return [match[1] for line in self.lines if (match := re.match(r"  run   (\S+)", line))]

    @property
    def stderr(self) -> str:
        """All that it said."""
        return "".join(self.lines)

    def wait_for(self, stage: str, timeout: float) -> bool:
        """Wait until a step of the stage runs; False where the build ended without."""
        deadline = time.monotonic() + timeout
        with self.changed:
            while not any(step.partition(":")[0] == stage for step in self.ran):
                if self.ended or not self.changed.wait(deadline - time.monotonic()):
                    return False
        return True

    def kill(self) -> list[psutil.Process]:
        """Kill the build's own process alone, as the kernel does when memory is short; return what outlives it."""
        self.process.kill()
        self.process.wait()
        deadline = time.monotonic() + _GONE_SECONDS
        while (left := self.family()) and time.monotonic() < deadline:
            time.sleep(0.05)
        return left

    def family(self) -> list[psutil.Process]:
        """Return every living process that has this build's mark in its environment, which children inherit."""
        found: list[psutil.Process] = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.status() != psutil.STATUS_ZOMBIE and process.environ().get(_MARK) == self.mark:
                    found.append(process)
        return found

    def _read(self) -> None:
        for line in self.process.stderr or ():
            with self.changed:
                self.lines.append(line)
                self.changed.notify_all()
        with self.changed:
            self.ended = True
            self.changed.notify_all()


@contextmanager
def started(folder: Path, recipe: str = "digits.yaml") -> Iterator[Build]:
    """Start `enginery build RECIPE --store store --json` in a folder; at the end nothing of it is left."""
    mark = uuid.uuid4().hex
    with subprocess.Popen(
        [sys.executable, "-m", "enginery", "build", recipe, "--store", "store", "--json"],
        cwd=folder,
        env={**environment(), "PREFECT_HOME": str(folder / "prefect"), _MARK: mark},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        build = Build(process, mark)
        reader = Thread(target=build._read)
        reader.start()
        try:
            yield build
        finally:
            for left in [process, *build.family()]:
                with contextlib.suppress(psutil.Error):
                    left.kill()
            process.wait()
            reader.join()


def check_store(folder: Path) -> dict[str, str]:
    """Check that all that is visible in a store is whole; return the stage of every record by key."""
    store = FolderStore(folder)
    faults: list[str] = []
    catalog = EngineCatalog(store, faults.append)
    for manifest in catalog.manifests():
        identity = manifest.identity
        path = folder / "engines" / identity.recipe / identity.target / identity.build
        names = {file.name for file in path.iterdir() if file.is_file()}  # beside them lie the marks of publications
        # A publication that died before its manifest leaves its provenance, which has a name of its own each time.
        left = {name for name in names - manifest.files.keys() if name.startswith("provenance-")}
        assert names - left == {"manifest.json", *manifest.files}
        for name, entry in manifest.files.items():
            data = (path / name).read_bytes()
            assert (hashlib.sha256(data).hexdigest(), len(data)) == (entry.digest, entry.size)
    assert not faults
    records: dict[str, str] = {}
    for info in store.list("cache/actions/"):
        record = ActionRecord.from_bytes(store.read(info.path))
        assert info.path == f"cache/actions/{record.stage}/{record.key}.json"
        for ref in record.outputs.values():
            assert hashlib.sha256(store.read(blob_path(ref.digest))).hexdigest() == ref.digest
        records[record.key] = record.stage
    return records
