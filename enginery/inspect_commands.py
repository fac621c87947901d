"""The command inspect: what an ONNX file holds, and which targets can read it; what an engine's precision cost it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from enginery.output import WRONG, JsonOption, explains_errors, print_json, stop

# Who is asked besides the file itself: the target, and the function that asks in a process of its own.
_QUERIES: Final = (
    ("tensorrt-rtx", "tasks.support.parser_query:run"),
    ("onnxruntime", "tasks.support.session_query:run"),
)
_TIMEOUT_S: Final = 600
_SHOWN_AXES: Final = 6


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command("inspect")(inspect)


@explains_errors
def inspect(
    model: Annotated[
        Path,
        typer.Argument(
            metavar="MODEL.onnx", help="An ONNX file, its external data beside it; or an engine's folder or plan."
        ),
    ],
    as_json: JsonOption = False,
) -> None:
    """Show what an ONNX file holds, and which targets can read it: every refused node, where it is, and what to do.

    TensorRT-RTX's parser and ONNX Runtime are asked where they are installed, each in a process of its own. TensorRT releases
    are judged by the opset that they read at most: 8.6 and 10.0 to 10.1; of later ones that is not known. Nothing is compiled.
    Of a graph with Q/DQ pairs, and of an engine that was pulled (its folder, or a file in it), also what each range and weight costs.

    Example: enginery inspect recipes/digits/digits.onnx
    """
    manifest = (model if model.is_dir() else model.parent) / "manifest.json"
    if model.suffix != ".onnx" and manifest.is_file():
        from enginery.engine_reports import engine_report, print_engine_report

        document = engine_report(manifest)
        print_json(document) if as_json else print_engine_report(document)
        return
    if not model.is_file():
        stop(WRONG, f"{model}: no such file; name an ONNX file, or the folder of an engine")
    document = inspected(model)
    if as_json:
        print_json(document)
    else:
        _print(document)


def inspected(model: Path) -> dict[str, Any]:
    """Return what the file holds and what each target says, as JSON values.

    Raises BackendError where the file is no whole ONNX; a target that cannot be asked says so in its entry.
    """
    from concurrent.futures import ThreadPoolExecutor

    from tasks.errors import BackendError

    facts = _ask("tasks.support.contents:run", model)

    def answer(query: tuple[str, str]) -> dict[str, Any]:
        target, entry = query
        try:
            return _ask(entry, model)
        except BackendError as err:
            missing = err.kind == "missing package"
            state = "not installed" if missing else "failed"
            words = err.message if missing else f"{err.kind}: {err.message}"
            return {"target": target, "by": "", "state": state, "words": words, "advice": err.advice, "nodes": []}

    with ThreadPoolExecutor(len(_QUERIES)) as pool:
        answers = list(pool.map(answer, _QUERIES))
    return {"file": str(model)} | facts | {"support": [*answers, *facts["support"]]}


def _ask(entry: str, model: Path) -> dict[str, Any]:
    import os
    import tempfile

    from tasks.process import Limits, run_stage

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with tempfile.TemporaryDirectory(prefix="enginery-inspect-") as folder:
        output = Path(folder) / "output"
        output.mkdir()
        limits = Limits(_TIMEOUT_S, memory)
        return dict(run_stage("inspect", {}, {"model.onnx": model}, output, limits=limits, entry=entry).facts)


def _print(document: dict[str, Any]) -> None:
    from enginery.rows import Rows, print_rows, say
    from enginery.tables import size_text

    size = document["size"]
    beside = f" and {size_text(size['external_bytes'])} in {', '.join(size['external_files'])}"
    say(
        f"{document['file']}: opset {document['opset']}, IR {document['ir_version']}, {document['parameters']:,} parameters, "
        f"{size_text(size['graph_bytes'])}{beside if size['external_files'] else ''}"
    )
    tensors = Rows(("", "name", "dtype", "shape"))
    for kind in ("inputs", "outputs"):
        for name, value in document[kind].items():
            shape = "unknown" if value["shape"] is None else " x ".join(map(str, value["shape"])) or "scalar"
            tensors.add_row(kind[:-1], name, value["dtype"], shape)
    print_rows(tensors)
    axes = [f"{name} ({', '.join(places[:_SHOWN_AXES])})" for name, places in document["dynamic_axes"].items()]
    say(f"dynamic axes: {', '.join(axes) or 'none'}")
    say(f"operators: {', '.join(f'{name} {count}' for name, count in document['operators'].items())}")
    support = Rows(("target", "reads it", "by", "why"))
    for entry in document["support"]:
        why = "; next: ".join(filter(None, (entry["words"], entry["advice"])))
        support.add_row(entry["target"], entry["state"], entry["by"], why)
    print_rows(support)
    _print_nodes(document["support"], say)
    pairs = document.get("quantized")
    if pairs is not None:
        from enginery.catalog_tables import print_weights

        ranges = Rows(("quantised tensor", "type", "range"))
        for row in pairs["activations"]:
            ranges.add_row(row["tensor"], row["type"], f"{row['range'][0]:.4g} .. {row['range'][1]:.4g}")
        print_rows(ranges)
        print_weights(pairs["weights"])


def _print_nodes(support: list[dict[str, Any]], say: Callable[[str], None]) -> None:
    """Say which nodes are refused, once for all targets that say the same of them."""
    told: list[tuple[list[str], list[dict[str, Any]]]] = []
    for entry in support:
        same = next((targets for targets, nodes in told if nodes == entry["nodes"]), None)
        if same is not None:
            same.append(entry["target"])
        elif entry["nodes"]:
            told.append(([entry["target"]], entry["nodes"]))
    for targets, nodes in told:
        say(f"refused by {', '.join(targets)}:")
        for node in nodes:
            say(f"  {node['operator']} {node['name'] or '(no name)'!r} ({node['location']}): {node['words']}")
            say(f"    next: {node['advice']}")
