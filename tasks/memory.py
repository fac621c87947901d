"""How much memory a process and everything it started holds, and how to end them all."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Final

import psutil

# What the kernel cannot take back without swapping: pages of mapped files (weights, libraries) are not counted.
_FIELDS: Final = ("RssAnon:", "RssShmem:", "VmSwap:")


class ProcessTree:
    """A process and all of its descendants. `peak` is the largest use that was measured, in bytes."""

    def __init__(self, pid: int) -> None:
        self.peak = 0
        self._root: psutil.Process | None = None
        self._seen: set[psutil.Process] = set()
        with contextlib.suppress(psutil.NoSuchProcess):
            self._root = psutil.Process(pid)

    def measure(self) -> int:
        """Return the bytes in use now: anonymous, shared and swapped memory (proc(5), status).

        Pages that forked processes share are counted once for each.
        """
        used = sum(_held_bytes(process.pid) for process in self._processes())
        self.peak = max(self.peak, used)
        return used

    def kill(self) -> None:
        """Kill the root's descendants, also those that left its process group; the root is its parent's to end."""
        self._processes()
        for process in self._seen:
            # psutil compares start times, so a number that the kernel gave to another process is left alone.
            with contextlib.suppress(psutil.Error):
                process.kill()

    def _processes(self) -> list[psutil.Process]:
        if self._root is None:
            return []
        try:
            descendants = self._root.children(recursive=True)
        except psutil.Error:
            return [self._root]
        self._seen = {process for process in self._seen if process.is_running()} | set(descendants)
        return [self._root, *self._seen]


def _held_bytes(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:  # it ended meanwhile
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(_FIELDS))
