"""Pydantic's errors in the words of a recipe: `path: what is wrong (allowed: ...)`, with near misses."""

from __future__ import annotations

import types
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Final, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from recipes.errors import Fault
from recipes.nodes import Key, Node, described, dotted, near
from recipes.schema import (
    AXIS_PATTERN,
    CODE_PATTERN,
    DURATION_PATTERN,
    IDENTIFIER_PATTERN,
    NAME_PATTERN,
    PART_PATTERN,
    SHA256_PATTERN,
    SIZE_PATTERN,
    OnnxSource,
    PaddleSource,
    Recipe,
    TorchSource,
)
from recipes.yaml_text import is_plain_string

_FRAMEWORKS: Final[Mapping[str, type[BaseModel]]] = {
    "torch": TorchSource,
    "paddle": PaddleSource,
    "onnx": OnnxSource,
}
_PATTERNS: Final[Mapping[str, str]] = {
    NAME_PATTERN: "a name of lower-case letters, digits, '.', '_' and '-', at most 63, beginning with a letter or digit",
    AXIS_PATTERN: "the name of a dynamic axis: lower-case letters, digits and '_', beginning with a letter",
    PART_PATTERN: "a name of lower-case letters, digits, '_' and '-', at most 31, beginning with a letter",
    IDENTIFIER_PATTERN: "the name of a callable in the file of source.model",
    SHA256_PATTERN: "a SHA-256: 64 lower-case hex digits",
    CODE_PATTERN: "file.py:callable",
    SIZE_PATTERN: "a size, such as 512MiB or 4GiB",
    DURATION_PATTERN: "a duration, such as 90s, 30m or 2h",
}
_EXPECTED: Final[Mapping[str, str]] = {
    "string_type": "a string",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "list_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "model_attributes_type": "a mapping",
}
_BOUNDS: Final[Mapping[str, tuple[str, str]]] = {
    "greater_than_equal": ("at least", "ge"),
    "less_than_equal": ("at most", "le"),
    "greater_than": ("greater than", "gt"),
    "less_than": ("less than", "lt"),
}


def faults_of(error: ValidationError, root: Node) -> list[Fault]:
    """Return what pydantic found as faults, one for each place, with the file and line that state it."""
    found: dict[tuple[Key, str], Fault] = {}
    for detail in error.errors(include_url=False):
        path, is_key = _place(detail["loc"], root)
        missing = detail["type"] == "missing"
        node = root.at(path)
        position = root.at(path[:-1]) if missing else node
        what = _what(detail, path, node, root, is_key=is_key)
        # Both sides of a union complain of one value: it is told once.
        found.setdefault((path, what), Fault(position.file, position.line, dotted(path), what))
    return list(found.values())


def _place(loc: Sequence[str | int], root: Node) -> tuple[Key, bool]:
    """Turn pydantic's location, which has tags of unions in it, into a path of the recipe; tell whether it is of a key."""
    path: Key = ()
    node = root
    for index, part in enumerate(loc):
        if _is_extent(path):  # what follows is a tag of a union
            break
        if part == "[key]" and index == len(loc) - 1:
            return path, True
        if path == ("source",) and index == 1 and part in _FRAMEWORKS:
            continue
        inside = node.value
        if isinstance(inside, dict):
            if part not in inside:  # a missing key
                return (*path, part), False
        elif not (isinstance(inside, list) and isinstance(part, int)):
            break  # a tag of a union: the fault is of the value itself
        node = node.value[part]
        path = (*path, part)
    return path, False


def _is_extent(path: Key) -> bool:
    own = path[2:] if path[:1] == ("parts",) else path
    return len(own) == 4 and own[0] == "inputs" and own[2] == "shape"


def _what(detail: Any, path: Key, node: Node, root: Node, *, is_key: bool) -> str:
    kind = str(detail["type"])
    context: Mapping[str, Any] = detail.get("ctx", {})
    if kind == "extra_forbidden":
        return _unknown_key(path, root)
    if kind == "missing":
        return "is required, and missing"
    if path == ("source",) and kind.startswith("union_tag"):
        return _framework(node)
    if _is_extent(path):
        axis = _PATTERNS[AXIS_PATTERN]
        return f"expected a size (a whole number, at least 1) or {axis}; found {described(node)}"
    if kind == "value_error":
        return str(context["error"])
    if kind == "literal_error":
        return _not_allowed(path, node, root, is_key=is_key)
    if is_key:
        return f"key {str(path[-1])!r}: expected {_PATTERNS.get(str(context.get('pattern')), 'another name')}"
    if kind in _EXPECTED:
        return f"expected {_EXPECTED[kind]}, found {described(node)}{_advice(kind, node)}"
    if kind == "string_pattern_mismatch":
        pattern = str(context["pattern"])
        return f"expected {_PATTERNS.get(pattern, pattern)}; found {described(node)}"
    if kind in _BOUNDS:
        words, name = _BOUNDS[kind]
        return f"must be {words} {context[name]:g}, found {described(node)}"
    if kind in ("too_short", "too_long"):
        return _length(context, path)
    if kind in ("string_too_short", "string_too_long"):
        return "is empty" if kind == "string_too_short" else f"is longer than {context['max_length']} characters"
    return f"{str(detail['msg'])[:1].lower()}{str(detail['msg'])[1:]}, found {described(node)}"


def _length(context: Mapping[str, Any], path: Key) -> str:
    found = context["actual_length"]
    if path[:1] == ("profiles",):
        return f"expected [min, opt, max], found {found} numbers"
    if path[-2:] == ("images", "size"):
        return f"expected [height, width], found {found} numbers"
    if "min_length" in context:
        return f"expected at least {context['min_length']}, found {found}"
    return f"expected at most {context['max_length']}, found {found}"


def _advice(kind: str, node: Node) -> str:
    value, text = node.value, node.text
    if kind == "string_type" and text and not isinstance(value, str):
        return f"; put it in quotes: '{text}'"
    if kind == "bool_type" and isinstance(value, str) and value.lower() in ("yes", "on", "y", "no", "off", "n"):
        return f"; write {'true' if value.lower() in ('yes', 'on', 'y') else 'false'}"
    if kind in ("int_type", "float_type") and isinstance(value, str) and not is_plain_string(value):
        return "; take away the quotes"
    if kind == "list_type" and value is not None and not isinstance(value, dict):
        return f"; write [{text if text is not None else value}]"
    if kind == "list_type" and isinstance(value, dict):
        return "; begin each item with '- '"
    return ""


def _framework(node: Node) -> str:
    allowed = ", ".join(_FRAMEWORKS)
    stated = node.value.get("framework") if isinstance(node.value, dict) else None
    if stated is None:
        return f"source.framework is required, and missing (allowed: {allowed})"
    hint = near(stated.value, list(_FRAMEWORKS)) if isinstance(stated.value, str) else ""
    return f"unknown framework: found {described(stated)} ({hint}allowed: {allowed})"


def _not_allowed(path: Key, node: Node, root: Node, *, is_key: bool) -> str:
    annotation = annotation_at(path[:-1] if is_key else path, root)
    if is_key:
        annotation = get_args(annotation)[0]
    allowed = [str(value) for value in get_args(annotation)]
    found = str(path[-1]) if is_key else node.value
    hint = near(found, allowed) if isinstance(found, str) else ""
    what = f"unknown key {found!r}" if is_key else f"found {described(node)}"
    return f"{what} ({hint}allowed: {', '.join(allowed)})"


def _unknown_key(path: Key, root: Node) -> str:
    model = annotation_at(path[:-1], root)
    allowed = list(model.model_fields)
    key = str(path[-1])
    hint = near(key, allowed)
    if not hint:
        places = [place for place in _places(key) if place != dotted(path)]
        hint = f"it belongs at {places[0]}; " if len(places) == 1 else ""
    if len(path) == 1:
        allowed.append("include")
    return f"unknown key {key!r} ({hint}allowed: {', '.join(allowed)})"


def _places(key: str) -> list[str]:
    """Return where in a recipe a key of this name belongs, looking one and two levels down."""
    found = [key] if key in Recipe.model_fields else []
    for name, field in Recipe.model_fields.items():
        model = _bare(field.annotation)
        if isinstance(model, type) and issubclass(model, BaseModel):
            found += [f"{name}.{key}"] if key in model.model_fields else []
            for inner_name, inner in model.model_fields.items():
                deep = _bare(inner.annotation)
                if isinstance(deep, type) and issubclass(deep, BaseModel) and key in deep.model_fields:
                    found.append(f"{name}.{inner_name}.{key}")
    return found


def annotation_at(path: Key, root: Node) -> Any:
    """Return the type that the schema has at a path: a model, a dict, a list, or a scalar's type."""
    current: Any = Recipe
    for index, part in enumerate(path):
        if path[:index] == ("source",):
            framework = root.at(("source", "framework")).value
            current = _FRAMEWORKS[framework]
        origin = get_origin(current)
        if isinstance(current, type) and origin is None and issubclass(current, BaseModel):
            current = current.model_fields[str(part)].annotation
        elif origin is dict:
            current = get_args(current)[1]
        else:
            current = get_args(current)[0]
        current = _bare(current)
    if path == ("source",):
        return _FRAMEWORKS[root.at(("source", "framework")).value]
    return current


def _bare(annotation: Any) -> Any:
    """Strip Annotated and `| None`."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return _bare(get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        inner = [part for part in get_args(annotation) if part is not type(None)]
        return _bare(inner[0]) if len(inner) == 1 else annotation
    return annotation
