"""What is done to a store in processes of their own, so that they can be killed, starved or raced: publish, promote, build...

An `Action` is a name and plain values. `Place` says where: the store's address, the environment that leads to it, the folder
of the key that signs. Processes are forked from a server that has imported everything, so that their time is the action's.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Final

from artifacts.cache import ActionCache
from artifacts.catalog import EngineCatalog, EngineId
from artifacts.channels import read_channel
from artifacts.collector import Collector
from artifacts.errors import ArtifactError
from artifacts.files import os_faults
from artifacts.garbage import Policy
from artifacts.leases import Lease
from artifacts.manifest import Manifest
from artifacts.records import ActionRecord
from artifacts.refs import ENGINE_PLAN, ArtifactRef, digest_bytes
from artifacts.signing import Signer, open_signer
from artifacts.store import Store, open_store
from artifacts.trust import Trust, TrustPolicy
from enginery import client
from enginery.moving import Mover
from tests.engines import make_manifest, parts_document

RECIPES: Final = ("digits", "swin")
TARGET: Final = "tensorrt-rtx-1.7.1.116-sm89"
CHANNEL: Final = "production"
GROUP: Final = ("tensorrt-rtx-1.7.1.116-sm80", "tensorrt-rtx-1.7.1.116-sm86", "onnxruntime-1.31.1-cpu")
PLAN_BYTES: Final = 200_000
PRELOADED: Final = ("bench.faults.world", "boto3", "model_signing.signing", "model_signing.verifying", "onnx")
_MEASURED: Final = {
    "executed": True,
    "parity": {"relative_l2": 1e-4, "max_abs": 1e-3, "cosine": 1.0, "non_finite": 0},
}


@dataclass(frozen=True)
class Place:
    """A store, and what a process needs to reach it and to sign; `folder` holds key.pem, key.pub and scratch files.

    `others` are addresses by which other hosts have the same store.
    """

    uri: str
    folder: Path
    environment: Mapping[str, str] = field(default_factory=dict)
    others: tuple[str, ...] = ()

    @property
    def store(self) -> Store:
        """The store, opened anew."""
        return open_store(self.uri)

    @property
    def signer(self) -> Signer | None:
        """What signs, if a key was made."""
        key = self.folder / "key.pem"
        return open_signer(str(key)) if key.exists() else None

    @property
    def judge(self) -> Trust | None:
        """Who believes that key, if one was made."""
        public = self.folder / "key.pub"
        if not public.exists():
            return None
        document = {
            "enginery-trust": 1,
            "keys": {"k": {"public_key": public.read_text()}},
            "allow": [{"keys": ["k"]}],
        }
        return Trust(TrustPolicy.from_document(document, "trust.yaml", Path.read_bytes))

    def seen_by(self, number: int) -> Place:
        """Return the place as the process of this number has it: the hosts take turns."""
        return replace(self, uri=(self.uri, *self.others)[number % (1 + len(self.others))])

    def enter(self) -> None:
        """Make this process's environment the one that leads to the store."""
        os.environ.update(self.environment)
        os.environ["ENGINERY_STATE"] = str(self.folder / "state")


@dataclass(frozen=True)
class Action:
    """Something to be done to a store: the name of a function of this module, and its arguments after the place."""

    name: str
    arguments: tuple[Any, ...] = ()

    def run(self, place: Place) -> Any:
        """Do it here. Raises what the product raises."""
        return ACTIONS[self.name](place, *self.arguments)


def engine(recipe: str, number: int) -> EngineId:
    """Return the name of a made-up engine; the number is its build."""
    return EngineId(recipe, TARGET, f"fp16-{number:06d}")


def group(recipe: str, number: int) -> list[EngineId]:
    """Return the names of engines that are published together: one with parts, a plain one, a fallback."""
    return [EngineId(recipe, target, f"fp16-{number:06d}") for target in GROUP]


def publish(place: Place, recipe: str, number: int, writer: str = "", lease: Lease | None = None) -> str:
    """Publish an engine of five files, one of them shared by all of its recipe; return its manifest's digest.

    `writer` is who says to have built it: two of different names publish different manifests of one action.
    """
    store, name = place.store, engine(recipe, number)
    manifest = _made(store, name, {}, writer, lease)
    return digest_bytes(EngineCatalog(store).publish(manifest, place.signer))


def publish_group(
    place: Place, recipe: str, number: int, writer: str = "", lease: Lease | None = None
) -> dict[str, str]:
    """Publish an engine with parts, a plain one and a fallback together; return their manifests' digests by engine."""
    store, names = place.store, group(recipe, number)
    fallback = {"schema": 3, "fallback": {"kind": "onnx", "instead_of": ["tensorrt-rtx:sm89"]}}
    changes: tuple[dict[str, Any], ...] = (parts_document("decoder", "encoder"), {}, fallback)
    manifests = [_made(store, name, change, writer, lease) for name, change in zip(names, changes, strict=True)]
    published = EngineCatalog(store).publish_together(manifests, place.signer, {"tensorrt-1-sm75": "it waits"})
    return {str(name): digest_bytes(data) for name, data in zip(names, published.manifests, strict=True)}


def _made(store: Store, name: EngineId, kind: Mapping[str, Any], writer: str, lease: Lease | None) -> Manifest:
    """Store an engine's blobs, and return the manifest that is to be published."""
    cache = ActionCache(store, lease=lambda: lease)
    plans = [f"{part}/model.plan" for part in kind.get("parts", ())] or ["model.plan"]
    contents = {
        **{plan: digest_bytes(f"{name} {plan}".encode()).encode() * (PLAN_BYTES // 64) for plan in plans},
        "report.html": f"<p>{name}</p>".encode(),
        "shared.bin": f"all of {name.recipe} have this".encode() * 1000,
        "fallback.onnx": f"the fallback of {name}".encode() * 50,
        "labels.txt": b"one\ntwo\n",
    }
    files = {}
    with store.scratch() as folder, os_faults(str(folder)):
        for file, data in contents.items():
            ref = ArtifactRef(digest_bytes(data), len(data), ENGINE_PLAN)
            (folder / ref.digest).write_bytes(data)
            cache.put_blob(folder / ref.digest, ref)
            files[file] = ref.to_json()
    changes = {
        **kind,
        "identity.recipe": name.recipe,
        "identity.target": name.target,
        "identity.build": name.build,
        "files": files,
        "verification.engine": _MEASURED,
        "provenance.key": digest_bytes(str(name).encode()),
        "provenance.host.name": writer or "builder",
    }
    return make_manifest(changes)


def promote(place: Place, recipe: str, number: int) -> str:
    """Make the channel name an engine; return the build."""
    mover = Mover(EngineCatalog(place.store), "bench", "because", place.signer, place.judge)
    mover.promote(engine(recipe, number), CHANNEL, waived=("slower", "unexecuted"))
    return engine(recipe, number).build


def rollback(place: Place, recipe: str) -> str:
    """Make the channel name what it named before; return the build."""
    mover = Mover(EngineCatalog(place.store), "bench", "because", place.signer, place.judge)
    return mover.rollback(recipe, TARGET, CHANNEL).move.build


def pull(place: Place, recipe: str, number: int, to: str) -> str:
    """Pull an engine into a folder; return that of the engine."""
    return str(client.pull(place.store, engine(recipe, number), Path(to), trust=place.judge).folder)


def follow(place: Place, recipe: str, to: str) -> str | None:
    """Pull what the channel names, if anything, and check what was pulled; return the build."""
    found = read_channel(place.store, recipe, TARGET, CHANNEL)
    if found is None:
        return None
    name = EngineId(recipe, TARGET, found.head.move.build)
    pulled = client.pull(place.store, name, Path(to), channel=CHANNEL, trust=place.judge)
    client.check(pulled.folder, trust=place.judge)
    return name.build


def build(place: Place, recipe: str) -> list[str]:
    """Build a recipe with its real stages, without Prefect; return the steps that ran."""
    from tests.integration.building import build as drive

    ran, planned, _session = drive(Path(recipe), place.uri)
    if not planned.fresh:
        raise AssertionError(f"not fresh: {[(step.id, step.state, step.why) for step in planned.steps]}")
    return sorted(ran)


def listed(place: Place, recipe: str) -> list[str]:
    """Return the builds of a recipe, as every table has them."""
    return [name.build for name in EngineCatalog(place.store).engines(recipe)]


def collect(place: Place, grace: float = 0.0) -> list[str]:
    """Collect what no channel and no pin names; return the paths that were removed."""
    policy = Policy(keep_days=0, keep_newest=0, keep_moves=1, grace=grace)
    return sorted(removal.path for removal in Collector(place.store, policy).collect().removed)


def keep(place: Place, number: int, lease: Lease | None = None) -> bool:
    """Keep a record of an action with one blob, and tell whether it is a hit then, its bytes being those that were kept."""
    store = place.store
    cache = ActionCache(store, lease=lambda: lease)
    data = f"the output of action {number}\n".encode() * 2000
    ref = ArtifactRef(digest_bytes(data), len(data), ENGINE_PLAN)
    record = ActionRecord({"stage": "compile", "number": number}, {"model.plan": ref})
    with store.scratch() as folder:
        (folder / "out").write_bytes(data)
        cache.put_blob(folder / "out", ref)
        kept = cache.put_record(record)
        found = cache.lookup("compile", record.key)
        if found is not None:
            cache.get_blob(ref, folder / "back")
    return found == kept


ACTIONS: Final[Mapping[str, Callable[..., Any]]] = {
    "publish": publish,
    "publish_group": publish_group,
    "promote": promote,
    "rollback": rollback,
    "pull": pull,
    "follow": follow,
    "listed": listed,
    "keep": keep,
    "collect": collect,
    "build": build,
}


# ---- processes ------------------------------------------------------------------------------------------------------------


@dataclass
class Running:
    """An action in a process of its own."""

    process: BaseProcess
    answers: Connection

    def wait(self, timeout: float) -> dict[str, Any]:
        """Return how it ended: `value` of what it returned, `error` (of the product, in words) or `crash` (a traceback)."""
        if not self.answers.poll(timeout):
            self.process.kill()
            return {"crash": f"did not end within {timeout:.0f} s"}
        try:
            answer = self.answers.recv()
        except EOFError:
            answer = {"crash": "killed"}
        self.process.join()
        return answer if isinstance(answer, dict) else {"crash": repr(answer)}

    def kill_after(self, seconds: float) -> bool:
        """Kill it so long after it began; tell whether it lived then."""
        ended = self.answers.poll(seconds)
        self.process.kill()
        self.process.join()
        return not ended


class Actors:
    """Starts actions in processes forked from one that has imported all that they need."""

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(list(PRELOADED))

    @contextmanager
    def started(self, action: Action, place: Place) -> Iterator[Running]:
        """Start an action, and yield when it begins; at the end its process is gone."""
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=_act, args=(action, place, theirs))
        process.start()
        theirs.close()
        try:
            if not ours.poll(120) or ours.recv() != "begin":
                raise AssertionError(f"{action} did not begin")
            yield Running(process, ours)
        finally:
            process.kill()
            process.join()
            ours.close()

    def run(self, action: Action, place: Place, timeout: float = 300) -> dict[str, Any]:
        """Run an action to its end. See `Running.wait`."""
        with self.started(action, place) as running:
            return running.wait(timeout)

    def complete(self, action: Action, place: Place, timeout: float = 300) -> tuple[Any, float]:
        """Run an action that has to end well; return its value, and the seconds since it began. Raises AssertionError."""
        with self.started(action, place) as running:
            begin = time.perf_counter()
            answer = running.wait(timeout)
            taken = time.perf_counter() - begin
        if "value" not in answer:
            raise AssertionError(f"{action}: {answer}")
        return answer["value"], taken


def _act(action: Action, place: Place, answers: Connection) -> None:
    place.enter()
    answers.send("begin")
    try:
        answer = {"value": action.run(place)}
    except ArtifactError as err:
        answer = {"error": f"{type(err).__name__}: {err}"}
    except BaseException:  # noqa: BLE001 - whatever else is a finding
        answer = {"crash": traceback.format_exc()}
    answers.send(answer)


def make_place(
    folder: Path,
    uri: str,
    environment: Mapping[str, str] | None = None,
    *,
    signed: bool = True,
    others: Iterable[str] = (),
) -> Place:
    """Make a place, with a key pair unless it is not to be signed."""
    folder.mkdir(parents=True, exist_ok=True)
    if signed:
        from tests.keys import make_key

        make_key(folder)
    return Place(uri, folder, dict(environment or {}), tuple(others))


def manifest_of(place: Place, name: EngineId) -> Manifest:
    """Return a published engine's manifest."""
    return EngineCatalog(place.store).manifest(name)


def write_json(path: Path, document: Any) -> None:
    """Write a result, with the Python that made it."""
    document = {"python": sys.version.split()[0], **document}
    path.write_text(json.dumps(document, indent=1) + "\n")
