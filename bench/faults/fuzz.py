"""Readers of what others may write, on mutated inputs: each input is read or refused in words, and none takes long.

    python -m bench.faults.fuzz RESULT.json [--inputs 10000] [--seed N] [--readers recipe,manifest,...]

Inputs are mutations of real documents: of their bytes, and of the JSON values in them. A reader may return, or raise the
errors that it states, which every command turns into words; whatever else it raises is a finding, and so is a signature that
holds over altered bytes which mean something else.
"""

from __future__ import annotations

import argparse
import base64
import copy
import json
import random
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from artifacts.attestation import Attestation
from artifacts.catalog import EngineCatalog, host_path
from artifacts.channels import channel_path, read_channel
from artifacts.claims import claimed
from artifacts.errors import ArtifactError
from artifacts.folder import FolderStore
from artifacts.fresh_plans import pack, unpack
from artifacts.host import Gpu, Host
from artifacts.hosts import read_host, see_host
from artifacts.leases import leased, read_leases
from artifacts.manifest import Manifest
from artifacts.publications import read_publication
from artifacts.records import ActionRecord
from artifacts.refs import ENGINE_PLAN, ArtifactRef, digest_bytes
from artifacts.rollouts import Rollout, change_rollout, rollout_path, rollouts
from artifacts.signing import check_signature
from bench.faults.flips import attestation_of
from bench.faults.recipe import write_tiny
from bench.faults.world import CHANNEL, RECIPES, TARGET, engine, make_place, promote, publish, write_json
from recipes.errors import RecipeError
from recipes.loader import load
from tests.engines import GOLDEN
from tests.keys import make_key

SECONDS: Final = 5.0
READERS: Final = (
    "recipe", "manifest", "channel", "signature", "host", "rollout", "claim", "lease", "publication", "attestation", "record",
    "plans",
)  # fmt: skip
_ODD: Final[tuple[Any, ...]] = (
    None, True, -1, 0, 2**63, 10**400, 1e308, -0.0, "", "\0", "../../etc/passwd", "\ud800", "9" * 5000, [], {}, [[]],
    {"": {}}, "2026-99-99T99:99:99Z", "0" * 64,
)  # fmt: skip
_PIECES: Final = (
    b"\0", b"\xff\xfe", b"{", b"[" * 3000, b"]", b'"', b"&a [*a]", b"<<: ", b"!!python/object/apply:os.system [id]", b"---\n",
    b"NaN", b"1e999", b"0x10", b"\t", b"\n", b"9" * 5000, b'{"a":' * 2000, b"\\ud800", "\u202e".encode(),
)  # fmt: skip


@dataclass
class Tally:
    """What the inputs of one reader came to."""

    inputs: int = 0
    read: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    findings: list[str] = field(default_factory=list)
    longest_seconds: float = 0.0
    seconds: float = 0.0


def mutate(data: bytes, chance: random.Random) -> bytes:
    """Return a document with one to four things changed: values where it is JSON, and bytes."""
    if chance.random() < 0.5:
        try:
            document = json.loads(data)
        except ValueError:
            pass
        else:
            for _ in range(chance.randint(1, 3)):
                _change(document, chance)
            # Numbers of 401 digits are written as they are; half a surrogate pair as an escape.
            data = json.dumps(document).encode()
            if chance.random() < 0.8:
                return data
    for _ in range(chance.randint(1, 4)):
        at, length = chance.randrange(len(data) + 1), chance.choice((1, 1, 2, 16, 200))
        match chance.randrange(5):
            case 0:
                data = data[:at] + data[at + length :]
            case 1:
                data = data[:at] + chance.choice(_PIECES) + data[at:]
            case 2:
                data = data[:at] + data[at : at + length] * 2 + data[at + length :]
            case 3 if data:
                flipped = bytearray(data)
                flipped[chance.randrange(len(flipped))] ^= 1 << chance.randrange(8)
                data = bytes(flipped)
            case _:
                data = data[:at]
    return data


def _change(document: Any, chance: random.Random) -> None:
    part = document
    while isinstance(part, dict | list) and part:
        name = chance.choice(list(part)) if isinstance(part, dict) else chance.randrange(len(part))
        if not isinstance(part[name], dict | list) or not part[name] or chance.random() < 0.3:
            if isinstance(part, dict) and chance.random() < 0.2:
                del part[name]
            else:
                part[name] = copy.deepcopy(chance.choice(_ODD))
            return
        part = part[name]


def readers(folder: Path) -> dict[str, tuple[list[bytes], Callable[[bytes], object]]]:
    """Return, for each reader, the documents to begin with and what reads one; it returns text for a finding of its own."""
    place = make_place(folder / "place", str(folder / "store"))
    place.enter()
    publish(place, RECIPES[0], 1)
    promote(place, RECIPES[0], 1)
    promote(place, RECIPES[0], 1)
    recipe = write_tiny(folder / "recipe")
    store = FolderStore(folder / "store")
    channel = (store.root / channel_path(RECIPES[0], TARGET, CHANNEL)).read_bytes()
    key = make_key(folder, "signer")
    contents = {"manifest.json": "0" * 64, "model.plan": "1" * 64}
    signature = key.signer.sign("fuzz", contents)
    envelope = json.loads(signature)["dsseEnvelope"]
    other = recipe.with_name("mutated.yaml")
    shipped = [path.read_bytes() for path in sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))]

    def read_recipe(data: bytes) -> None:
        other.write_bytes(data)
        load(other)

    def read_moves(data: bytes) -> None:
        (store.root / channel_path(RECIPES[0], TARGET, CHANNEL)).write_bytes(data)
        read_channel(store, RECIPES[0], TARGET, CHANNEL)

    def kept_at(path: str, read: Callable[[], object]) -> Callable[[bytes], None]:
        def reader(data: bytes) -> None:
            store.write(path, data)
            read()

        return reader

    def take_claim() -> None:
        with claimed(store, "fuzz", lambda: True):
            pass

    catalog, name = EngineCatalog(store), engine(RECIPES[0], 1)
    host = Host(
        "builder", "linux", "x86_64", "580.1", "13.0", (Gpu("L4", "GPU-1", "sm89", None),), {"onnxruntime": "1.31.1"}
    )
    see_host(store, host_path("builder"), host, "2026-01-02T03:04:05Z")
    see_host(store, host_path("builder"), replace(host, driver="580.2"), "2026-01-03T03:04:05Z")
    change_rollout(
        store,
        "driver",
        lambda _found: Rollout("driver", "2026-01-02T03:04:05Z").joined("builder", (), "2026-01-02T03:04:05Z"),
    )
    claim = f"claims/{digest_bytes(b'fuzz')}.json"
    take_claim()
    with leased(store, "fuzz", [str(name)]) as lease:
        held = store.read(lease.path)
    publication = next(store.list("publications/")).path
    attestation = attestation_of(name, catalog.manifest_bytes(name)).to_bytes()
    record = ActionRecord(
        {"stage": "compile", "number": 1}, {"model.plan": ArtifactRef("0" * 64, 3, ENGINE_PLAN)}
    ).to_bytes()

    def read_signature(data: bytes) -> str | None:
        check_signature(data, contents, key.pem)
        now = json.loads(data)["dsseEnvelope"]
        # Other base64 of the same bytes is the same statement.
        same = base64.b64decode(now["payload"]) == base64.b64decode(envelope["payload"])
        return None if same else "it holds over another payload"

    return {
        "recipe": ([recipe.read_bytes(), *shipped], read_recipe),
        "manifest": ([GOLDEN.read_bytes(), *(path.read_bytes() for path in store.root.glob("engines/*/*/*/manifest.json"))],
                     Manifest.from_bytes),
        "channel": ([channel], read_moves),
        "signature": ([signature], read_signature),
        "host": ([store.read(host_path("builder"))], kept_at(host_path("builder"), lambda: read_host(store, host_path("builder")))),
        "rollout": ([store.read(rollout_path("driver"))], kept_at(rollout_path("driver"), lambda: rollouts(store))),
        "claim": ([store.read(claim)], kept_at(claim, take_claim)),
        "lease": ([held], kept_at(lease.path, lambda: read_leases(store))),
        "publication": ([store.read(publication)], read_publication),
        "attestation": ([attestation], Attestation.from_bytes),
        "record": ([record], ActionRecord.from_bytes),
        # As an attacker would: with the check of what was changed.
        "plans": ([pack({"0" * 64: {"plan": ["a step"]}}).partition(b"\n")[2]],
                  lambda data: unpack(digest_bytes(data).encode() + b"\n" + data)),
    }  # fmt: skip


def fuzz(seeds: list[bytes], read: Callable[[bytes], object], inputs: int, chance: random.Random) -> Tally:
    """Read so many mutations; return what they came to."""
    tally, begin = Tally(), time.perf_counter()
    for _ in range(inputs):
        data = mutate(chance.choice(seeds), chance)
        start = time.perf_counter()
        try:
            said = read(data)
        except (ArtifactError, RecipeError) as err:
            tally.refused[type(err).__name__] += 1
            if any("\ud800" <= letter <= "\udfff" or letter == "\x1b" for letter in str(err)):
                tally.findings.append(f"words that cannot be printed: {str(err)!r:.300} at {data[:300]!r}")
        except Exception as err:  # noqa: BLE001 - whatever else is a finding
            tally.findings.append(f"{type(err).__name__}: {err!s:.300} at {data[:300]!r}")
        else:
            tally.read += 1
            if isinstance(said, str):
                tally.findings.append(f"{said}: {data[:300]!r}")
        took = time.perf_counter() - start
        tally.longest_seconds = round(max(tally.longest_seconds, took), 3)
        if took > SECONDS:
            tally.findings.append(f"took {took:.1f} s: {data[:300]!r}")
        tally.inputs += 1
    tally.seconds = round(time.perf_counter() - begin, 1)
    return tally


def main() -> None:
    """Fuzz as the command line says; write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path)
    parser.add_argument("--inputs", type=int, default=10_000, help="of each reader")
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32))
    parser.add_argument("--readers", default=",".join(READERS))
    given = parser.parse_args()
    tallies: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        known = readers(Path(folder))
        for name in given.readers.split(","):
            tally = fuzz(*known[name], given.inputs, random.Random(f"{name} {given.seed}"))
            tallies[name] = {**vars(tally), "findings": tally.findings[:20], "found": len(tally.findings)}
            print(f"{name}: {tallies[name]}", flush=True)
            command = f"python -m bench.faults.fuzz RESULT.json --inputs {given.inputs} --seed {given.seed}"
            date = time.strftime("%Y-%m-%d", time.gmtime())
            write_json(given.result, {"command": command, "date": date, "seed": given.seed, "by_reader": tallies})
    if any(tally["found"] for tally in tallies.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
