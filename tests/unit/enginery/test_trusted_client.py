"""Pulling and loading by a trust policy: nothing reaches a runtime, or a folder, that nobody trusted has signed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from artifacts.catalog import EngineCatalog, EngineId
from artifacts.channels import channel_path, read_channel
from artifacts.errors import ChannelError, IntegrityError, SigningError, TrustError
from artifacts.folder import FolderStore
from artifacts.manifest import Manifest
from artifacts.refs import digest_bytes
from artifacts.resolve import Request
from artifacts.signing import STATEMENT_NAME
from artifacts.store import Store, open_store
from artifacts.trust import Trust
from enginery import client
from enginery.moving import Mover
from enginery.trusting import UNCHECKED
from tests.engines import digest, make_engine
from tests.keys import KeyPair, make_key, trust, write_policy
from tests.unit.artifacts.test_attestation import attestation

TARGET = "tensorrt-rtx-1.7.1.116-sm89"
RAN = {"executed": True, "parity": {"relative_l2": 1e-4, "max_abs": 1e-3, "cosine": 1.0, "non_finite": 0}}


def request(channel: str | None = None) -> Request:
    return Request({"tensorrt-rtx": "1.7.1.116"}, ("sm89",), "linux", "x86_64", channel=channel)


class World:
    """A store with signed engines of two recipes, and those who sign and read."""

    def __init__(self, folder: Path, store: Store | None = None) -> None:
        self.folder = folder
        self.store = store or FolderStore(folder / "store")
        self.catalog = EngineCatalog(self.store)
        self.key, self.other = make_key(folder, "release"), make_key(folder, "stranger")
        self.trust = trust(self.key)
        self.to = folder / "pulled"

    def publish(
        self, build: str, recipe: str = "digits", key: KeyPair | None = None, *, executed: bool = True, **changes: str
    ) -> EngineId:
        manifest = make_engine(self.store, self.folder, build.encode(), recipe=recipe, target=TARGET, build=build)
        document = json.loads(manifest.to_bytes())
        if executed:
            document["verification"]["engine"] = RAN
        document["identity"] |= changes
        manifest = Manifest.from_bytes(json.dumps(document).encode())
        self.catalog.publish(manifest, key.signer if key is not None else None)
        return EngineId.of(manifest.identity)

    def mover(self, key: KeyPair | None = None, judge: Trust | None = None) -> Mover:
        return Mover(self.catalog, "me", "because", (key or self.key).signer, judge or self.trust)

    def resolved(self, channel: str | None = None, judge: Trust | None = None) -> client.Resolution:
        return client.resolve(self.store, "digits", request(channel), trust=judge or self.trust)


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    monkeypatch.setenv("ENGINERY_STATE", str(tmp_path / "state"))
    monkeypatch.delenv("ENGINERY_TRUST", raising=False)
    return World(tmp_path)


def test_what_is_signed_is_pulled_with_its_signature_and_loads(world: World) -> None:
    engine = world.publish("fp16-a", key=world.key)
    pulled = client.pull(world.store, world.resolved().best, world.to, trust=world.trust)
    assert (pulled.folder / "manifest.json.sig").read_bytes() == world.catalog.signatures(
        engine, world.catalog.manifest_bytes(engine)
    )[world.key.fingerprint]
    assert client.check(pulled.folder, trust=world.trust) == pulled.manifest
    with pytest.raises(TrustError, match="is not known"):
        client.check(pulled.folder, trust=trust(world.other))
    # The signature comes back where it was lost, and is exchanged where another policy asks for another.
    (pulled.folder / "manifest.json.sig").unlink()
    with pytest.raises(TrustError, match="is not signed"):
        client.check(pulled.folder, trust=world.trust)
    manifest = world.catalog.manifest(engine)
    world.catalog.sign(manifest, world.catalog.manifest_bytes(engine), world.other.signer)
    for judge in (world.trust, trust(world.other)):
        client.pull(world.store, engine, world.to, trust=judge)
        client.check(pulled.folder, trust=judge)


@pytest.mark.parametrize("signer", ["nobody", "a stranger"])
def test_what_is_not_signed_by_a_trusted_key_is_neither_resolved_nor_pulled(world: World, signer: str) -> None:
    good = world.publish("fp16-good", key=world.key)
    bad = world.publish("fp16-bad", key=None if signer == "nobody" else world.other, created="2030-01-01T00:00:00Z")
    resolution = world.resolved()
    assert EngineId.of(resolution.best.identity) == good
    (refused,) = [candidate for candidate in resolution.candidates if not candidate.fits]
    assert EngineId.of(refused.manifest.identity) == bad
    assert ("is not signed" if signer == "nobody" else "is not known") in refused.reasons[0]
    with pytest.raises(TrustError):
        client.pull(world.store, bad, world.to, trust=world.trust)
    assert not world.to.exists()
    # Without a policy, or said aloud, all is as it was: the newest is taken, and its digests are checked.
    for unchecked in (None, UNCHECKED):
        chosen = client.resolve(world.store, "digits", request(), trust=unchecked).best
        assert EngineId.of(chosen.identity) == bad
        client.pull(world.store, chosen, world.to, trust=unchecked)


def test_the_policy_of_the_environment_holds_for_serving_code(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = world.publish("fp16-bad")
    pulled = client.pull(world.store, bad, world.to)
    monkeypatch.setenv("ENGINERY_TRUST", str(write_policy(world.folder, world.key)))
    assert client.resolve(world.store, "digits", request()).best is None
    for call in (lambda: client.pull(world.store, bad, world.to), lambda: client.load(pulled)):
        with pytest.raises(TrustError, match=r"is not signed, and .*trust.yaml asks for it"):
            call()
    assert client.check(pulled.folder, trust=UNCHECKED) == pulled.manifest


@pytest.mark.parametrize("harm", ["manifest", "file and digest", "another recipe's", "an old one's", "plan", "cut"])
def test_attacks_on_a_signed_engine(world: World, harm: str) -> None:
    """Whoever may write to the store has no key."""
    world.publish("fp16-a", key=world.key)
    foreign = world.publish("fp16-x", recipe="swin", key=world.key)
    old = world.publish("fp16-0", key=world.key)
    engine = EngineId("digits", TARGET, "fp16-a")
    path = f"{engine.path}/manifest.json"
    document = json.loads(world.store.read(path))
    if harm == "manifest":
        document["verification"]["passed"] = False
        world.store.write(path, json.dumps(document).encode())
    elif harm == "file and digest":
        world.store.write(f"{engine.path}/model.plan", b"evil!!")
        document["files"]["model.plan"]["digest"] = digest_bytes(b"evil!!")
        world.store.write(path, json.dumps(document).encode())
    elif harm in ("another recipe's", "an old one's"):
        source = foreign if harm == "another recipe's" else old
        for info in list(world.store.list(f"{source.path}/")):
            world.store.copy(info.path, info.path.replace(source.path, engine.path))
    else:
        world.store.write(f"{engine.path}/model.plan", b"evil!!" if harm == "plan" else b"fp16")
    with pytest.raises((TrustError, IntegrityError)):
        client.pull(world.store, engine, world.to, trust=world.trust)
    assert list(world.to.rglob("model.plan")) == []


# ---- channels


def test_a_signed_channel_is_followed(world: World) -> None:
    first, second = world.publish("fp16-a", key=world.key), world.publish("fp16-b", key=world.key)
    for engine in (first, second):
        world.mover().promote(engine, "production")
        best = world.resolved("production").best
        assert EngineId.of(best.identity) == engine
        client.pull(world.store, best, world.to, channel="production", trust=world.trust)
    world.mover().rollback("digits", TARGET, "production")
    assert EngineId.of(world.resolved("production").best.identity) == first


def test_from_s3(s3_store_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENGINERY_STATE", str(tmp_path / "state"))
    world = World(tmp_path, open_store(s3_store_uri))
    first, second = world.publish("fp16-a", key=world.key), world.publish("fp16-b", key=world.key)
    for engine in (first, second):
        world.mover().promote(engine, "production")
    world.mover().rollback("digits", TARGET, "production")
    best = world.resolved("production").best
    assert EngineId.of(best.identity) == first
    client.check(
        client.pull(world.store, best, world.to, channel="production", trust=world.trust).folder, trust=world.trust
    )
    bare = world.publish("fp16-bare")
    with pytest.raises(TrustError, match="is not signed"):
        client.pull(world.store, bare, world.to, trust=world.trust)


def test_a_channel_moved_by_someone_else_names_nothing(world: World) -> None:
    engine = world.publish("fp16-a", key=world.key)
    Mover(world.catalog, "them").promote(engine, "production")
    resolution = world.resolved("production")
    assert resolution.best is None
    assert (
        "names nothing that may be trusted: channel production of digits is not signed"
        in (resolution.candidates[0].reasons[0])
    )
    Mover(world.catalog, "them", signer=world.other.signer).promote(engine, "production")
    assert "is not known" in world.resolved("production").candidates[0].reasons[0]
    # Nor may it be moved on from there by who has the policy, unless said aloud.
    with pytest.raises(TrustError, match="move it with --key and --insecure-no-trust this once"):
        world.mover().promote(engine, "production")
    world.publish("fp16-b", key=world.key)
    Mover(world.catalog, "me", signer=world.key.signer).promote(EngineId("digits", TARGET, "fp16-b"), "production")
    assert EngineId.of(world.resolved("production").best.identity).build == "fp16-b"


def test_an_older_state_of_a_channel_is_refused_once_a_later_was_seen(world: World) -> None:
    first, second = world.publish("fp16-a", key=world.key), world.publish("fp16-b", key=world.key)
    path = channel_path("digits", TARGET, "production")
    world.mover().promote(first, "production")
    old = world.store.read(path)
    world.mover().promote(second, "production")
    assert world.resolved("production").best is not None
    world.store.write(path, old)
    resolution = world.resolved("production")
    assert resolution.best is None
    assert "shows move 1, and move 2 was seen here before" in resolution.candidates[0].reasons[0]
    with pytest.raises(TrustError, match="was seen here before"):
        world.mover().promote(second, "production")


@pytest.mark.parametrize("harm", ["another channel's", "another recipe's", "build", "sequence"])
def test_signed_moves_do_not_fit_elsewhere(world: World, harm: str) -> None:
    engine, swin = world.publish("fp16-a", key=world.key), world.publish("fp16-a", recipe="swin", key=world.key)
    world.publish("fp16-b", key=world.key)
    world.mover().promote(engine, "production")
    world.mover().promote(engine, "staging")
    world.mover().promote(swin, "production")
    path = channel_path("digits", TARGET, "production")
    document = json.loads(world.store.read(path))
    if harm == "another channel's":
        world.store.copy(channel_path("digits", TARGET, "staging"), path)
    elif harm == "another recipe's":
        world.store.copy(channel_path("swin", TARGET, "production"), path)
    else:
        document["moves"][-1]["statement"] |= {"build": "fp16-b"} if harm == "build" else {"sequence": 2}
        world.store.write(path, json.dumps(document).encode())
    try:
        assert world.resolved("production").best is None
    except IntegrityError:
        assert harm != "build"


def test_an_old_signed_manifest_under_a_new_name_of_a_channel(world: World) -> None:
    """Two manifests of one build, both signed: the channel names one of them."""
    engine = world.publish("fp16-a", key=world.key)
    path = f"{engine.path}/manifest.json"
    old = world.store.read(path)
    world.store.delete(path)
    world.publish("fp16-a", key=world.key, created="2027-01-01T00:00:00Z")
    world.mover().promote(engine, "production")
    assert world.resolved("production").best is not None
    world.store.write(path, old)
    resolution = world.resolved("production")
    assert resolution.best is None
    assert "is not the one that was promoted to production" in resolution.candidates[0].reasons[0]
    world.mover().promote(world.publish("fp16-b", key=world.key), "production")
    with pytest.raises(IntegrityError, match="is not the one that was promoted in move 1"):
        world.mover().rollback("digits", TARGET, "production")


def test_keys_are_exchanged_without_a_gap(world: World) -> None:
    """As docs/operations.md says: at every step readers with the old policy, or with both keys, or with the new, are served."""
    engine = world.publish("fp16-a", key=world.key)
    world.mover().promote(engine, "production")
    both, new = trust(world.key, world.other), trust(world.other)
    assert world.mover(judge=both).promote(engine, "production") is None
    world.catalog.sign(world.catalog.manifest(engine), world.catalog.manifest_bytes(engine), world.other.signer)
    for judge in (world.trust, both):
        assert world.resolved("production", judge).best is not None
    moved = world.mover(world.other, both).promote(engine, "production")
    assert moved.move.sequence == 2
    for judge in (both, new):
        best = world.resolved("production", judge).best
        client.pull(world.store, best, world.to, channel="production", trust=judge)
    assert world.mover(world.other, new).promote(engine, "production") is None


def test_a_key_for_staging_does_not_do_for_production(world: World) -> None:
    judge = trust(world.key, rules=[{"keys": ["k0"], "channels": ["staging"]}])
    engine = world.publish("fp16-a", key=world.key)
    world.mover(judge=judge).promote(engine, "staging")
    assert world.resolved("staging", judge).best is not None
    with pytest.raises(TrustError, match="k0 may not sign engines of digits by channel production"):
        world.mover(judge=judge).promote(engine, "production")
    assert read_channel(world.store, "digits", TARGET, "production") is None


def test_what_readers_would_refuse_is_not_written(world: World) -> None:
    engine = world.publish("fp16-a", key=world.key)
    for mover in (
        Mover(world.catalog, "me", trust=world.trust),
        Mover(world.catalog, "me", signer=world.other.signer, trust=world.trust),
    ):
        with pytest.raises(TrustError):
            mover.promote(engine, "production")
    assert read_channel(world.store, "digits", TARGET, "production") is None
    world.mover().promote(engine, "production")
    with pytest.raises(ChannelError, match="is signed and this one would not be"):
        Mover(world.catalog, "me").promote(world.publish("fp16-b"), "production")


def test_the_statement_is_what_the_reference_format_signs(world: World) -> None:
    engine = world.publish("fp16-a", key=world.key)
    moved = world.mover().promote(engine, "production")
    from artifacts.signing import check_signature

    check_signature(moved.signature, {STATEMENT_NAME: digest_bytes(moved.statement)}, world.key.pem)
    move = moved.move
    assert (move.at, move.build, move.manifest) == (
        ("digits", TARGET, "production"),
        "fp16-a",
        digest_bytes(world.catalog.manifest_bytes(engine)),
    )


# ---- what was executed later


def test_an_execution_that_nobody_trusted_signed_does_not_count(world: World) -> None:
    engine = world.publish("fp16-a", key=world.key, executed=False)
    manifest = world.catalog.manifest(engine)
    # Only a promoter without a policy believes what anybody may write.
    world.catalog.attest(engine, attestation(manifest))
    for signer in (None, world.other.signer):
        if signer is not None:
            world.catalog.attest(engine, attestation(manifest, key=digest("again")), signer)
        with pytest.raises(ChannelError, match="was not executed on its device"):
            world.mover().promote(engine, "production")
        assert not world.resolved().best.verification.engine.executed
    assert client.resolve(world.store, "digits", request()).best.verification.engine.executed
    world.catalog.attest(engine, attestation(manifest, key=digest("signed")), world.key.signer)
    assert world.resolved().best.verification.engine.executed
    world.mover().promote(engine, "production")
    Mover(world.catalog, "me", signer=world.other.signer).promote(engine, "staging")


def test_an_execution_that_failed_counts_whoever_wrote_it(world: World) -> None:
    engine = world.publish("fp16-a", key=world.key)
    world.catalog.attest(engine, attestation(world.catalog.manifest(engine), passed=False, reasons=["NaN"]))
    assert world.resolved().best is None
    with pytest.raises(ChannelError, match="its gates did not pass"):
        world.mover().promote(engine, "production")


# ---- publishing


def test_of_two_who_publish_one_build_neithers_signature_meets_the_others_manifest(world: World) -> None:
    engine = world.publish("fp16-a", key=world.key)
    data = world.catalog.manifest_bytes(engine)
    world.publish("fp16-a", key=world.other, created="2030-01-01T00:00:00Z")
    assert world.catalog.manifest_bytes(engine) == data
    assert set(world.catalog.signatures(engine, data)) == {world.key.fingerprint}
    assert len(list(world.store.list(f"{engine.path}/signatures/"))) == 1


def test_signatures_travel_with_their_engine(world: World, tmp_path: Path) -> None:
    engine = world.publish("fp16-a", key=world.key)
    other = EngineCatalog(FolderStore(tmp_path / "mirror"))
    world.catalog.send([engine], other)
    client.pull(other.store, engine, world.to, trust=world.trust)


def test_what_lies_among_signatures_and_is_none_is_passed_over(world: World) -> None:
    engine = world.publish("fp16-a", key=world.key)
    data = world.catalog.manifest_bytes(engine)
    digits = digest_bytes(data)[:16]
    world.store.write(f"{engine.path}/signatures/{digits}-0.sig", b"noise")
    world.store.write(f"{engine.path}/signatures/{digits}-1.sig", b" " * (1 << 20))
    assert set(world.catalog.signatures(engine, data)) == {world.key.fingerprint}
    assert world.catalog.engines() == [engine]

    class Silent:
        def sign(self, _subject: str, _contents: object) -> bytes:
            return b"{}"

    with pytest.raises(SigningError, match="names no key"):
        world.catalog.sign(world.catalog.manifest(engine), data, Silent())
