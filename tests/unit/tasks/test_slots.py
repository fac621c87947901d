"""Slots: never more than there are, and who wants all of them is not passed by for ever."""

from __future__ import annotations

import threading

from tasks.slots import Slots


def test_who_takes_all_runs_alone():
    slots, lock = Slots(3), threading.Lock()
    running: list[int] = []
    seen: list[list[int]] = []
    start = threading.Barrier(12)

    def work(count: int) -> None:
        start.wait()
        for _ in range(50):
            with slots.taken(count):
                with lock:
                    running.append(count)
                    seen.append(list(running))
                with lock:
                    running.remove(count)

    threads = [threading.Thread(target=work, args=(3 if index < 2 else 1,)) for index in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(seen) == 600
    assert all(sum(counts) <= 3 for counts in seen)


def test_there_are_as_many_as_were_asked_for():
    slots, together = Slots(3), threading.Barrier(3)

    def work() -> None:
        with slots.taken(1):
            together.wait(10)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert not together.broken


def test_first_come_first_served():
    slots, order = Slots(2), []
    held = slots.taken(1)
    held.__enter__()
    wants_all, wants_one = threading.Event(), threading.Event()

    def take(count: int, name: str, ready: threading.Event) -> None:
        ready.set()
        with slots.taken(count):
            order.append(name)

    first = threading.Thread(target=take, args=(2, "all", wants_all))
    first.start()
    wants_all.wait(10)
    while not slots.waiting:
        pass
    second = threading.Thread(target=take, args=(1, "one", wants_one))
    second.start()
    while slots.waiting < 2:
        pass
    assert order == []  # though one slot is free: it was not the second one's turn
    held.__exit__(None, None, None)
    first.join(10)
    second.join(10)
    assert order == ["all", "one"]
