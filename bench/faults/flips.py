"""Every object of a store with a bit flipped, or cut short: whoever would use it says so, misses it aloud, or reads the same.

    python -m bench.faults.flips RESULT.json [--flips 40] [--seed N] [--store folder|s3]

The store, a folder or moto's S3, has what builds and promotions leave: the records and blobs of a tiny recipe that was built with its real
stages, signed engines with their provenance, one with parts and a fallback among them, their publications, a signed attestation, a
channel, a pin, a host, a rollout, a claim, fresh plans, a timing cache, a list of refittable plans, a recipe's last preimages. Each object is damaged by so many single bits, and
cut to nothing, to its half, and by its last byte; then the reader of its kind is asked. What it may answer:

    refused     an error in words
    missed      nothing, and a warning that says why
    same        what it answers of the undamaged object: blanks, or words that nobody relies on
    a hint      of the last two alone: other words, which explain a miss, or name a record that is looked up and checked itself

Anything else is a finding: something damaged was used, or lost in silence, or ended in a traceback.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from artifacts.attestation import Attestation
from artifacts.cache import ActionCache, blob_path
from artifacts.catalog import SIGNATURE_DIGITS, EngineCatalog, EngineId
from artifacts.claims import claimed
from artifacts.errors import ArtifactError
from artifacts.folder import FolderStore
from artifacts.fresh_plans import PLANS, FreshPlans, unpack
from artifacts.host import Host
from artifacts.layout import LAYOUT_NAME
from artifacts.pins import pin, pins
from artifacts.records import ActionRecord
from artifacts.refits import Base, RefitIndex
from artifacts.refs import digest_bytes
from artifacts.rollouts import Rollout, change_rollout, read_rollout
from artifacts.store import Store
from bench.faults.kills import STORES, places_of
from bench.faults.recipe import write_tiny
from bench.faults.world import (
    RECIPES,
    Place,
    build,
    engine,
    follow,
    promote,
    publish,
    publish_group,
    write_json,
)
from enginery import client
from tasks.latest import read_latest
from tasks.timing import LentCache, TimingPlace

HOST: Final = "builder"
CLAIM: Final = "compile/made-up"
TIMING: Final = TimingPlace("tensorrt", "10.16.1.11", "13", "linux", "x86_64", "580.1", "8.9", {"sm_count": 58})
REFIT: Final = digest_bytes(b"made-up")
# What they say is never taken for true: see `refits` and `latest`.
HINTS: Final = frozenset({"refit", "latest"})


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
    attested: str
    plans: dict[str, bytes]
    warnings: list[str] = field(default_factory=list)

    def ask(self, path: str) -> Any:
        """Return what the users of an object make of it. Raises ArtifactError."""
        store = self.place.store
        parts = path.split("/")
        cache = ActionCache(store, self.warnings.append)
        with tempfile.TemporaryDirectory(dir=self.scratch) as folder:
            to = Path(folder)
            match kind_of(path, self.attested):
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
                case "rollout":
                    return read_rollout(store, parts[1].removesuffix(".json"))
                case "attestation" | "attestation's signature":
                    catalog = EngineCatalog(store, self.warnings.append, self.place.judge.believes)
                    name = EngineId(*parts[1:4])
                    return catalog.attestations(name, digest_bytes(catalog.manifest_bytes(name))) or None
                case "plans":
                    names = unpack(self.plans[path])
                    return FreshPlans(store, parts[2], self.warnings.append).read(names) or None
                case "claim":
                    with claimed(store, CLAIM, lambda: True):
                        return "taken"
                case "timing cache":
                    lent = LentCache(store, TIMING)
                    if lent.lend(to / "lent"):
                        return (to / "lent").read_bytes()
                    self.warnings.append(lent.facts["not_lent"])
                    return None
                case "refit":
                    return RefitIndex(store).bases(REFIT)
                case "latest":
                    return read_latest(store, parts[2].removesuffix(".json"))
                case "publication" | "mark":  # that it is there is all that counts
                    return EngineCatalog(store).engines()
                case "store.json":
                    return {info.path for info in store.list("engines/")}
                case _:
                    pulled = client.pull(store, EngineId(*parts[1:4]), to, trust=self.place.judge).folder
                    client.check(pulled, trust=self.place.judge)
                    # A signature that holds is as good as another one.
                    whole = [file for file in pulled.rglob("*") if file.is_file() and file.suffix != ".sig"]
                    return {str(file.relative_to(pulled)): file.read_bytes() for file in whole}


def kind_of(path: str, attested: str) -> str:
    """Return the kind of an object by its path; `attested` is how signatures of the attestation begin."""
    parts = path.split("/")
    if parts[0] == "engines" and parts[-1].startswith(attested):
        return "attestation's signature"
    match parts[0]:
        case "cache" if parts[1] in ("blobs", "actions"):
            return {"blobs": "blob", "actions": "record"}[parts[1]]
        case "engines":
            name = parts[4] if len(parts) == 6 else parts[-1]
            if name.startswith("provenance"):
                return "provenance"
            named = {
                "manifest.json": "manifest",
                "signatures": "signature",
                "publications": "mark",
                "verification": "attestation",
            }
            return named.get(name, "engine's file")
        case "cache" if parts[1] in ("plans", "refit", "latest"):
            return parts[1]
        case "timing" if path.endswith(".cache"):
            return "timing cache"
        case "channels" | "pins" | "hosts" | "rollouts" | "claims" | "publications":
            return parts[0].removesuffix("s")
        case "store.json":
            return "store.json"
        case _:
            return "hint"


def make_store(folder: Path, place: Place) -> Reader:
    """Fill a store, and return its reader."""
    place.enter()
    os.environ["ENGINERY_SIGN_KEY"] = str(place.folder / "key.pem")
    build(place, str(write_tiny(folder / "recipe")))
    for number in (1, 2):
        publish(place, RECIPES[0], number)
        promote(place, RECIPES[0], number)
    publish_group(place, RECIPES[1], 1)
    catalog = EngineCatalog(place.store)
    pin(catalog, engine(RECIPES[0], 1), "bench", "because")
    catalog.record_host(Host.from_json({"name": HOST, "os": "Linux", "arch": "x86_64", "gpus": []}))
    attested = engine(RECIPES[0], 1)
    found = attestation_of(attested, catalog.manifest_bytes(attested))
    catalog.attest(attested, found, place.signer)
    change_rollout(place.store, "driver-580.2", lambda _found: Rollout("driver-580.2", "2026-01-02T03:04:05Z"))
    refs = {}
    for info in place.store.list("cache/actions/"):
        for ref in ActionRecord.from_bytes(place.store.read(info.path)).outputs.values():
            refs[blob_path(ref.digest)] = ref
    for manifest in catalog.manifests():
        refs |= {blob_path(entry.digest): entry.ref for entry in manifest.files.values()}
    (folder / "scratch").mkdir()
    FreshPlans(place.store, "made-up").add({digest_bytes(name.encode()): {"plan": [name]} for name in ("one", "two")})
    plans = {info.path: place.store.read(info.path) for info in place.store.list(PLANS)}
    with claimed(place.store, CLAIM, lambda: True):
        pass
    RefitIndex(place.store).add(REFIT, Base(digest_bytes(b"compiled"), str(attested)))
    (folder / "made.cache").write_bytes(b"what tactics took" * 100)
    LentCache(place.store, TIMING).take_back(folder / "made.cache", {"reloads": True}, lambda _there, _made: (None, ""))
    return Reader(place, refs, folder / "scratch", f"{digest_bytes(found.to_bytes())[:SIGNATURE_DIGITS]}-", plans)


def attestation_of(name: EngineId, manifest: bytes) -> Attestation:
    """Return what an execution of an engine, whose manifest has these bytes, might have found."""
    measured = {"executed": True, "parity": {"relative_l2": 1e-3, "max_abs": 1e-2, "cosine": 0.9999, "non_finite": 0}}
    document = {
        "schema": 1, "engine": str(name), "manifest": digest_bytes(manifest), "created": "2026-02-03T04:05:06Z",
        "key": digest_bytes(b"executed"), "host": {"name": "box", "os": "linux", "arch": "x86_64", "driver": "580.1"},
        "device": {"name": "NVIDIA L4", "sm_count": 58}, "gpu": "sm89", "runtime_version": "1.7.1.116",
        "passed": True, "reasons": [], "measured": measured, "enginery": "0.1.0",
    }  # fmt: skip
    return Attestation.from_bytes(json.dumps(document).encode())


def damages(data: bytes, flips: int, chance: random.Random) -> list[tuple[str, bytes]]:
    """Return ways in which bytes were damaged, in words, and the bytes then."""
    made = [(f"cut to {size} of {len(data)}", data[:size]) for size in sorted({0, len(data) // 2, len(data) - 1})]
    for bit in chance.sample(range(8 * len(data)), min(flips, 8 * len(data))):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        made.append((f"bit {bit % 8} of byte {bit // 8} flipped", bytes(flipped)))
    return made


def damage_all(folder: Path, flips: int, chance: random.Random, kind_of_store: str = "folder") -> dict[str, Tally]:
    """Damage every object of a new store in many ways; return what came of it, by kind of object."""
    with places_of(kind_of_store, folder / "places", 1000) as places:
        place = next(places)
        reader = make_store(folder, place)
        return _damage_each(place, reader, flips, chance)


def _damage_each(place: Place, reader: Reader, flips: int, chance: random.Random) -> dict[str, Tally]:
    tallies: dict[str, Tally] = defaultdict(Tally)
    store = place.store
    for path in sorted([info.path for info in store.list("")] + [LAYOUT_NAME]):
        kind = kind_of(path, reader.attested)
        if kind == "hint" or path.endswith(".seen"):
            continue  # what says nothing that anybody relies on unchecked
        data, tally = _read(store, path), tallies[kind]
        tally.objects += 1
        right = reader.ask(path)
        for how, bad in damages(data, flips, chance):
            _write(store, path, bad)
            tally.damages += 1
            answer = _answer(lambda path=path: reader.ask(path), reader.warnings, right)  # type: ignore[misc]
            if kind in HINTS and answer.startswith(("used", "lost")):
                answer = "a hint"
            tally.answers[answer.partition(":")[0]] += 1
            if answer not in ("refused", "missed", "same", "a hint"):
                tally.findings.append(f"{path}: {how}: {answer}")
            _write(store, path, data)
    return dict(tallies)


def _read(store: Store, path: str) -> bytes:
    if path != LAYOUT_NAME:
        return store.read(path)
    if isinstance(store, FolderStore):
        return (store.root / path).read_bytes()
    answer = store._connection.get_object(Bucket=store.bucket, Key=store._layout_key)  # type: ignore[attr-defined]  # noqa: SLF001
    return bytes(answer["Body"].read())


def _write(store: Store, path: str, data: bytes) -> None:
    if path != LAYOUT_NAME:
        store.write(path, data)
    elif isinstance(store, FolderStore):
        (store.root / path).write_bytes(data)
    else:
        client = store._connection  # type: ignore[attr-defined]  # noqa: SLF001
        client.put_object(Bucket=store.bucket, Key=store._layout_key, Body=data)  # type: ignore[attr-defined]  # noqa: SLF001


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
    parser.add_argument("--store", choices=STORES, default="folder")
    given = parser.parse_args()
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        tallies = damage_all(Path(folder), given.flips, random.Random(given.seed), given.store)
    document = {
        "command": f"python -m bench.faults.flips RESULT.json --flips {given.flips} --seed {given.seed} --store {given.store}",
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
