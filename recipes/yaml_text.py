"""YAML as recipes use it: plain data by the 1.2 core schema, with a file and a line for every value.

Values are built from the parser's events, and never by a constructor, so that nothing in a file can make
anything but mappings, lists, strings, numbers, true, false and null. `yes`, `no`, `on`, `off` and dates are strings.
"""

from __future__ import annotations

import math
import re
import stat
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import yaml

from artifacts.refs import digest_bytes
from recipes.errors import Fault, RecipeError
from recipes.nodes import Node, beside, brief, described, dotted

MAX_BYTES: Final = 1 << 20
MAX_NODES: Final = 100_000
MAX_DEPTH: Final = 64
MAX_FAULTS: Final = 100

_LOADER: Final[Any] = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_NULL: Final = frozenset(("", "~", "null", "Null", "NULL"))
_BOOL: Final = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_INT: Final = re.compile(r"[-+]?(0|[1-9][0-9]*)")
_FLOAT: Final = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_ODD_INT: Final = re.compile(r"[-+]?0([0-9]+|o[0-7]+|x[0-9a-fA-F]+|b[01]+)")
_NOT_FINITE: Final = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
# The class of characters of YAML 1.2, section 5.1, as PyYAML has it compiled already: that takes 4 ms.
_UNPRINTABLE: Final = yaml.reader.Reader.NON_PRINTABLE
_UNUSABLE: Final = re.compile("[\0\ud800-\udfff]")
_CORE: Final = "tag:yaml.org,2002:"


@dataclass(frozen=True)
class Document:
    """One YAML file: its top-level mapping, and the SHA-256 of its bytes."""

    path: Path
    root: Node
    digest: str


def parse(path: Path) -> Document:
    """Read a YAML file that holds one mapping; raise RecipeError with everything that is wrong with its text."""
    document, faults = read(path)
    if document is None or faults:
        raise RecipeError(faults)
    return document


def read(path: Path) -> tuple[Document | None, list[Fault]]:
    """Read a YAML file as far as it can be: the document (None where there is no mapping), and the faults of its text."""
    data, fault = _bytes(path)
    if fault is not None:
        return None, [Fault(str(path), 0, "", fault)]
    text, fault_at = _text(path, data)
    if fault_at is not None:
        return None, [fault_at]
    builder = _Builder(str(path), text)
    root = builder.document()
    if root is not None and not isinstance(root.value, dict):
        builder.faults.append(
            Fault(str(path), root.line, "", f"expected a mapping (key: value), found {described(root)}")
        )
        root = None
    faults = sorted(builder.faults, key=lambda fault: fault.line)
    return (Document(path, root, digest_bytes(data)) if root is not None else None), faults


def is_plain_string(text: str) -> bool:
    """Tell whether an unquoted scalar reads back as this string (and not as a number, true, null or a fault)."""
    odd = _ODD_INT.fullmatch(text) or _NOT_FINITE.fullmatch(text)
    return not (text in _NULL or text in _BOOL or text == "<<" or _FLOAT.fullmatch(text) or odd)


def _bytes(path: Path) -> tuple[bytes, str | None]:
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            return b"", "is a folder; expected a YAML file"
        if not stat.S_ISREG(mode):
            return b"", "is not a regular file; expected a YAML file"
        with path.open("rb") as stream:
            data = stream.read(MAX_BYTES + 1)
    except FileNotFoundError:
        return b"", f"no such file{beside(path)}"
    except (OSError, ValueError) as err:  # ValueError: a NUL in the name
        return b"", f"cannot be read: {getattr(err, 'strerror', None) or err}"
    if len(data) > MAX_BYTES:
        size = path.stat().st_size
        return b"", f"has {size} bytes; a recipe has at most {MAX_BYTES} (data belongs in files that the recipe names)"
    return data, None


def _text(path: Path, data: bytes) -> tuple[str, Fault | None]:
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "", Fault(str(path), 0, "", "is UTF-16; save it as UTF-8")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as err:
        offset = err.start + (3 if data.startswith(b"\xef\xbb\xbf") else 0)
        line = data.count(b"\n", 0, offset) + 1
        return "", Fault(
            str(path), line, "", f"not UTF-8: byte 0x{data[offset]:02x} at offset {offset}; save the file as UTF-8"
        )
    found = _UNPRINTABLE.search(text)
    if found is not None:
        line = text.count("\n", 0, found.start()) + 1
        return "", Fault(str(path), line, "", f"control character U+{ord(found[0]):04X}; remove it")
    return text, None


class _Stop(Exception):  # noqa: N818  it ends the parsing of a file whose faults are recorded already
    """Nothing further can be read from this file."""


class _Builder:
    """Builds nodes from the parser's events, collecting faults."""

    def __init__(self, file: str, text: str) -> None:
        self.faults: list[Fault] = []
        self._file = file
        self._text = text
        self._anchors: dict[str, Node | None] = {}
        self._count = 0
        self._depth = 0
        self._path: list[str | int] = []

    def document(self) -> Node | None:
        """Return the one document of the file, or None where it has none or its text cannot be parsed."""
        self._parser = _LOADER(self._text)
        try:
            return self._document()
        except _Stop:
            return None
        except yaml.MarkedYAMLError as err:
            self._syntax(err)
            return None
        except yaml.YAMLError as err:
            self._fault(0, f"not valid YAML: {err}", whole=True)
            return None
        finally:
            self._parser.dispose()

    def _document(self) -> Node | None:
        self._next()  # the stream's start
        event = self._next()
        node = None
        if not isinstance(event, yaml.StreamEndEvent):
            node = self._node(self._next())
            self._next()  # the document's end
            event = self._next()
        if node is None or (node.value is None and node.text == ""):
            self._fault(0, "is empty; a recipe begins with 'enginery: 1'", whole=True)
            return None
        if not isinstance(event, yaml.StreamEndEvent):
            self._fault(_line(event), "a second document begins here ('---'); a file holds one recipe", whole=True)
        return node

    def _next(self) -> Any:
        return self._parser.get_event()

    def _node(self, event: Any) -> Node:
        line = _line(event)
        if len(self.faults) >= MAX_FAULTS:
            self._fault(line, f"{MAX_FAULTS} faults so far; the rest of the file was not read", whole=True)
            raise _Stop
        if isinstance(event, yaml.AliasEvent):
            node = self._alias(event, line)
        elif isinstance(event, yaml.ScalarEvent):
            node = self._scalar(event, line)
        else:
            if self._depth == MAX_DEPTH:
                self._fault(line, f"nested more than {MAX_DEPTH} deep", whole=True)
                raise _Stop
            self._depth += 1
            node = self._collection(event, line)
            self._depth -= 1
        self._spend(node.size if isinstance(event, yaml.AliasEvent) else 1, line)
        return node

    def _spend(self, nodes: int, line: int) -> None:
        self._count += nodes
        if self._count > MAX_NODES:
            self._fault(line, f"more than {MAX_NODES} values, anchors (&) and aliases (*) expanded", whole=True)
            raise _Stop

    def _alias(self, event: Any, line: int) -> Node:
        name = str(event.anchor)
        node = self._anchors.get(name)
        if node is None:
            inside = name in self._anchors
            why = "stands inside the value that it names" if inside else f"has no anchor &{name} before it"
            self._fault(line, f"alias *{name} {why}")
            return Node(None, self._file, line)
        return replace(node, line=line)

    def _collection(self, event: Any, line: int) -> Node:
        is_map = isinstance(event, yaml.MappingStartEvent)
        self._check_tag(event.tag, "map" if is_map else "seq", line)
        if event.anchor is not None:
            self._anchors[event.anchor] = None
        before = self._count
        value = self._mapping() if is_map else self._sequence()
        node = Node(value, self._file, line, size=self._count - before + 1)
        if event.anchor is not None:
            self._anchors[event.anchor] = node
        return node

    def _sequence(self) -> list[Node]:
        items: list[Node] = []
        while not isinstance(event := self._next(), yaml.SequenceEndEvent):
            self._path.append(len(items))
            items.append(self._node(event))
            self._path.pop()
        return items

    def _mapping(self) -> dict[str, Node]:
        entries: dict[str, Node] = {}
        while not isinstance(event := self._next(), yaml.MappingEndEvent):
            line = _line(event)
            key = self._key(event, line)
            self._path.append(key if key is not None else "?")
            node = replace(self._node(self._next()), line=line)
            if key in entries:
                self._fault(line, f"key {brief(str(key), 60)!r} is stated twice (first in line {entries[key].line})")
            elif key is not None:
                entries[key] = node
            self._path.pop()
        return entries

    def _key(self, event: Any, line: int) -> str | None:
        faults = len(self.faults)
        node = self._node(event)
        if node.text == "<<":
            self._fault(line, "merge keys (<<) are not read; put what is shared into a base file: include: base.yaml")
            return None
        if isinstance(node.value, str):
            return node.value
        if len(self.faults) == faults:
            advice = f"; put it in quotes: '{node.text}'" if node.text else ""
            self._fault(line, f"a key must be a string, found {described(node)}{advice}")
        return None

    def _scalar(self, event: Any, line: int) -> Node:
        text = str(event.value)
        plain = bool(event.implicit[0]) and event.tag is None
        if plain:
            value = self._resolved(text, line)
        else:
            self._check_tag(event.tag, "str", line)
            value = text
        if _UNUSABLE.search(text):
            self._fault(line, "a string holds a NUL or half a surrogate pair; remove it")
        node = Node(value, self._file, line, text if plain else None)
        if event.anchor is not None:
            self._anchors[event.anchor] = node
        return node

    def _resolved(self, text: str, line: int) -> Any:
        if text in _NULL:
            return None
        if text in _BOOL:
            return _BOOL[text]
        if _ODD_INT.fullmatch(text):
            advice = "write it in decimal without leading zeros, or in quotes where a string is meant"
            self._fault(line, f"{brief(text, 40)} can be read as octal, hexadecimal or decimal: {advice}")
            return 0
        if _INT.fullmatch(text):
            if len(text) <= 20 and abs(int(text)) < 1 << 63:
                return int(text)
            self._fault(line, f"{brief(text, 40)} does not fit 64 bits; put it in quotes where a string is meant")
            return 0
        number = float(text) if _FLOAT.fullmatch(text) else None
        if _NOT_FINITE.fullmatch(text) or (number is not None and not math.isfinite(number)):
            self._fault(line, f"{brief(text, 40)} is not a finite number; put it in quotes where a string is meant")
            return 0
        return number if number is not None else text

    def _check_tag(self, tag: str | None, kind: str, line: int) -> None:
        if tag not in (None, "!", _CORE + kind):
            shown = f"!!{str(tag).removeprefix(_CORE)}" if str(tag).startswith(_CORE) else str(tag)
            self._fault(line, f"unknown tag {brief(shown, 60)}; recipes are plain data, remove it")

    def _syntax(self, err: yaml.MarkedYAMLError) -> None:
        mark = err.problem_mark or err.context_mark
        line = mark.line if mark is not None else 0
        lines = re.split("\r\n|[\n\r\x85\u2028\u2029]", self._text)
        start = lines[line] if line < len(lines) else ""
        if "\t" in start[: len(start) - len(start.lstrip())]:
            self._fault(line + 1, "a tab used as indentation; YAML takes spaces only", whole=True)
            return
        begun = f", {err.context}" if err.context else ""
        if err.context and err.context_mark is not None and err.context_mark.line != line:
            begun += f" that begins in line {err.context_mark.line + 1}"
        self._fault(line + 1, f"not valid YAML: {err.problem or 'cannot be parsed'}{begun}", whole=True)

    def _fault(self, line: int, what: str, *, whole: bool = False) -> None:
        self.faults.append(Fault(self._file, line, "" if whole else dotted(self._path), what))


def _line(event: Any) -> int:
    return int(event.start_mark.line) + 1
