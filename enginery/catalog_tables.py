"""Engines for people: tables on a terminal, aligned plain columns in a pipe; and the same as JSON."""

from __future__ import annotations

import datetime as dt
from typing import TYPE_CHECKING, Any

from artifacts.timings import timing_summary
from enginery.output import console
from enginery.rows import print_table
from enginery.tables import candidate_cells, size_text, timing_cells

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from rich.console import Console
    from rich.table import Table

    from artifacts.attestation import Attestation
    from artifacts.manifest import Manifest
    from artifacts.manifest_gates import Measured
    from artifacts.manifest_precision import WorstTensor
    from artifacts.resolve import Request, Resolution


def engine_json(manifest: Manifest) -> dict[str, Any]:
    """Return one engine in short, as `enginery list --json` prints it."""
    measured = _best_measured(manifest)
    return {
        "engine": str(manifest.identity),
        "recipe": manifest.identity.recipe,
        "target": manifest.identity.target,
        "build": manifest.identity.build,
        "created": manifest.identity.created,
        "runtime": manifest.compatibility.runtime,
        "runtime_version": manifest.compatibility.runtime_version,
        "gpus": list(manifest.compatibility.gpus),
        "precision": {"asked": manifest.precision.asked, "given": manifest.precision.given},
        "size": manifest.size,
        "parity": measured.parity.model_dump() if measured.parity is not None else None,
        "metric": measured.metric.model_dump() if measured.metric is not None else None,
        "benchmark": _timing(manifest),
        "executed": manifest.verification.engine.executed,
        **({"fallback": manifest.fallback.kind} if manifest.fallback is not None else {}),
        **(
            {"parts": {name: {"precision": part.precision.given} for name, part in manifest.parts.items()}}
            if manifest.parts
            else {}
        ),
    }


def resolution_json(recipe: str, request: Request, resolution: Resolution) -> dict[str, Any]:
    """Return what was asked, the best engine, and every candidate with the reasons against it."""
    return {
        "recipe": recipe,
        "request": {
            "runtimes": dict(request.runtimes),
            "gpus": list(request.gpus),
            "os": request.os,
            "arch": request.arch,
            "driver": request.driver,
            "shapes": {name: list(shape) for name, shape in request.shapes.items()},
            "channel": request.channel,
            "precision": request.precision,
        },
        "best": engine_json(resolution.best) if resolution.best is not None else None,
        "candidates": [
            {"engine": str(candidate.manifest.identity), "fits": candidate.fits, "reasons": list(candidate.reasons)}
            for candidate in resolution.candidates
        ],
    }


def fallback_words(manifest: Manifest) -> str:
    """Say that what is offered is no engine, and what it is."""
    from artifacts.manifest import EXPORTED_PROGRAM

    facts = manifest.fallback
    if facts is None:
        raise ValueError(f"{manifest.identity} is an engine")
    providers = dict.fromkeys(one.name for found in facts.providers.values() for one in found)
    forms = dict.fromkeys(one.form for one in facts.saved.values())
    what = f"{facts.kind} ({', '.join(forms)})" if forms else facts.kind
    release = " of the same release" if EXPORTED_PROGRAM in forms else ""
    first = f", with the first of {', '.join(providers)} that is there" if providers else ""
    return (
        f"no engine fits; {manifest.identity} is the fallback: {what} for {manifest.compatibility.runtime} "
        f"{manifest.compatibility.runtime_version} or later{release}{first}"
    )


def print_engines(manifests: Sequence[Manifest]) -> None:
    """Print a table of engines on stdout."""
    out = console()
    metrics = {measured.metric.name for measured in map(_best_measured, manifests) if measured.metric is not None}
    metric = metrics.pop() if len(metrics) == 1 else "metric"
    timings = [_timing(manifest) for manifest in manifests]
    columns = ["p50 ms", "faster than"] if any(timings) else []
    table = plain_table(out, "engine", "precision", "size", metric, "parity (rel. L2)", *columns, "executed", "age")
    for manifest, timing in zip(manifests, timings, strict=True):
        measured = _best_measured(manifest)
        asked, given = manifest.precision.asked, manifest.precision.given
        add_row(
            table,
            str(manifest.identity),
            given if given == asked else f"{given} (asked {asked})",
            size_text(manifest.size),
            _figure(measured.metric.value if measured.metric is not None else None, ".4f"),
            _figure(measured.parity.relative_l2 if measured.parity is not None else None, ".1e"),
            *(timing_cells(timing) if columns else ()),
            "yes" if manifest.verification.engine.executed else "no",
            age_text(manifest.identity.created),
        )
    print_table(out, table)


def print_candidates(resolution: Resolution) -> None:
    """Print every candidate of a resolution on stderr: the best, those that fit, and why the others do not."""
    out = console(stderr=True)
    table = plain_table(out, "engine", "", "why")
    for candidate in resolution.candidates:
        verdict = "fits" if candidate.fits else "refused"
        verdict = "best" if candidate.manifest is resolution.best else verdict
        add_row(table, str(candidate.manifest.identity), verdict, "; ".join(candidate.reasons))
    print_table(out, table)


def print_engine(manifest: Manifest, later: Sequence[Attestation] = ()) -> None:
    """Print one engine's manifest on stdout, in sections; `later` are executions after it was published."""
    out = console()
    needs, precision, origin = manifest.compatibility, manifest.precision, manifest.provenance
    rows: list[tuple[str, str]] = [
        ("engine", str(manifest.identity)),
        ("created", f"{manifest.identity.created} ({age_text(manifest.identity.created)})"),
        ("loads on", f"{needs.runtime} {needs.runtime_version}, {' or '.join(needs.gpus)}, {needs.os} {needs.arch}"),
    ]
    if manifest.fallback is not None:
        rows.append(("fallback for", ", ".join(manifest.fallback.instead_of)))
    rows += [
        ("file", f"{name}  {size_text(entry.size)}  sha256 {entry.digest}") for name, entry in manifest.files.items()
    ]
    rows += [("input", f"{name}  {tensor.dtype} {_axes(tensor.shape)}") for name, tensor in manifest.inputs.items()]
    rows += [("output", f"{name}  {tensor.dtype} {_axes(tensor.shape)}") for name, tensor in manifest.outputs.items()]
    rows += [
        ("profile", f"{profile.name}  {name} {_axes(span.min)} .. {_axes(span.opt)} .. {_axes(span.max)}")
        for profile in manifest.profiles
        for name, span in profile.inputs.items()
    ]
    asked = "" if precision.asked == precision.given else f" (asked {precision.asked})"
    rows.append(("precision", f"{precision.given}{asked}, inputs and outputs {precision.io}"))
    if precision.quantized is not None:
        counts = precision.quantized
        parts = [(counts.nodes, counts.of_nodes, "nodes of the graph"), (counts.layers, counts.of_layers, "layers")]
        told = [f"{count} of {total} {what}" for count, total, what in parts if count is not None and total is not None]
        rows.append(("quantised", ", ".join(told) or "not known"))
    rows += [row for name in manifest.parts for row in _part_rows(name, manifest.part(name))]
    rows += [
        ("candidate", f"{one.name}  p50 {p50} ms, CUDA graph {graph}; {what}")
        for one in precision.candidates
        for p50, graph, what in [candidate_cells(one.model_dump())]
    ]
    rows += [("refused", f"{refused.precision}: {'; '.join(refused.reasons)}") for refused in precision.tried]
    if precision.kept:
        rows += [("kept in fp32", f"{node}: {why}") for node, why in precision.kept_why.items()] or [
            ("kept in fp32", ", ".join(precision.kept))
        ]
    if manifest.calibration is not None:
        samples = f", {manifest.calibration.samples} samples" if manifest.calibration.samples is not None else ""
        method = f", {manifest.calibration.method}" if manifest.calibration.method is not None else ""
        rows.append(("calibration", f"sha256 {manifest.calibration.digest}{samples}{method}"))
        if manifest.calibration.report is not None:
            rows.append(("ranges", f"{_worst_text(manifest.calibration.worst)}; all: enginery show --ranges"))
    rows.append(("graph", _measured_text(manifest.verification.graph)))
    rows.append(("engine itself", _measured_text(manifest.verification.engine)))
    rows += [("timed", line) for line in _timed_lines(manifest)]
    rows += [("executed later", _attestation_text(attestation)) for attestation in later]
    rows.append(("gates", "passed" if manifest.verification.passed else "not passed"))
    commit = "not in git"
    if origin.git is not None:
        commit = f"commit {origin.git.commit}{' with changes' if origin.git.dirty else ''}"
    rows.append(("recipe", f"{commit}, sha256 {origin.recipe_digest}"))
    rows.append(("built by", f"enginery {origin.enginery} on {origin.host.name}"))
    out.print(pairs_table(rows))
    table = plain_table(out, "stage", "seconds", "", "toolchain")
    for step in origin.steps:
        tools = ", ".join(f"{name} {found}" for name, found in step.toolchain.items() if found is not None)
        add_row(table, step.id, f"{step.seconds:.1f}", "reused" if step.reused else "built", tools)
    print_table(out, table)


def print_ranges(reports: Mapping[str, Mapping[str, Any]]) -> None:
    """Print what each tensor's range costs, the worst first, of each part (or of the only graph, whose name is empty)."""
    out = console()
    for part, report in reports.items():
        where = f"part {part}: " if part else ""
        out.print(
            f"{where}{len(report['tensors'])} tensors, {report['method']}, {report['samples']} samples", markup=False
        )
        table = plain_table(out, "SNR dB", "minmax", "fp8", "clipped", "range", "observed", "tensor", "taken by")
        for row in report["tensors"]:
            spans = (f"{row[name][0]:.4g} .. {row[name][1]:.4g}" for name in ("range", "observed"))
            ratios = (_figure(row[name], ".1f") for name in ("snr_db", "snr_minmax_db", "snr_fp8_db"))
            add_row(table, *ratios, f"{row['clipped']:.3%}", *spans, row["tensor"], ", ".join(row["nodes"]))
        print_table(out, table)
        if report.get("weights"):  # reports of earlier releases have none
            print_weights(report["weights"])


def print_weights(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print what a low precision costs each weight, the worst first: of the whole tensor, and of its worst channel."""
    out = console()
    out.print(f"{len(rows)} weights", markup=False)
    table = plain_table(out, "SNR dB", "fp8", "worst channel", "clipped", "range", "shape", "weight", "taken by")
    for row in rows:
        worst, several = row["worst_channel"], row["channels"] > 1
        channel = f"{_figure(worst['snr_db'], '.1f')} ({worst['channel']} of {row['channels']})" if worst else ""
        add_row(
            table,
            *(_figure(row.get(name), ".1f") for name in ("snr_db", "snr_fp8_db")),
            channel if several else "",
            f"{row['clipped']:.3%}",
            f"{row['range'][0]:.4g} .. {row['range'][1]:.4g}",
            " x ".join(map(str, row["shape"])),
            row["tensor"],
            ", ".join(row["nodes"]),
        )
    print_table(out, table)


def _worst_text(worst: WorstTensor | None) -> str:
    if worst is None:
        return "no tensor"
    return f"worst is {worst.tensor}: SNR {_figure(worst.snr_db, '.1f')} dB, {worst.clipped:.3%} clipped"


def _part_rows(name: str, part: Manifest) -> list[tuple[str, str]]:
    """Return what is told of one part of an engine."""
    given, asked = part.precision.given, part.precision.asked
    tensors = [
        f"{kind} {tensor}  {facts.dtype} {_axes(facts.shape)}"
        for kind, found in (("input", part.inputs), ("output", part.outputs))
        for tensor, facts in found.items()
    ]
    profiles = [
        f"profile {profile.name}  {tensor} {_axes(span.min)} .. {_axes(span.opt)} .. {_axes(span.max)}"
        for profile in part.profiles
        for tensor, span in profile.inputs.items()
    ]
    refused = [f"refused {one.precision}: {'; '.join(one.reasons)}" for one in part.precision.tried]
    said = [
        given if given == asked else f"{given} (asked {asked})",
        *refused,
        *tensors,
        *profiles,
        f"graph {_measured_text(part.verification.graph)}",
        f"engine itself {_measured_text(part.verification.engine)}",
    ]
    return [(f"part {name}", text) for text in said]


def age_text(created: str, now: dt.datetime | None = None) -> str:
    """Return how long ago an RFC 3339 instant in UTC was, as people say it."""
    then = dt.datetime.fromisoformat(created.removesuffix("Z").partition(".")[0]).replace(tzinfo=dt.timezone.utc)
    seconds = ((now or dt.datetime.now(dt.timezone.utc)) - then).total_seconds()
    if seconds < -1:
        return "in the future"
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{int(seconds // length)} {unit} ago"
    return "just now"


def plain_table(out: Console, *columns: str) -> Table:
    """Return a table with these columns, of which only the last folds: rules on a terminal, only spaces in a pipe."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD if out.is_terminal else None, pad_edge=False, padding=(0, 2, 0, 0))
    for index, column in enumerate(columns):
        right = column in ("seconds", "size")
        table.add_column(
            column, justify="right" if right else "left", overflow="fold", no_wrap=index < len(columns) - 1
        )
    return table


def add_row(table: Table, *cells: str) -> None:
    """Add a row of plain text: names and messages may hold what looks like markup."""
    from rich.text import Text

    table.add_row(*(Text(cell) for cell in cells))


def pairs_table(rows: Iterable[tuple[str, str]]) -> Table:
    """Return names beside values, a name that repeats shown once."""
    from rich.table import Table

    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    last = ""
    for name, value in rows:
        add_row(table, "" if name == last else name, value)
        last = name
    return table


def _best_measured(manifest: Manifest) -> Measured:
    """Return what was measured of the engine itself where it was executed, else of its graph."""
    engine = manifest.verification.engine
    return engine if engine.executed else manifest.verification.graph


def _measured_text(measured: Measured) -> str:
    if not measured.executed or measured.parity is None:
        return f"not executed: {measured.reason}"
    parity = measured.parity
    text = (
        f"relative L2 {_figure(parity.relative_l2, '.1e')}, max abs {_figure(parity.max_abs, '.1e')}, "
        f"cosine {_figure(parity.cosine, '.6f')}, {parity.non_finite} NaN or Inf, {len(measured.cases)} shapes"
    )
    if measured.metric is not None:
        value, source = _figure(measured.metric.value, ".4f"), _figure(measured.metric.source, ".4f")
        text += f"; {measured.metric.name} {value} (source {source})"
    return text


def _timing(manifest: Manifest) -> dict[str, Any] | None:
    return timing_summary(manifest.benchmark.model_dump()) if manifest.benchmark is not None else None


def _timed_lines(manifest: Manifest) -> list[str]:
    """Return one line for every way in which each case was timed, and one for each thing it was compared with."""
    timed = manifest.benchmark
    if timed is None:
        return ["not measured"]
    lines = [
        f"{case.name}{' CUDA graph' if case.graph else ''}: p50 {case.latency_ms.p50:.3f} ms, p90 {case.latency_ms.p90:.3f}, "
        f"p99 {case.latency_ms.p99:.3f}, with copies {case.end_to_end_ms.p50:.3f}; {case.throughput:.0f} samples/s"
        f"{'' if case.steady else '; not steady'}"
        for case in timed.cases
    ]
    for other in timed.compared:
        ratios = ", ".join(f"{ratio:.2f}x at {case}" for case, ratio in other.ratios.items())
        error = other.error.partition("\n")[0] if other.error is not None else None
        lines.append(f"{other.name}: {error or f'the engine is faster by {ratios}'}")
    return lines


def _attestation_text(attestation: Attestation) -> str:
    device = attestation.device.name if attestation.device is not None else None
    where = f"{device or attestation.gpu} of {attestation.host.name}, driver {attestation.host.driver or 'none'}"
    verdict = "passed" if attestation.passed else f"not passed: {'; '.join(attestation.reasons)}"
    return f"{verdict}, on {where}, {age_text(attestation.created)}"


def _axes(shape: Sequence[int | str | None] | None) -> str:
    if shape is None:
        return "of unknown shape"
    return f"[{', '.join('?' if axis is None else str(axis) for axis in shape)}]"


def _figure(value: float | None, spec: str) -> str:
    return "-" if value is None else format(value, spec)
