"""Enginery's own commands as child processes of a flow: a worker does what a person would do at the prompt."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from prefect import get_run_logger

from tasks.shown import leave_answer

_ROOT: Final = Path(__file__).resolve().parent.parent
_MEANING: Final = {1: "something failed", 2: "the command is wrong", 3: "some wait for another host"}


class CommandError(RuntimeError):
    """A command ended with a status other than 0; `status` is that, `document` what it printed."""

    def __init__(self, command: str, status: int, said: str, document: Any) -> None:
        self.status = status
        self.document = document
        super().__init__(f"{command}: status {status} ({_MEANING.get(status, 'ended by a signal')})\n{said}".strip())


async def run_command(*arguments: str, store: str | None, names: Sequence[str] = ()) -> Any:
    """Run `enginery ARGUMENTS --json -- NAMES`, its stderr in the run's log and what it prints as an artifact; return that.

    Raises CommandError. The child ends with this flow when that is cancelled.
    """
    # What a person has written into a form as a name is no option, whatever it begins with.
    words = [*arguments, *(("--store", store) if store else ()), "--json", "--", *names]
    code = f"import sys; sys.path.insert(0, {str(_ROOT)!r}); from enginery.__main__ import main; sys.exit(main())"
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", code, *words, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    if process.stdout is None or process.stderr is None:
        raise RuntimeError("the command has no pipes")
    said: list[str] = []

    async def listen(stream: asyncio.StreamReader) -> None:
        async for line in stream:
            said.append(line.decode(errors="replace").rstrip())
            get_run_logger().info("%s", said[-1])

    try:
        out, _none = await asyncio.gather(process.stdout.read(), listen(process.stderr))
        status = await process.wait()
    finally:
        if process.returncode is None:
            process.kill()
    document = json.loads(out) if out.strip() else None
    if document is not None:
        await leave_answer(arguments[0], document, get_run_logger().log)
    if status:
        raise CommandError(f"enginery {arguments[0]}", status, "\n".join(said[-20:]), document)
    return document
