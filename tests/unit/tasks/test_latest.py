"""What is kept of a recipe's last build: builds of several hosts that end at once, and writers that change it in between."""

from __future__ import annotations

import json
import threading

from artifacts.folder import FolderStore
from tasks.latest import keep_latest, latest_path, read_latest


def step(number: int) -> dict[str, dict[str, object]]:
    return {f"compile:sm{number}": {"params": {"gpu": number}}}


def test_builds_that_end_at_once_keep_what_all_of_them_made(tmp_path):
    store, together = FolderStore(tmp_path / "store"), threading.Barrier(8)

    def end(number: int) -> None:
        together.wait()
        keep_latest(store, "digits", step(number))

    threads = [threading.Thread(target=end, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected = {name: preimage for number in range(8) for name, preimage in step(number).items()}
    assert read_latest(store, "digits") == expected


class Busy(FolderStore):
    """A store in which somebody else is always quicker."""

    others = 0

    def write(self, path, data, *, if_absent=False, if_version=None):
        if if_absent or if_version is not None:
            self.others += 1
            super().write(path, json.dumps({"export": {"params": {"others": self.others}}}).encode())
        return super().write(path, data, if_absent=if_absent, if_version=if_version)


def test_who_never_comes_first_keeps_it_all_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr("tasks.latest._LONGEST_WAIT", 0.0)
    store = Busy(tmp_path / "store")
    keep_latest(store, "digits", step(89))
    assert read_latest(store, "digits") == {"export": {"params": {"others": store.others - 1}}, **step(89)}


def test_what_is_kept_already_is_not_written_again(tmp_path):
    store = FolderStore(tmp_path / "store")
    keep_latest(store, "digits", {**step(89), **step(120)})
    before = store.info(latest_path("digits"))
    keep_latest(store, "digits", step(89))
    assert store.info(latest_path("digits")) == before
