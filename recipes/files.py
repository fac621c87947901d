"""What a recipe names on disk: digests, code bundles and data sets, found without running any of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class LocalFile:
    """One file that a recipe names: the name it has among a stage's inputs, its SHA-256 and size in bytes.

    `address` is where it lies: a local path, or `s3://` for a remote one (whose size is -1: unknown).
    """

    name: str
    digest: str
    size: int
    address: str


@dataclass(frozen=True)
class CodeBundle:
    """A recipe's own code with every local module that it imports, as one deterministic tar.

    `digest` and `size` are the tar's; `entry` is `module:callable` inside it; `members` maps names in the tar to
    local files, `digests` to their SHA-256; `packages` are the installed packages that the code imports (top-level
    import names, standard library excepted).
    """

    digest: str
    size: int
    entry: str
    members: Mapping[str, Path]
    digests: Mapping[str, str]
    packages: tuple[str, ...]


@dataclass(frozen=True)
class DatasetFiles:
    """A data set's content: an .npz, a folder of arrays or images (digest over sorted names and bytes), or code."""

    format: Literal["npz", "arrays", "images", "callable"]
    digest: str
    path: Path
    code: CodeBundle | None = None


@dataclass(frozen=True)
class RecipeFiles:
    """Everything that a recipe names, with content digests."""

    code: CodeBundle | None = None
    weights: LocalFile | None = None
    model: tuple[LocalFile, ...] = ()
    calibration: DatasetFiles | None = None
    labelled: DatasetFiles | None = None
    metric: CodeBundle | None = None
