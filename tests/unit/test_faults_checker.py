"""The checker of bench/faults sees what it is there to see: each invariant, broken, is told by its name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from artifacts.catalog import EngineCatalog
from artifacts.channels import channel_path
from artifacts.folder import FolderStore
from artifacts.fresh_plans import pack
from artifacts.publications import publication_document
from artifacts.store import Store
from bench.faults.checker import INVARIANTS, check, lost
from bench.faults.world import CHANNEL, TARGET, Action, Place, engine, group, make_place
from tests.simulated_builds import simulate_build, write_recipe
from tests.unit.artifacts.test_attestation import attestation

ONE, TWO = engine("digits", 1).path, engine("digits", 2).path
HEAD = channel_path("digits", TARGET, CHANNEL)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A sound store: two signed engines, a channel that was moved twice, records of a build."""
    folder = tmp_path_factory.mktemp("sound")
    made = make_place(folder, str(folder / "store"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ENGINERY_STATE", str(folder / "state"))
        for number in (1, 2):
            Action("publish", ("digits", number)).run(made)
            Action("promote", ("digits", number)).run(made)
    simulate_build(write_recipe(folder, "made-up"), made.store, folder)
    for info in list(made.store.list("engines/made-up/")):  # whose manifests say nothing
        made.store.delete(info.path)
    return made


@pytest.fixture
def place(sound: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    """A copy of it, to be harmed."""
    shutil.copytree(sound.folder, tmp_path / "place")
    monkeypatch.setenv("ENGINERY_STATE", str(tmp_path / "state"))
    return Place(str(tmp_path / "place" / "store"), tmp_path / "place")


def edit(path: str, right: bytes, wrong: bytes) -> Callable[[Store], object]:
    def apply(store: Store) -> None:
        data = store.read(path)
        assert right in data
        store.write(path, data.replace(right, wrong, 1))

    return apply


def edit_first(prefix: str, right: bytes, wrong: bytes) -> Callable[[Store], object]:
    return lambda store: edit(next(store.list(prefix)).path, right, wrong)(store)


def change_a_blob(store: Store) -> None:
    path = next(store.list("cache/blobs/")).path
    data = store.read(path)
    store.write(path, bytes([data[0] ^ 1]) + data[1:])


def drop_blobs_of_a_record(store: Store) -> None:
    for info in list(store.list("cache/blobs/")):
        store.delete(info.path)


def drop_first_move(store: Store) -> None:
    document = json.loads(store.read(HEAD))
    del document["moves"][0]
    store.write(HEAD, json.dumps(document).encode())


def change_last_move(store: Store) -> None:
    document = json.loads(store.read(HEAD))
    document["moves"][-1]["statement"]["reason"] = "no reason"
    store.write(HEAD, json.dumps(document).encode())


def renamed(store: Store) -> str:
    from artifacts.refs import digest_bytes

    return digest_bytes(store.read(f"{ONE}/manifest.json"))[:16]


def attest_wrongly(store: Store) -> None:
    from artifacts.catalog import EngineCatalog

    document = attestation(EngineCatalog(store).manifest(engine("digits", 1)))
    store.write(f"{TWO}/verification/{document.name}", document.to_bytes())


def publish_before_the_engines(store: Store) -> None:
    path = "engines/digits/elsewhere/fp16-000009"
    store.write(f"{path}/publications/{'0' * 16}", b"a mark")
    store.write(f"publications/digits/{'0' * 16}.json", publication_document({}, {}))


HARMS: dict[str, tuple[str, Callable[[Store], object]]] = {
    "a name out of place": ("names", lambda store: store.write("engines/stray", b"")),
    "a temporary name": ("names", lambda store: store.write(f"{ONE}/x.part", b"")),
    "a manifest cut short": ("manifest", lambda store: store.write(f"{ONE}/manifest.json", b"{")),
    "a manifest elsewhere": ("manifest", lambda store: store.copy(f"{ONE}/manifest.json", f"{TWO}/manifest.json")),
    "a file gone": ("files", lambda store: store.delete(f"{ONE}/model.plan")),
    "a file changed": ("files", edit(f"{ONE}/labels.txt", b"one", b"One")),
    "a manifest changed after it was signed": (
        "signature",
        lambda store: [
            edit(f"{ONE}/manifest.json", b'"builder"', b'"bilder"')(store),
            [
                store.copy(info.path, f"{ONE}/signatures/{renamed(store)}-{info.path.rpartition('-')[2]}")
                for info in list(store.list(f"{ONE}/signatures/"))
            ],
        ],
    ),
    "a move changed": ("signature", change_last_move),
    "an engine of a publication gone": ("together", lambda store: store.delete(f"{ONE}/manifest.json")),
    "a publication before its engines": ("together", publish_before_the_engines),
    "a publication cut short": ("together", edit_first("publications/", b"}", b"")),
    "an attestation elsewhere": ("attestation", attest_wrongly),
    "a channel of no JSON": ("channel", lambda store: store.write(HEAD, b"no")),
    "a chain without its first move": ("channel", drop_first_move),
    "a channel of no engine": ("head", lambda store: store.delete(f"{TWO}/manifest.json")),
    "a channel of another manifest": ("head", edit(f"{TWO}/manifest.json", b'"builder"', b'"bilder"')),
    "a blob of other bytes": ("blob", change_a_blob),
    "a record cut short": ("record", edit_first("cache/actions/", b"}", b"")),
    "a record of another key": ("record", edit_first("cache/actions/", b'"stage_version": 1', b'"stage_version": 7')),
    "a record without its blobs": ("outputs", drop_blobs_of_a_record),
    "plans cut short": ("plans", lambda store: store.write("cache/plans/profile/00", pack({"0": {}})[:-1])),
    "a timing cache of other bytes": ("timing", lambda store: store.write("timing/t/x.cache", b"0" * 64 + b"\nbytes")),
    "a timing fact of no JSON": ("hint", lambda store: store.write("timing/t/x.json", b"no")),
    "a rollout of no JSON": ("hint", lambda store: store.write("rollouts/driver.json", b"no")),
    "a hint of no JSON": ("hint", lambda store: store.write("cache/latest/x.json", b"no")),
}


def test_a_sound_store_has_no_violations(place: Place):
    report = check(place.store, place.judge)
    report.require_sound()
    assert report.counts["manifest"] == 2
    assert report.counts["record"] > 8
    assert [len(moves) for moves in report.state.channels.values()] == [2]
    assert lost(report.state, check(place.store).state) == []


@pytest.mark.parametrize("harm", HARMS)
def test_what_is_harmed_is_told_by_its_name(place: Place, harm: str):
    invariant, apply = HARMS[harm]
    apply(place.store)
    report = check(place.store, place.judge)
    assert invariant in {name for name, _words in report.violations}, report.violations
    with pytest.raises(AssertionError, match=invariant):
        report.require_sound()


def test_every_invariant_has_a_harm():
    assert {invariant for invariant, _apply in HARMS.values()} == INVARIANTS.keys() - {
        "lost",
        "told",
        "published",
        "pinned",
        "used",
    }


def test_every_invariant_is_written_down():
    written = (Path(__file__).parents[2] / "docs" / "operations.md").read_text()
    assert [words for words in INVARIANTS.values() if f"* {words}\n" not in written] == []


def test_a_record_whose_blobs_were_collected_is_a_miss_and_no_violation(place: Place):
    drop_blobs_of_a_record(place.store)
    check(place.store, place.judge, collected=True).require_sound()


def test_an_engine_of_a_publication_that_was_collected_is_no_violation(place: Place):
    Action("publish_group", ("swin", 7)).run(place)
    check(place.store, place.judge).require_sound()
    EngineCatalog(place.store).unmark(group("swin", 7)[0])
    place.store.delete(f"{group('swin', 7)[0].path}/manifest.json")
    check(place.store, place.judge, collected=True).require_sound()
    assert {name for name, _words in check(place.store, place.judge).violations} == {"together"}


def test_what_was_there_and_is_gone_is_lost(place: Place):
    before = check(place.store).state
    store = FolderStore(Path(place.uri))
    store.delete(f"{ONE}/manifest.json")
    store.write(f"{TWO}/manifest.json", b"{}")
    store.delete(HEAD)
    store.delete(next(store.list("cache/actions/")).path)
    words = [words for _name, words in lost(before, check(store).state)]
    assert len(words) == 4
    assert lost(before, check(store).state, engines=False, records=False) == [("lost", words[2])]
    assert lost(before, before) == []


def test_a_channel_that_went_on_has_lost_nothing(place: Place):
    before = check(place.store).state
    Action("promote", ("digits", 1)).run(place)
    after = check(place.store).state
    assert lost(before, after) == []
    assert [name for name, _words in lost(after, before)] == ["lost"]
