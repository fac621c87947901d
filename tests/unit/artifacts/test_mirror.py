"""Mirrors between folders and S3 in all pairs, and what `verify --deep` finds, moves aside and repairs from a mirror."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from artifacts.cache import ActionCache, blob_path
from artifacts.catalog import EngineCatalog, EngineId
from artifacts.channels import channel_path, move_channel, read_channel
from artifacts.deep import DeepCheck
from artifacts.errors import StoreError
from artifacts.mirror import Mirror
from artifacts.publications import read_publication
from artifacts.refs import digest_bytes
from artifacts.store import Store, open_store
from bench.faults import world
from bench.faults.world import make_place
from enginery.__main__ import command_line
from tests.keys import make_key, trust
from tests.unit.artifacts.test_collector import Shop

KINDS = ["folder", pytest.param("s3", marks=pytest.mark.slow)]


class AnyShop(Shop):
    """The simulated builds of a shop, in a store of any kind."""

    def __init__(self, store: Store) -> None:
        self.store = store  # type: ignore[assignment]
        self.cache = ActionCache(store)
        self.catalog = EngineCatalog(store)

    def promote_truly(self, engine: EngineId, channel: str = "production") -> None:
        digest = digest_bytes(self.catalog.manifest_bytes(engine))
        fields = {"action": "promote", "build": engine.build, "manifest": digest, "by": "me"}
        fields["time"] = "2026-01-01T00:00:00Z"
        move_channel(self.store, engine.recipe, engine.target, channel, lambda _found: fields)


def store_of(kind: str, name: str, tmp_path: Path, s3: str) -> Store:
    return open_store(str(tmp_path / name) if kind == "folder" else f"{s3}/{name}")


def contents(store: Store) -> dict[str, bytes]:
    return {info.path: store.read(info.path) for info in store.list("") if not info.path.startswith("quarantine/")}


@pytest.fixture(params=KINDS)
def source(request: pytest.FixtureRequest, tmp_path: Path, s3_store_uri: str) -> AnyShop:
    shop = AnyShop(store_of(request.param, "source", tmp_path, s3_store_uri))
    one, two = shop.engine("fp16-a"), shop.engine("fp16-b", recipe="swin")
    shop.promote_truly(one)
    shop.promote_truly(two, "staging")
    return shop


@pytest.fixture(params=KINDS)
def target(request: pytest.FixtureRequest, tmp_path: Path, s3_store_uri: str) -> Store:
    return store_of(request.param, "target", tmp_path, s3_store_uri)


def test_a_mirror_has_everything_and_a_second_sends_nothing(source: AnyShop, target: Store) -> None:
    done = Mirror(source.store, target).run()
    assert contents(target) == contents(source.store)
    assert (len(done.engines), sorted(done.channels), done.left) == (
        2,
        ["digits/tensorrt-1-sm90/production", "swin/tensorrt-1-sm90/staging"],
        [],
    )
    again = Mirror(source.store, target).run()
    assert (again.objects, again.size, again.left, again.channels) == (0, 0, [], [])


class Dying:
    """A store that writes so many objects and then none, in which nothing is ever seen that is not whole."""

    def __init__(self, store: Store, writes: int) -> None:
        self._store, self._writes = store, writes
        self.order: list[str] = []

    def __getattr__(self, name: str) -> object:
        return getattr(self._store, name)

    def _count(self, path: str) -> None:
        if path.startswith("leases/"):
            return
        if len(self.order) == self._writes:
            raise StoreError("killed")
        self.order.append(path)

    def write(self, path: str, data: bytes, **conditions: object) -> bool:
        self._count(path)
        return self._store.write(path, data, **conditions)

    def put_file(self, path: str, *rest: object) -> None:
        self._count(path)
        self._store.put_file(path, *rest)

    def copy(self, source: str, target: str) -> None:
        self._count(target)
        self._store.copy(source, target)


def test_a_mirror_that_dies_at_any_write_shows_nothing_half_and_goes_on(tmp_path: Path) -> None:
    shop = AnyShop(open_store(str(tmp_path / "source")))
    shop.promote_truly(shop.engine("fp16-a"))
    whole = Dying(open_store(str(tmp_path / "whole")), 1000)
    Mirror(shop.store, whole).run()
    kinds_in_order = ("cache/blobs", "cache/actions", "engines", "publications", "channels")
    kinds = [next(kind for kind in kinds_in_order if path.startswith(kind)) for path in whole.order]
    assert kinds.index("engines") > max(at for at, kind in enumerate(kinds) if kind.startswith("cache"))
    assert kinds[-1] == "channels"
    for writes in range(len(whole.order)):
        target = open_store(str(tmp_path / f"target-{writes}"))
        with pytest.raises(StoreError, match="killed"):
            Mirror(shop.store, Dying(target, writes)).run()
        assert DeepCheck(target).run() == []  # each manifest that is there has its files, each channel can be read
        for info in target.list("channels/"):
            assert info.path == ""  # the last write is the channel's
        Mirror(shop.store, target).run()
        assert contents(target) == contents(shop.store)


TARGETS = ("tensorrt-1-sm80", "tensorrt-1-sm90")


def test_what_was_published_together_is_visible_together_in_a_mirror_that_dies_at_any_write(tmp_path: Path) -> None:
    shop = AnyShop(open_store(str(tmp_path / "source")))
    group = shop.engines(TARGETS, "fp16-a")
    (publication,) = (info.path for info in shop.store.list("publications/"))
    whole = Dying(open_store(str(tmp_path / "whole")), 1000)
    Mirror(shop.store, whole).run()
    assert read_publication(whole.read(publication)).without == {"tensorrt-1-sm75": "waits"}
    for writes in range(len(whole.order)):
        target = open_store(str(tmp_path / f"target-{writes}"))
        with pytest.raises(StoreError, match="killed"):
            Mirror(shop.store, Dying(target, writes)).run()
        assert EngineCatalog(target).engines() in ([], group)
    # And then a mirror that goes on where the last one stopped.
    assert whole.order[-1] == publication
    assert EngineCatalog(target).engines() == []
    Mirror(shop.store, target).run()
    assert EngineCatalog(target).engines() == group
    assert contents(target) == contents(shop.store)


@pytest.mark.parametrize("damaged", ["model.plan", "manifest.json"])
def test_where_one_of_a_publication_is_damaged_none_of_it_is_sent(tmp_path: Path, damaged: str) -> None:
    shop, target = AnyShop(open_store(str(tmp_path / "source"))), open_store(str(tmp_path / "target"))
    group, other = shop.engines(TARGETS, "fp16-a"), shop.engine("fp16-b")
    right = harm(shop.store, f"{group[1].path}/{damaged}")
    done = Mirror(shop.store, target).run()
    assert EngineCatalog(target).engines() == [other]
    assert str(group[0]) in done.left[-1]
    assert "enginery verify --deep" in done.left[-1]
    shop.store.write(f"{group[1].path}/{damaged}", right)
    assert Mirror(shop.store, target).run().left == []
    assert EngineCatalog(target).engines() == sorted([*group, other])


class Collected:
    """A store from which an engine is removed between the first and the second look at its manifest."""

    def __init__(self, store: Store, engine: EngineId) -> None:
        self._store, self._manifest = store, f"{engine.path}/manifest.json"
        self._looks = 0

    def __getattr__(self, name: str) -> object:
        return getattr(self._store, name)

    def read(self, path: str) -> bytes:
        self._looks += path == self._manifest
        if self._looks == 2:
            self._store.delete(self._manifest)
        return self._store.read(path)


def test_of_a_publication_one_that_is_collected_meanwhile_holds_up_no_other(tmp_path: Path) -> None:
    shop, target = AnyShop(open_store(str(tmp_path / "source"))), open_store(str(tmp_path / "target"))
    gone, other = shop.engines(TARGETS, "fp16-a")
    done = Mirror(Collected(shop.store, gone), target).run()
    assert (done.left, done.engines) == ([], [str(other)])
    assert EngineCatalog(target).engines() == [other]


def test_a_blob_that_is_damaged_at_the_other_end_becomes_no_engines_file(tmp_path: Path) -> None:
    shop, target = AnyShop(open_store(str(tmp_path / "source"))), open_store(str(tmp_path / "target"))
    engine = shop.engine("fp16-a")
    entry = shop.catalog.manifest(engine).files["model.plan"]
    target.write(blob_path(entry.digest), bytes(entry.size))
    Mirror(shop.store, target).run()
    assert digest_bytes(target.read(f"{engine.path}/model.plan")) == entry.digest


def test_an_engine_with_parts_is_sent_once(tmp_path: Path) -> None:
    place = make_place(tmp_path, str(tmp_path / "source"), signed=False)
    names = world.publish_group(place, "swin", 1).keys()
    target = open_store(str(tmp_path / "target"))
    assert Mirror(place.store, target).run().objects > len(names)
    assert {str(engine) for engine in EngineCatalog(target).engines()} == names
    assert Mirror(place.store, target).run().objects == 0


@pytest.mark.parametrize("source", ["folder"], indirect=True)
@pytest.mark.parametrize("target", ["folder"], indirect=True)
class TestSelections:
    def test_of_a_publication_those_that_a_channel_names_are_together(self, source: AnyShop, target: Store) -> None:
        first, second = source.engines(TARGETS, "fp16-c")
        source.promote_truly(second)
        assert Mirror(source.store, target, channel="production").run().left == []
        assert EngineCatalog(target).engines() == [second]
        Mirror(source.store, target).run()
        assert {first, second} <= {*EngineCatalog(target).engines()}
        assert Mirror(source.store, target).run().objects == 0

    def test_by_recipe_and_by_channel(self, source: AnyShop, target: Store, tmp_path: Path) -> None:
        source.engine("fp16-c")
        Mirror(source.store, target, channel="production").run()
        assert [str(engine) for engine in EngineCatalog(target).engines()] == ["digits/tensorrt-1-sm90/fp16-a"]
        assert [info.path for info in target.list("channels/")] == ["channels/digits/tensorrt-1-sm90/production.json"]
        other = open_store(str(tmp_path / "other"))
        Mirror(source.store, other, recipe="swin").run()
        assert {engine.recipe for engine in EngineCatalog(other).engines()} == {"swin"}
        assert all(path.split("/")[1] == "swin" for path in contents(other) if path.startswith(("engines", "channels")))
        assert DeepCheck(other).run() == []
        assert [info.path for info in other.list("cache/actions/")]

    def test_a_channel_moves_on_and_one_that_went_another_way_stays(self, source: AnyShop, target: Store) -> None:
        Mirror(source.store, target).run()
        newer = source.engine("fp16-c")
        source.promote_truly(newer)
        done = Mirror(source.store, target).run()
        assert done.channels == ["digits/tensorrt-1-sm90/production"]
        assert read_channel(target, *newer_place(newer)).head.move.build == "fp16-c"
        AnyShop(target).promote_truly(EngineId("digits", "tensorrt-1-sm90", "fp16-a"))
        before = target.read(channel_path(*newer_place(newer)))
        ahead = Mirror(source.store, target).run()
        source.promote_truly(EngineId("digits", "tensorrt-1-sm90", "fp16-a"))
        another = Mirror(source.store, target).run()
        assert "is ahead, and stays as it is" in ahead.left[0]
        assert "was moved another way, and stays as it is" in another.left[0]
        assert target.read(channel_path(*newer_place(newer))) == before

    def test_damaged_bytes_are_not_sent(self, source: AnyShop, target: Store) -> None:
        (record,) = list(source.store.list("engines/swin/tensorrt-1-sm90/fp16-b/model.plan"))
        harm(source.store, record.path)
        done = Mirror(source.store, target).run()
        assert any("expected" in message for message in done.left)
        assert [engine.recipe for engine in EngineCatalog(target).engines()] == ["digits"]

    def test_the_command(self, source: AnyShop, target: Store) -> None:
        arguments = ["mirror", source.store.uri, target.uri, "--json"]
        done = CliRunner().invoke(command_line(), arguments)
        assert done.exit_code == 0, done.output
        assert len(json.loads(done.stdout)["engines"]) == 2
        harm(source.store, "channels/swin/tensorrt-1-sm90/staging.json")
        assert CliRunner().invoke(command_line(), ["mirror", source.store.uri, target.uri]).exit_code == 1


def newer_place(engine: EngineId) -> tuple[str, str, str]:
    return engine.recipe, engine.target, "production"


def harm(store: Store, path: str) -> bytes:
    """Flip a bit of an object, and return what it was; in a folder its other names keep their bytes."""
    data = store.read(path)
    store.write(path, bytes([data[0] ^ 1]) + data[1:])
    return data


def test_every_object_that_is_damaged_is_found_and_repaired_from_a_mirror(source: AnyShop, target: Store) -> None:
    Mirror(source.store, target).run()
    right = contents(source.store)
    assert len(right) > 10
    for path in right:
        harm(source.store, path)
    found = DeepCheck(source.store, target).run()
    assert {damage.path for damage in found} == set(right)
    assert {damage.state for damage in found} == {"repaired"}
    assert contents(source.store) == right
    assert all(source.store.read(damage.moved) != right[damage.path] for damage in found)
    assert DeepCheck(source.store, target).run() == []


def test_a_channel_does_not_move_to_what_is_not_visible_at_the_other_end(tmp_path: Path) -> None:
    shop, target = AnyShop(open_store(str(tmp_path / "source"))), open_store(str(tmp_path / "target"))
    engine = shop.engine("fp16-a")
    shop.promote_truly(engine)
    Mirror(shop.store, target).run()
    for path in [
        info.path for prefix in ("channels/", "publications/", f"{engine.path}/model") for info in target.list(prefix)
    ]:
        target.delete(path)
    harm(shop.store, f"{engine.path}/model.plan")
    done = Mirror(shop.store, target).run()
    assert any("names fp16-a, which is not in" in message for message in done.left)
    assert not list(target.list("channels/"))


def test_what_is_published_anew_is_not_visible_by_the_mark_of_what_was_damaged(tmp_path: Path) -> None:
    shop = AnyShop(open_store(str(tmp_path / "store")))
    engine = shop.engine("fp16-a")
    harm(shop.store, f"{engine.path}/manifest.json")
    assert [damage.state for damage in DeepCheck(shop.store).run()] == ["quarantined"]
    assert not list(shop.store.list(f"{engine.path}/publications/"))


@pytest.mark.parametrize("source", ["folder"], indirect=True)
class TestDeep:
    def test_a_whole_store_is_whole(self, source: AnyShop) -> None:
        before = contents(source.store)
        check = DeepCheck(source.store)
        assert check.run() == []
        assert check.checked >= len(before)
        assert contents(source.store) == before

    def test_without_another_store_it_is_moved_aside_and_never_deleted(self, source: AnyShop) -> None:
        right = contents(source.store)
        for path in right:
            harm(source.store, path)
        found = DeepCheck(source.store).run()
        # That it is there is all that a publication or a mark says, and what it says besides follows from the rest.
        assert {damage.state for damage in found if "publications/" not in damage.path} == {"quarantined"}
        assert {damage.state for damage in found if "publications/" in damage.path} == {"repaired"}
        for damage in found:
            if damage.moved is not None:
                assert source.store.info(damage.moved) is not None
        assert EngineCatalog(source.store).engines() == []

    @pytest.mark.parametrize("gone", [False, True])
    def test_an_engine_that_cannot_be_repaired_is_not_found_any_more(self, source: AnyShop, gone: bool) -> None:
        (info,) = list(source.store.list("engines/swin/tensorrt-1-sm90/fp16-b/model.plan"))
        digest = digest_bytes(source.store.read(info.path))
        # From a blob that is still whole it is repaired.
        source.store.delete(info.path) if gone else harm(source.store, info.path)
        (damage,) = DeepCheck(source.store).run()
        assert (damage.state, damage.moved is None) == ("repaired", gone)
        source.store.delete(info.path) if gone else harm(source.store, info.path)
        source.store.delete(blob_path(digest))
        found = {damage.path.rpartition("/")[2]: damage.state for damage in DeepCheck(source.store).run()}
        assert found == {"manifest.json": "quarantined", "model.plan": "quarantined"}
        assert [engine.recipe for engine in EngineCatalog(source.store).engines()] == ["digits"]
        assert DeepCheck(source.store).run() == []

    def test_another_store_that_is_damaged_itself_repairs_nothing(self, source: AnyShop, tmp_path: Path) -> None:
        spare = open_store(str(tmp_path / "spare"))
        Mirror(source.store, spare).run()
        for path in contents(source.store):
            harm(source.store, path)
            harm(spare, path)
        found = DeepCheck(source.store, spare).run()
        assert {damage.state for damage in found if "publications/" not in damage.path} == {"quarantined"}

    def test_the_command(self, source: AnyShop, tmp_path: Path) -> None:
        def run(*more: str) -> tuple[int, str]:
            done = CliRunner().invoke(command_line(), ["verify", "--deep", "--store", source.store.uri, *more])
            return done.exit_code, done.output

        spare = open_store(str(tmp_path / "spare"))
        Mirror(source.store, spare).run()
        assert run()[0] == 0
        path = next(info.path for info in source.store.list("cache/actions/"))
        harm(source.store, path)
        status, said = run("--from", spare.uri)
        assert (status, "1 repaired; what was damaged lies in quarantine/" in said) == (0, True)
        harm(source.store, path)
        status, said = run("--json")
        assert (status, '"quarantined"' in said) == (1, True)
        assert run("--execute")[0] == 2


def test_signatures_are_compared_and_checked_at_the_other_end(tmp_path: Path) -> None:
    shop = AnyShop(open_store(str(tmp_path / "source")))
    key, other = make_key(tmp_path), make_key(tmp_path, "other")
    signed, bare = shop.engine("fp16-a"), shop.engine("fp16-b", recipe="swin")
    data = shop.catalog.manifest_bytes(signed)
    shop.catalog.sign(shop.catalog.read_manifest(signed, data), data, key.signer)
    judge = trust(key)
    target = open_store(str(tmp_path / "target"))
    done = Mirror(shop.store, target, judge=judge).run()
    assert done.engines == [str(signed)]
    (left,) = done.left
    assert "target" in left
    assert str(bare) in left
    assert Mirror(shop.store, open_store(str(tmp_path / "plain"))).run().left == []
    # What a mirror finds at the other end in a signature's place stays there, and is told.
    (info,) = target.list(f"{signed.path}/signatures/")
    target.write(info.path, other.signer.sign(str(signed), {"manifest.json": digest_bytes(data)}))
    done = Mirror(shop.store, target, "digits").run()
    assert done.engines == []
    assert "its signature by" in done.left[0]
