"""The two pipes from a stage's process: its report (JSON lines), and everything it prints."""

from __future__ import annotations

import json
import os
import re
import selectors
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, Final

from tasks.errors import BackendError

_CHUNK: Final = 1 << 16
# A pipe holds at most 1 MiB (/proc/sys/fs/pipe-max-size), so this is more than an ended process can have left.
_LAST_BYTES: Final = 2 << 20
_KEPT_LINES: Final = 200
_LINE_BYTES: Final = 4096
_FILE_BYTES: Final = 64 << 20
_IDLE_SECONDS: Final = 0.005
# Terminal sequences and control characters must not reach a terminal or a report.
_CONTROL: Final = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]|[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class Pipes:
    """Reads both pipes in the thread that asks; never blocks for longer than asked to."""

    def __init__(self, log_path: Path, on_log: Callable[[str], None]) -> None:
        self._on_log = on_log
        self._lines: deque[str] = deque(maxlen=_KEPT_LINES)
        self._selector = selectors.DefaultSelector()
        self._pending = {"report": b"", "log": b""}
        self._log_file: IO[bytes] | None = log_path.open("wb", buffering=0)
        self._room = _FILE_BYTES
        self._report, self.report_end = os.pipe()
        self._log, self.log_end = os.pipe()
        self._child_ends = [self.report_end, self.log_end]
        for name, descriptor in (("report", self._report), ("log", self._log)):
            os.set_blocking(descriptor, False)
            self._selector.register(descriptor, selectors.EVENT_READ, name)

    def close(self) -> None:
        """Close every end and the log file."""
        self.close_child_ends()
        self._selector.close()
        os.close(self._report)
        os.close(self._log)
        if self._log_file is not None:
            self._log_file.close()

    def close_child_ends(self) -> None:
        """Close the ends that the child has now, so that its death shows."""
        while self._child_ends:
            os.close(self._child_ends.pop())

    def read(self, timeout: float, *, last: bool = False) -> list[dict[str, Any]]:
        """Wait at most `timeout` seconds for something, and return the reported messages.

        With `last`, everything that an ended process left is read. Raises BackendError where the report is no JSON.
        """
        messages: list[dict[str, Any]] = []
        if not self._selector.get_map() and not last:
            time.sleep(min(timeout, _IDLE_SECONDS))  # both ends are closed: the process is about to end
            return messages
        room = _LAST_BYTES
        while ready := self._selector.select(timeout if not last else 0.0):
            for key, _events in ready:
                chunk = os.read(key.fd, _CHUNK)
                room -= len(chunk)
                if not chunk:
                    self._selector.unregister(key.fd)
                elif key.data == "report":
                    messages += self._take_report(chunk)
                else:
                    self._take_log(chunk)
            if not last or room < 0:
                break
        if last and self._pending["log"]:
            self._take_log(b"\n")
        return messages

    def last_lines(self, count: int) -> list[str]:
        """Return the last lines that were printed."""
        return list(self._lines)[-count:]

    def _take_report(self, chunk: bytes) -> list[dict[str, Any]]:
        *lines, self._pending["report"] = (self._pending["report"] + chunk).split(b"\n")
        return [_message(line) for line in lines]

    def _take_log(self, chunk: bytes) -> None:
        self._write(chunk)
        *lines, rest = re.split(rb"[\r\n]+", self._pending["log"] + chunk)
        if len(rest) > _LINE_BYTES:
            lines, rest = [*lines, rest], b""
        self._pending["log"] = rest
        for line in lines:
            text = _CONTROL.sub("", line[:_LINE_BYTES].decode("utf-8", "replace")).rstrip()
            if text:
                self._lines.append(text)
                self._on_log(text)

    def _write(self, chunk: bytes) -> None:
        if self._log_file is None:
            return
        try:
            self._log_file.write(chunk[: self._room])
        except OSError:  # a full disk: the stage may still succeed, and its last lines are kept
            self._room = 0
        self._room -= len(chunk)
        if self._room <= 0:
            self._log_file.close()
            self._log_file = None


def _message(line: bytes) -> dict[str, Any]:
    try:
        return dict(json.loads(line))
    except (ValueError, TypeError) as err:
        raise BackendError(
            "crash",
            f"something else wrote to the stage's report: {line[:200].decode('utf-8', 'replace')!r}",
            "the stage's code must write to no file descriptor that it did not open",
        ) from err
