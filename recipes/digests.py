"""Digests of local files, remembered for large ones between runs.

The memory is `digests.json` in `$XDG_CACHE_HOME/enginery` (or `~/.cache/enginery`). It is a help and never needed:
what cannot be read or written there is digested again. A file is known by device, inode, size, and times of its last
change; one that changed within two seconds before it was digested is not remembered, since another change in the same
tick of the clock would leave no trace (Git calls such entries racy).
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from artifacts.refs import digest_bytes, digest_file, is_digest

REMEMBERED_BYTES: Final = 8 << 20
MAX_ENTRIES: Final = 4096
_RACY_NS: Final = 2_000_000_000
_LAYOUT: Final = 1


def cache_path() -> Path | None:
    """Return where digests are remembered, or None where there is no place for it."""
    home = os.environ.get("XDG_CACHE_HOME", "")
    if not Path(home).is_absolute():
        try:
            home = str(Path.home() / ".cache")
        except RuntimeError:
            return None
    return Path(home) / "enginery" / "digests.json"


@dataclass
class Digests:
    """Digests files, with a memory that is read when it is first needed and written by `save`."""

    path: Path | None = field(default_factory=cache_path)
    hashed: int = 0  # bytes that were read for digests, for tests and for curious people
    _known: dict[str, str] | None = None
    _dirty: bool = False

    def file(self, path: Path) -> str:
        """Return the SHA-256 of a file; raise OSError where it cannot be read."""
        before = path.stat()
        if before.st_size < REMEMBERED_BYTES:
            self.hashed += before.st_size
            return digest_file(path)
        return self._remembered("file", _identity(before), _changed(before), lambda: self._hash(path, before))

    def files(self, named: Sequence[tuple[str, Path]]) -> str:
        """Return one SHA-256 over many files: of the lines `sha256  name`, sorted by name."""
        stats = [(name, path, path.stat()) for name, path in sorted(named)]
        identity = digest_bytes("\n".join(f"{name} {_identity(stat)}" for name, _path, stat in stats).encode())

        def digest() -> str:
            return digest_bytes("".join(f"{self.file(path)}  {name}\n" for name, path, _stat in stats).encode())

        if sum(stat.st_size for _name, _path, stat in stats) < REMEMBERED_BYTES:
            return digest()
        return self._remembered("folder", identity, max(_changed(stat) for _name, _path, stat in stats), digest)

    def note(self, kind: str, digest: str, text: str) -> None:
        """Remember a short text about the bytes that have this digest."""
        self._load()[f"{kind} {digest}"] = text
        self._dirty = True

    def noted(self, kind: str, digest: str) -> str | None:
        """Return what was remembered about these bytes, or None."""
        return self._load().get(f"{kind} {digest}")

    def save(self) -> None:
        """Write the memory, atomically; say nothing where that is not possible."""
        if not self._dirty or self.path is None:
            return
        entries = dict(list(self._load().items())[-MAX_ENTRIES:])
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(prefix=".digests-", dir=self.path.parent)
            try:
                with os.fdopen(handle, "w", encoding="utf-8") as stream:
                    json.dump({"layout": _LAYOUT, "known": entries}, stream)
                Path(name).replace(self.path)
            finally:
                Path(name).unlink(missing_ok=True)
        except OSError:
            return
        self._dirty = False

    def _hash(self, path: Path, before: os.stat_result) -> str:
        self.hashed += before.st_size
        return digest_file(path)

    def _remembered(self, kind: str, identity: str, changed_ns: int, digest: Callable[[], str]) -> str:
        known = self._load()
        key = f"{kind} {identity}"
        found = known.get(key)
        if found is not None and is_digest(found):
            return found
        began = time.time_ns()
        made = digest()
        if changed_ns + _RACY_NS < began:
            known[key] = made
            self._dirty = True
        return made

    def _load(self) -> dict[str, str]:
        if self._known is None:
            self._known = {}
            try:
                document = json.loads(self.path.read_bytes()) if self.path is not None else None
            except (OSError, ValueError, RecursionError):
                document = None
            known = document.get("known") if isinstance(document, dict) and document.get("layout") == _LAYOUT else None
            if isinstance(known, dict):
                self._known = {key: text for key, text in known.items() if isinstance(text, str)}
        return self._known


def _identity(stat: os.stat_result) -> str:
    # The time of the last change of the inode too: a tool may set the other back.
    return f"{stat.st_dev}:{stat.st_ino}:{stat.st_size}:{stat.st_mtime_ns}:{stat.st_ctime_ns}"


def _changed(stat: os.stat_result) -> int:
    return max(stat.st_mtime_ns, stat.st_ctime_ns)
