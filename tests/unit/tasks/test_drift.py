import asyncio
import json
import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from artifacts.catalog import EngineCatalog, host_path
from artifacts.errors import UnavailableError
from artifacts.folder import FolderStore
from artifacts.host import Gpu, Host
from artifacts.hosts import VANISHED_SECONDS, read_host, see_host, seen_path
from artifacts.rollouts import Rebuild, change_rollout, read_rollout, rollouts
from tasks.drift import judge, look, missing_versions, request
from tasks.rebuilding import built_or_raise, rebuild_due, verdict
from tasks.toolchain import HOST_NAME, probe_host
from tests.simulated_builds import simulate_build, write_recipe
from tests.unit.artifacts.test_promotion import timed

pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed (pip install 'enginery[rtx]')")

HERE = probe_host()
H100 = Gpu("H100", "GPU-1", "sm90", 80 << 30, 132)
RTX = [f"tensorrt-rtx:{gpu}" for gpu in ("sm75", "sm80", "sm86", "sm89", "sm120", "sm121")]


def upgraded(host, **runtimes):
    return replace(host, runtimes={**host.runtimes, **{name.replace("_", "-"): it for name, it in runtimes.items()}})


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("built")
    (folder / "recipes").mkdir()
    recipe = write_recipe(folder / "recipes", "one")
    (folder / "recipes" / "data.yaml").write_text("a: 1\n")
    store = FolderStore(folder / "store")
    simulate_build(recipe, store, folder)
    return [folder / "recipes"], store


@pytest.fixture
def watched(built):
    recipes, store = built
    yield recipes, store
    for info in [*store.list("hosts/"), *store.list("rollouts/")]:
        store.delete(info.path)


def test_exactly_the_engines_whose_keys_a_change_enters_are_stale(built):
    recipes, store = built
    judged = judge(recipes, store, HERE, upgraded(HERE, tensorrt_rtx="9.9.9.9"))
    assert [one.target for one in judged.stale] == RTX
    assert all("tensorrt_rtx" in one.why and "9.9.9.9" in one.why for one in judged.stale)
    assert all(one.replaces.startswith(f"one/tensorrt-rtx-{HERE.runtimes['tensorrt-rtx']}-sm") for one in judged.stale)
    # Neither needs a driver, and every portable stage uses ONNX Runtime.
    assert judge(recipes, store, HERE, replace(HERE, driver="999.1", cuda="99.0")).stale == ()
    assert len(judge(recipes, store, HERE, upgraded(HERE, onnxruntime="9.9.9")).stale) == 8
    gone = judge(recipes, store, HERE, replace(HERE, runtimes={"onnxruntime": HERE.runtimes["onnxruntime"]}))
    assert (gone.stale, len(gone.lost)) == ((), 6)
    assert "tensorrt-rtx is not installed here" in gone.lost[0]


def test_pools_rebuild_what_has_a_pool_and_find_it_in_their_checkout(built):
    recipes, store = built
    top = recipes[0].parent
    subprocess.run(["git", "-C", top, "init", "-q"], check=True)
    changed = upgraded(HERE, tensorrt_rtx="9.9.9.9", onnxruntime="9.9.9")
    judged = judge(recipes, store, HERE, changed, pools=True)
    assert [one.target for one in judged.stale] == RTX
    assert {one.file for one in judged.stale} == {"recipes/one.yaml"}
    # ONNX Runtime is the portable pool's own, in engines as in portable stages.
    assert judge(recipes, store, HERE, upgraded(HERE, onnxruntime="9.9.9"), pools=True).stale == ()
    shutil.rmtree(top / ".git")
    assert judge(recipes, store, HERE, changed, pools=True).stale[0].file == str(recipes[0] / "one.yaml")


def test_a_build_that_no_worker_took_is_no_verdict():
    taken = {"status": 0, "pools": [{"target": "tensorrt:sm90", "state": "built", "why": ""}]}
    assert built_or_raise(taken) is taken
    waiting = {"status": 3, "pools": [{"target": "tensorrt:sm90", "state": "waiting", "why": "no live worker"}]}
    with pytest.raises(RuntimeError, match="tensorrt:sm90: no live worker"):
        built_or_raise(waiting)
    with pytest.raises(KeyError):
        built_or_raise(KeyError("what the build raised"))


@pytest.mark.parametrize(
    ("policy", "change", "stale"),
    [
        ("branch", {"driver": "570.99"}, False),
        ("branch", {"driver": "580.1"}, True),
        ("exact", {"driver": "570.99"}, True),
        ("ignore", {"driver": "580.1"}, False),
        ("ignore", {"gpus": (replace(H100, uuid="GPU-2"),)}, False),
        ("ignore", {"gpus": (replace(H100, sm_count=114),)}, True),
        ("branch", {"runtimes": {"tensorrt": "10.17.0.1"}}, True),
    ],
)
def test_the_recipes_driver_policy_and_the_device_decide_for_tensorrt(tmp_path, policy, change, stale):
    recipe, store = write_recipe(tmp_path, "one"), FolderStore(tmp_path / "store")
    head = recipe.read_text().partition("targets:")[0]
    recipe.write_text(f"{head}driver: {policy}\ntargets: [{{runtime: tensorrt, gpus: [sm90]}}]\n")
    box = Host("box", "linux", "x86_64", "570.1", "12.8", (H100,), {"tensorrt": "10.16.1.11"})
    simulate_build(recipe, store, tmp_path, box)
    judged = judge([recipe], store, box, replace(box, **change))
    assert [one.target for one in judged.stale] == ["tensorrt:sm90"] * stale
    assert judged.lost == ()
    other = judge([recipe], store, box, replace(box, gpus=(replace(H100, compute_capability="sm89"),)))
    assert (other.stale, len(other.lost)) == ((), 1)


def test_packages_that_are_not_here_are_planned_as_the_last_build_had_them(tmp_path):
    store = FolderStore(tmp_path)
    step = {"params": {}, "toolchain": {"no_such_package": "2.1", "onnxruntime": "0.1", "os": "linux", "cuda": ""}}
    store.write("cache/latest/one.json", json.dumps({"export": step}).encode())
    found = missing_versions(store, "one")
    assert found == {"no_such_package": "2.1"}
    assert missing_versions(store, "two") == {}


def test_a_broken_recipe_is_told_and_the_others_are_judged(built, tmp_path):
    recipes, store = built
    (tmp_path / "bad.yaml").write_text("enginery: 1\nname: bad\n")
    told = []
    judged = judge([*recipes, tmp_path], store, HERE, upgraded(HERE, tensorrt_rtx="9.9.9.9"), told.append)
    assert len(judged.stale) == 6
    assert len(told) == 1
    assert "bad.yaml" in told[0]


def test_a_change_is_recorded_once_and_stays_due_until_it_is_dealt_with(watched):
    recipes, store = watched
    assert look(store, recipes, host=HERE).to_json()["changes"] == []
    new = upgraded(HERE, tensorrt_rtx="9.9.9.9")
    found = look(store, recipes, host=new)
    (name,) = found.due
    assert len(found.due[name]) == 6
    again = look(store, recipes, host=new)
    assert (again.drifts, again.due) == ((), found.due)
    request(store, name, new.name, found.due[name])
    assert look(store, recipes, host=new).due == {}
    # A second change before the first is dealt with: what both made stale is judged from before the first.
    later = look(store, recipes, host=upgraded(HERE, tensorrt_rtx="9.9.9.10"))
    assert [len(rebuilds) for rebuilds in later.due.values()] == [6]
    assert read_rollout(store, name).members[new.name].left == "it has changed again"
    # And back: all is fresh again, and nothing is due.
    assert look(store, recipes, host=HERE).due == {}
    assert read_host(store, host_path(HERE.name))[0].open == ()


def test_who_dies_between_record_and_rollout_leaves_the_change_to_the_next_look(watched):
    recipes, store = watched
    look(store, recipes, host=HERE)
    new = upgraded(HERE, tensorrt_rtx="9.9.9.9")
    see_host(store, host_path(new.name), new, "2026-01-01T00:00:00Z")  # as far as a look that was killed got
    assert rollouts(store) == []
    assert [len(rebuilds) for rebuilds in look(store, recipes, host=new).due.values()] == [6]


def test_the_second_host_waits_for_the_canary_and_takes_over_when_it_vanishes(watched):
    recipes, store = watched
    one, two = replace(HERE, name="one"), replace(HERE, name="two")
    for host in (one, two):
        look(store, recipes, host=host)
    (name,) = look(store, recipes, host=upgraded(one, tensorrt_rtx="9.9.9.9")).due
    assert look(store, recipes, host=upgraded(two, tensorrt_rtx="9.9.9.9")).due == {}
    seen = Path(store.uri.removeprefix("file://")) / seen_path(host_path("one"))
    old = seen.stat().st_mtime - VANISHED_SECONDS - 5
    os.utime(seen, (old, old))
    assert set(look(store, recipes, host=upgraded(two, tensorrt_rtx="9.9.9.9")).due) == {name}
    assert (read_rollout(store, name).canary, read_rollout(store, name).members["one"].left != "") == ("two", True)
    assert look(store, recipes, host=upgraded(one, tensorrt_rtx="9.9.9.9")).due == {}
    assert read_rollout(store, name).members["one"].left == ""


def test_a_canary_that_comes_back_with_another_card_is_out_and_what_it_cannot_build_any_more_is_told(tmp_path):
    recipe, store = write_recipe(tmp_path, "one"), FolderStore(tmp_path / "store")
    head = recipe.read_text().partition("targets:")[0]
    recipe.write_text(f"{head}driver: exact\ntargets: [{{runtime: tensorrt, gpus: [sm90]}}]\n")
    one = Host("one", "linux", "x86_64", "570.1", "12.8", (H100,), {"tensorrt": "10.16.1.11"})
    two = replace(one, name="two")
    simulate_build(recipe, store, tmp_path, one)
    for host in (one, two):
        look(store, [recipe], host=host)
    one, two = replace(one, driver="580.2"), replace(two, driver="580.2")
    (name,) = look(store, [recipe], host=one).due
    assert look(store, [recipe], host=two).due == {}

    card = replace(H100, name="L4", compute_capability="sm89", uuid="GPU-9")
    back = look(store, [recipe], host=replace(one, gpus=(card,)))
    assert back.to_json()["changes"] == [f"gpu H100 sm90 {H100.uuid} -> L4 sm89 GPU-9"]
    assert (back.judgement.stale, len(back.judgement.lost), back.due) == ((), 1, {})
    assert read_rollout(store, name).members["one"].left == "it has changed again"
    assert set(look(store, [recipe], host=two).due) == {name}  # nobody waits for a card that is gone
    assert read_rollout(store, name).canary == "two"
    assert look(store, [recipe], host=replace(one, gpus=(card,))).to_json()["changes"] == []
    # The card is put back: its host is in again, behind the new canary, with what it still owes.
    again = look(store, [recipe], host=one)
    assert ([rebuild.target for rebuild in again.judgement.stale], again.due) == (["tensorrt:sm90"], {})
    assert (read_rollout(store, name).canary, read_rollout(store, name).members["one"].left) == ("two", "")
    assert read_host(store, host_path("one"))[0].owed is None


def test_a_host_whose_card_was_exchanged_for_good_shares_later_rollouts_with_others(tmp_path):
    recipe, store = write_recipe(tmp_path, "one"), FolderStore(tmp_path / "store")
    head = recipe.read_text().partition("targets:")[0]
    recipe.write_text(f"{head}driver: exact\ntargets: [{{runtime: tensorrt, gpus: [sm89, sm90]}}]\n")
    one = Host("one", "linux", "x86_64", "570.1", "12.8", (H100,), {"tensorrt": "10.16.1.11"})
    card = replace(H100, name="L4", compute_capability="sm89", uuid="GPU-9")
    two = replace(one, name="two", gpus=(replace(card, uuid="GPU-8"),))
    for host in (one, two):
        simulate_build(recipe, store, tmp_path, host)
        look(store, [recipe], host=host)
    one = replace(one, gpus=(card,))
    assert len(look(store, [recipe], host=one).judgement.lost) == 1
    # One rollout for both, though the first still owes what only its old card could build.
    for host in (one, two):
        found = look(store, [recipe], host=replace(host, driver="580.2"))
        assert [rebuild.target for rebuild in found.judgement.stale] == ["tensorrt:sm89"]
    (rollout,) = rollouts(store)
    assert set(rollout.members) == {"one", "two"}
    assert read_host(store, host_path("one"))[0].owed is not None


def test_rebuilds_are_asked_for_again_when_the_build_itself_breaks(watched, monkeypatch):
    recipes, store = watched
    look(store, recipes, host=HERE)
    new = upgraded(HERE, tensorrt_rtx="9.9.9.9")
    found = look(store, recipes, host=new)
    (name,) = found.due
    request(store, name, new.name, found.due[name])

    async def broken(recipe, targets):
        assert targets == RTX
        assert {one.state for one in read_rollout(store, name).members[new.name].rebuilds} == {"building"}
        raise OSError("the network is down")

    with pytest.raises(OSError, match="network"):
        asyncio.run(rebuild_due(store, name, new.name, broken))
    assert {one.state for one in read_rollout(store, name).members[new.name].rebuilds} == {"requested"}

    async def refused(recipe, targets):
        engines = [
            {
                "runtime": "tensorrt-rtx",
                "gpu": target[13:],
                "precision": {"asked": "fp16"},
                "path": None,
                "why": "no kernel",
            }
            for target in targets
        ]
        return {"engines": engines}

    # A verdict that cannot be given leaves what it is about asked for; a store that does not answer at once is asked again.
    with monkeypatch.context() as patch:
        patch.setattr("tasks.rebuilding.verdict", lambda *_asked: {}["no verdict"])
        with pytest.raises(KeyError, match="no verdict"):
            asyncio.run(rebuild_due(store, name, new.name, refused))
    assert {one.state for one in read_rollout(store, name).members[new.name].rebuilds} == {"requested"}
    monkeypatch.setattr("tasks.patience._FIRST_SECONDS", 0.0)
    away, judge_one = ["verdict", "write"], verdict

    def sometimes(what, call):
        def refusing(*asked, **more):
            if what in away and (what != "write" or b"no kernel" in asked[2]):
                away.remove(what)
                raise UnavailableError("not now")
            return call(*asked, **more)

        return refusing

    monkeypatch.setattr("tasks.rebuilding.verdict", sometimes("verdict", judge_one))
    monkeypatch.setattr(FolderStore, "write", sometimes("write", FolderStore.write))
    done = asyncio.run(rebuild_due(store, name, new.name, refused))
    assert away == []
    assert {one["reason"] for one in done["rebuilt"]} == {"no kernel"}
    assert read_rollout(store, name).state == "halted"
    assert look(store, recipes, host=new).due == {}
    change_rollout(store, name, lambda one: one.resumed("me", "t"))
    assert len(look(store, recipes, host=new).due[name]) == 6


def test_a_rebuilt_engine_passes_by_its_gates_and_the_speed_of_what_it_replaces(tmp_path):
    catalog = EngineCatalog(FolderStore(tmp_path))
    rebuild = Rebuild("digits", "d.yaml", "tensorrt:sm90", "fp16", "", replaces="digits/tensorrt-1-sm90/old")
    report = {
        "engines": [{"runtime": "tensorrt", "gpu": "sm90", "precision": {"asked": "fp16"}, "path": None, "why": "w"}]
    }
    assert verdict(catalog, rebuild, report) == {"state": "failed", "reason": "w"}
    assert verdict(catalog, rebuild, {"engines": []})["state"] == "failed"
    report["engines"][0]["why"] = "needs check:tensorrt, which failed"
    report["steps"] = [{"id": "check:tensorrt", "state": "failed", "why": ["no libnvinfer.so.10"]}]
    report["pools"] = [{"target": "tensorrt:sm90", "state": "failed", "why": "out of memory"}]
    told = "needs check:tensorrt, which failed; check:tensorrt: no libnvinfer.so.10; out of memory"
    assert verdict(catalog, rebuild, report)["reason"] == told
    old = _publish(catalog, "old", 1.0)
    for p50, state in ((1.0, "passed"), (1.04, "passed"), (1.06, "failed")):
        new = _publish(catalog, "new", p50)
        report["engines"][0]["path"] = f"engines/{new}"
        found = verdict(catalog, replace(rebuild, replaces=old), report)
        assert (found["state"], found["engine"]) == (state, new)
    assert "6.0% slower" in found["reason"]
    assert verdict(catalog, replace(rebuild, replaces="gone/tensorrt-1-sm90/fp16-a"), report)["state"] == "passed"


def _publish(catalog, build, p50):
    manifest = timed(bulk=p50)
    manifest = manifest.model_copy(update={"identity": manifest.identity.model_copy(update={"build": build})})
    catalog.store.write(f"engines/{manifest.identity}/manifest.json", manifest.to_bytes())
    return str(manifest.identity)


def test_a_host_can_be_named(monkeypatch):
    monkeypatch.setenv(HOST_NAME, "node-7")
    assert probe_host().name == "node-7"
