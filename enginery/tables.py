"""Tables of plans and builds: stages (state, seconds, why) and engines (size, accuracy, parity, where)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from enginery.output import console

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from recipes.plan import Plan

_WIDE = 10_000  # wider than any table: what it measures at is what it needs
_FOLDED = 20  # how narrow the last column of a table may become
_STYLES = {"cached": "dim", "built": "green", "run": "yellow", "follows": "yellow", "waiting": "cyan"}


def print_plan(planned: Plan, *, explain: bool) -> None:
    """Print a plan: what would run; with `explain` also why, and what is cached."""
    counts = {state: sum(step.state == state for step in planned.steps) for state in ("run", "follows", "cached")}
    out = console()
    table = _table("stage", "subject", "state", *(["why"] if explain else []))
    for step in planned.steps:
        if explain or step.state != "cached":
            why = ["\n".join(step.why)] if explain else []
            table.add_row(step.stage, step.subject, _styled(step.state), *map(_plain, why))
    if table.row_count:
        print_table(out, table)
    out.print(
        f"{planned.recipe}: {counts['run']} to run, {counts['follows']} more if their input changes, {counts['cached']} cached",
        markup=False,
    )
    for engine in planned.engines:
        if engine.state in ("waiting", "failed"):
            out.print(f"{engine.state}: {engine.target} {engine.asked}: {engine.why}", markup=False)


def print_build(document: dict[str, Any]) -> None:
    """Print the report of a build: a table of stages and a table of engines."""
    out = console()
    stages = _table("stage", "subject", "state", "seconds", "why", title=document["recipe"])
    for step in document["steps"]:
        seconds = f"{step['seconds']:.1f}" if step["state"] == "built" else ""
        why = "" if step["state"] == "cached" else "; ".join(step["why"])
        stages.add_row(step["stage"], step["subject"], _styled(step["state"]), seconds, _plain(_brief(why)))
    print_table(out, stages)
    metric = next((engine["metric_name"] for engine in document["engines"] if engine["metric_name"]), "metric")
    engines = _table(
        "runtime", "GPU", "precision", "size", metric, "source", "parity (rel. L2)", "executed", "published"
    )
    for engine in document["engines"]:
        asked, given = engine["precision"]["asked"], engine["precision"]["given"]
        engines.add_row(
            f"{engine['runtime']} {engine['runtime_version']}".strip(),
            engine["gpu"],
            asked if given in (asked, None) else f"{given} (asked {asked})",
            size_text(engine["size"]),
            _figure(engine["metric"], ".4f"),
            _figure(engine["source_metric"], ".4f"),
            _figure(engine["parity"], ".1e"),
            "yes" if engine["executed"] else "no",
            engine["path"]
            if engine["state"] == "cached" and engine["path"]
            else _plain(f"{engine['state']}: {_brief(engine['why'])}"),
        )
    print_table(out, engines)
    out.print(f"store: {document['store']}", markup=False)
    if any(not engine["executed"] and engine["state"] == "cached" for engine in document["engines"]):
        out.print(
            "executed no: the engine's graph was measured through ONNX Runtime; the engine itself needs its own GPU.",
            markup=False,
        )


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


def size_text(size: int | None) -> str:
    """Return a size in bytes as people read it."""
    if size is None:
        return "-"
    from rich.filesize import decimal

    return decimal(size)


def _table(*columns: str, title: str | None = None) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        right, last = column in ("seconds", "size"), column == columns[-1]
        table.add_column(column, justify="right" if right else "left", overflow="fold", no_wrap=not last)
    return table


def _plain(words: str) -> Text:
    """Show words of frameworks and recipes as they are: square brackets in them are no markup."""
    from rich.text import Text

    return Text(words)


def _styled(state: str) -> str:
    style = _STYLES.get(state, "bold red")
    return f"[{style}]{state}[/]"


def _figure(value: float | None, spec: str) -> str:
    return "-" if value is None else format(value, spec)


def _brief(text: str, limit: int = 90) -> str:
    first, _, rest = text.partition("\n")
    # Of a traceback the first line says where, and the last one what.
    text = f"{first.partition('Traceback')[0]}{rest.rpartition(chr(10))[2]}" if "Traceback (most" in first else first
    return text if len(text) <= limit else f"{text[: limit - 1]}…"
