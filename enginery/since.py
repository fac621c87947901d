"""`--since REV`: the recipes that a change in Git touches, each with the files that made it be taken."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from enginery.output import note

if TYPE_CHECKING:
    from tasks.git import Since

SinceOption = Annotated[
    str | None,
    typer.Option(
        "--since",
        metavar="REV",
        help="Only recipes that changes since this Git revision touch, through any file they read.",
    ),
]


@dataclass(frozen=True)
class Taken:
    """Recipes that a change touches, of `looked_at`; `files` maps each to the changed files, with how each changed.

    `names` has the names of all that can be read. A recipe that cannot be read is taken too (without files), so that its faults are told.
    """

    revision: str
    commit: str
    looked_at: int
    files: dict[Path, dict[str, str]] = field(default_factory=dict)
    names: dict[Path, str] = field(default_factory=dict)

    @property
    def others(self) -> dict[str, Path]:
        """The names of the recipes that no change touches: those that are touched may not have them."""
        return {name: path for path, name in self.names.items() if path not in self.files}

    def to_json(self, recipe: Path) -> dict[str, Any]:
        """Return why a recipe was taken, as JSON values."""
        return {"revision": self.revision, "commit": self.commit, "files": self.files.get(recipe, {})}

    def why(self, recipe: Path) -> str:
        """Return why a recipe was taken, in words."""
        changed = self.files.get(recipe, {})
        return ", ".join(f"{name} ({kind})" for name, kind in changed.items()) or "cannot be read"

    def tell(self) -> None:
        """Say on stderr how many recipes were taken, and which file made each be."""
        note(f"{len(self.files)} of {self.looked_at} recipes touched since {self.revision} ({self.commit[:12]})")
        for recipe in self.files:
            note(f"  {recipe}: {self.why(recipe)}")


def touched_since(paths: list[Path], revision: str) -> Taken:
    """Return which of these recipes a change since a revision touches, without running any code of theirs.

    Files are named relative to the top of the work tree. Says on stderr where a recipe reads what Git does not see.
    Raises GitError.
    """
    from recipes.errors import RecipeError
    from recipes.files import gather
    from recipes.loader import load
    from recipes.touched import reads_of, touching
    from tasks.git import changes_since, ignored, work_tree

    tops: dict[Path, Path] = {}
    since: dict[Path, Since] = {}
    files: dict[Path, dict[str, str]] = {}
    names: dict[Path, str] = {}
    unseen: dict[Path, set[str]] = {}
    for path in paths:
        folder = path.absolute().parent
        if folder not in tops:
            tops[folder] = work_tree(folder)
        top = tops[folder]
        if top not in since:
            since[top] = changes_since(top, revision)
        try:
            loaded = load(path)
            reads = reads_of(loaded, gather(loaded))
        except RecipeError:
            files[path] = {}
            continue
        names[path] = loaded.recipe.name
        found = touching(reads, since[top].changes)
        unseen.setdefault(top, set()).update(name for name in reads.files - reads.stated if Path(name).is_file())
        if found:
            files[path] = {Path(name).relative_to(top).as_posix(): kind for name, kind in found.items()}
    for top, read in unseen.items():
        missed = ignored(top, {str(Path(name).resolve()) for name in read})
        if missed:
            more = f" and {len(missed) - 1} more" if len(missed) > 1 else ""
            note(
                f"warning: Git does not follow {missed[0]}{more}: --since sees no change of it; state its sha256 in the recipe"
            )
    commits = dict.fromkeys(one.commit for one in since.values())
    return Taken(revision, ", ".join(commits), len(paths), files, names)
