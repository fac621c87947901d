"""Collecting garbage in a real store: what goes, what stays, in which order, and what a collector that dies leaves."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from artifacts import leases
from artifacts.cache import ActionCache, blob_path, record_path
from artifacts.catalog import EngineCatalog, EngineId
from artifacts.channels import move_channel
from artifacts.claims import claimed
from artifacts.collector import Collected, Collector
from artifacts.errors import StoreError
from artifacts.folder import FolderStore
from artifacts.fresh_plans import SHARDS, FreshPlans
from artifacts.garbage import Policy, note_path, pin_path
from artifacts.keys import Action
from artifacts.leases import leased
from artifacts.manifest import Manifest
from artifacts.publications import mark_of, publication_path
from artifacts.records import ActionRecord
from artifacts.refits import Base, RefitIndex
from artifacts.refs import BYTES, ArtifactRef, digest_bytes
from tests.engines import make_manifest

DAY = 86400.0
TARGET = "tensorrt-1-sm90"
LONG_AGO = Policy(keep_days=0, grace=DAY)


class Shop:
    """A store in which builds are simulated: an engine has a compile record, its blobs, and a manifest that names them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.store = FolderStore(folder / "store")
        self.cache = ActionCache(self.store)
        self.catalog = EngineCatalog(self.store)

    def blob(self, data: bytes) -> ArtifactRef:
        ref = ArtifactRef(digest_bytes(data), len(data), BYTES)
        with self.store.scratch() as folder:
            (folder / "blob").write_bytes(data)
            self.cache.put_blob(folder / "blob", ref)
        return ref

    def record(self, stage: str, name: str, **facts: str) -> ActionRecord:
        ref = self.blob(f"{stage} of {name}".encode())
        return self.cache.put_record(
            ActionRecord(Action(stage, 1, {"name": name}).preimage(), {"out": ref}, facts, 1.0, "2026-01-01T00:00:00Z")
        )

    def engine(self, build: str, created: str = "2026-01-01T00:00:00Z", recipe: str = "digits") -> EngineId:
        return self.engines([TARGET], build, created, recipe)[0]

    def engines(
        self, targets: Sequence[str], build: str, created: str = "2026-01-01T00:00:00Z", recipe: str = "digits"
    ) -> list[EngineId]:
        """Publish engines of several targets together; return their names."""
        manifests = [self.manifest(target, build, created, recipe) for target in targets]
        self.catalog.publish_together(manifests, without={"tensorrt-1-sm75": "waits"} if len(targets) > 1 else None)
        return [EngineId.of(manifest.identity) for manifest in manifests]

    def manifest(self, target: str, build: str, created: str, recipe: str) -> Manifest:
        of = f"{recipe} {build}{'' if target == TARGET else f' {target}'}"
        compiled, shared = self.record("compile", of), self.record("export", recipe)
        manifest = make_manifest(
            {
                "identity": {"recipe": recipe, "target": target, "build": build, "created": created},
                "files": {"model.plan": compiled.outputs["out"].to_json()},
                "provenance.key": digest_bytes(f"publish {of}".encode()),
            }
        )
        step = manifest.provenance.steps[0]
        steps = tuple(
            step.model_copy(update={"id": made.stage, "stage": made.stage, "key": made.key})
            for made in (shared, compiled)
        )
        manifest = manifest.model_copy(update={"provenance": manifest.provenance.model_copy(update={"steps": steps})})
        return Manifest.from_bytes(manifest.to_bytes())

    def promote(self, engine: EngineId, channel: str = "production", when: str = "2026-01-01T00:00:00Z") -> None:
        fields = {"action": "promote", "build": engine.build, "manifest": "0" * 64, "by": "me", "time": when}
        move_channel(self.store, engine.recipe, engine.target, channel, lambda _found: fields)

    def age(self, days: float = 10, prefix: str = "") -> None:
        """Make everything (under a prefix) so much older."""
        seen = set()
        for info in list(self.store.list(prefix)):
            path = self.store.root / info.path
            if path.stat().st_ino not in seen:  # blobs and engines' files are the same files
                seen.add(path.stat().st_ino)
                os.utime(path, (info.modified - days * DAY,) * 2)

    def paths(self, prefix: str = "") -> set[str]:
        return {info.path for info in self.store.list(prefix)}

    def collect(self, policy: Policy = LONG_AGO) -> Collected:
        return Collector(self.store, policy).collect()

    def whole(self) -> list[str]:
        """Return the engines that are visible, having compared every file with its manifest."""
        found = []
        for manifest in self.catalog.manifests():
            engine = EngineId.of(manifest.identity)
            with self.store.scratch() as folder:
                for name, entry in manifest.files.items():
                    self.catalog.fetch(engine, name, entry, folder / name)
            found.append(engine.build)
        return found


@pytest.fixture
def shop(tmp_path: Path) -> Shop:
    return Shop(tmp_path)


def test_nothing_young_goes(shop: Shop) -> None:
    shop.engine("fp16-a")
    shop.engine("fp16-b")
    shop.blob(b"of a build that is under way")
    before = shop.paths()
    assert shop.collect().removed == ()
    assert shop.paths() == before


def test_what_is_old_goes_in_two_steps_and_the_newest_stays(shop: Shop) -> None:
    old, new = shop.engine("fp16-a", "2026-01-01T00:00:00Z"), shop.engine("fp16-b", "2026-01-02T00:00:00Z")
    shop.blob(b"nobody's")
    shop.age()
    preview = Collector(shop.store, LONG_AGO).preview()
    assert len(shop.catalog.engines()) == 2
    done = shop.collect()
    assert {removal.path for removal in done.removed} == {removal.path for removal in preview.removed}
    assert shop.whole() == ["fp16-b"]
    compiled = ("compile", Action("compile", 1, {"name": "digits fp16-a"}).key)
    assert shop.cache.lookup(*compiled) is None
    assert shop.cache.lookup("compile", Action("compile", 1, {"name": "digits fp16-b"}).key) is not None
    assert shop.cache.lookup("export", Action("export", 1, {"name": "digits"}).key) is not None
    assert shop.store.info(blob_path(digest_bytes(b"nobody's"))) is None
    # Whoever was reading the engine can finish.
    assert shop.paths(f"{old.path}/") == {f"{old.path}/model.plan"}
    assert [removal.path for removal in done.waiting] == [f"{old.path}/model.plan"]
    assert shop.collect().removed == ()
    shop.age(2, "removed/")
    assert {removal.path for removal in shop.collect().removed} == {f"{old.path}/model.plan", note_path(old)}
    assert done.found.kept == {new: "the newest fp16 of its target"}


def test_channels_pins_and_the_last_build_keep_engines(shop: Shop) -> None:
    builds = [shop.engine(f"fp16-{name}", f"2026-01-0{day}T00:00:00Z") for day, name in enumerate("abcdefg", 1)]
    for build in builds[:4]:
        shop.promote(build)
    shop.store.write(pin_path(builds[4]), b"{}")
    publish = {"stage": "publish", "stage_version": 1, "params": {}, "inputs": {}, "toolchain": {}}
    shop.store.write("cache/latest/digits.json", json.dumps({"publish:x": publish}).encode())
    shop.age()
    shop.collect(Policy(keep_days=0, keep_moves=2))
    assert shop.whole() == ["fp16-c", "fp16-d", "fp16-e", "fp16-g"]
    shop.collect(Policy(keep_days=0, keep_moves=0))
    assert shop.whole() == ["fp16-d", "fp16-e", "fp16-g"]
    shop.store.delete(pin_path(builds[4]))
    shop.collect(Policy(keep_days=0, keep_moves=0, keep_newest=0))
    assert shop.whole() == ["fp16-d"]


def test_the_last_build_of_a_recipe_stays_though_it_is_not_the_newest(shop: Shop) -> None:
    first = shop.engine("fp16-a", "2026-01-01T00:00:00Z")
    shop.engine("fp16-b", "2026-01-02T00:00:00Z")
    key = {"stage": "publish", "stage_version": 1, "params": {}, "inputs": {}, "toolchain": {}}
    data = shop.catalog.manifest_bytes(first)
    document = json.loads(data)
    document["provenance"]["key"] = Action("publish", 1).key
    shop.store.write(f"{first.path}/manifest.json", json.dumps(document).encode())
    shop.store.write("cache/latest/digits.json", json.dumps({"publish:x": key}).encode())
    shop.age()
    shop.collect()
    assert shop.whole() == ["fp16-a", "fp16-b"]


def test_a_channel_that_moved_on_within_the_grace_period_keeps_what_it_named(shop: Shop) -> None:
    builds = [shop.engine(f"fp16-{name}", f"2026-01-0{day}T00:00:00Z") for day, name in enumerate("abc", 1)]
    shop.promote(builds[0])
    shop.promote(builds[1], when=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() - 3600)))
    shop.age()
    shop.collect(Policy(keep_days=0, keep_moves=0))
    assert shop.whole() == ["fp16-a", "fp16-b", "fp16-c"]
    shop.collect(Policy(keep_days=0, keep_moves=0, grace=1800))
    assert shop.whole() == ["fp16-b", "fp16-c"]


def test_what_cannot_be_read_keeps_what_it_may_be_about(shop: Shop) -> None:
    first, second = shop.engine("fp16-a", "2026-01-01T00:00:00Z"), shop.engine("fp16-b", "2026-01-02T00:00:00Z")
    shop.store.write(f"channels/digits/{TARGET}/production.json", b"{")
    shop.age()
    told: list[str] = []
    Collector(shop.store, LONG_AGO, told.append).collect()
    assert shop.whole() == ["fp16-a", "fp16-b"]
    assert "all engines of digits/tensorrt-1-sm90 stay" in told[0]
    shop.store.delete(f"channels/digits/{TARGET}/production.json")
    shop.store.write(f"{first.path}/manifest.json", b"{")
    shop.age()
    shop.collect()
    left = {path for path in shop.paths(f"{first.path}/") if mark_of(path) is None}
    assert left == {f"{first.path}/manifest.json", f"{first.path}/model.plan"}
    assert shop.whole() == [second.build]


def test_one_recipe_alone(shop: Shop) -> None:
    for recipe in ("digits", "swin"):
        shop.engine("fp16-a", "2026-01-01T00:00:00Z", recipe)
        shop.engine("fp16-b", "2026-01-02T00:00:00Z", recipe)
    shop.blob(b"nobody's")
    shop.age()
    done = shop.collect(Policy(keep_days=0, recipe="swin"))
    assert {removal.recipe for removal in done.removed} == {"swin"}
    assert sorted(shop.whole()) == ["fp16-a", "fp16-b", "fp16-b"]
    assert shop.store.info(blob_path(digest_bytes(b"nobody's"))) is not None
    assert shop.cache.lookup("compile", Action("compile", 1, {"name": "swin fp16-a"}).key) is None
    assert shop.store.info(blob_path(digest_bytes(b"compile of swin fp16-a"))) is None


def test_what_a_dead_publication_left_goes_and_what_a_living_one_has_written_stays(shop: Shop) -> None:
    engine = shop.engine("fp16-a")
    ref = shop.blob(b"plan")
    shop.store.copy(blob_path(ref.digest), "engines/digits/t/fp16-dead/model.plan")
    shop.store.copy(blob_path(ref.digest), "engines/digits/t/fp16-live/model.plan")
    for stray in ("provenance-0.intoto.json", "signatures/0000000000000000-1.sig", "verification/sm89-0.json"):
        shop.store.write(f"{engine.path}/{stray}", b"{}")
    shop.age()
    with leased(shop.store, "publish", ["digits/t/fp16-live"]):
        shop.collect()
    left = shop.paths("engines/")
    assert "engines/digits/t/fp16-dead/model.plan" not in left
    assert "engines/digits/t/fp16-live/model.plan" in left
    # Whose signature it is cannot be told where an engine was executed later.
    of_engine = [path for path in left if path.startswith(engine.path) and mark_of(path) is None]
    assert {path.removeprefix(f"{engine.path}/") for path in of_engine} == {
        "manifest.json", "model.plan", "signatures/0000000000000000-1.sig", "verification/sm89-0.json",
    }  # fmt: skip


def test_an_engine_whose_publication_ended_early_goes_and_never_counts_as_the_newest(shop: Shop) -> None:
    shop.engine("fp16-a", "2026-01-01T00:00:00Z")
    held = shop.engine("fp16-b", "2026-01-02T00:00:00Z")
    (mark,) = [path for path in shop.paths(f"{held.path}/") if mark_of(path)]
    shop.store.delete(publication_path("digits", mark_of(mark) or ""))
    assert shop.whole() == ["fp16-a"]
    shop.collect()  # which is young, and may be under way
    assert shop.store.info(f"{held.path}/manifest.json") is not None
    shop.age()
    done = shop.collect()
    assert {removal.why for removal in done.removed if removal.path.startswith(held.path)} == {
        "its publication ended early"
    }
    assert shop.whole() == ["fp16-a"]
    shop.age()
    shop.collect()
    assert shop.paths(f"{held.path}/") == set()


def test_what_is_published_anew_is_not_visible_by_the_mark_of_what_was_removed(shop: Shop) -> None:
    old = shop.engine("fp16-a", "2026-01-01T00:00:00Z")
    shop.engine("fp16-b", "2026-01-02T00:00:00Z")
    shop.age()
    shop.collect()
    assert shop.store.info(f"{old.path}/manifest.json") is None
    assert not [path for path in shop.paths(f"{old.path}/") if mark_of(path)]
    assert len(shop.paths("publications/")) == 1


def test_a_lease_keeps_what_was_used_since_it_began_and_the_engines_that_it_names(shop: Shop) -> None:
    old = shop.engine("fp16-a", "2026-01-01T00:00:00Z")
    shop.engine("fp16-b", "2026-01-02T00:00:00Z")
    lone, used = shop.record("type", "lone"), shop.record("type", "used")
    shop.age()
    none = Policy(keep_days=0, grace=0)
    with leased(shop.store, "promote", [f"{old.recipe}/{old.target}"]) as lease:
        assert ActionCache(shop.store, lease=lambda: lease).lookup("type", used.key) is not None
        shop.collect(none)
        assert shop.whole() == ["fp16-a", "fp16-b"]
        assert shop.cache.lookup("type", lone.key) is None
        assert shop.cache.lookup("type", used.key) is not None
        assert lease.use([record_path("type", lone.key), record_path("type", used.key)]) == {
            record_path("type", lone.key)
        }
    shop.collect(none)
    assert shop.cache.lookup("type", used.key) is None
    assert shop.whole() == ["fp16-b"]


def test_a_lease_of_a_dead_process_protects_nothing_and_goes(shop: Shop) -> None:
    shop.record("type", "lone")
    shop.store.write("leases/dead.json", json.dumps({"engines": [], "began": 0.0}).encode())
    shop.store.write("sweeps/dead.json", b"{}")
    shop.age()
    shop.collect()
    assert shop.paths() == set()


def test_a_record_that_was_used_keeps_its_engine_and_its_blobs(shop: Shop) -> None:
    engine = shop.engine("fp16-a", "2026-01-01T00:00:00Z")
    shop.engine("fp16-b", "2026-01-02T00:00:00Z")
    published = shop.record("publish", "fp16-a", path=engine.path)
    shop.age()
    shop.store.touch(record_path("publish", published.key))
    shop.collect()
    assert shop.whole() == ["fp16-a", "fp16-b"]
    assert shop.store.info(blob_path(published.outputs["out"].digest)) is not None


def test_plans_that_may_be_refitted_stay_as_long_as_their_list_is_young(shop: Shop) -> None:
    compiled = shop.record("compile", "base")
    RefitIndex(shop.store).add("0" * 64, Base(compiled.key))
    shop.age(10)
    shop.collect(Policy(keep_days=30))
    assert shop.cache.lookup("compile", compiled.key) is not None
    shop.collect(Policy(keep_days=9))
    assert shop.paths() == set()


def test_fresh_plans_stay_as_long_as_builds_change_them(shop: Shop) -> None:
    for profile in ("used", "gone"):
        FreshPlans(shop.store, profile).add({"0" * 64: 1})
    shop.age(10)
    FreshPlans(shop.store, "used").add({f"{SHARDS:08x}{0:056x}": 1})  # of the same shard
    shop.collect(Policy(keep_days=11))
    assert FreshPlans(shop.store, "gone").read(["0" * 64])
    shop.collect(Policy(keep_days=9))
    assert FreshPlans(shop.store, "gone").read(["0" * 64]) == {}
    assert FreshPlans(shop.store, "used").read(["0" * 64])


def test_claims_go_when_nobody_has_said_them_for_long(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    with claimed(shop.store, "free"):
        pass
    with claimed(shop.store, "dead"):
        died = [shop.store.read(path) for path in sorted(shop.paths("claims/"))]
    for path, data in zip(sorted(shop.paths("claims/")), died, strict=True):
        shop.store.write(path, data)  # as its killed holder left it
    shop.age(0.1)
    monkeypatch.setenv("ENGINERY_CLAIM_SECONDS", "0.6")
    with claimed(shop.store, "held"):
        (held,) = (path for path in shop.paths("claims/") if b'"held"' in shop.store.read(path))
        shop.collect()  # within the grace period of a day
        assert len(shop.paths("claims/")) == 3
        shop.collect(Policy(grace=0, keep_days=0))
        assert shop.paths("claims/") == {held}
        shop.store.delete(held)  # as a collector might that saw it free a moment ago
        deadline = time.monotonic() + 30
        while shop.paths("claims/") != {held}:
            assert time.monotonic() < deadline, "its holder has not put it back"
            time.sleep(0.05)


def test_timing_caches_hosts_and_what_is_not_known_stay(shop: Shop) -> None:
    others = {"timing/tensorrt-1/a.cache", "hosts/a.json", "notes.txt", "engines/readme.txt", "channels/a"}
    for path in others:
        shop.store.write(path, b"x")
    shop.age(1000)
    shop.collect(Policy(keep_days=0, grace=0))
    assert shop.paths() == others


class Failing(FolderStore):
    """A store whose deletions fail after some."""

    left = 0

    def delete(self, path: str) -> None:
        if path.startswith("sweeps/"):
            super().delete(path)
            return
        if not self.left:
            raise StoreError("as if killed")
        self.left -= 1
        super().delete(path)


def test_a_collector_that_ends_anywhere_leaves_only_whole_engines_and_the_next_one_goes_on(shop: Shop) -> None:
    for name in "abc":
        shop.engine(f"fp16-{name}", f"2026-01-01T00:00:0{ord(name) - 97}Z")
    shop.age()
    store = Failing(shop.store.root)
    everything = {removal.path for removal in Collector(shop.store, LONG_AGO).preview().removed}
    gone: set[str] = set()
    for _ in range(len(everything)):
        store.left = 1
        left = shop.paths()
        with contextlib.suppress(StoreError):
            Collector(store, LONG_AGO).collect()
        gone |= left - shop.paths()
        assert "fp16-c" in shop.whole()
        for info in shop.store.list("cache/actions/"):
            record = ActionRecord.from_bytes(shop.store.read(info.path))
            assert shop.cache.lookup(record.stage, record.key) is not None  # records go before their blobs
    assert gone == everything
    assert shop.whole() == ["fp16-c"]


SWEEPER = """
import sys, time
from artifacts.leases import sweeping
from artifacts.store import open_store
with sweeping(open_store(sys.argv[1])):
    print("sweeping", flush=True)
    time.sleep(600)
"""


def test_a_sweep_whose_process_was_killed_here_is_not_waited_for(tmp_path: Path):
    store = FolderStore(tmp_path / "store")
    with subprocess.Popen([sys.executable, "-c", SWEEPER, store.uri], stdout=subprocess.PIPE, text=True) as sweeper:
        try:
            assert sweeper.stdout.readline() == "sweeping\n"
            [sweep] = list(store.list("sweeps/"))
            document = json.loads(store.read(sweep.path))
            assert not leases._has_ended(document["process"])
        finally:
            sweeper.kill()
    assert leases._has_ended(document["process"])
    assert not leases._has_ended(document["process"] | {"machine": "another"})
    assert leases._has_ended(document["process"] | {"pid": os.getpid()})  # its number, given to another process
    begin = time.monotonic()
    with leased(store, "build digits"):
        pass
    assert time.monotonic() - begin < 30  # not the ten minutes after which what is not renewed counts as dead
