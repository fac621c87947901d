"""The key function: the same for equal values however spelt, another for any change, and every change is named."""

from __future__ import annotations

import copy
import json
import math
from collections import OrderedDict
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from artifacts.keys import Action, Difference, canonical_json, differences

names = st.text(max_size=6)
leaves = (
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False, allow_infinity=False) | names
)
values = st.recursive(leaves, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(names, inner, max_size=4))
objects = st.dictionaries(names, values, max_size=5)


def reordered(value: Any) -> Any:
    """Return an equal value whose every object lists its names the other way round."""
    if isinstance(value, dict):
        return {name: reordered(item) for name, item in reversed(value.items())}
    return [reordered(item) for item in value] if isinstance(value, list) else value


def paths_of(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the way to every value inside a value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(found for name, item in inner for found in paths_of(item, (*path, name)))]


def replaced(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    if not path:
        return new
    value = copy.copy(value)
    value[path[0]] = replaced(value[path[0]], path[1:], new)
    return value


@given(values)
def test_canonical_json_does_not_see_the_order_of_names(value: Any) -> None:
    assert canonical_json(reordered(value)) == canonical_json(value)


@given(values)
def test_canonical_json_is_json_and_loses_nothing(value: Any) -> None:
    text = canonical_json(value)
    back = json.loads(text)
    assert canonical_json(back) == text
    assert back == value
    assert b"\n" not in text


@given(objects, leaves, st.data())
def test_any_single_change_changes_the_key_and_is_named(params: dict[str, Any], new: Any, data: st.DataObject) -> None:
    path = data.draw(st.sampled_from(paths_of(params)))
    assume(path)
    changed = replaced(params, path, new)
    old_action, new_action = Action("export", 1, params=params), Action("export", 1, params=changed)
    same = canonical_json(params) == canonical_json(changed)
    assert (old_action.key == new_action.key) == same
    found = differences(old_action.preimage(), new_action.preimage())
    assert len(found) == (0 if same else 1)
    for difference in found:
        assert difference.path.startswith("params.")


@given(objects, objects)
def test_no_differences_exactly_where_canonical_json_is_equal(old: dict[str, Any], new: dict[str, Any]) -> None:
    assert (differences(old, new) == []) == (canonical_json(old) == canonical_json(new))
    assert differences(old, copy.deepcopy(old)) == []
    assert differences(old, reordered(old)) == []


@given(objects, objects)
def test_differences_are_the_same_both_ways(old: dict[str, Any], new: dict[str, Any]) -> None:
    there, back = differences(old, new), differences(new, old)
    assert there == [Difference(d.path, d.new, d.old, added=d.removed, removed=d.added) for d in back]
    for difference in there:
        left, right = str(difference)[len(difference.path) + 1 :].split(" -> ", 1)
        assert left != right or " -> " in str(difference.old) + str(difference.new)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ({"opset": 17}, {"opset": 18}, ["opset 17 -> 18"]),
        ({"a": {"b": [1, 2]}}, {"a": {"b": [1, 3]}}, ["a.b[1] 2 -> 3"]),
        ({"a": [1]}, {"a": [1, 2]}, ["a [1] -> [1, 2]"]),
        ({"a": None}, {}, ["a null -> (none)"]),
        ({}, {"a": None}, ["a (none) -> null"]),
        ({}, {"a": {}}, ["a (none) -> {}"]),
        ({"a": {}}, {"a": []}, ["a {} -> []"]),
        ({"a": 1}, {"a": True}, ["a 1 -> true"]),
        ({"a": 1}, {"a": 1.0}, ["a 1 -> 1.0"]),
        ({"a": 0.0}, {"a": -0.0}, ["a 0.0 -> -0.0"]),
        ({"a": [1]}, {"a": [1.0]}, ["a[0] 1 -> 1.0"]),
        ({"a": "18"}, {"a": 18}, ['a "18" -> 18']),
        ({"a": "null"}, {"a": None}, ['a "null" -> null']),
        ({"in": "0" * 64}, {"in": "f" * 64}, ["in 000000000000… -> ffffffffffff…"]),
        ({"b": 1, "a": 1}, {"a": 2, "b": 2}, ["a 1 -> 2", "b 1 -> 2"]),
        ({"v": "10.9.0.34"}, {"v": "10.13.3.9"}, ["v 10.9.0.34 -> 10.13.3.9"]),
        (
            {"a": list(range(30))},
            {"a": [*range(30), 30]},
            [f"a {json.dumps(list(range(30)))} -> {json.dumps(list(range(31)))}"],
        ),
        ({"a": {"b": "x" * 80}}, {"a": 1}, [f'a {{"b": "{"x" * 50}... -> 1']),
    ],
)
def test_how_differences_read(old: dict[str, Any], new: dict[str, Any], said: list[str]) -> None:
    assert [str(difference) for difference in differences(old, new)] == said


def test_each_part_of_an_action_enters_its_key() -> None:
    base = Action("export", 1, {"opset": 17}, {"model.onnx": "a" * 64}, {"torch": "2.9.0"})
    others = [
        Action("simplify", 1, base.params, base.inputs, base.toolchain),
        Action("export", 2, base.params, base.inputs, base.toolchain),
        Action("export", 1, {"opset": 18}, base.inputs, base.toolchain),
        Action("export", 1, base.params, {"model.onnx": "b" * 64}, base.toolchain),
        Action("export", 1, base.params, {"other.onnx": "a" * 64}, base.toolchain),
        Action("export", 1, base.params, base.inputs, {"torch": "2.9.1"}),
        Action("export", 1, base.params, base.inputs, {}),
    ]
    keys = {action.key for action in (base, *others)}
    assert len(keys) == 1 + len(others)
    for other in others:
        assert differences(base.preimage(), other.preimage())


def test_the_key_is_stable_across_versions_of_this_code() -> None:
    # A change here throws away every cache there is: it needs a decision record, not a new number.
    action = Action("export", 1, {"opset": 18, "é": [1, 2.5, None, True]}, {"model.onnx": "a" * 64}, {"torch": "2.9.0"})
    assert (
        canonical_json(action.preimage())
        == (
            '{"inputs":{"model.onnx":"' + "a" * 64 + '"},"params":{"opset":18,"é":[1,2.5,null,true]},'
            '"stage":"export","stage_version":1,"toolchain":{"torch":"2.9.0"}}'
        ).encode()
    )
    assert action.key == "0c3a482677e07b6a1631415be8250b575b419fe2cc5672895c0e065e59e5f829"  # by sha256sum


class Colour(str, Enum):
    RED = "red"


@pytest.mark.parametrize(
    "value",
    [
        Path("x"),
        ("a",),
        {"a"},
        b"x",
        Colour.RED,
        {"a": [OrderedDict()]},
        {1: "x"},
        {"a": {None: 1}},
        {"a": object()},
        1j,
    ],
)
def test_what_is_not_json_enters_no_key(value: object) -> None:
    with pytest.raises(TypeError):
        canonical_json(value)
    with pytest.raises(TypeError):
        _ = Action("export", 1, {"value": value}).key


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, "\ud800"])
def test_what_json_cannot_spell_enters_no_key(value: object) -> None:
    with pytest.raises(ValueError, match=r"cannot enter a key|surrogates"):
        canonical_json({"a": [value]})


def test_the_place_of_a_fault_is_named() -> None:
    with pytest.raises(TypeError, match=r"\$\.params\.a\[1\]: PosixPath cannot enter a key"):
        _ = Action("export", 1, {"a": [1, Path("x")]}).key
