"""Tables: plain text in pipes, drawn by rich where a terminal or its width is asked for; no word is lost in either."""

from __future__ import annotations

import io
import sys

import pytest

from enginery.rows import Rows, plain_text, print_rows, say

ASKED = ("COLUMNS", "FORCE_COLOR", "TTY_COMPATIBLE")


@pytest.fixture
def table() -> Rows:
    rows = Rows(("stage", "state", "seconds", "why"), title="digits")
    rows.add_row("export", "cached", "", "")
    rows.add_row("compile", "built", "12.5", "miss: params.opset 17 -> 18\nmiss: [/inputs] [bold]")
    return rows


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ASKED:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("plain")
def test_a_pipe_gets_plain_lines(table: Rows, capsys: pytest.CaptureFixture[str]):
    print_rows(table)
    assert capsys.readouterr().out.splitlines() == [
        "digits",
        "",
        " stage     state    seconds   why",
        f" {'─' * 56}",
        " export    cached",
        " compile   built       12.5   miss: params.opset 17 -> 18",
        "                              miss: [/inputs] [bold]",
        "",
    ]


def test_plain_lines_are_as_wide_as_their_words(table: Rows):
    table.add_row("x" * 300, "run", "", "y" * 300)
    assert f" {'x' * 300}   run                {'y' * 300}\n" in plain_text(table)


def test_characters_of_two_columns_are_counted_as_two():
    rows = Rows(("stage", "why"))
    rows.add_row("模型", "one")
    rows.add_row("abcd", "two")
    assert plain_text(rows).splitlines()[-3:-1] == [" 模型    one", " abcd    two"]


def test_a_stream_that_takes_no_lines_gets_dashes(table: Rows, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    assert " -----" in plain_text(table)


@pytest.mark.parametrize("asked", ASKED)
def test_what_asks_for_a_terminal_gets_what_rich_draws(
    asked: str, table: Rows, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    for name in ASKED:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(asked, "120" if asked == "COLUMNS" else "1")
    print_rows(table)
    out = capsys.readouterr().out
    assert " ──────" in out
    assert "miss: [/inputs] [bold]" in out
    assert ("\x1b[32mbuilt" in out) == (asked != "COLUMNS")


def test_a_narrow_terminal_gets_a_paragraph_for_each_row(
    table: Rows, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("COLUMNS", "30")
    print_rows(table)
    out = capsys.readouterr().out
    assert "──" not in out
    assert "compile\n  state built, seconds 12.5" in out


@pytest.mark.usefixtures("plain")
def test_a_line_is_said_as_it_is(capsys: pytest.CaptureFixture[str]):
    say("store: file:///[/s] " + "x" * 500)
    assert capsys.readouterr().out == "store: file:///[/s] " + "x" * 500 + "\n"


def test_a_row_has_a_cell_for_each_column(table: Rows):
    with pytest.raises(ValueError, match="2 cells for 4 columns"):
        table.add_row("a", "b")
