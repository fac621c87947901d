"""What a running step says to whoever watches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """Something a running step says: how far it is (0..1, None where unknown) and a short text, or a log line."""

    step_id: str
    kind: str  # "started" | "progress" | "log" | "done" | "failed"
    fraction: float | None = None
    text: str = ""
    seconds: float = 0.0


Listener = Callable[[Progress], None]
