"""Progress of a build on stderr: live bars on a terminal, plain lines in pipes and CI logs."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from enginery.output import console, note
from tasks.progress import Progress

if TYPE_CHECKING:
    from recipes.plan import Plan
    from tasks.session import BuildSession


_LINE: Final = 160


@contextmanager
def watch(session: BuildSession, planned: Plan, *, verbose: bool, quiet: bool) -> Iterator[None]:
    """Show what the session does until the block ends."""
    if sys.stderr.isatty() and not quiet:
        with _bars(session, verbose=verbose):
            yield
    else:
        session.on_progress(_Lines(verbose=verbose))
        fresh = sum(step.state == "cached" for step in planned.steps)
        note(f"{planned.recipe}: {len(planned.steps) - fresh} of {len(planned.steps)} stages to run, {fresh} cached")
        yield


class _Lines:
    """One line when a stage starts, ends or fails; every 30 s one for a stage that takes long."""

    def __init__(self, *, verbose: bool) -> None:
        self._verbose = verbose
        self._last: dict[str, float] = {}

    def __call__(self, event: Progress) -> None:
        now = time.monotonic()
        if event.kind == "started":
            self._last[event.step_id] = now
            text = event.text if self._verbose or len(event.text) <= _LINE else f"{event.text[: _LINE - 1]}…"
            note(f"  run   {event.step_id}  {text}")
        elif event.kind == "done":
            note(f"  built {event.step_id}  {event.seconds:.1f} s")
        elif event.kind == "failed":
            note(f"  FAIL  {event.step_id}  {event.text}")
        elif event.kind == "log":
            if self._verbose:
                note(f"        {event.step_id}| {event.text}")
        elif now - self._last.get(event.step_id, now) > 30:
            self._last[event.step_id] = now
            share = "" if event.fraction is None else f" {event.fraction:.0%}"
            note(f"  ...   {event.step_id}{share} {event.text}")


@contextmanager
def _bars(session: BuildSession, *, verbose: bool) -> Iterator[None]:
    from rich.progress import BarColumn, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bars

    terminal = console(stderr=True)
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(20),
        TextColumn("{task.fields[text]}", markup=False),
        TimeElapsedColumn(),
    )
    with Bars(*columns, console=terminal, transient=True) as bars:
        tasks: dict[str, TaskID] = {}
        lock = threading.Lock()

        def show(event: Progress) -> None:
            with lock:
                if event.kind == "started":
                    tasks[event.step_id] = bars.add_task(event.step_id, total=None, text="")
                elif event.kind == "progress" and event.step_id in tasks:
                    total = None if event.fraction is None else 1.0
                    bars.update(
                        tasks[event.step_id], total=total, completed=event.fraction or 0.0, text=event.text[:60]
                    )
                elif event.kind == "log" and verbose:
                    bars.console.print(f"{event.step_id}| {event.text}", markup=False, style="dim")
                elif event.kind in ("done", "failed") and event.step_id in tasks:
                    bars.remove_task(tasks.pop(event.step_id))
                    mark = f"[green]built[/] {event.seconds:.1f} s" if event.kind == "done" else "[red]failed[/]"
                    bars.console.print(f"{event.step_id} {mark}")
                    if event.kind == "failed":  # the table has room for the first words alone
                        bars.console.print(event.text, markup=False, highlight=False)

        session.on_progress(show)
        yield
