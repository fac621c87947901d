"""Measure the document of a large rollout: its bytes, and processor seconds for a change of it.

python bench/rollout_document.py [RESULT.json] [--hosts 40] [--engines 1900]
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from artifacts.folder import FolderStore  # noqa: E402  of this checkout
from artifacts.rollouts import Rebuild, Rollout, change_rollout, rollout_path  # noqa: E402

NAME = "driver-580.65.06"


def rebuilds(count: int) -> list[Rebuild]:
    """Return what a host of a fleet has to rebuild: two engines of each recipe."""
    return [
        Rebuild(
            f"recipe-{index:04d}",
            f"/srv/models/recipes/recipe-{index:04d}.yaml",
            "tensorrt:sm90",
            asked,
            "miss: toolchain.driver 570.124.06 -> 580.65.06",
            replaces=f"recipe-{index:04d}/tensorrt-10.16.1.11-sm90/{asked}-0123456789abcdef",
            seconds=120.0,
        )
        for index in range(count // 2)
        for asked in ("fp16", "int8")
    ]


def passed(rollout: Rollout) -> Rollout:
    """Return a rollout in which all that had to be rebuilt has passed."""

    def done(one: Rebuild) -> Rebuild:
        told = "its speed is not compared"
        return replace(one, state="passed", since=1764262272.123, engine=f"{one.replaces}-new", reason=told)

    members = {
        host: replace(member, rebuilds=tuple(map(done, member.rebuilds))) for host, member in rollout.members.items()
    }
    return replace(rollout, proven=True, members=members)


def measured(store: FolderStore, change: Callable[[Rollout], Rollout]) -> dict[str, float]:
    """Change the rollout once, and return its bytes and the processor seconds that took."""

    def changed(found: Rollout | None) -> Rollout:
        assert found is not None
        return change(found)

    began = time.process_time()
    change_rollout(store, NAME, changed)
    seconds = time.process_time() - began
    info = store.info(rollout_path(NAME))
    return {"bytes": info.size if info is not None else 0, "cpu_seconds": round(seconds, 2)}


def main() -> None:
    """Measure at the start of a rollout and at its end, print, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument("result", nargs="?", type=Path, default=ROOT / "bench" / "results" / "rollout_document.json")
    parser.add_argument("--hosts", type=int, default=40)
    parser.add_argument("--engines", type=int, default=1900)
    asked = parser.parse_args()
    rollout = Rollout(NAME, ("driver 570.124.06 -> 580.65.06",))
    hosts = [f"gpu-node-{index:03d}" for index in range(asked.hosts)]
    work = rebuilds(asked.engines)
    for host in hosts:
        rollout = rollout.joined(host, work, "2026-01-01T00:00:00Z")
    with tempfile.TemporaryDirectory() as folder:
        store = FolderStore(Path(folder))
        change_rollout(store, NAME, lambda _none: rollout)
        start = measured(store, lambda found: found.alive(hosts[0], {work[0].key}, 5.0))
        change_rollout(store, NAME, lambda found: passed(found or rollout))
        end = measured(store, lambda found: found.said("2026-01-01T00:00:00Z", "one more word"))
    document = {
        "command": f"python bench/rollout_document.py --hosts {asked.hosts} --engines {asked.engines}",
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "at_the_start": start,
        "at_the_end": end,
    }
    asked.result.write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(document, indent=1))


if __name__ == "__main__":
    main()
