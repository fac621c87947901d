"""Every object of a store with a bit flipped, or cut short: whoever would use it says so, misses it aloud, or reads the same.

    python -m bench.faults.flips RESULT.json [--flips 40] [--seed N]

The store is a folder with what builds and promotions leave: the records and blobs of a tiny recipe that was built with its real
stages, signed engines with their provenance, a channel, a pin, a host. Each object is damaged by so many single bits, and
cut to nothing, to its half, and by its last byte; then the reader of its kind is asked. What it may answer:

    refused     an error in words
    missed      nothing, and a warning that says why
    same        what it answers of the undamaged object: blanks, or words that nobody relies on

Anything else is a finding: something damaged was used, or lost in silence, or ended in a traceback. Only a host's
fingerprint is not guarded (`used` is counted, and is no finding): who loads an engine looks at the host itself.
"""

from __future__ import annotations

import argparse
import os
import random
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from artifacts.cache import ActionCache, blob_path
from artifacts.catalog import EngineCatalog, EngineId
from artifacts.errors import ArtifactError
from artifacts.folder import FolderStore
from artifacts.host import Host
from artifacts.pins import pin, pins
from artifacts.records import ActionRecord
from bench.faults.recipe import write_tiny
from bench.faults.world import RECIPES, Place, build, engine, follow, make_place, promote, publish, write_json
from enginery import client

HOST: Final = "builder"


@dataclass
class Tally:
    """What the damages of one kind of object came to."""

    objects: int = 0
    damages: int = 0
    answers: Counter[str] = field(default_factory=Counter)
    findings: list[str] = field(default_factory=list)


@dataclass
class Reader:
    """Asks for an object as its users do; `warnings` gets what they are told beside the answer."""

    place: Place
    refs: dict[str, Any]
    scratch: Path
    warnings: list[str] = field(default_factory=list)

    def ask(self, path: str) -> Any:
        """Return what the users of an object make of it. Raises ArtifactError."""
        store = self.place.store
        parts = path.split("/")
        cache = ActionCache(store, self.warnings.append)
        with tempfile.TemporaryDirectory(dir=self.scratch) as folder:
            to = Path(folder)
            match kind_of(path):
                case "blob":
                    cache.get_blob(self.refs[path], to / "blob")
                    return (to / "blob").read_bytes()
                case "record":
                    return cache.lookup(parts[2], parts[3].removesuffix(".json"))
                case "channel":
                    return follow(self.place, RECIPES[0], str(to))
                case "pin":
                    return set(pins(store))
                case "host":
                    return EngineCatalog(store).host(HOST)
                case "store.json":
                    return {info.path for info in store.list("engines/")}
                case _:
                    pulled = client.pull(store, EngineId(*parts[1:4]), to, trust=self.place.judge).folder
                    client.check(pulled, trust=self.place.judge)
                    # A signature that holds is as good as another one.
                    return {file.name: file.read_bytes() for file in pulled.iterdir() if not file.name.endswith(".sig")}


def kind_of(path: str) -> str:
    """Return the kind of an object, by its path."""
    parts = path.split("/")
    match parts[0]:
        case "cache" if parts[1] in ("blobs", "actions"):
            return {"blobs": "blob", "actions": "record"}[parts[1]]
        case "engines":
            name = parts[4] if len(parts) == 6 else parts[-1]
            if name.startswith("provenance"):
                return "provenance"
            named = {"manifest.json": "manifest", "signatures": "signature", "publications": "hint"}
            return named.get(name, "engine's file")
        case "channels" | "pins" | "hosts":
            return parts[0].removesuffix("s")
        case "store.json":
            return "store.json"
        case _:
            return "hint"


def make_store(folder: Path) -> tuple[Place, Reader]:
    """Fill a store, and return it with its reader."""
    place = make_place(folder / "place", str(folder / "store"))
    place.enter()
    os.environ["ENGINERY_SIGN_KEY"] = str(place.folder / "key.pem")
    build(place, str(write_tiny(folder / "recipe")))
    for number in (1, 2):
        publish(place, RECIPES[0], number)
        promote(place, RECIPES[0], number)
    catalog = EngineCatalog(place.store)
    pin(catalog, engine(RECIPES[0], 1), "bench", "because")
    catalog.record_host(Host.from_json({"name": HOST, "os": "Linux", "arch": "x86_64", "gpus": []}))
    refs = {}
    for info in place.store.list("cache/actions/"):
        for ref in ActionRecord.from_bytes(place.store.read(info.path)).outputs.values():
            refs[blob_path(ref.digest)] = ref
    for manifest in catalog.manifests():
        refs |= {blob_path(entry.digest): entry.ref for entry in manifest.files.values()}
    (folder / "scratch").mkdir()
    return place, Reader(place, refs, folder / "scratch")


def damages(data: bytes, flips: int, chance: random.Random) -> list[tuple[str, bytes]]:
    """Return ways in which bytes were damaged, in words, and the bytes then."""
    made = [(f"cut to {size} of {len(data)}", data[:size]) for size in sorted({0, len(data) // 2, len(data) - 1})]
    for bit in chance.sample(range(8 * len(data)), min(flips, 8 * len(data))):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        made.append((f"bit {bit % 8} of byte {bit // 8} flipped", bytes(flipped)))
    return made


def damage_all(folder: Path, flips: int, chance: random.Random) -> dict[str, Tally]:
    """Damage every object of a new store in many ways; return what came of it, by kind of object."""
    place, reader = make_store(folder)
    tallies: dict[str, Tally] = defaultdict(Tally)
    root = FolderStore(Path(place.uri)).root
    for path in sorted([info.path for info in place.store.list("")] + ["store.json"]):
        kind, file = kind_of(path), root / path
        if kind == "hint" or not file.exists() or path.endswith(".seen"):
            continue  # what says nothing that anybody relies on unchecked
        data, tally = file.read_bytes(), tallies[kind]
        tally.objects += 1
        right = reader.ask(path)
        for how, bad in damages(data, flips, chance):
            _replace(file, bad)
            tally.damages += 1
            answer = _answer(lambda path=path: reader.ask(path), reader.warnings, right)  # type: ignore[misc]
            tally.answers[answer.partition(":")[0]] += 1
            if answer not in ("refused", "missed", "same") and not (kind == "host" and answer.startswith("used")):
                tally.findings.append(f"{path}: {how}: {answer}")
            _replace(file, data)
    return dict(tallies)


def _replace(file: Path, data: bytes) -> None:
    file.unlink(missing_ok=True)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(data)


def _answer(ask: Callable[[], Any], warnings: list[str], right: Any) -> str:
    warnings.clear()
    try:
        found = ask()
    except ArtifactError:
        return "refused"
    except Exception as err:  # noqa: BLE001 - whatever else is a finding
        return f"traceback: {type(err).__name__}: {err!s:.200}"
    if found == right:
        return "same"
    if found is None:
        return "missed" if warnings else "lost in silence"
    return f"used: {found!s:.200}"


def main() -> None:
    """Damage as the command line says; write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path)
    parser.add_argument("--flips", type=int, default=40, help="bits of each object")
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32))
    given = parser.parse_args()
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        tallies = damage_all(Path(folder), given.flips, random.Random(given.seed))
    document = {
        "command": f"python -m bench.faults.flips RESULT.json --flips {given.flips} --seed {given.seed}",
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "seconds": round(time.perf_counter() - begin, 1),
        "by_kind": {
            kind: {**vars(tally), "findings": tally.findings[:10], "found": len(tally.findings)}
            for kind, tally in sorted(tallies.items())
        },
    }
    write_json(given.result, document)
    if any(tally.findings for tally in tallies.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
