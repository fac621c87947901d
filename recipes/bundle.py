"""Code bundles: a recipe's own code with every local module that it imports, as one deterministic tar.

The tar's names are import names, so that neither the folder of the recipe nor that of the model enters its digest.
Nothing is executed: imports are found by reading the code.
"""

from __future__ import annotations

import glob
import hashlib
import os
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

from artifacts.refs import CHUNK_BYTES, digest_bytes, digest_file
from recipes.errors import Fault, RecipeError
from recipes.files import CodeBundle
from recipes.imports import Import, imports_of, parse_source, star_names, top_level_names
from recipes.nodes import beside, near

MAX_FILES: Final = 10_000
MAX_BYTES: Final = 512 << 20
_BLOCK: Final = 512
# Names that Python finds Enginery's own packages under where a recipe's code runs, whatever lies beside that code.
_TAKEN: Final = frozenset({"artifacts", "enginery", "flows", "recipes", "tasks"})


def collect(path: Path, callable_name: str, recipe_root: Path, include: Sequence[str] = ()) -> CodeBundle:
    """Find the code that `path` needs: itself, local modules that it imports (and they import), and `include` globs.

    A module is looked for in the code's own root (the first folder above `path` without an `__init__.py`), then in the
    recipe's folder; what is in neither, and not in the standard library, is a package. `include` is relative to the
    recipe's folder; such files keep their place below the code's root, or else below the recipe's folder.
    Raises RecipeError: no such file or callable, syntax errors (at their line), a glob that matches nothing.
    """
    _require_file(path)
    looked_for: dict[Path, bool] = {}
    root = _code_root(path, looked_for)
    module = _module_name(path, root)
    walk = _Walk((root, _absolute(recipe_root)), shown=path, looked_for=looked_for)
    walk.add_entry(path, module)
    _require_callable(walk, path, module, callable_name)
    for pattern in include:
        walk.include(pattern, recipe_root)
    members = dict(sorted(walk.members.items()))
    _require_own_names(members)
    digest, size = hashlib.sha256(), 0
    for chunk in _tar_chunks(members, walk.sizes):
        digest.update(chunk)
        size += len(chunk)
    return CodeBundle(
        digest=digest.hexdigest(),
        size=size,
        entry=f"{module}:{callable_name}",
        members=members,
        digests={name: walk.digests[name] for name in members},
        packages=tuple(sorted(walk.packages)),
        looked_for=walk.looked_for,
        globs=tuple((pattern, _absolute(recipe_root)) for pattern in include),
    )


def _require_own_names(members: Mapping[str, Path]) -> None:
    """Refuse modules that would be hidden. Raises RecipeError, a fault for each name."""
    hidden: dict[str, Path] = {}
    for name, path in members.items():
        top = name.split("/")[0].removesuffix(".py")
        if top in _TAKEN:
            hidden.setdefault(top, path)
    faults = [
        Fault(
            str(path), 0, "", f"a package of Enginery is named {top!r}, and hides this module where it runs: rename it"
        )
        for top, path in sorted(hidden.items())
    ]
    if faults:
        raise RecipeError(faults)


def write_tar(bundle: CodeBundle, target: Path) -> None:
    """Write a bundle's tar, whole or not at all; raise RecipeError where its files have changed since it was collected."""
    sizes = {name: path.stat().st_size for name, path in bundle.members.items() if path.is_file()}
    gone = [str(path) for name, path in bundle.members.items() if name not in sizes]
    if gone:
        raise RecipeError([Fault(gone[0], 0, "", "is gone since the build was planned; run it again")])
    digest = hashlib.sha256()
    handle, name = tempfile.mkstemp(prefix=f".{target.name}-", dir=target.parent)
    try:
        with os.fdopen(handle, "wb") as stream:
            for chunk in _tar_chunks(bundle.members, sizes):
                digest.update(chunk)
                stream.write(chunk)
        if digest.hexdigest() != bundle.digest:
            changed = [path for member, path in bundle.members.items() if digest_file(path) != bundle.digests[member]]
            at = str(changed[0]) if changed else bundle.entry
            raise RecipeError([Fault(at, 0, "", "changed since the build was planned; run it again")])
        Path(name).replace(target)
    finally:
        Path(name).unlink(missing_ok=True)


class _Walk:
    """Follows imports from file to file, collecting members, their digests, and packages."""

    def __init__(self, roots: tuple[Path, ...], shown: Path, looked_for: dict[Path, bool]) -> None:
        self.roots = roots
        self.looked_for = looked_for
        self.members: dict[str, Path] = {}
        self.digests: dict[str, str] = {}
        self.sizes: dict[str, int] = {}
        self.packages: set[str] = set()
        self._bytes = 0
        self._shown = shown
        self._stars: dict[str, tuple[str, ...]] = {}
        self._queue: list[tuple[Path, str, str]] = []

    def add_entry(self, path: Path, module: str) -> None:
        """Add the entry file, the packages around it, and all that they import."""
        root = _code_root(path, self.looked_for)
        self._add_module(root, module)
        self._follow()

    def _add_module(self, root: Path, module: str) -> bool:
        """Queue a module below a root and the `__init__.py` of every package around it; False where it is not there."""
        parts = module.split(".")
        file = self._module_file(root, parts)
        if file is None:
            return False
        for count in range(1, len(parts)):
            init = root.joinpath(*parts[:count], "__init__.py")
            if _is_file(init, self.looked_for):
                self._add_file(init, "/".join([*parts[:count], "__init__.py"]), ".".join(parts[:count]))
        name = "/".join([*parts, "__init__.py"] if file.name == "__init__.py" else [*parts[:-1], file.name])
        self._add_file(file, name, module)
        return True

    def _module_file(self, root: Path, parts: Sequence[str]) -> Path | None:
        package = root.joinpath(*parts, "__init__.py")
        plain = root.joinpath(*parts[:-1], f"{parts[-1]}.py")
        return next((path for path in (package, plain) if _is_file(path, self.looked_for)), None)

    def _add_file(self, path: Path, name: str, module: str) -> None:
        if name not in self.members:
            self.members[name] = path
            self._queue.append((path, name, module))

    def _follow(self) -> None:
        while self._queue:
            path, name, module = self._queue.pop()
            source = self._read(path, name)
            tree = parse_source(source, self._as_shown(path))
            if name.endswith("__init__.py"):
                self._stars[module] = star_names(tree)
            for found in imports_of(tree, module, is_package=name.endswith("__init__.py")):
                self._resolve(found)

    def _read(self, path: Path, name: str) -> bytes:
        try:
            source = path.read_bytes()
        except OSError as err:
            raise RecipeError([Fault(str(path), 0, "", f"cannot be read: {err.strerror}")]) from err
        self.digests[name], self.sizes[name] = digest_bytes(source), len(source)
        return source

    def _resolve(self, found: Import) -> None:
        parts = found.module.split(".")
        for root in self.roots:
            # Of `import a.b.c` the parts that are local modules count: `a.b` may be one, and `c` a name in it.
            local = [self._add_module(root, ".".join(parts[:count])) for count in range(1, len(parts) + 1)]
            names = list(found.names)
            if "*" in names:
                names += self._star(root, found.module)
            local += [self._add_module(root, f"{found.module}.{name}") for name in names]
            if any(local):
                return
        if parts[0] and parts[0] not in sys.stdlib_module_names and parts[0] != "__main__":
            self.packages.add(parts[0])

    def _star(self, root: Path, module: str) -> tuple[str, ...]:
        if module not in self._stars:
            init = root.joinpath(*module.split("."), "__init__.py")
            self._stars[module] = (
                star_names(parse_source(init.read_bytes(), init)) if _is_file(init, self.looked_for) else ()
            )
        return self._stars[module]

    def include(self, pattern: str, recipe_root: Path) -> None:
        """Add what a glob matches (a folder stands for all that is in it); Python files are followed like imports."""
        folder = _absolute(recipe_root)
        found = sorted(set(matching(pattern, folder)))
        if not found:
            what = f"{pattern!r} matches no file in {recipe_root}"
            raise RecipeError([Fault(str(self._shown), 0, "include", what)])
        for path in found:
            root = next((root for root in self.roots if path.is_relative_to(root)), None)
            if root is None:
                what = f"{pattern!r} takes {path.name}, which is neither in the code's folder nor in the recipe's"
                raise RecipeError([Fault(str(self._shown), 0, "include", what)])
            inner = path.relative_to(root)
            name = inner.as_posix()
            if name in self.members:
                continue
            if path.suffix == ".py":
                parts = inner.parent.parts if inner.name == "__init__.py" else inner.with_suffix("").parts
                self._add_file(path, name, ".".join(parts))
            else:
                self.members[name], self.sizes[name] = path, path.stat().st_size
                self._bytes += self.sizes[name]
                self._check_limits(pattern)
                self.digests[name] = digest_file(path)
        self._follow()

    def _check_limits(self, pattern: str) -> None:
        if len(self.members) > MAX_FILES or self._bytes > MAX_BYTES:
            limit = f"at most {MAX_FILES} files and {MAX_BYTES >> 20} MiB travel with the code"
            what = f"{pattern!r} takes too much: {limit} (weights and data are named in the recipe)"
            raise RecipeError([Fault(str(self._shown), 0, "include", what)])

    def _as_shown(self, path: Path) -> Path:
        """Name a file as the recipe does, where it is the recipe's own; a neighbour by its place beside that."""
        base = _absolute(self._shown).parent
        return self._shown.parent / path.relative_to(base) if path.is_relative_to(base) else path


def _require_file(path: Path) -> None:
    if path.is_dir():
        raise RecipeError([Fault(str(path), 0, "", "is a folder; expected a Python file")])
    if not path.is_file():
        raise RecipeError([Fault(str(path), 0, "", f"no such file{beside(path)}")])
    stem = path.parent.name if path.name == "__init__.py" else path.stem
    if "." in stem or not stem:
        raise RecipeError(
            [Fault(str(path), 0, "", f"{path.name!r} cannot be imported; leave the dots out of its name")]
        )


def _absolute(path: Path) -> Path:
    """Return an absolute path by its spelling: links are not followed, since names in the tar are names as written."""
    return Path(os.path.normpath(path.absolute()))


def _is_file(path: Path, looked_for: dict[Path, bool]) -> bool:
    found = looked_for[path] = path.is_file()
    return found


def _code_root(path: Path, looked_for: dict[Path, bool]) -> Path:
    folder = _absolute(path).parent
    while _is_file(folder / "__init__.py", looked_for) and folder != folder.parent:
        folder = folder.parent
    return folder


def _module_name(path: Path, root: Path) -> str:
    inner = _absolute(path).relative_to(root)
    return ".".join(inner.parent.parts if inner.name == "__init__.py" else inner.with_suffix("").parts)


def _require_callable(walk: _Walk, path: Path, module: str, name: str) -> None:
    tree = parse_source(walk.members[_entry_name(path, module)].read_bytes(), path)
    names, open_ended = top_level_names(tree)
    if name not in names and not open_ended:
        defined = sorted(known for known in names if not known.startswith("_"))
        hint = near(name, defined)
        what = f"has no {name!r} at its top level ({hint}there: {', '.join(defined[:20]) or 'nothing'})"
        raise RecipeError([Fault(str(path), 0, "", what)])


def _entry_name(path: Path, module: str) -> str:
    plain = f"{module.replace('.', '/')}.py"
    return f"{module.replace('.', '/')}/__init__.py" if path.name == "__init__.py" else plain


def matching(pattern: str, folder: Path) -> Iterator[Path]:
    """Yield the files that an `include` glob takes, relative to a folder; a folder stands for all that is in it."""
    for name in glob.iglob(pattern, root_dir=folder, recursive=True):  # noqa: PTH207  pathlib's ** took no files before 3.13
        path = Path(os.path.normpath(folder / name))
        for file in _below(path) if path.is_dir() else [path]:
            if "__pycache__" not in file.parts and file.suffix != ".pyc" and file.is_file():
                yield file


def _below(folder: Path) -> Iterator[Path]:
    for parent, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(parent, name) for name in files if not name.startswith("."))


# ---- the tar ---------------------------------------------------------------------------------------------------------


def _tar_chunks(members: Mapping[str, Path], sizes: Mapping[str, int]) -> Iterator[bytes]:
    """Yield a POSIX ustar archive of plain files: sorted names, mode 0644, no times and no owners.

    Written by hand (IEEE 1003.1, pax: ustar interchange format), since the bytes of `tarfile` may differ between
    versions of Python, and the digest enters keys.
    """
    total = 0
    for name in sorted(members):
        yield _header(name, sizes[name])
        written = 0
        with members[name].open("rb") as stream:
            while chunk := stream.read(min(CHUNK_BYTES, sizes[name] - written)):
                written += len(chunk)
                yield chunk
        padded = -(-sizes[name] // _BLOCK) * _BLOCK
        yield bytes(padded - written)
        total += _BLOCK + padded
    yield bytes(2 * _BLOCK)


def _header(name: str, size: int) -> bytes:
    prefix, short = _split(name)
    start = short.ljust(100, b"\0") + b"0000644\0" + b"0000000\0" * 2 + b"%011o\0" % size + b"00000000000\0"
    end = b"0" + bytes(100) + b"ustar\x0000" + bytes(64) + b"0000000\0" * 2 + prefix.ljust(155, b"\0") + bytes(12)
    return start + b"%06o\0 " % sum(start + b" " * 8 + end) + end


def _split(name: str) -> tuple[bytes, bytes]:
    raw = name.encode()
    if len(raw) <= 100:
        return b"", raw
    for at in _slashes(raw):
        if at <= 155 and len(raw) - at - 1 <= 100:
            return raw[:at], raw[at + 1 :]
    raise RecipeError([Fault(name, 0, "", "the path is too long for an archive (255 bytes); use shorter folder names")])


def _slashes(raw: bytes) -> Iterable[int]:
    return (index for index, byte in enumerate(raw) if byte == ord("/"))
