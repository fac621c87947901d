import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from artifacts.checked import dump_checked
from artifacts.errors import IntegrityError, NotFoundError
from artifacts.folder import FolderStore
from artifacts.host import Gpu
from artifacts.hosts import Change
from artifacts.rollouts import (
    ASK_AGAIN_SECONDS,
    CANARY_ENGINES,
    LOST_SECONDS,
    Rebuild,
    Rollout,
    RolloutError,
    change_rollout,
    read_rollout,
    rollout_id,
    rollouts,
)

A = Rebuild("digits", "digits.yaml", "tensorrt-rtx:sm89", "fp16", "miss: toolchain.tensorrt_rtx 1.6 -> 1.7")
B = Rebuild("swin", "swin.yaml", "tensorrt-rtx:sm89", "int8", "miss: toolchain.tensorrt_rtx 1.6 -> 1.7")
NEW = Rollout("rtx", ("tensorrt-rtx 1.6 -> 1.7",))
HOSTS = ("one", "two", "three")


def both() -> Rollout:
    return NEW.joined("one", [A, B], "t").joined("two", [A], "t")


def test_the_canary_goes_first_and_the_others_follow_when_all_of_its_engines_passed():
    rollout = both()
    assert (rollout.state, rollout.canary, rollout.due("one", 0), rollout.due("two", 0)) == (
        "canary",
        "one",
        (A, B),
        (),
    )
    rollout = rollout.marked("one", A.key, "t", state="passed")
    assert (rollout.state, rollout.due("two", 0)) == ("canary", ())
    rollout = rollout.marked("one", B.key, "t", state="passed")
    assert (rollout.state, rollout.due("two", 0), rollout.may_build("two")) == ("rolling", (A,), True)
    rollout = rollout.marked("two", A.key, "t", state="passed")
    assert rollout.state == "done"
    # A host that has the change later need not prove it again.
    assert rollout.joined("three", [A], "t").due("three", 0) == (A,)


def test_a_failure_halts_until_somebody_resumes_or_abandons():
    failed = both().marked("one", A.key, "t", state="failed", reason="12 % slower")
    assert failed.state == "halted"
    assert failed.halted == "the canary one: digits tensorrt-rtx:sm89 fp16: 12 % slower"
    assert failed.due("one", 0) == failed.due("two", 0) == ()
    assert failed.resumed("me", "t").due("one", 0) == (A, B)
    assert failed.alive("one", [A.key], 1.0) == failed  # a sign of life that comes late
    accepted = failed.resumed("me", "t", accept=True)
    assert (accepted.state, accepted.due("one", 0)) == ("canary", (B,))
    assert accepted.marked("one", B.key, "t", state="passed").due("two", 0) == (A,)
    gone = failed.abandon("me", "1.8 comes", "t")
    assert (gone.state, gone.due("one", 0)) == ("abandoned", ())
    assert gone.resumed("me", "t").state == "canary"
    for refused in (
        lambda: both().resumed("me", "t"),
        lambda: gone.abandon("me", "", "t"),
        lambda: NEW.abandon("", "", ""),
    ):
        with pytest.raises(RolloutError):
            refused()


def test_what_was_asked_for_and_got_lost_is_asked_for_again():
    asked = both().marked("one", A.key, "t", state="requested", since=100.0)
    assert asked.due("one", 101.0) == (B,)
    assert len(asked.due("one", 100.0 + ASK_AGAIN_SECONDS)) == 2
    building = asked.marked("one", A.key, "t", state="building", since=100.0)
    assert building.due("one", 100.0 + ASK_AGAIN_SECONDS) == (B,)
    assert len(building.due("one", 100.0 + LOST_SECONDS)) == 2


def engines(count: int) -> list[Rebuild]:
    return [replace(A, recipe=f"r{index}", file=f"r{index}.yaml", seconds=float(index)) for index in range(count)]


def test_the_others_follow_when_enough_of_many_engines_passed_and_all_of_few():
    many = engines(CANARY_ENGINES + 5)
    rollout = NEW.joined("one", many, "t").joined("two", many, "t")
    for one in many[: CANARY_ENGINES - 1]:
        rollout = rollout.marked("one", one.key, "t", state="passed")
    assert (rollout.state, rollout.turn("two", 0)) == ("canary", ())
    rollout = rollout.marked("one", many[CANARY_ENGINES].key, "t", state="passed")
    assert rollout.state == "rolling"
    assert "passed with 20 of 25 engines" in rollout.log[-1]
    strict = replace(NEW, enough=0).joined("one", many, "t")
    for one in many[:-1]:
        strict = strict.marked("one", one.key, "t", state="passed")
    assert strict.state == "canary"
    assert strict.marked("one", many[-1].key, "t", state="passed").proven


def test_hosts_share_the_work_longest_first_and_build_nothing_twice_at_once():
    many = engines(8)
    rollout = replace(NEW, enough=1).joined("one", many, "t").joined("two", many, "t").joined("three", many, "t")
    (sample,) = rollout.turn("one", 0)
    assert sample != many[-1]  # by its name, and not the longest
    rollout = rollout.alive("one", {sample.key}, 0).marked("one", sample.key, "t", state="passed")
    taken = []
    for host in HOSTS:
        ((chosen),) = rollout.turn(host, 0)
        taken.append(chosen.seconds)
        rollout = rollout.alive(host, {chosen.key}, 0)
    left = [one.seconds for one in reversed(many) if one.key != sample.key]
    assert taken == left[:3]
    assert rollout.turn("two", LOST_SECONDS + 1, {many[-2].key})[0].seconds == 7.0  # whoever has built that is silent
    # What others build or have built comes when there is nothing else: then it is found made, or waited for.
    done = {one.key for one in many if one.key not in (sample.key, many[-1].key)}
    (made,) = rollout.turn("two", 1, done)
    assert made.key == sample.key
    (waits,) = rollout.turn("two", 1, {*done, made.key})
    assert waits.key == many[-1].key


def test_what_is_asked_of_a_host_that_is_at_work_is_not_lost():
    rollout = both().requested("one", {A.key, B.key}, 100.0)
    later = 101.0 + ASK_AGAIN_SECONDS
    assert len(rollout.due("one", later)) == 2
    at_work = rollout.alive("one", {A.key}, later)
    assert at_work.due("one", later + 1) == ()
    assert [one.state for one in at_work.members["one"].rebuilds] == ["building", "requested"]
    passed = at_work.marked("one", A.key, "t", state="passed")
    assert passed.requested("one", {A.key}, later).members == passed.members


def test_a_canary_that_vanishes_is_replaced_and_comes_back_as_one_of_the_others():
    rollout = both().without("one", "not seen for 900 s", "t")
    assert (rollout.canary, rollout.due("two", 0), rollout.due("one", 0)) == ("two", (A,), ())
    rollout = rollout.marked("two", A.key, "t", state="passed")
    assert rollout.state == "done"  # nobody waits for it
    back = rollout.back("one", "t")
    assert (back.state, back.due("one", 0)) == ("rolling", (A, B))


def test_a_host_with_nothing_to_rebuild_proves_nothing():
    rollout = NEW.joined("one", [], "t")
    assert (rollout.state, rollout.canary) == ("done", None)
    assert rollout.joined("two", [A], "t").canary == "two"


steps = st.lists(
    st.tuples(
        st.sampled_from(["join", "pass", "fail", "ask", "leave", "back", "resume", "accept", "abandon"]),
        st.sampled_from(HOSTS),
        st.sampled_from([A, B]),
    ),
    max_size=30,
)


@given(steps)
def test_whatever_happens_no_host_is_ahead_of_the_canary_and_what_passed_stays_passed(taken):
    rollout = NEW
    for what, host, one in taken:
        before = rollout
        there = {found.key for found in rollout.members[host].rebuilds} if host in rollout.members else set()
        if what == "join":
            rollout = rollout.joined(host, [one], "t")
        elif what in ("pass", "fail", "ask") and one.key in there and rollout.may_build(host):
            state = {"pass": "passed", "fail": "failed", "ask": "requested"}[what]
            rollout = rollout.marked(host, one.key, "t", state=state, reason="r" if what == "fail" else "")
        elif what == "leave":
            rollout = rollout.without(host, "gone", "t")
        elif what == "back":
            rollout = rollout.back(host, "t")
        elif what in ("resume", "accept") and (rollout.halted or rollout.abandoned):
            rollout = rollout.resumed("me", "t", accept=what == "accept")
        elif what == "abandon" and rollout.state != "done" and not rollout.abandoned:
            rollout = rollout.abandon("me", "", "t")
        may = [name for name in rollout.members if rollout.due(name, 1e9)]
        assert rollout.proven or set(may) <= {rollout.canary}
        assert not may or rollout.state in ("canary", "rolling")
        for name, member in before.members.items():
            passed = {found.key for found in member.rebuilds if found.state == "passed"}
            assert passed <= {found.key for found in rollout.members[name].rebuilds if found.state == "passed"}
        # It never sticks: something is due, or all is passed, or a person or an absent host has the next word.
        waits = [m for m in rollout.members.values() if not m.left and not m.passed]
        assert may or rollout.halted or rollout.abandoned or not waits
        failed = [f for m in rollout.members.values() for f in m.rebuilds if f.state == "failed"]
        assert not failed or rollout.halted or rollout.abandoned
        for document in (rollout.to_json(), rollout.to_stored()):
            assert Rollout.from_json(json.loads(json.dumps(document))) == rollout


def test_a_store_keeps_what_hosts_have_in_common_once():
    many = engines(300)
    one = len(json.dumps(NEW.joined("one", many, "t").to_stored()))
    rollout = NEW
    for index in range(20):
        rollout = rollout.joined(f"host-{index}", many, "t")
    assert len(json.dumps(rollout.to_stored())) < 2 * one


def test_a_rollout_is_named_by_what_hosts_became():
    first = rollout_id([Change("tensorrt-rtx", "1.5", "1.7")])
    assert first == rollout_id([Change("tensorrt-rtx", "1.6", "1.7")])
    assert first.startswith("tensorrt-rtx-1.7-")
    assert first != rollout_id([Change("tensorrt-rtx", "1.6", "1.7"), Change("driver", "1", "2")])
    card = [rollout_id([Change("gpu", None, f"L4 sm89 GPU-{index}")]) for index in (1, 2)]
    assert card[0] == card[1] != rollout_id([Change("gpu", None, "H100 sm90 GPU-1")])
    # What one kind of GPU proves holds for no other.
    driver = [Change("driver", "570.1", "580.1")]
    kinds = [
        rollout_id(driver, [Gpu(name, uuid, sm, 1 << 30, 1)])
        for name, uuid, sm in (("T4", "a", "sm75"), ("T4", "b", "sm75"), ("L4", "c", "sm89"))
    ]
    assert kinds[0] == kinds[1] != kinds[2]


def test_rollouts_are_changed_by_compare_and_swap(tmp_path):
    store = FolderStore(tmp_path)
    raced = []

    def join(host):
        def change(found):
            if not raced:
                raced.append(host)
                change_rollout(store, "rtx", join("two"))
            return (found or NEW).joined(host, [A], "t")

        return change

    assert set(change_rollout(store, "rtx", join("one")).members) == {"one", "two"}
    assert rollouts(store) == [read_rollout(store, "rtx")]
    with pytest.raises(NotFoundError):
        read_rollout(store, "another")
    stored = read_rollout(store, "rtx").to_stored()
    store.write("rollouts/rtx.json", dump_checked({**stored, "schema": 1}))  # as an earlier release wrote it
    assert (stored["schema"], read_rollout(store, "rtx").to_stored()) == (2, stored)
    for place in ("9", "-1", "0:1.0:0:0:9", "0:1.0:0:0:-1"):
        members = {"one": {"left": "", "rebuilds": place}}
        store.write("rollouts/rtx.json", dump_checked({**stored, "members": members, "words": ["passed"]}))
        with pytest.raises(IntegrityError, match="not a rollout"):
            read_rollout(store, "rtx")
    store.write("rollouts/rtx.json", b'{"schema": 9}')
    with pytest.raises(IntegrityError, match="this release reads 1 and 2"):
        read_rollout(store, "rtx")
