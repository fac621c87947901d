"""What can go wrong in a stage, by whose fault.

TaskError
├── BackendError         a framework's or compiler's; `kind` is one of KINDS
├── ModelCodeError       the recipe's own code raised; the message is that code's traceback
├── CallError            the caller's: what an engine was given (names, types, shapes), or that it is closed
└── StageCancelledError  nobody's: the build was asked to stop
(a wrong recipe is `recipes.errors.RecipeError`; a store's faults are in `artifacts.errors`)
"""

from __future__ import annotations

from typing import Final

KINDS: Final = (
    "unsupported operator",
    "out of memory",
    "no kernel",
    "missing plugin",
    "bad profile",
    "no device",
    "version mismatch",
    "missing package",
    "rejected setting",
    "wrong result",
    "not reproducible",
    "bad data",
    "disk full",
    "time-out",
    "crash",
)


class TaskError(Exception):
    """Base of every error of this package."""


class BackendError(TaskError):
    """A framework or a compiler failed.

    `kind` is one of KINDS; `message` holds the backend's own words; `advice` says what to do next.
    """

    def __init__(self, kind: str, message: str, advice: str = "") -> None:
        if kind not in KINDS:
            raise ValueError(f"unknown kind of failure {kind!r}")
        self.kind = kind
        self.message = message
        self.advice = advice
        super().__init__(f"{kind}: {message}" + (f"\n  next: {advice}" if advice else ""))


class ModelCodeError(TaskError):
    """The recipe's own code raised; the message is the traceback of that code alone."""


class CallError(TaskError, ValueError):
    """A loaded engine was called with what it does not take, or after it was closed; the engine is fine."""


class StageCancelledError(TaskError):
    """The build was asked to stop while the stage ran; its process is gone."""
