"""What changed in a Git work tree since a revision, asked of `git` itself; no file of the tree is written or run.

Changes are those since the work tree left the revision (its merge base with HEAD), as `git diff REV...` has it, so that
what others have merged meanwhile is not counted; besides commits they are what is staged, edited, and not tracked yet.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from recipes.touched import Changes
from tasks.errors import CallError

# Nothing of a user's settings may show other changes, or run a program to show them. Modes enter no key.
_QUIET: Final = ("--no-optional-locks", "-c", "core.quotepath=off", "-c", "core.fileMode=false")
_KINDS: Final = {"A": "added", "D": "deleted"}


class GitError(CallError):
    """Git cannot say what changed: no repository, no such revision, or a clone that is too shallow."""


@dataclass(frozen=True)
class Since:
    """The commit that work is compared with, and what changed since."""

    commit: str
    changes: Changes


def work_tree(folder: Path) -> Path:
    """Return the top folder of the work tree that a folder is in. Raises GitError."""
    done = _git(folder, "rev-parse", "--show-toplevel")
    if done.returncode != 0:
        words = done.stderr.strip()
        if "not a git repository" in words or "must be run in a work tree" in words:
            raise GitError(
                f"{folder} is in no Git work tree, so that --since has nothing to compare with; leave it out"
            )
        raise GitError(f"git does not read {folder}: {words}")
    return Path(done.stdout.removesuffix("\n"))


def in_checkout(path: Path) -> str:
    """Return a file's path as every checkout of its repository has it; outside of a work tree, as it is."""
    try:
        return str(path.resolve().relative_to(work_tree(path.parent)))
    except (GitError, ValueError):
        return str(path)


def changes_since(top: Path, revision: str) -> Since:
    """Return what changed in a work tree since a revision: a renamed file is one deleted and one added. Raises GitError."""
    commit = _merge_base(top, revision)
    kinds: dict[str, str] = {}
    listed = _asked(
        top, "diff", "--name-status", "--no-renames", "--no-ext-diff", "--ignore-submodules=none", "-z", commit
    )
    words = listed.split("\0")
    for status, name in zip(words[::2], words[1::2], strict=False):
        kinds[str(top / name)] = _KINDS.get(status, "changed")
    for name in _asked(top, "ls-files", "--others", "--exclude-standard", "-z").split("\0"):
        if name:  # which ends with a slash where it is a repository in this one; Path takes that off
            path = str(top / name)
            kinds[path] = "changed" if path in kinds else "added"  # known, and taken out of the index alone
    return Since(commit, Changes(top, kinds))


def ignored(top: Path, files: Collection[str]) -> list[str]:
    """Return those of these files whose changes Git does not see: ignored, or outside the work tree. Raises GitError."""
    inside = [file for file in sorted(files) if file.startswith(f"{top}/")]
    outside = [file for file in sorted(files) if not file.startswith(f"{top}/")]
    if not inside:
        return outside
    done = _git(top, "check-ignore", "-z", "--stdin", stdin="\0".join(inside))
    return [*outside, *(name for name in done.stdout.split("\0") if name)]


def _merge_base(top: Path, revision: str) -> str:
    found = _git(top, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{revision}^{{commit}}")
    shallow = _git(top, "rev-parse", "--is-shallow-repository").stdout.strip() == "true"
    if found.returncode != 0:
        advice = "fetch it, or write another (a branch, a tag, a commit, HEAD~1)"
        if shallow:
            advice = (
                "this clone is shallow: fetch its history with git fetch --unshallow (actions/checkout: fetch-depth: 0)"
            )
        raise GitError(f"{top}: --since {revision}: Git knows no such revision here; {advice}")
    commit = found.stdout.strip()
    base = _git(top, "merge-base", commit, "HEAD")
    if base.returncode == 0:
        return base.stdout.strip()
    if shallow:
        raise GitError(
            f"{top}: --since {revision}: this clone is too shallow to tell where HEAD left it; fetch its history with "
            "git fetch --unshallow (actions/checkout: fetch-depth: 0)"
        )
    raise GitError(f"{top}: --since {revision} shares no history with HEAD; name a revision that it was made from")


def _asked(top: Path, *words: str) -> str:
    done = _git(top, *words)
    if done.returncode != 0:
        raise GitError(f"{top}: git {words[0]} failed: {done.stderr.strip()}")
    return done.stdout


def _git(folder: Path, *words: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    command = ["git", *_QUIET, "-C", str(folder), *words]
    try:
        return subprocess.run(
            command,
            input=stdin,
            capture_output=True,
            text=True,
            errors="surrogateescape",
            env={**os.environ, "LC_ALL": "C"},
            check=False,
        )
    except FileNotFoundError as err:
        raise GitError("--since asks git, which is not installed here (apt-get install git)") from err
