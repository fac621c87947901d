"""A full disk, a read-only one, no permission, a clock two days off: a clear error and nothing half-written, or the right result.

    python -m bench.faults.disk RESULT.json [--levels 6] [--seed N] [--actions build,publish,pull,promote,gc]

Needs root (it mounts a tmpfs, and drops capabilities again) and, for the clock, libfaketime. Each action is the real command line, in a
process of its own, on a store of its own file system, or on S3 with the system's temporary folders there (s3-temp): with the disk filled up to a few levels between nothing and what the
action takes; mounted read-only; without permission to write; with a clock two days ahead or behind (the store's own times stay
right, as those of a file server or S3 do). An action that ends with an error must say, without a traceback, what happened,
where, and what to do; the store must be whole at once (`bench.faults.checker`); and when the fault is gone the next run completes.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from artifacts.catalog import EngineCatalog
from artifacts.errors import ArtifactError
from bench.faults.checker import check, lost
from bench.faults.kills import left_in_tmp
from bench.faults.recipe import write_tiny
from bench.faults.servers import s3_with_bucket
from bench.faults.world import CHANNEL, RECIPES, TARGET, Place, engine, make_place, publish, write_json

ROOT: Final = Path(__file__).parents[2]
ACTIONS: Final = ("publish", "pull", "promote", "gc", "build")
FAULTS: Final[Mapping[str, str]] = {
    "full": r"the disk is full|No space left on device",
    "read-only": r"[Rr]ead-only",
    "denied": r"[Nn]o permission|Permission denied",
    "ahead": "",
    "behind": "",
}
_DISK_BYTES: Final = 24 << 20
_BUCKET: Final = "enginery-faults"
# S3, with the fault on the disk where files lie on their way.
TEMPORARY: Final = "s3-temp"
_ONLY_TEMPORARY: Final = (
    "unshare", "--mount", "sh", "-c", 'mount --bind "$0" /tmp && mount --bind "$0" /var/tmp && exec "$@"'
)  # fmt: skip
# What lies there goes again; the plans that are published have 200 kB.
_TEMPORARY_BYTES: Final = 400_000
# What an error tells to do next.
_NEXT: Final = re.compile(r"free some|use another|check who|next: |give |set |make ")
_FAKETIME: Final = tuple(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"))
_DENIED: Final = ("setpriv", "--bounding-set=-dac_override,-dac_read_search", "--inh-caps=-all")
_PUBLISH: Final = (
    "import sys; from pathlib import Path; from bench.faults.disk import publish_here; publish_here(*sys.argv[1:])"
)


@dataclass
class Tally:
    """What one action under one fault came to."""

    runs: int = 0
    refused: int = 0
    completed: int = 0
    words: list[str] = field(default_factory=list)
    violations: list[str] = field(default_factory=list)


@dataclass
class World:
    """A store, the file system on which the fault happens, and a number for the next engine."""

    base: Path
    disk: Path
    place: Place
    next: int = 1
    temporary: bool = False

    @property
    def prefix(self) -> tuple[str, ...]:
        """What a command runs under: where the disk is for temporary files, all folders of the system for them lie on it."""
        return (*_ONLY_TEMPORARY, str(self.disk)) if self.temporary else ()

    @property
    def here(self) -> Path:
        """The folder that commands run in, which is the last one that is tried for temporary files."""
        return self.disk if self.temporary else self.base

    def command(self, action: str) -> list[str]:
        """Return the command line of an action; what it needs is published first."""
        uri, number = self.place.uri, self.next
        python = [sys.executable, "-m", "enginery"]
        match action:
            case "build":
                recipe = write_tiny(self.base / f"recipe-{number}")
                text = recipe.read_text().replace("name: tiny", f"name: tiny{number}")
                # A stage of its own for each, so that there is something to make.
                recipe.write_text(text.replace("[1, 1, 2]", f"[1, 1, {number + 1}]"))
                return [*python, "build", str(recipe), "--store", uri]
            case "publish":
                return [sys.executable, "-c", _PUBLISH, uri, str(self.place.folder), str(number)]
            case "pull":
                self.publish(number)
                gpu = ["--gpu", "sm89", "--runtime", "tensorrt-rtx==1.7.1.116"]
                to = str(self.pulled)
                return [*python, "pull", RECIPES[0], *gpu, "--to", to, "--store", uri]
            case "promote":
                self.publish(number)
                name = str(engine(RECIPES[0], number))
                return [*python, "promote", name, "--channel", CHANNEL, "--reason", "disk", "--store", uri]
        self.publish(number)
        keep = ["--keep-days", "0", "--keep-newest", "0", "--keep-moves", "1", "--grace", "0s"]
        return [*python, "gc", *keep, "--store", uri]

    @property
    def pulled(self) -> Path:
        """Where the next engine is pulled to."""
        return (self.base if self.temporary else self.disk) / f"pulled-{self.next}"

    def publish(self, number: int) -> None:
        """Publish an engine where no fault is."""
        publish(self.place, RECIPES[0], number)

    def done(self, action: str) -> bool:
        """Tell whether the last action's work is there."""
        names = EngineCatalog(self.place.store).engines()
        last = engine(RECIPES[0], self.next)
        match action:
            case "build":
                return any(name.recipe == f"tiny{self.next}" for name in names)
            case "publish":
                return last in names
            case "pull":
                return self.pulled.exists()
            case "promote":
                return EngineCatalog(self.place.store).channels(RECIPES[0], CHANNEL).get(TARGET) == last.build
        return last not in names


def publish_here(uri: str, folder: str, number: str) -> None:
    """Publish an engine, and end with the product's own words where that cannot be done."""
    try:
        publish(Place(uri, Path(folder)), RECIPES[0], int(number))
    except ArtifactError as err:
        sys.exit(f"error: {err}")


@contextmanager
def file_system(folder: Path) -> Iterator[Path]:
    """Mount a new small file system. Raises CalledProcessError where that is not permitted."""
    folder.mkdir(parents=True)
    options = ["-t", "tmpfs", "-o", f"size={_DISK_BYTES}"]
    subprocess.run(["mount", *options, "none", str(folder)], check=True, capture_output=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@contextmanager
def _full(disk: Path, leave: int) -> Iterator[Mapping[str, Any]]:
    filler, status = disk / "filler", os.statvfs(disk)
    size = status.f_bavail * status.f_frsize - leave
    with filler.open("wb") as stream:
        os.posix_fallocate(stream.fileno(), 0, max(size, 1))
    yield {}
    filler.unlink()


@contextmanager
def _read_only(disk: Path, _level: int) -> Iterator[Mapping[str, Any]]:
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    yield {}
    subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)


@contextmanager
def _denied(disk: Path, _level: int) -> Iterator[Mapping[str, Any]]:
    modes = {path: path.stat().st_mode for path in [disk, *disk.rglob("*")]}
    for path in modes:
        path.chmod(0o555 if path.is_dir() else 0o444)
    yield {"prefix": _DENIED}
    for path, mode in modes.items():
        path.chmod(mode)


def _clock(days: int) -> Callable[[Path, int], Any]:
    @contextmanager
    def off(_disk: Path, _level: int) -> Iterator[Mapping[str, Any]]:
        names = {"FAKETIME": f"{days:+d}d", "NO_FAKE_STAT": "1"}
        yield {"environment": {"LD_PRELOAD": str(_FAKETIME[0]), **names}}

    return off


_CONDITIONS: Final[Mapping[str, Callable[[Path, int], Any]]] = {
    "full": _full, "read-only": _read_only, "denied": _denied, "ahead": _clock(2), "behind": _clock(-2),
}  # fmt: skip


def attempt(world: World, action: str, fault: str, level: int, tally: Tally) -> None:
    """Do an action under a fault, look, then do it again without, and look again."""
    command = world.command(action)
    before = check(world.place.store, collected=True).state
    with _CONDITIONS[fault](world.disk, level) as given:
        environment = {
            **os.environ, **world.place.environment, "PYTHONPATH": str(ROOT), "NO_COLOR": "1",
            "PREFECT_HOME": str(world.base / "prefect"), "ENGINERY_STATE": str(world.base / "state"),
            "XDG_CACHE_HOME": str(world.base / "cache"), **given.get("environment", {}),
        }  # fmt: skip
        ran = subprocess.run(
            [*world.prefix, *given.get("prefix", ()), *command], capture_output=True, text=True, check=False, timeout=300,
            env=environment, cwd=world.here,
        )  # fmt: skip
    tally.runs += 1
    label = f"{action}, {fault}{f' ({level} bytes left)' if fault == 'full' else ''}"
    _judge(ran, fault, label, tally)
    report = check(world.place.store, collected=True)
    may = {"engines": action != "gc", "records": action != "gc"}
    tally.violations += [
        f"{label}: {name}: {words}" for name, words in report.violations + lost(before, report.state, **may)
    ]
    if action == "pull" and ran.returncode and world.done("pull"):
        left = [path.name for path in world.pulled.rglob("*") if path.is_file()]
        tally.violations += [f"{label}: half of an engine is there: {left}"] if "manifest.json" in left else []
    plain = {name: value for name, value in environment.items() if name not in ("LD_PRELOAD", "FAKETIME")}
    again = subprocess.run(
        [*world.prefix, *command], capture_output=True, text=True, check=False, timeout=300, env=plain, cwd=world.here
    )
    if again.returncode or not world.done(action):
        tally.violations.append(f"{label}: the next run did not complete: {again.stdout[-500:]} {again.stderr[-800:]}")
    report = check(world.place.store, collected=True)
    tally.violations += [f"{label}, then without: {name}: {words}" for name, words in report.violations]
    left = left_in_tmp(world.place)
    if world.temporary:
        left = [str(path.relative_to(world.disk)) for path in world.disk.rglob("*") if path.is_file()]
    tally.violations += [f"{label}: left in tmp: {name}" for name in left]
    world.next += 1


def _judge(ran: subprocess.CompletedProcess[str], fault: str, label: str, tally: Tally) -> None:
    said = f"{ran.stdout}\n{ran.stderr}".strip()
    if "Traceback" in said or ran.returncode not in (0, 1):
        tally.violations.append(f"{label}: status {ran.returncode}: {said[-1500:]}")
    if not ran.returncode:
        tally.completed += 1
        return
    tally.refused += 1
    words = re.sub(
        r"[0-9a-f]{12,}", "#", re.sub(r"/tmp/\S*?/(?=disk|place|tmp|recipe)", "/", ran.stderr.strip() or said)
    )[-400:]
    if len(tally.words) < 4 and words not in tally.words:
        tally.words.append(words)
    if not FAULTS[fault]:
        tally.violations.append(f"{label}: refused: {words}")
    elif not (re.search(FAULTS[fault], said) and _NEXT.search(said) and "/" in said):
        tally.violations.append(f"{label}: what happened, where, or what to do is not said: {said[-1000:]}")


def usage(disk: Path) -> int:
    """Return how many bytes of a file system are used."""
    status = os.statvfs(disk)
    return (status.f_blocks - status.f_bfree) * status.f_frsize


@contextmanager
def new_world(kind: str, *, apart: bool) -> Iterator[World]:
    """Yield a world; `apart`: its store lies elsewhere than on the disk on which the fault happens."""
    # Not below a folder for temporary files, where the disk is mounted over these.
    outside = "/dev/shm" if kind == TEMPORARY else None
    with tempfile.TemporaryDirectory(dir=outside) as name, file_system(Path(name) / "disk") as disk:
        base = Path(name)
        if kind != "folder":
            with s3_with_bucket(_BUCKET, 1000) as environment:
                place = make_place(base / "place", f"s3://{_BUCKET}/store", environment, signed=False)
                place.enter()
                yield World(base, disk, place, temporary=kind == TEMPORARY)
            return
        place = make_place(base / "place", str((base if apart else disk) / "store"), signed=False)
        place.enter()
        yield World(base, disk, place)


def harm(
    kind: str,
    action: str,
    faults: list[str],
    levels: int,
    chance: random.Random,
    tell: Callable[[dict[str, Tally]], None] = lambda _tallies: None,
) -> dict[str, Tally]:
    """Try one action under every fault on one kind of store; `tell` gets what came of it until then after each attempt."""
    tallies: dict[str, Tally] = {}
    with new_world(kind, apart=action == "pull") as world:
        world.publish(90_000)
        ran = subprocess.run(
            [*world.prefix, *world.command(action)], capture_output=True, text=True, check=False, cwd=world.here,
            env={**os.environ, "PYTHONPATH": str(ROOT), "PREFECT_HOME": str(world.base / "prefect")},
        )  # fmt: skip
        if ran.returncode:
            raise AssertionError(f"{action} on {kind} does not work: {ran.stderr}")
        taken = max(usage(world.disk), _TEMPORARY_BYTES if world.temporary else 1 << 16)
        world.next += 1
        for fault in faults:
            tally = tallies[f"{action} on {kind}, {fault}"] = Tally()
            spaces = [0, 4096, *(chance.randrange(2 * taken) for _ in range(levels - 2))] if fault == "full" else [0]
            for space in spaces:
                attempt(world, action, fault, space, tally)
                tell(tallies)
    return tallies


def main() -> None:
    """Try what the command line asks for; write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path)
    parser.add_argument("--levels", type=int, default=6, help="of a full disk")
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32))
    parser.add_argument("--actions", default=",".join(ACTIONS))
    parser.add_argument("--stores", default=f"folder,s3,{TEMPORARY}")
    parser.add_argument("--faults", default=",".join(FAULTS))
    given = parser.parse_args()
    begin, chance, tallies = time.perf_counter(), random.Random(given.seed), dict[str, Any]()
    for kind in given.stores.split(","):
        for action in given.actions.split(","):
            faults = given.faults.split(",")
            if kind == TEMPORARY:
                if action not in ("publish", "pull", "build"):
                    continue
                faults = [fault for fault in faults if FAULTS[fault]]
            if kind == "s3":  # whose disk is another's; only a pull writes to one here
                faults = [fault for fault in faults if action == "pull" or not FAULTS[fault]]

            def tell(found: dict[str, Tally]) -> None:
                # A long run that is stopped has told what it came to until then.
                tallies.update({name: vars(tally) for name, tally in found.items()})
                write_json(given.result, _summary(given, time.perf_counter() - begin, tallies))

            for name, tally in harm(kind, action, faults, given.levels, chance, tell).items():
                print(f"{name}: {vars(tally)}", flush=True)
    if any(tally["violations"] for tally in tallies.values()):
        raise SystemExit(1)


def _summary(given: argparse.Namespace, seconds: float, tallies: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    return {
        "command": f"python -m bench.faults.disk RESULT.json --levels {given.levels} --seed {given.seed} "
        f"--stores {given.stores} --actions {given.actions} --faults {given.faults}",
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "seconds": round(seconds, 1),
        **{key: sum(tally[key] for tally in tallies.values()) for key in ("runs", "refused", "completed")},
        "violations": sum(len(tally["violations"]) for tally in tallies.values()),
        "by_case": tallies,
    }


if __name__ == "__main__":
    main()
