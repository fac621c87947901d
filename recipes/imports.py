"""Which modules a Python file imports, and what it defines, found by reading it: nothing is executed."""

from __future__ import annotations

import ast
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from recipes.errors import Fault, RecipeError


@dataclass(frozen=True, slots=True)
class Import:
    """One imported name: the absolute module, and the names taken from it (which may be modules too)."""

    module: str
    names: tuple[str, ...] = ()


def parse_source(source: bytes, shown: Path) -> ast.Module:
    """Parse Python source; raise RecipeError with the file and line of a syntax error."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes and the like are the author's to see when it runs
            return ast.parse(source)
    except SyntaxError as err:
        raise RecipeError([Fault(str(shown), err.lineno or 0, "", f"syntax error: {err.msg}")]) from err
    except (ValueError, RecursionError, MemoryError) as err:
        raise RecipeError(
            [Fault(str(shown), 0, "", f"cannot be parsed as Python: {err or type(err).__name__}")]
        ) from err


def imports_of(tree: ast.Module, module: str, *, is_package: bool) -> list[Import]:
    """Return everything that a module imports, at any depth: also in functions, `try` and `if` blocks.

    `importlib.import_module("literal")` and `__import__("literal")` count; what stands under `if TYPE_CHECKING:` does
    not. Relative imports are made absolute; those that lead out of the package are left to fail when the code runs.
    """
    package = module if is_package else module.rpartition(".")[0]
    found: list[Import] = []
    for node in _reached(tree.body):
        if isinstance(node, ast.Import):
            found += [Import(alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = _absolute(node.module or "", node.level, package)
            if base is not None:
                found.append(Import(base, tuple(alias.name for alias in node.names)))
        elif isinstance(node, ast.Call):
            name = _literal_import(node, package)
            if name is not None:
                found.append(Import(name))
    return found


def star_names(tree: ast.Module) -> tuple[str, ...]:
    """Return the names that a module lists in `__all__`, where it is a literal."""
    for node in tree.body:
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        value = node.value if isinstance(node, (ast.Assign, ast.AnnAssign)) else None
        if any(isinstance(target, ast.Name) and target.id == "__all__" for target in targets):
            items = value.elts if isinstance(value, (ast.List, ast.Tuple)) else []
            return tuple(str(item.value) for item in items if isinstance(item, ast.Constant))
    return ()


def top_level_names(tree: ast.Module) -> tuple[set[str], bool]:
    """Return the names that a module binds at its top level, and whether it may bind more (a star import, __getattr__)."""
    names: set[str] = set()
    for node in _top_level(tree.body):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)}
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names |= {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
    return names - {"*"}, bool(names & {"*", "__getattr__"})


def _top_level(body: Iterable[ast.stmt]) -> Iterator[ast.stmt]:
    for node in body:
        yield node
        if isinstance(node, (ast.If, ast.Try, ast.With, ast.For, ast.While)):
            for part in ("body", "orelse", "finalbody"):
                yield from _top_level(getattr(node, part, []))
            for handler in getattr(node, "handlers", []):
                yield from _top_level(handler.body)


def _reached(body: Iterable[ast.AST]) -> Iterator[ast.AST]:
    """Yield every node below, but for what only type checkers see."""
    stack = list(body)
    while stack:
        node = stack.pop()
        yield node
        if isinstance(node, ast.If) and _is_type_checking(node.test):
            stack.extend(node.orelse)
        else:
            stack.extend(ast.iter_child_nodes(node))


def _is_type_checking(test: ast.expr) -> bool:
    name = test.attr if isinstance(test, ast.Attribute) else test.id if isinstance(test, ast.Name) else ""
    return name == "TYPE_CHECKING"


def _absolute(module: str, level: int, package: str) -> str | None:
    if level == 0:
        return module
    parts = package.split(".") if package else []
    if level > len(parts):
        return None
    base = ".".join(parts[: len(parts) - level + 1])
    return f"{base}.{module}" if module else base


def _literal_import(call: ast.Call, package: str) -> str | None:
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    arguments = [*call.args[:1], *(word.value for word in call.keywords if word.arg == "name")]
    if name not in ("import_module", "__import__") or not arguments:
        return None
    literal = arguments[0].value if isinstance(arguments[0], ast.Constant) else None
    bare = literal.lstrip(".") if isinstance(literal, str) else ""
    if not isinstance(literal, str) or not all(part.isidentifier() for part in bare.split(".")):
        return None
    return _absolute(bare, len(literal) - len(bare), package)
