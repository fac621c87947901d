"""A fresh plan is given back where everything that it was made from is the same, and after no change of any of it."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from artifacts import fresh_plans
from artifacts.folder import FolderStore
from artifacts.host import Gpu
from artifacts.store import open_store
from recipes.digests import Digests
from recipes.errors import RecipeError
from recipes.traces import FileTrace, trace_of
from tasks import shared_plans
from tasks.remembered import PlanMemory, leave_plan, plans_folder
from tasks.report import plan_report
from tasks.session import BuildSession, open_session
from tasks.toolchain import probe_host, version
from tests.simulated_builds import simulate_build, write_recipe

CODE = """
from helper import *
import layers.conv
def build(): ...
"""


@pytest.fixture(autouse=True)
def _own_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a recipe and a store in which it is fresh, as if built some time ago."""
    folder = tmp_path_factory.mktemp("built")
    (folder / "recipes").mkdir()
    path = write_recipe(folder / "recipes", "m")
    base = folder / "recipes" / "base.inc"
    base.write_text("description: shared\n")
    path.write_text(f"{path.read_text()}include: base.inc\n")
    simulate_build(path, FolderStore(folder / "store"), folder)
    age(folder / "store")
    return folder


@pytest.fixture
def house(built: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(built, tmp_path / "house"))  # with the times of its files


def age(folder: Path, seconds: float = 100.0) -> None:
    for path in folder.rglob("*"):
        os.utime(path, (time.time() - seconds,) * 2)


def recipe_of(house: Path) -> Path:
    return house / "recipes" / "m.yaml"


def memory_of(house: Path, *targets: str) -> PlanMemory:
    return PlanMemory(FolderStore(house / "store"), targets)


def kept(house: Path, *, latest: bool = False) -> BuildSession:
    """Plan, and remember the plan."""
    memory = memory_of(house)
    session = open_session(recipe_of(house), memory.store)
    memory.keep([(session, session.plan())], latest=latest)
    return session


def recalled(house: Path, *targets: str) -> bool:
    return recipe_of(house) in memory_of(house, *targets).recall([recipe_of(house)])


def test_a_fresh_plan_is_given_back_word_for_word(house: Path):
    session = kept(house)
    found = memory_of(house).recall([recipe_of(house), house / "recipes" / "other.yaml"])
    assert {path: one.report for path, one in found.items()} == {recipe_of(house): plan_report(session.plan())}


def any_file(house: Path, pattern: str) -> Path:
    return min(path for path in (house / "store").glob(pattern) if path.is_file())


def rewrite(path: Path) -> None:
    """Change a file's bytes, but not its size."""
    data = path.read_bytes()
    path.chmod(0o644)
    path.write_bytes(bytes([data[0] ^ 1]) + data[1:])


CHANGES: dict[str, Callable[[Path], object]] = {
    "a comment in the recipe": lambda house: recipe_of(house).write_text(recipe_of(house).read_text() + "# more\n"),
    "the recipe's base": lambda house: (house / "recipes" / "base.inc").write_text("description: other\n"),
    "the graph": lambda house: rewrite(house / "recipes" / "m.onnx"),
    "no graph": lambda house: (house / "recipes" / "m.onnx").unlink(),
    "no recipe": lambda house: recipe_of(house).unlink(),
    "a record": lambda house: rewrite(any_file(house, "cache/actions/type/*")),
    "no record": lambda house: any_file(house, "cache/actions/export/*").unlink(),
    "no blob": lambda house: any_file(house, "cache/blobs/sha256/*/*").unlink(),
    "a shorter blob": lambda house: any_file(house, "cache/blobs/sha256/*/*").write_bytes(b""),
    "a manifest": lambda house: rewrite(any_file(house, "engines/**/manifest.json")),
    "no plan file": lambda house: any_file(house, "engines/**/model.plan").unlink(),
    "no store": lambda house: shutil.rmtree(house / "store"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_no_plan_is_given_back_after_a_change(house: Path, change: str):
    kept(house)
    assert recalled(house)
    for path in (house / "store").rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    assert recalled(house)
    CHANGES[change](house)
    assert not recalled(house)


def test_every_object_that_a_plan_was_made_from_is_looked_for(house: Path, monkeypatch: pytest.MonkeyPatch):
    """Whatever object goes, the plan that is remembered (here, in the store) goes, exactly where the plan is fresh no more."""
    kept(house)
    shared(house)
    index = set((house / "store").glob("cache/plans/*/*"))
    assert len(index) == 1
    homes = [os.environ["XDG_CACHE_HOME"], str(house / "nothing")]

    def known() -> set[bool]:
        found = set()
        for home in homes:
            monkeypatch.setenv("XDG_CACHE_HOME", home)
            found.add(recalled(house))
        return found

    for path in sorted({path for path in (house / "store").rglob("*") if path.is_file()} - index):
        aside = path.with_name(f"{path.name}.aside")
        path.rename(aside)
        fresh = open_session(recipe_of(house), FolderStore(house / "store")).plan().fresh
        assert known() == {fresh}, path
        aside.rename(path)
    assert known() == {True}
    index.pop().unlink()
    assert known() == {True, False}  # what this machine remembers needs no index


def test_other_targets_and_stores_and_places_are_remembered_apart(house: Path, tmp_path: Path):
    kept(house)
    assert not recalled(house, "onnxruntime")
    other = Path(shutil.copytree(house, tmp_path / "elsewhere"))
    assert not recalled(other)


def test_another_host_or_version_is_another_plan(house: Path):
    kept(house)
    place = memory_of(house)._place(recipe_of(house))
    entry = json.loads(place.read_text())
    assert recalled(house)
    for change in (
        {"made_by": {**entry["made_by"], "host": {**entry["made_by"]["host"], "driver": "580.1"}}},
        {"made_by": {**entry["made_by"], "code": "0" * 64}},
        {"versions": {**entry["versions"], "onnx": "0.0.1"}},
        {"path": "/another"},
    ):
        place.write_text(json.dumps({**entry, **change}))
        assert not recalled(house), change
    assert {"onnx", "onnxruntime", "numpy"} <= set(entry["versions"])


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b"null", b'{"made_by": 1}', "cut"])
def test_a_damaged_memory_is_no_memory(house: Path, damage: bytes | str):
    kept(house)
    place = memory_of(house)._place(recipe_of(house))
    place.write_bytes(place.read_bytes()[:-100] if isinstance(damage, str) else damage)
    assert not recalled(house)


@pytest.mark.parametrize("part", ["made_by", "path", "versions", "trace", "objects", "latest", "report"])
@pytest.mark.parametrize("value", [None, [], {}, 1, {"a": 1}])
def test_a_memory_with_a_part_of_another_kind_harms_nothing(house: Path, part: str, value: object):
    kept(house, latest=True)
    place = memory_of(house)._place(recipe_of(house))
    place.write_text(json.dumps(json.loads(place.read_text()) | {part: value}))
    found = memory_of(house).recall([recipe_of(house)])
    assert all(one.report["steps"] for one in found.values())


def test_what_has_just_been_written_is_not_remembered(house: Path):
    any_file(house, "cache/actions/type/*").touch()
    kept(house)
    assert not recalled(house)


def test_what_is_stale_is_not_remembered(house: Path):
    any_file(house, "cache/actions/type/*").unlink()
    kept(house)
    assert not recalled(house)
    assert not (plans_folder() or Path()).exists()


def test_a_build_needs_what_the_last_one_left_to_explain_misses(house: Path):
    def is_latest() -> bool:
        return memory_of(house).recall([recipe_of(house)])[recipe_of(house)].is_latest

    kept(house)
    assert not is_latest()
    session = kept(house, latest=True)
    assert is_latest()
    latest = house / "store" / session.latest_path
    latest.write_text("{}")
    assert not is_latest()
    latest.unlink()
    assert not is_latest()


def test_a_memory_without_a_place_is_none(house: Path):
    memory = PlanMemory(FolderStore(house / "store"), folder=None)
    session = open_session(recipe_of(house), memory.store)
    memory.keep([(session, session.plan())])
    assert memory.recall([recipe_of(house)]) == {}


def test_a_place_that_takes_no_files_harms_nothing(house: Path, tmp_path: Path):
    (tmp_path / "file").write_text("")
    memory = PlanMemory(FolderStore(house / "store"), folder=tmp_path / "file" / "plans")
    session = open_session(recipe_of(house), memory.store)
    memory.keep([(session, session.plan())])
    assert memory.recall([recipe_of(house)]) == {}


def test_a_memory_that_has_grown_large_begins_anew(house: Path, tmp_path: Path):
    folder = tmp_path / "plans"
    folder.mkdir()
    for number in range(5):
        (folder / f"{number}.json").write_text("")
    memory = PlanMemory(FolderStore(house / "store"), folder=folder, most=4)
    session = open_session(recipe_of(house), memory.store)
    memory.keep([(session, session.plan())])
    assert memory.recall([recipe_of(house)])
    assert len(list(folder.iterdir())) == 1


def test_plans_of_a_store_in_s3_are_remembered_by_versions_and_not_by_times(s3_store_uri: str, tmp_path: Path):
    (tmp_path / "recipes").mkdir()
    recipe, store = write_recipe(tmp_path / "recipes", "m"), open_store(s3_store_uri)
    simulate_build(recipe, store, tmp_path)
    memory = PlanMemory(store)
    session = open_session(recipe, store)
    planned = session.plan()
    record = next(store.list("cache/actions/simplify/"))
    data = store.read(record.path)
    store.write(record.path, data.replace(b"1.0", b"2.0"))  # after it was read, and at once
    memory.keep([(session, planned)])
    assert not PlanMemory(store).recall([recipe])
    store.write(record.path, data)
    memory.keep([(session, planned)])
    assert PlanMemory(store).recall([recipe])
    store.touch(record.path)
    assert PlanMemory(store).recall([recipe])
    store.delete(record.path)
    assert not PlanMemory(store).recall([recipe])


# ---- what builds share through the store


def shared(house: Path, *targets: str) -> None:
    """Build a recipe in which nothing is stale, and leave its plan in the store."""
    memory = memory_of(house, *targets)
    session = open_session(recipe_of(house), memory.store, targets=targets)
    memory.keep([(session, session.plan())], latest=True)
    memory.share()


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Begin on a machine that remembers nothing itself."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    (tmp_path / "file").write_text("")


@pytest.mark.usefixtures("elsewhere")
def test_a_machine_that_has_planned_nothing_is_given_what_a_build_left(house: Path, tmp_path: Path):
    shared(house)
    session = open_session(recipe_of(house), FolderStore(house / "store"))
    found = memory_of(house).recall([recipe_of(house)])[recipe_of(house)]
    assert (found.report, found.is_latest) == (plan_report(session.plan()), True)
    assert not recalled(house, "onnxruntime")
    other = Path(shutil.copytree(house, tmp_path / "elsewhere"))  # of a recipe that names nothing outside of its folder
    assert recalled(other)


@pytest.mark.usefixtures("elsewhere")
def test_plans_alone_leave_nothing_in_the_store(house: Path):
    kept(house)
    assert not list((house / "store").glob("cache/plans/*"))


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize("change", CHANGES)
def test_no_plan_of_another_machine_is_given_back_after_a_change(house: Path, change: str):
    shared(house)
    for path in (house / "store").rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    assert recalled(house)
    CHANGES[change](house)
    assert not recalled(house)


@pytest.mark.usefixtures("elsewhere")
def test_a_recipe_behind_a_link_that_names_files_above_is_known_where_it_lay(house: Path, tmp_path: Path):
    (house / "recipes" / "base.inc").rename(house / "base.inc")
    recipe_of(house).write_text(recipe_of(house).read_text().replace("base.inc", "../base.inc"))
    link = tmp_path / "link"
    link.symlink_to(house)
    shared(link)
    assert recalled(link)
    (tmp_path / "another").symlink_to(house)
    assert not recalled(tmp_path / "another")
    shared(house)
    assert recalled(Path(shutil.copytree(house, tmp_path / "elsewhere")))


def moved(file: str, to: str) -> Callable[[Path], object]:
    return lambda house: (house / file).rename(house / to) if (house / file).exists() else None


# What may happen to a checkout whose recipe includes ../shared/base.inc, which lies beside where links lead.
EVENTS: dict[str, Callable[[Path], object]] = {
    "another base": lambda house: (house / "shared" / "base.inc").write_text("description: other\n"),
    "no base": moved("shared/base.inc", "shared/gone.inc"),
    "the base again": moved("shared/gone.inc", "shared/base.inc"),
    "another graph": lambda house: (house / "recipes" / "m.onnx").write_bytes(b"the graph of x"),
    "the graph again": lambda house: (house / "recipes" / "m.onnx").write_bytes(b"the graph of m"),
    "a link to the recipes": lambda house: (
        (house / "deep" / "recipes").exists() or moved("recipes", "deep/recipes")(house),
        (house / "recipes").exists() or (house / "recipes").symlink_to("deep/recipes"),
    ),
    "a base for the link": lambda house: (
        (house / "deep" / "shared").exists() or shutil.copytree(house / "shared", house / "deep" / "shared")
    ),
    "another base for the link": lambda house: (
        EVENTS["a base for the link"](house),
        (house / "deep" / "shared" / "base.inc").write_text("description: of the link\n"),
    ),
    "a file nobody reads": lambda house: (house / "recipes" / "notes").write_text("x"),
}


def checkout(house: Path, folder: Path) -> Path:
    """Make a checkout of the recipe, whose base lies in a folder beside its own."""
    for name in ("deep", "shared"):
        (folder / name).mkdir(parents=True)
    shutil.copytree(house / "recipes", folder / "recipes")
    (folder / "recipes" / "base.inc").rename(folder / "shared" / "base.inc")
    path = folder / "recipes" / "m.yaml"
    path.write_text(path.read_text().replace("base.inc", "../shared/base.inc"))
    return folder


@pytest.mark.usefixtures("elsewhere")
def test_whatever_happens_in_another_checkout_a_plan_that_is_given_back_is_the_plan(house: Path, tmp_path: Path):
    store = FolderStore(house / "store")
    memory = PlanMemory(store)
    session = open_session(recipe_of(checkout(house, tmp_path / "first")), store)
    memory.keep([(session, session.plan())], latest=True)
    memory.share()
    outcomes = set()

    @given(st.lists(st.sampled_from(sorted(EVENTS)), max_size=4))
    @settings(max_examples=40, deadline=None, derandomize=True)
    def after(events: list[str]) -> None:
        with tempfile.TemporaryDirectory() as name:
            recipe = recipe_of(checkout(house, Path(name, "second")))
            for event in events:
                EVENTS[event](Path(name, "second"))
            found = PlanMemory(store).recall([recipe])
            outcomes.add((bool(events), bool(found)))
            if found:
                planned = open_session(recipe, store).plan()
                assert planned.fresh
                assert found[recipe].report == plan_report(planned)

    after()
    assert outcomes == {(False, True), (True, True), (True, False)}


@pytest.mark.usefixtures("elsewhere")
def test_another_host_or_code_or_version_is_another_plan(house: Path, monkeypatch: pytest.MonkeyPatch):
    shared(house)
    here = probe_host()
    for other, same in (
        (replace(here, name="another", cpu="another"), True),  # nothing was timed
        (replace(here, gpus=(Gpu("T4", "uuid", "sm75", 1),)), False),
        (replace(here, driver="580.1"), False),
        (replace(here, runtimes={**here.runtimes, "tensorrt-rtx": "9.9.9.9"}), False),
    ):
        memory = PlanMemory(FolderStore(house / "store"), host=other)
        assert bool(memory.recall([recipe_of(house)])) == same, other
    monkeypatch.setattr(shared_plans, "version", lambda package: "0.0.1" if package == "onnx" else version(package))
    assert not recalled(house)


@pytest.mark.usefixtures("elsewhere")
def test_an_entry_with_a_part_of_another_kind_harms_nothing(house: Path):
    shared(house)
    place = next((house / "store").glob("cache/plans/*/*"))
    entries = fresh_plans.unpack(place.read_bytes())
    for value in (None, [], {}, 1, {"a": 1}):
        for part in ("folder", "cpu", "versions", "trace", "objects", "latest", "report"):
            place.write_bytes(fresh_plans.pack({name: entry | {part: value} for name, entry in entries.items()}))
            found = memory_of(house).recall([recipe_of(house)])
            assert all(one.report["steps"] for one in found.values()), (part, value)
        place.write_bytes(fresh_plans.pack(dict.fromkeys(entries, value)))
        assert not recalled(house)


# ---- the files of a recipe


@pytest.fixture
def coded(tmp_path: Path) -> Path:
    """A recipe with code that imports local modules, and a folder of samples."""
    folder = tmp_path / "coded"
    (folder / "layers").mkdir(parents=True)
    (folder / "samples").mkdir()
    for name, text in {"model.py": CODE, "helper.py": "", "layers/__init__.py": "", "layers/conv.py": ""}.items():
        (folder / name).write_text(text)
    (folder / "samples" / "1.npy").write_bytes(b"one")
    path = folder / "r.yaml"
    path.write_text(
        "enginery: 1\nname: r\nsource: {framework: torch, model: 'model.py:build'}\noutputs: [y]\n"
        "inputs: {x: {shape: [1, 4]}}\nprecision: {build: [int8], calibration: {data: samples}}\n"
        "targets: [{runtime: onnxruntime}]\n"
    )
    return path


def trace(path: Path) -> FileTrace:
    session = open_session(path, open_store(str(path.parent / "store")))
    found = trace_of(session.loaded, session.files)
    assert found is not None
    return FileTrace.from_json(json.loads(json.dumps(found.to_json())))


FILE_CHANGES: dict[str, Callable[[Path], object]] = {
    "code": lambda folder: (folder / "layers" / "conv.py").write_text("x = 1"),
    "a module gone": lambda folder: (folder / "helper.py").unlink(),
    "a package where a module was": lambda folder: (
        (folder / "helper").mkdir(),
        (folder / "helper" / "__init__.py").touch(),
    ),
    "the root is a package": lambda folder: (folder / "__init__.py").touch(),
    "a sample more": lambda folder: (folder / "samples" / "2.npy").write_bytes(b"two"),
    "a sample of another kind": lambda folder: (folder / "samples" / "2.png").write_bytes(b"two"),
    "another sample": lambda folder: (folder / "samples" / "1.npy").write_bytes(b"two"),
    "no sample": lambda folder: (folder / "samples" / "1.npy").unlink(),
}


@pytest.mark.parametrize("change", FILE_CHANGES)
def test_a_trace_holds_until_what_it_was_made_of_changes(coded: Path, change: str):
    made = trace(coded)
    (coded.parent / "notes.txt").write_text("nobody reads this")
    assert made.holds(Digests())
    FILE_CHANGES[change](coded.parent)
    assert not made.holds(Digests())


def test_a_module_that_comes_to_hide_a_package_ends_a_trace(coded: Path):
    (coded.parent / "model.py").write_text("import torch\ndef build(): ...\n")
    made = trace(coded)
    assert made.holds(Digests())
    (coded.parent / "torch.py").touch()
    assert not made.holds(Digests())


def test_globs_leave_no_trace(coded: Path):
    text = coded.read_text().replace("'model.py:build'", "'model.py:build', include: ['*.txt']")
    coded.write_text(text)
    (coded.parent / "a.txt").write_text("a")
    session = open_session(coded, open_store(str(coded.parent / "store")))
    assert trace_of(session.loaded, session.files) is None


@pytest.mark.parametrize(("state", "plans"), [("built", 0), ("cached", 1)])
def test_what_was_just_built_in_a_folder_is_not_planned_once_more_for_nothing(tmp_path, state, plans):
    """Its files are too young to tell whether they change again, so that no plan of them could be left."""
    asked = []

    def plan():
        asked.append(1)
        raise RecipeError([])

    session = SimpleNamespace(
        outcomes={"publish": SimpleNamespace(state=state)},
        store=FolderStore(tmp_path),
        selection=SimpleNamespace(targets=()),
        host=probe_host(),
        anew=lambda: SimpleNamespace(plan=plan),
    )
    leave_plan(session)
    assert len(asked) == plans
