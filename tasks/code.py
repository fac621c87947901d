"""A recipe's own code in the child process: unpacked, imported, and blamed by its own lines alone.

`code.tar` is the bundle of `recipes.files.CodeBundle`; its root goes first on `sys.path`. Whatever the code raises
becomes a `ModelCodeError` whose traceback names files as they are in the bundle, so that no message (and nothing
derived from one) holds the temporary folder it was unpacked to.
"""

from __future__ import annotations

import atexit
import importlib
import re
import shutil
import sys
import tarfile
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from types import ModuleType
from typing import Any, Final

from tasks.errors import BackendError, ModelCodeError, TaskError

# Folders of bundles unpacked by this process: where a frame of a traceback is the recipe's own.
_FOLDERS: Final[list[Path]] = []
# Twice what recipes.bundle takes.
_MAX_FILES: Final = 20_000
_MAX_BYTES: Final = 1 << 30


def load_callable(tar: Path, entry: str) -> Callable[..., Any]:
    """Unpack a code bundle and return the callable `package.module:name` of it.

    The bundle's modules take precedence over installed ones of the same name, and stay importable until the process
    ends. Calling the result runs under `recipe_code`. Raises BackendError("bad data") for a damaged or unsafe tar, and
    ModelCodeError where the code cannot be imported or has no such callable.
    """
    module_name, _, attribute = entry.partition(":")
    folder = _unpack(tar)
    _forget_other_bundles(folder)
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    with recipe_code(f"importing {module_name}"):
        module = importlib.import_module(module_name)
    _require_own(module, module_name, folder)
    target = getattr(module, attribute, None)
    if not callable(target):
        found = "nothing" if target is None else f"a {type(target).__name__}"
        defined = ", ".join(sorted(_callables(module))) or "none"
        raise ModelCodeError(
            f"{entry}: expected a callable named {attribute!r}, found {found} (callables there: {defined})"
        )

    def call(*arguments: Any, **named: Any) -> Any:
        with recipe_code(f"calling {entry}"):
            return target(*arguments, **named)

    return call


@contextmanager
def recipe_code(doing: str) -> Iterator[None]:
    """Turn whatever the recipe's code raises inside into a ModelCodeError: `doing`, then the traceback of its lines.

    Errors of this package pass through. `sys.exit` counts as raising; KeyboardInterrupt and MemoryError do not.
    """
    try:
        yield
    except (TaskError, KeyboardInterrupt, MemoryError, GeneratorExit):
        raise
    except BaseException as err:
        raise ModelCodeError(f"{doing}: {own_traceback(err)}") from err


def own_traceback(error: BaseException) -> str:
    """Format an exception with only the frames of the recipe's code, files named as in the bundle.

    Where the exception was raised below that code, a last line names the module that raised it.
    """
    summary = traceback.TracebackException.from_exception(error)
    part: traceback.TracebackException | None = summary
    seen: set[int] = set()
    while part is not None and id(part) not in seen:
        seen.add(id(part))
        part.stack = traceback.StackSummary.from_list(
            [
                (own, frame.lineno or 0, frame.name, frame.line)
                for frame in part.stack
                if (own := _own_name(frame.filename)) is not None
            ]
        )
        if isinstance(error, SyntaxError) and part is summary and part.filename is not None:
            part.filename = _own_name(part.filename) or Path(part.filename).name
        part = part.__cause__ or part.__context__
    text = "".join(summary.format()).rstrip()
    if not summary.stack and text.startswith("Traceback"):
        text = text.partition("\n")[2]
    below = _module_below(error)
    text = f"{text}\n(raised inside {below})" if below else text
    return _without_folders(text)  # the code may have put its own path into a message


def _unpack(tar: Path) -> Path:
    folder = Path(tempfile.mkdtemp(prefix="enginery-code-")).resolve()
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    try:
        # Not compressed: a bundle never is.
        with tarfile.open(tar, "r:") as archive:
            claimed = 0
            for count, member in enumerate(archive):
                claimed += member.size
                if count >= _MAX_FILES or claimed > _MAX_BYTES:
                    raise BackendError(
                        "bad data",
                        f"{tar.name}: refused to unpack: {count + 1} files claim {claimed} bytes "
                        f"(at most {_MAX_FILES} files and {_MAX_BYTES >> 20} MiB)",
                        "build the bundle with Enginery; name weights and data in the recipe",
                    )
                name = PurePosixPath(member.name)
                if member.isdir() and ".." not in name.parts and not name.is_absolute():
                    continue
                # Stricter than tarfile's "data" filter (which Python 3.10 lacks before 3.10.12): no links at all.
                if (
                    not member.isreg()
                    or member.issparse()
                    or name.is_absolute()
                    or ".." in name.parts
                    or "\\" in member.name
                ):
                    raise BackendError(
                        "bad data",
                        f"{tar.name}: refused to unpack {member.name!r}: not a plain file inside the bundle",
                        "build the bundle with Enginery; it holds plain files only",
                    )
                stream = archive.extractfile(member)
                if stream is None:  # isreg() was checked; this is for the type checker
                    continue
                target = folder.joinpath(*name.parts)
                target.parent.mkdir(parents=True, exist_ok=True)
                with stream, target.open("wb") as out:
                    shutil.copyfileobj(stream, out)
    except (
        tarfile.TarError,
        EOFError,
        ValueError,
        RecursionError,
        FileExistsError,
        NotADirectoryError,
        IsADirectoryError,
    ) as err:
        raise BackendError(
            "bad data", f"{tar.name}: not a readable tar: {err}", "remove it from the store and build again"
        ) from err
    _FOLDERS.append(folder)
    return folder


def _forget_other_bundles(folder: Path) -> None:
    """Drop modules of bundles loaded before, so that two bundles may both have a `model.py`."""
    others = [other for other in _FOLDERS if other != folder]
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if file is not None and any(Path(file).is_relative_to(other) for other in others):
            del sys.modules[name]
    sys.path[:] = [entry for entry in sys.path if all(entry != str(other) for other in others)]


def _require_own(module: ModuleType, name: str, folder: Path) -> None:
    file = getattr(module, "__file__", None)
    if file is None or not Path(file).resolve().is_relative_to(folder):
        raise ModelCodeError(
            f"{name}: Python has another module of that name loaded (a built-in or an installed one), which hides the "
            "recipe's file; rename the file"
        )


def _callables(module: ModuleType) -> list[str]:
    return [
        name
        for name, value in vars(module).items()
        if callable(value) and not name.startswith("_") and getattr(value, "__module__", None) == module.__name__
    ]


def _own_name(filename: str) -> str | None:
    path = Path(filename)
    for folder in _FOLDERS:
        if path.is_relative_to(folder):
            return path.relative_to(folder).as_posix()
    return None


def _module_below(error: BaseException) -> str | None:
    trace, last = error.__traceback__, None
    while trace is not None:
        last, trace = trace.tb_frame, trace.tb_next
    if last is None or _own_name(last.f_code.co_filename) is not None:
        return None
    name = str(last.f_globals.get("__name__", ""))
    return None if name.startswith(("importlib", "_frozen_importlib", "tasks.")) else name or None


def plain_words(text: str, limit: int = 2000) -> str:
    """Return a framework's words for a message: no colours, no folders of this machine, at most `limit` characters."""
    text = _without_folders(re.sub(r"\x1b\[[0-9;]*m", "", text)).strip()
    return text if len(text) <= limit else f"{text[:limit]}..."


def _without_folders(text: str) -> str:
    for folder in _FOLDERS:
        text = text.replace(f"{folder}/", "").replace(str(folder), "the code bundle")
    return re.sub(r"/[^\s\"']*/(?:site-packages|lib/python3\.\d+)/", "", text)
