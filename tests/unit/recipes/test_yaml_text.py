"""YAML text: plain data by the 1.2 core schema, every value with its line, and a message of its own for each trap."""

from __future__ import annotations

import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recipes.errors import RecipeError
from recipes.yaml_text import MAX_BYTES, MAX_FAULTS, is_plain_string, parse, read


def faults(tmp_path, text):
    path = tmp_path / "r.yaml"
    if isinstance(text, bytes):
        path.write_bytes(text)
    else:
        path.write_bytes(text.encode())
    with pytest.raises(RecipeError) as caught:
        parse(path)
    return [str(fault).replace(f"{path}", "r.yaml") for fault in caught.value.faults]


def value(tmp_path, text):
    path = tmp_path / "r.yaml"
    path.write_text(text)
    return parse(path).root.plain()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("yes", "yes"), ("no", "no"), ("on", "on"), ("off", "off"), ("Yes", "Yes"), ("y", "y"),
        ("true", True), ("TRUE", True), ("false", False), ("False", False),
        ("null", None), ("~", None), ("", None), ("'null'", "null"),
        ("17", 17), ("-3", -3), ("+4", 4), ("0", 0), ("9223372036854775807", 9223372036854775807),
        ("1.5", 1.5), ("1e-3", 0.001), (".5", 0.5), ("1.", 1.0), ("10.10", 10.1),
        ("1_000", "1_000"), ("1:30", "1:30"), ("2020-01-01", "2020-01-01"), ("2001-12-14T21:59:43Z", "2001-12-14T21:59:43Z"),
        ("sm89", "sm89"), ("'010'", "010"), ('"1.5"', "1.5"), ("!!str 10.10", "10.10"), ("! 12", "12"),
        ("=", "="), ("a: b".replace(": ", ":"), "a:b"),
    ],
)  # fmt: skip
def test_scalars_follow_yaml_1_2(tmp_path, text, expected):
    found = value(tmp_path, f"key: {text}\n")["key"]
    assert found == expected
    assert type(found) is type(expected)


def test_on_is_a_key_like_any_other(tmp_path):
    assert value(tmp_path, "on: 1\nno: {off: yes}\n") == {"on": 1, "no": {"off": "yes"}}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3\n", "r.yaml:3: a: key 'a' is stated twice (first in line 1)"),
        ("x:\n  y: 1\n  'y': 2\n", "r.yaml:3: x.y: key 'y' is stated twice (first in line 2)"),
        ("a: {}\nb:\n  <<: {c: 1}\n", "r.yaml:3: b: merge keys (<<) are not read; put what is shared into a base file: include: base.yaml"),
        ("a: 1\n---\nb: 2\n", "r.yaml:2: a second document begins here ('---'); a file holds one recipe"),
        ("a:\n\tb: 1\n", "r.yaml:2: a tab used as indentation; YAML takes spaces only"),
        ("a:\n  b: 1\n \tc: 2\n", "r.yaml:3: a tab used as indentation; YAML takes spaces only"),
        (b"a: 1\nb: caf\xe9\n", "r.yaml:2: not UTF-8: byte 0xe9 at offset 11; save the file as UTF-8"),
        (b"\xef\xbb\xbfa: \xff\n", "r.yaml:1: not UTF-8: byte 0xff at offset 6; save the file as UTF-8"),
        ("a: 1\n".encode("utf-16"), "r.yaml: is UTF-16; save it as UTF-8"),
        ("a: 1\nb: !!python/object:os.system x\n", "r.yaml:2: b: unknown tag !!python/object:os.system; recipes are plain data, remove it"),
        ("a: !foo [1]\n", "r.yaml:1: a: unknown tag !foo; recipes are plain data, remove it"),
        ("a: !!set {b}\n", "r.yaml:1: a: unknown tag !!set; recipes are plain data, remove it"),
        ("a: !!int 3\n", "r.yaml:1: a: unknown tag !!int; recipes are plain data, remove it"),
        ("a: 1\n2: x\n", "r.yaml:2: a key must be a string, found the number 2; put it in quotes: '2'"),
        ("a: {true: x}\n", "r.yaml:1: a: a key must be a string, found true; put it in quotes: 'true'"),
        ("? [a]\n: 1\n", "r.yaml:1: a key must be a string, found a list"),
        ("a: [0644]\n", "r.yaml:1: a[0]: 0644 can be read as octal, hexadecimal or decimal: write it in decimal without leading zeros, or in quotes where a string is meant"),
        ("a: 0o17\n", "r.yaml:1: a: 0o17 can be read as octal, hexadecimal or decimal: write it in decimal without leading zeros, or in quotes where a string is meant"),
        ("a: 0x1F\n", "r.yaml:1: a: 0x1F can be read as octal, hexadecimal or decimal: write it in decimal without leading zeros, or in quotes where a string is meant"),
        ("a: .nan\n", "r.yaml:1: a: .nan is not a finite number; put it in quotes where a string is meant"),
        ("a: 1e999\n", "r.yaml:1: a: 1e999 is not a finite number; put it in quotes where a string is meant"),
        ("a: " + "9" * 64 + "\n", "r.yaml:1: a: " + "9" * 40 + "... does not fit 64 bits; put it in quotes where a string is meant"),
        ("a: 9223372036854775808\n", "r.yaml:1: a: 9223372036854775808 does not fit 64 bits; put it in quotes where a string is meant"),
        ("a: *b\n", "r.yaml:1: a: alias *b has no anchor &b before it"),
        ("a: &b [*b]\n", "r.yaml:1: a[0]: alias *b stands inside the value that it names"),
        ('a: "x\\0y"\n', "r.yaml:1: a: a string holds a NUL or half a surrogate pair; remove it"),
        ("a: x\ny: \x01\n", "r.yaml:2: control character U+0001; remove it"),
        ("", "r.yaml: is empty; a recipe begins with 'enginery: 1'"),
        ("# only a comment\n", "r.yaml: is empty; a recipe begins with 'enginery: 1'"),
        ("---\n...\n", "r.yaml: is empty; a recipe begins with 'enginery: 1'"),
        ("- a\n", "r.yaml:1: expected a mapping (key: value), found a list"),
        ("# x\njust text\n", 'r.yaml:2: expected a mapping (key: value), found the string "just text"'),
        ("null\n", "r.yaml:1: expected a mapping (key: value), found nothing"),
        ("a: 1\nb: 'x\n", "r.yaml:3: not valid YAML: found unexpected end of stream, while scanning a quoted scalar that begins in line 2"),
        ("a: b: c\n", "r.yaml:1: not valid YAML: mapping values are not allowed in this context"),
        ("%YAML 1.3\n---\na: 1\n", "r.yaml:1: not valid YAML: found incompatible YAML document"),
        ("a: " + "[" * 100 + "]" * 100, "r.yaml:1: nested more than 64 deep"),
        ("? " * 1000, "r.yaml:1: nested more than 64 deep"),
        ("a: [" + "x," * 100_001 + "]", "r.yaml:1: more than 100000 values, anchors (&) and aliases (*) expanded"),
    ],
)  # fmt: skip
def test_each_trap_has_its_own_message(tmp_path, text, message):
    assert message in faults(tmp_path, text)


def test_a_tab_that_is_not_indentation_is_fine(tmp_path):
    assert value(tmp_path, "a:\t1\nb: {\n\tc: 2}\nd: |\n  x\n  \ty\n") == {"a": 1, "b": {"c": 2}, "d": "x\n\ty\n"}


def test_all_faults_of_a_file_are_told_in_order(tmp_path):
    found = faults(tmp_path, "a: !x 1\na: 2\n3: 4\nb: 010\n")
    assert [fault.split(":")[1] for fault in found] == ["1", "2", "3", "4"]


def test_faults_without_end_are_cut(tmp_path):
    found = faults(tmp_path, "a: 1\n" * 5000)
    assert len(found) == MAX_FAULTS + 1
    assert found[-1].endswith("the rest of the file was not read")


def test_anchors_within_reason_are_values(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("a: &x {b: [1, 2]}\nc: *x\nd: &k key\ne: {*k : 3}\n")
    root = parse(path).root
    assert root.plain() == {"a": {"b": [1, 2]}, "c": {"b": [1, 2]}, "d": "key", "e": {"key": 3}}
    assert root.at(("c",)).line == 2
    assert root.at(("c", "b", 1)).line == 1


def test_anchors_that_explode_are_refused(tmp_path):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9)]
    assert faults(tmp_path, "\n".join(lines)) == [
        "r.yaml:5: more than 100000 values, anchors (&) and aliases (*) expanded"
    ]


def test_every_value_knows_its_line(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("\ufeff# comment\na:\n  - x\n  -\n    y: 1\n\nb: {c:\n  [1,\n   2]}\n")
    root = parse(path).root
    lines = {path: node.line for path, node in root.walk()}
    assert lines[("a",)] == 2
    assert lines[("a", 0)] == 3
    assert lines[("a", 1, "y")] == 5
    assert lines[("b", "c")] == 7
    assert lines[("b", "c", 1)] == 9
    assert root.at(("b", "nothing", 3)).line == 7


def test_what_cannot_be_read_is_told(tmp_path):
    (tmp_path / "digits.yaml").write_text("a: 1")
    assert read(tmp_path / "digit.yaml")[1][0].what == "no such file (did you mean 'digits.yaml'?)"
    assert read(tmp_path / "zzz.yaml")[1][0].what == "no such file"
    assert "there is no folder" in read(tmp_path / "nowhere" / "a.yaml")[1][0].what
    assert read(tmp_path)[1][0].what == "is a folder; expected a YAML file"
    os.mkfifo(tmp_path / "pipe")
    assert read(tmp_path / "pipe")[1][0].what == "is not a regular file; expected a YAML file"
    assert "cannot be read" in read(tmp_path / "a\0b")[1][0].what
    assert "cannot be read" in read(tmp_path / ("x" * 300))[1][0].what


def test_a_document_over_the_limit_is_refused(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("a: " + "x" * (MAX_BYTES - 3))
    assert parse(path).root.plain() == {"a": "x" * (MAX_BYTES - 3)}
    path.write_text("a: " + "x" * (MAX_BYTES - 2))
    assert f"has {MAX_BYTES + 1} bytes; a recipe has at most {MAX_BYTES}" in read(path)[1][0].what


@given(
    st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs")), max_size=12)
    | st.from_regex(r"[-+0-9.exob_]{1,6}", fullmatch=True)
)
@settings(max_examples=300, deadline=None)
def test_plain_strings_read_back_as_themselves(tmp_path_factory, text):
    """Where `is_plain_string` is false, the text without quotes is something else, or a fault."""
    path = tmp_path_factory.mktemp("plain") / "r.yaml"
    path.write_text(f"key: {text}\n")
    document, found = read(path)
    same = not found and document is not None and document.root.plain() == {"key": text}
    if not is_plain_string(text):
        assert not same
    elif text.isalnum() and text.isascii():
        assert same
