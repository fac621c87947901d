"""YAML to a Recipe: text, includes, shape, then the rules that several values must keep; all faults at once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from artifacts.keys import canonical_json
from artifacts.refs import digest_bytes
from recipes import rules
from recipes.errors import Fault, RecipeError
from recipes.includes import read_merged
from recipes.nodes import Key, Node, dotted
from recipes.schema import Recipe


@dataclass(frozen=True)
class LoadedRecipe:
    """A recipe, and where everything in it is stated.

    `path` is the recipe's file; `sources` are all files that were read (the recipe first, then its bases) and
    `digests` their SHA-256 by path; `root` is the merged recipe with positions. Paths in `recipe` and `merged` are
    relative to the folder of `path`, also those that a base in another folder states.
    """

    recipe: Recipe
    path: Path
    root: Node
    digests: Mapping[str, str]

    @property
    def folder(self) -> Path:
        """The folder that the recipe's paths are relative to."""
        return self.path.parent

    @property
    def sources(self) -> tuple[Path, ...]:
        """Every file that was read: the recipe, and what it includes."""
        return tuple(Path(name) for name in self.digests)

    @cached_property
    def merged(self) -> dict[str, Any]:
        """The merged recipe as JSON: what was stated, without defaults; the order of keys carries no meaning."""
        document: dict[str, Any] = self.root.plain()
        return document

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the merged recipe; comments, spacing, key order and the split into files do not change it."""
        return digest_bytes(canonical_json(self.merged))

    @cached_property
    def lines(self) -> Mapping[Key, tuple[str, int]]:
        """File and line of every value of the merged recipe, by path."""
        return {path: (node.file, node.line) for path, node in self.root.walk()}

    def fault(self, path: Key, what: str) -> Fault:
        """Return a fault at the line that states a value (or the nearest one around it that is stated)."""
        node = self.root.at(path)
        return Fault(node.file, node.line, dotted(path), what)


def load(path: Path) -> LoadedRecipe:
    """Read a recipe and its bases, and check everything that can be checked without the files it names.

    Where rules over several values are broken, faults of those files are reported with them. None of the recipe's
    code runs. Raises RecipeError with all faults, each with the file and line that states the value.
    """
    merged = read_merged(path)
    if merged.root is None or merged.faults:
        raise RecipeError(merged.faults)
    try:
        recipe = Recipe.model_validate(merged.root.plain())
    except ValidationError as err:
        from recipes.wording import faults_of

        raise RecipeError(_sorted(faults_of(err, merged.root), path)) from err
    digests = {str(document.path): document.digest for document in merged.documents}
    loaded = LoadedRecipe(recipe, path, merged.root, digests)
    broken = [loaded.fault(where, what) for where, what in rules.check(recipe)]
    if broken:
        raise RecipeError(_sorted([*broken, *_file_faults(loaded)], path))
    return loaded


def dump_merged(loaded: LoadedRecipe) -> str:
    """Return the merged recipe as YAML that loads to the same recipe when put in the recipe's place."""
    import yaml

    from recipes.yaml_text import is_plain_string

    class Dumper(yaml.SafeDumper):
        """Quotes every string that would not read back as itself; aliases are written out."""

        def ignore_aliases(self, data: Any) -> bool:
            del data
            return True

    def string(dumper: Dumper, text: str) -> yaml.ScalarNode:
        # Double quotes escape what the emitter would fold or a reader could not see (line breaks of Unicode).
        style = '"' if not text.isprintable() else None if is_plain_string(text) else "'"
        return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)

    Dumper.add_representer(str, string)
    dumped = yaml.dump(
        loaded.merged, Dumper=Dumper, sort_keys=False, allow_unicode=True, default_flow_style=None, width=110
    )
    return str(dumped)


def _file_faults(loaded: LoadedRecipe) -> tuple[Fault, ...]:
    from recipes.files import gather

    try:
        gather(loaded)
    except RecipeError as err:
        return err.faults
    return ()


def _sorted(faults: list[Fault], path: Path) -> list[Fault]:
    """Order faults by place, the recipe's own file first; what is found twice is told once."""
    return sorted(dict.fromkeys(faults), key=lambda fault: (fault.file != str(path), fault.file, fault.line))
