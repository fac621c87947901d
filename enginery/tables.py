"""Tables of plans and builds: stages (state, seconds, why) and engines (size, accuracy, parity, where)."""

from __future__ import annotations

from typing import Any

from enginery.rows import Rows, print_rows, say


def print_plan(document: dict[str, Any], *, explain: bool) -> None:
    """Print the report of a plan: what would run; with `explain` also why, and what is cached."""
    steps = document["steps"]
    counts = {state: sum(step["state"] == state for step in steps) for state in ("run", "follows", "cached")}
    table = Rows(("stage", "subject", "state", *(["why"] if explain else [])))
    for step in steps:
        if explain or step["state"] != "cached":
            why = ["\n".join(step["why"])] if explain else []
            table.add_row(step["stage"], step["subject"], step["state"], *why)
    if table.rows:
        print_rows(table)
    say(
        f"{document['recipe']}: {counts['run']} to run, {counts['follows']} more if their input changes, {counts['cached']} cached"
    )
    for engine in document["engines"]:
        if engine["state"] in ("waiting", "failed"):
            say(f"{engine['state']}: {engine['target']} {engine['precision']['asked']}: {engine['why']}")


def print_build(document: dict[str, Any]) -> None:
    """Print the report of a build: a table of stages and a table of engines."""
    stages = Rows(("stage", "subject", "state", "seconds", "why"), title=document["recipe"])
    for step in document["steps"]:
        seconds = f"{step['seconds']:.1f}" if step["state"] == "built" else ""
        why = "" if step["state"] == "cached" else "; ".join(step["why"])
        stages.add_row(step["stage"], step["subject"], step["state"], seconds, _brief(why))
    print_rows(stages)
    metric = next((engine["metric_name"] for engine in document["engines"] if engine["metric_name"]), "metric")
    timed = any(engine.get("benchmark") for engine in document["engines"])
    columns = ("p50 ms", "faster than") if timed else ()
    engines = Rows(
        ("runtime", "GPU", "precision", "size", metric, "source", "parity (rel. L2)", *columns, "executed", "published")
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
            *(timing_cells(engine.get("benchmark")) if timed else ()),
            "yes" if engine["executed"] else "no",
            engine["path"]
            if engine["state"] == "cached" and engine["path"]
            else f"{engine['state']}: {_brief(engine['why'])}",
        )
    print_rows(engines)
    for engine in document["engines"]:
        if engine.get("candidates"):
            title = f"{engine['runtime']} {engine['gpu']}: candidates of auto"
            candidates = Rows(("candidate", "p50 ms", "CUDA graph", ""), title=title)
            for row in engine["candidates"]:
                candidates.add_row(row["name"], *candidate_cells(row))
            print_rows(candidates)
    for why in dict.fromkeys(engine["why"] for engine in document["engines"] if "\n" in engine["why"]):
        if "Traceback (most" not in why:
            for line in why.splitlines():
                say(line)
    if any(engine["state"] == "failed" for engine in document["engines"]):
        for spare in (one["path"] for one in document["engines"] if one.get("fallback") and one["path"]):
            say(f"in place of what failed, the fallback is served: {spare}")
    for step in document["steps"]:
        for warning in step.get("warnings", ()):
            say(f"warning: {step['subject']} data: {warning}")
    for engine in document["engines"]:
        if (line := _given_instead(engine)) is not None:
            say(line)
        for name, part in engine.get("parts", {}).items():
            of_part = {"runtime": engine["runtime"], "gpu": f"{engine['gpu']} {name}", **part}
            if (line := _given_instead(of_part)) is not None:
                say(line)
    say(f"store: {document['store']}")
    if any(not engine["executed"] and engine["state"] == "cached" for engine in document["engines"]):
        say("executed no: the engine's graph was measured through ONNX Runtime; the engine itself needs its own GPU.")


def _given_instead(engine: dict[str, Any]) -> str | None:
    """Say what was asked, what was given and why, where the two differ; None where they do not."""
    asked, given = engine["precision"]["asked"], engine["precision"]["given"]
    refused = [
        f"{one['precision']}: {', '.join(one['reasons'])}" for one in engine.get("tried", ()) if not one["passed"]
    ]
    if not refused or asked == "auto":
        return None
    what = f"{given} given" if given is not None else "none given"
    return f"{engine['runtime']} {engine['gpu']}: {asked} asked, {what}: {'; '.join(refused)}"


def candidate_cells(row: dict[str, Any]) -> tuple[str, str, str]:
    """Return p50 latency, whether as a CUDA graph, and what became of a candidate for the fastest engine."""
    p50, graph = _figure(row["p50_ms"], ".3f"), {True: "yes", False: "no", None: "-"}[row["graph"]]
    what = "chosen" if row["chosen"] else "passed" if row["passed"] else ""
    return p50, graph, "; ".join([*([what] if what else []), *map(_brief, row["reasons"])])


def timing_cells(timing: dict[str, Any] | None) -> tuple[str, str]:
    """Return the p50 latency of the first case that was timed, and how many times faster than what it was compared with."""
    if timing is None:
        return "-", "-"
    ratios = ", ".join(f"{name} {ratio:.2f}x" for name, ratio in timing["ratios"].items())
    return f"{timing['p50_ms']:.3f} ({timing['case']})", ratios or "-"


def size_text(size: int | None) -> str:
    """Return a size in bytes as people read it."""
    if size is None:
        return "-"
    from rich.filesize import decimal

    return decimal(size)


def _figure(value: float | None, spec: str) -> str:
    return "-" if value is None else format(value, spec)


def _brief(text: str, limit: int = 90) -> str:
    first, _, rest = text.partition("\n")
    # Of a traceback the first line says where, and the last one what.
    text = f"{first.partition('Traceback')[0]}{rest.rpartition(chr(10))[2]}" if "Traceback (most" in first else first
    return text if len(text) <= limit else f"{text[: limit - 1]}…"
