import json
import multiprocessing
import shutil

import pytest

from artifacts.cache import blob_path
from artifacts.catalog import EngineCatalog, EngineId, host_path
from artifacts.errors import IntegrityError, NotFoundError, StoreError
from artifacts.folder import FolderStore
from artifacts.host import Gpu, Host
from artifacts.refs import digest_bytes
from tests.engines import digest, make_engine, make_manifest

SM89, SM80 = "tensorrt-rtx-1.7.1.116-sm89", "tensorrt-rtx-1.7.1.116-sm80"


@pytest.fixture
def warnings():
    return []


@pytest.fixture
def catalog(tmp_path, warnings):
    return EngineCatalog(FolderStore(tmp_path / "store"), warnings.append)


@pytest.fixture
def make(catalog, tmp_path):
    def make(recipe="digits", target=SM89, build="fp16-0123456789abcdef", content=b"plan"):
        return make_engine(catalog.store, tmp_path, content, recipe=recipe, target=target, build=build)

    return make


def test_a_published_engine_is_listed_read_and_fetched(catalog, make, tmp_path):
    manifest = make()
    assert catalog.publish(manifest) == manifest.to_bytes()
    engine = EngineId.of(manifest.identity)
    assert catalog.engines() == [engine]
    assert catalog.engines("digits") == [engine]
    assert catalog.engines("digit") == []
    assert catalog.manifests() == [manifest]
    assert catalog.manifest(engine) == manifest
    catalog.fetch(engine, "model.plan", manifest.files["model.plan"], tmp_path / "plan")
    assert (tmp_path / "plan").read_bytes() == b"plan"


def test_publishing_again_changes_nothing_and_returns_what_is_there(catalog, make, warnings):
    first = make()
    catalog.publish(first)
    later = first.model_copy(update={"identity": first.identity.model_copy(update={"created": "2027-01-01T00:00:00Z"})})
    assert catalog.publish(later) == first.to_bytes()
    assert catalog.manifests() == [first]
    assert not warnings


def test_without_its_manifest_a_folder_is_no_engine(catalog, make):
    manifest = make()
    engine = EngineId.of(manifest.identity)
    catalog.store.copy(blob_path(manifest.files["model.plan"].digest), f"{engine.path}/model.plan")
    assert catalog.engines() == []
    assert catalog.manifests() == []
    assert catalog.find("digits") == []


def test_a_blob_that_is_gone_publishes_nothing(catalog, make):
    manifest = make()
    catalog.store.delete(blob_path(manifest.files["model.plan"].digest))
    with pytest.raises(NotFoundError):
        catalog.publish(manifest)
    assert catalog.engines() == []


class Dying(FolderStore):
    """A store that ends its process, so to say, at one of its writes."""

    def __init__(self, root, left):
        super().__init__(root)
        self.left = left

    def _die(self):
        self.left -= 1
        if self.left < 0:
            raise StoreError("as if killed")

    def write(self, path, data, **conditions):
        if not path.startswith("leases/"):
            self._die()
        return super().write(path, data, **conditions)

    def copy(self, source, target):
        self._die()
        super().copy(source, target)


def test_what_is_published_together_is_visible_together_wherever_its_publisher_dies(catalog, make, tmp_path):
    old = make(build="fp16-before")
    catalog.publish(old)
    group = [make(target=target, content=target.encode()) for target in (SM80, SM89)]
    seen = set()
    for left in range(8):  # two files, marks, manifests, and the publication: the last one is the eighth
        dying = EngineCatalog(Dying(catalog.store.root, left))
        if left < 7:
            with pytest.raises(StoreError, match="as if killed"):
                dying.publish_together(group)
        else:
            dying.publish_together(group, without={"tensorrt-11-sm90": "waiting"})
        found = catalog.manifests()
        seen.add(len(found))
        assert found == ([old] if left < 7 else sorted([old, *group], key=lambda one: str(one.identity)))
        assert catalog.engines("digits") == [EngineId.of(manifest.identity) for manifest in found]
        assert catalog.find("fp16-0123") == ([EngineId.of(one.identity) for one in group] if left == 7 else [])
        assert [catalog.is_visible(EngineId.of(one.identity)) for one in group] == [left == 7] * 2
    assert seen == {1, 3}
    [path] = [
        info.path for info in catalog.store.list("publications/digits/") if b"sm80" in catalog.store.read(info.path)
    ]
    said = json.loads(catalog.store.read(path))
    assert said["engines"] == {str(one.identity): digest_bytes(one.to_bytes()) for one in group}
    assert said["without"] == {"tensorrt-11-sm90": "waiting"}


def test_an_engine_that_waits_for_one_publication_is_published_by_another(catalog, make):
    group = [make(target=target, content=target.encode()) for target in (SM80, SM89)]
    with pytest.raises(StoreError):
        EngineCatalog(Dying(catalog.store.root, 6)).publish_together(group)
    assert catalog.publish(group[0]) == group[0].to_bytes()
    assert catalog.manifests() == [group[0]]
    catalog.publish_together(group)
    assert catalog.manifests() == group


def test_one_that_was_visible_stays_so_while_it_is_published_again(catalog, make):
    manifest, other = make(), make(target=SM80)
    catalog.publish(manifest)
    for info in list(catalog.store.list(f"{EngineId.of(manifest.identity).path}/publications/")):
        catalog.store.delete(info.path)  # as an older release published it
    with pytest.raises(StoreError):
        EngineCatalog(Dying(catalog.store.root, 5)).publish_together([manifest, other])
    assert catalog.manifests() == [manifest]


class Interrupted(FolderStore):
    """A folder in which something happens after the first engine's file was listed."""

    def __init__(self, root, happens):
        super().__init__(root)
        self.happens = happens

    def list(self, prefix):
        for info in super().list(prefix):
            yield info
            if prefix.startswith("engines/") and self.happens is not None:
                happens, self.happens = self.happens, None
                happens()


def test_who_lists_while_a_group_is_published_sees_none_of_it_or_all(catalog, make):
    catalog.publish(make(target=SM80, build="fp16-before"))
    group = [make(target=target, content=target.encode()) for target in (SM80, SM89)]
    # The folder of the first is listed before it is published, that of the second afterwards.
    reader = EngineCatalog(Interrupted(catalog.store.root, lambda: catalog.publish_together(group)))
    assert [engine.build for engine in reader.engines()] == ["fp16-before"]
    assert len(reader.engines()) == 3


def test_a_publication_that_was_left_of_engines_that_were_removed_shows_none_early(catalog, make):
    group = [make(target=target, content=target.encode()) for target in (SM80, SM89)]
    first = catalog.publish_together(group).name
    for one in group:  # as a collector that dies before it comes to the publication
        engine = EngineId.of(one.identity)
        catalog.unmark(engine)
        catalog.store.delete(f"{engine.path}/manifest.json")
    assert [info.path for info in catalog.store.list("publications/")] == [f"publications/digits/{first}.json"]
    for left in range(8):
        dying = EngineCatalog(Dying(catalog.store.root, left))
        if left < 7:
            with pytest.raises(StoreError, match="as if killed"):
                dying.publish_together(group)
        else:
            assert dying.publish_together(group).name != first
        assert len(catalog.engines()) == (2 if left == 7 else 0)
    # What is complete is published again under either name, and stays as it is.
    assert catalog.publish_together(group).name == first


def test_sending_a_group_dies_and_shows_nothing_of_it(catalog, make, tmp_path):
    group = [make(target=target, content=target.encode()) for target in (SM80, SM89)]
    catalog.publish_together(group)
    names = [EngineId.of(one.identity) for one in group]
    for left in range(6):
        other = EngineCatalog(Dying(tmp_path / "other", left))
        if left < 5:
            with pytest.raises(StoreError, match="as if killed"):
                catalog.send(names, other)
        else:
            catalog.send(names, other)
        assert EngineCatalog(FolderStore(tmp_path / "other")).engines() == (names if left == 5 else [])


@pytest.mark.parametrize("damage", [b"", b"{", b'{"schema": 9}', b"\x00" * 40])
def test_a_damaged_manifest_is_passed_over_aloud_named_when_read_and_replaced_when_published(
    catalog, make, warnings, damage
):
    good, bad = make(), make(recipe="other")
    for manifest in (good, bad):
        catalog.publish(manifest)
    path = f"{EngineId.of(bad.identity).path}/manifest.json"
    catalog.store.write(path, damage)
    assert catalog.manifests() == [good]
    assert len(warnings) == 1
    assert path in warnings[0]
    with pytest.raises(IntegrityError, match="engines/other"):
        catalog.manifest(EngineId.of(bad.identity))
    catalog.publish(bad)
    assert catalog.manifest(EngineId.of(bad.identity)) == bad


def test_a_manifest_that_was_moved_is_not_the_engine_of_its_new_place(catalog, make):
    manifest = make()
    catalog.publish(manifest)
    old = catalog.store.root / EngineId.of(manifest.identity).path
    new = EngineId("digits", SM80, manifest.identity.build)
    (catalog.store.root / new.path).parent.mkdir()
    shutil.copytree(old, catalog.store.root / new.path)
    with pytest.raises(IntegrityError, match="is the manifest of digits/tensorrt-rtx"):
        catalog.manifest(new)


def test_two_actions_never_share_one_name(catalog, make):
    first = make()
    catalog.publish(first)
    other = first.model_copy(update={"provenance": first.provenance.model_copy(update={"key": digest("another")})})
    with pytest.raises(IntegrityError, match="share their first digits"):
        catalog.publish(other)
    assert catalog.manifests() == [first]


def test_sending_to_another_store_brings_the_same_bytes(catalog, make, tmp_path):
    manifest = make()
    catalog.publish(manifest)
    other = EngineCatalog(FolderStore(tmp_path / "other"))
    engine = EngineId.of(manifest.identity)
    for _twice in range(2):
        assert catalog.send([engine], other) == [manifest.to_bytes()]
    assert other.manifests() == [manifest]
    assert other.store.read(f"{engine.path}/model.plan") == b"plan"


def test_damaged_bytes_are_never_sent(catalog, make, tmp_path):
    manifest = make()
    catalog.publish(manifest)
    engine = EngineId.of(manifest.identity)
    catalog.store.write(f"{engine.path}/model.plan", b"nalp")
    other = EngineCatalog(FolderStore(tmp_path / "other"))
    with pytest.raises(IntegrityError, match="SHA-256"):
        catalog.send([engine], other)
    assert other.engines() == []


def test_finding_takes_whole_names_builds_and_unique_parts(catalog, make):
    one = make(build="fp16-aaaaaaaaaaaaaaaa")
    two = make(build="int8-bbbbbbbbbbbbbbbb", content=b"two")
    three = make(target=SM80, build="fp16-cccccccccccccccc", content=b"three")
    for manifest in (one, two, three):
        catalog.publish(manifest)
    ids = {str(EngineId.of(m.identity)): EngineId.of(m.identity) for m in (one, two, three)}
    for text in ("fp16-a", "fp16-aaaaaaaaaaaaaaaa", str(one.identity), f"engines/{one.identity}/manifest.json", "aaaa"):
        assert catalog.find(text) == [ids[str(one.identity)]]
    assert len(catalog.find("sm89")) == 2
    assert len(catalog.find("digits")) == 3
    assert catalog.find("digitz") == []
    assert "digits" in catalog.near("digitz")
    assert str(two.identity) in catalog.near(f"digits/{SM89}/int8-bbbbbbbbbbbbbbb")


def test_a_channel_names_a_build_for_each_target(catalog):
    for target, build in ((SM80, "fp16-1"), (SM89, "int8-2")):
        catalog.store.write(
            f"channels/digits/{target}/production.json", b'{"schema": 1, "build": "%s"}' % build.encode()
        )
    catalog.store.write(f"channels/digits/{SM80}/staging.json", b'{"schema": 1, "build": "fp16-9"}')
    assert catalog.channels("digits", "production") == {SM80: "fp16-1", SM89: "int8-2"}
    assert catalog.channels("digits", "canary") == {}
    assert catalog.channels("other", "production") == {}


@pytest.mark.parametrize(
    "data", [b"", b"[]", b'{"schema": 2, "build": "x"}', b'{"schema": 1}', b'{"schema": 1, "build": 3}']
)
def test_a_damaged_channel_is_named(catalog, data):
    catalog.store.write(f"channels/digits/{SM80}/production.json", data)
    with pytest.raises(IntegrityError, match="production"):
        catalog.channels("digits", "production")


SLICE = Gpu(
    "L4 slice", "MIG-1", "sm89", 1 << 30, 16, 192, 1 << 25, 48 << 10, 99 << 10, 100 << 10, 512, False, True, mig=True
)


def test_a_recorded_host_is_read_back(catalog):
    host = Host(
        "gpu box/1",
        "linux",
        "x86_64",
        "580.1",
        "13.0",
        (Gpu("L4", "GPU-1", "sm89", None), SLICE),
        {"onnxruntime": "1.31.1"},
    )
    path = catalog.record_host(host)
    assert path == host_path(host.name) == "hosts/gpu_box_1.json"
    assert catalog.host(host.name) == host
    # Of an earlier release: fewer facts, and one that is no more.
    old = {
        "name": "old",
        "os": "linux",
        "arch": "x86_64",
        "gpus": [{"name": "L4", "uuid": "GPU-1", "compute_capability": "sm89", "memory_bytes": 1, "cores": 7}],
    }
    catalog.store.write("hosts/old.json", json.dumps({"schema": 1, **old}).encode())
    assert catalog.host("old").gpus == (Gpu("L4", "GPU-1", "sm89", 1),)
    with pytest.raises(NotFoundError):
        catalog.host("another")


@pytest.mark.parametrize(
    "data", [b"{}", b'{"schema": 1}', b'{"schema": 1, "name": "a", "os": "b", "arch": "c", "gpus": [1]}']
)
def test_a_damaged_fingerprint_is_named(catalog, data):
    catalog.store.write("hosts/box.json", data)
    with pytest.raises(IntegrityError, match="hosts/box"):
        catalog.host("box")


def test_names_that_lead_elsewhere_are_refused(catalog):
    with pytest.raises(StoreError):
        catalog.engines("../digits")


def _publish(root, manifest, barrier):
    barrier.wait()
    EngineCatalog(FolderStore(root)).publish(manifest)


def test_of_many_that_publish_one_build_at_once_all_succeed_and_one_manifest_is_left(catalog, make):
    first = make()
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(4)
    manifests = [
        make_manifest({**_document(first), "identity.created": f"2026-01-0{index}T00:00:00Z"}) for index in range(1, 5)
    ]
    workers = [context.Process(target=_publish, args=(catalog.store.root, m, barrier)) for m in manifests]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0] * 4
    assert catalog.manifests()[0] in manifests


def _document(manifest):
    return {name: value for name, value in manifest.to_json().items() if name != "schema"}
