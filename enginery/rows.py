"""Tables that are drawn by rich on a terminal, and as plain text in pipes and CI logs.

Rich takes 40 ms to import and to draw with, a third of what a command with nothing to do takes besides, so plain text
does without it. There no cell is cut or folded, whatever the width.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from enginery.output import console

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

_WIDE: Final = 10_000  # wider than any table: what it measures at is what it needs
_FOLDED: Final = 20  # how narrow the last column of a table may become
_STYLES: Final = {"cached": "dim", "built": "green", "run": "yellow", "follows": "yellow", "waiting": "cyan"}
_RIGHT: Final = ("seconds", "size")
# Each of these asks for what rich draws: for colours, or for a width.
_ASKED: Final = ("COLUMNS", "FORCE_COLOR", "TTY_COMPATIBLE")
_CONTROL: Final = dict.fromkeys((7, 8, 11, 12, 13))  # as rich leaves them out: they move the cursor


@dataclass
class Rows:
    """A table of plain words: square brackets in them are no markup, and a cell may have several lines.

    The words of a column `state` are coloured, numbers under `seconds` and `size` are set to the right.
    """

    columns: tuple[str, ...]
    title: str | None = None
    rows: list[tuple[str, ...]] = field(default_factory=list)

    def add_row(self, *cells: str) -> None:
        """Add a row, a cell for each column."""
        if len(cells) != len(self.columns):
            raise ValueError(f"{len(cells)} cells for {len(self.columns)} columns")
        self.rows.append(cells)


def is_plain() -> bool:
    """Tell whether stdout takes plain text: it is no terminal, and nothing asks for what a terminal gets."""
    return not (sys.stdout.isatty() or any(os.environ.get(name) for name in _ASKED))


def say(text: str) -> None:
    """Print a line on stdout as it is; a terminal folds it between words."""
    if is_plain():
        sys.stdout.write(f"{text.translate(_CONTROL)}\n")
    else:
        console().print(text, markup=False)


def print_rows(rows: Rows) -> None:
    """Print a table, its last column folded on a terminal; on a narrow one each row is a paragraph."""
    if is_plain():
        sys.stdout.write(plain_text(rows))
    else:
        print_table(console(), _drawn(rows))


def plain_text(rows: Rows) -> str:
    """Return a table as lines of plain text, without colours and without blanks at their ends."""
    table = [rows.columns, *rows.rows]
    cells = [[cell.translate(_CONTROL).split("\n") for cell in row] for row in table]
    widths = [max(_width(line) for row in cells for line in row[index]) for index in range(len(rows.columns))]
    lines = [_lines(row, rows.columns, widths) for row in cells]
    line = "─" if (sys.stdout.encoding or "").lower().startswith("utf") else "-"
    rule = line * (sum(widths) + 3 * (len(widths) - 1))
    body = [*lines[0], rule, *(line for row in lines[1:] for line in row)]
    return "\n".join([*([rows.title] if rows.title else []), "", *(f" {line}".rstrip() for line in body), "", ""])


def print_table(out: Console, table: Table) -> None:
    """Print a table whose last column may fold; on a narrower terminal each row is a paragraph, so that no word is cut."""
    from rich.text import Text

    widths = [out.measure(cell).maximum for cell in table.columns[-1].cells] if table.columns else []
    foldable = max(0, max(widths, default=0) - _FOLDED)
    if out.measure(table, options=out.options.update(max_width=_WIDE)).maximum - foldable <= out.width:
        out.print(table)
        return
    if table.title:
        out.print(table.title, markup=False)
    names = [str(column.header) for column in table.columns]
    for cells in zip(*(column.cells for column in table.columns), strict=True):
        first, *rest = (cell if isinstance(cell, Text) else Text.from_markup(str(cell)) for cell in cells)
        out.print(first, overflow="fold")
        named = [
            Text.assemble(f"{name} " if name else "", text) for name, text in zip(names[1:], rest, strict=True) if text
        ]
        out.print(Text("  ") + Text(", ").join(named), overflow="fold")


def _lines(row: list[list[str]], columns: tuple[str, ...], widths: list[int]) -> list[str]:
    """Return the lines of one row: as many as its longest cell has."""
    return [
        "   ".join(
            _padded(cell[index] if index < len(cell) else "", width, right=column in _RIGHT)
            for cell, column, width in zip(row, columns, widths, strict=True)
        )
        for index in range(max(len(cell) for cell in row))
    ]


def _padded(text: str, width: int, *, right: bool) -> str:
    blanks = " " * (width - _width(text))
    return f"{blanks}{text}" if right else f"{text}{blanks}"


def _width(text: str) -> int:
    """Return how many columns a text takes: Chinese and Japanese take two for each character."""
    if text.isascii():
        return len(text)
    from rich.cells import cell_len

    return cell_len(text)


def _drawn(rows: Rows) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(title=rows.title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in rows.columns:
        last = column == rows.columns[-1]
        table.add_column(column, justify="right" if column in _RIGHT else "left", overflow="fold", no_wrap=not last)
    for row in rows.rows:
        table.add_row(
            *(
                Text(cell, _STYLES.get(cell, "bold red") if column == "state" else "")
                for cell, column in zip(row, rows.columns, strict=True)
            )
        )
    return table
