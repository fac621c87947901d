"""Simplify: one graph to an equal one with fewer nodes, by onnxsim or onnxslim, judged by running both."""

from __future__ import annotations

import contextlib
import math
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from tasks.errors import BackendError
from tasks.exporter_words import quiet
from tasks.onnx_files import (
    DATA,
    GRAPH,
    brief,
    check_graph,
    custom_domains,
    dims_of,
    graph_inputs,
    infer_shapes,
    load_graph,
    save_graph,
    strip_notes,
)
from tasks.onnx_sessions import GraphRunner
from tasks.onnx_weights import APART, external_bytes, load_streamed, put_back, set_apart
from tasks.rewrite import rewrite
from tasks.seeded import Array, seeded_inputs
from tasks.stage import StageRequest, StageResult

# How far the simplified graph's outputs may be from the input's, relative to the largest magnitude of an output:
# folding and fusing reorder sums, which in float32 costs a few roundoffs (2^-24 each).
TOLERANCE: Final = 1e-5
# onnxsim 0.8 fuses attention into com.microsoft::Attention, which TensorRT does not parse (facts: toolchain.md 0.3).
# The pass is not listed among onnxsim's own, but the name works.
_SKIPPED: Final = ["fuse_attention"]


def run(request: StageRequest) -> StageResult:
    """Simplify `model.onnx` as `params["simplifier"]` says ("none" checks and copies), keeping names and dynamic axes.

    Then apply params["rewrites"], names of `tasks.rewrite.PASSES`; the fact `rewritten` counts what each changed. Both graphs run in ONNX Runtime at every case. Raises BackendError("wrong result") where an output differs by more
    than TOLERANCE, where an axis, a name or a type is lost, or where operators outside the ONNX standard appear;
    "bad profile" where the input graph itself does not run at a case (with params["plugins"], graphs with operators outside
    the standard are not run); "missing package" with the extra to install.
    """
    simplifier: str = request.params["simplifier"]
    source = request.inputs[GRAPH]
    before = load_graph(source, weights=False)
    request.report(0.1, f"{simplifier} on {len(before.graph.node)} nodes")
    rewritten = dict.fromkeys(request.params.get("rewrites", ()), 0)
    if simplifier == "none" and not rewritten:
        outputs = save_graph(load_streamed(source), request.output_dir, external=DATA in request.inputs)
        after = before
    else:
        outputs = _simplify(simplifier, source, request.output_dir, rewritten, external=DATA in request.inputs)
        after = infer_shapes(request.output_dir)
        _require_same_interface(before, after, simplifier)
        check_graph(request.output_dir / GRAPH)
    counts = {"nodes_before": len(before.graph.node), "nodes_after": len(after.graph.node), "rewritten": rewritten}
    if request.params.get("plugins") and custom_domains(before):
        # ONNX Runtime runs neither graph; what a plugin computes is measured where the engine is executed.
        return StageResult(outputs, {**counts, "checked": [], "max_abs": None})
    worst = _compare(request, source, request.output_dir / GRAPH, [name for name, count in rewritten.items() if count])
    checked = [case["name"] for case in request.params["cases"]]
    return StageResult(outputs, {**counts, "checked": checked, "max_abs": worst})


def _simplify(
    simplifier: str, source: Path, folder: Path, rewritten: dict[str, int], *, external: bool
) -> dict[str, str]:
    """Write the simplified and rewritten graph; `rewritten` names the passes, and gets their counts."""

    def run(path: Path, folder: Path) -> Any:
        model = _SIMPLIFIERS[simplifier](path, folder)
        try:
            rewritten.update(rewrite(model, tuple(rewritten)))
        except Exception as err:  # a graph that a pass did not expect
            raise BackendError(
                "unsupported operator", f"export.rewrites failed: {brief(err)}", "set export.rewrites to []"
            ) from err
        return model

    try:
        with quiet("onnxslim", "ONNXSLIM"):
            streamed = load_streamed(source) if external else None
            if streamed is not None and external_bytes(streamed) > APART:
                model = _apart(streamed, run, folder)
            else:
                model = run(source, folder)
    except ImportError as err:
        raise BackendError(
            "missing package",
            f"{simplifier} cannot be imported: {err}",
            f"install it (pip install 'enginery[{simplifier}]'), or set export.simplifier",
        ) from err
    except BackendError:
        raise
    except Exception as err:  # simplifiers raise anything
        raise BackendError(
            "unsupported operator",
            f"{simplifier} failed: {brief(err)}",
            "set export.simplifier to another one, or to none",
        ) from err
    strip_notes(model, keep_model_metadata=True)
    kept = [(entry.key, entry.value) for entry in model.metadata_props if not entry.key.startswith("onnxsim.")]
    del model.metadata_props[:]
    for key, value in kept:
        model.metadata_props.add(key=key, value=value)
    return save_graph(model, folder, external=external)


def _apart(model: Any, run: Callable[[Path, Path], Any], folder: Path) -> Any:
    """Simplify without the large weights, which are inputs meanwhile: nothing is folded into them, and nothing holds them."""
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        path = Path(scratch) / GRAPH
        weights = set_apart(model)
        path.write_bytes(model.SerializeToString())
        simplified = run(path, folder)
    put_back(simplified, weights)
    return simplified


def _onnxsim(source: Path, _folder: Path) -> Any:
    import onnxsim

    # By path: a graph with 2.4 GB of external data takes 11 s and 7.6 GB so, 45 s and 12.4 GB as a proto.
    # Its own check (check_n) takes no dynamic heights, and says False instead of why; ours runs at the cases.
    model, _checked = onnxsim.simplify(str(source), check_n=0, skipped_optimizers=list(_SKIPPED))
    return model


def _onnxslim(source: Path, folder: Path) -> Any:
    import onnxslim

    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        copy = Path(scratch) / GRAPH  # it may write beside its input, which is read-only
        shutil.copyfile(source, copy)
        data = source.with_name(DATA)
        with contextlib.suppress(FileNotFoundError):
            (Path(scratch) / DATA).hardlink_to(data)
        model = onnxslim.slim(str(copy))
        if model is None:
            raise BackendError("unsupported operator", "onnxslim returned no graph", "set export.simplifier to onnxsim")
        return model


def _unchanged(source: Path, _folder: Path) -> Any:
    return load_graph(source)


_SIMPLIFIERS: Final[Mapping[str, Callable[[Path, Path], Any]]] = {
    "onnxsim": _onnxsim,
    "onnxslim": _onnxslim,
    "none": _unchanged,
}


def _require_same_interface(before: Any, after: Any, simplifier: str) -> None:
    lost = [
        f"{kind} {old.name!r} {dims_of(old)} became {[(new.name, dims_of(new)) for new in news] or 'nothing'}"
        for kind, olds, news in (
            ("input", graph_inputs(before), graph_inputs(after)),
            ("output", list(before.graph.output), list(after.graph.output)),
        )
        for old in olds
        if not any(_same_value(old, new) for new in news)
    ]
    domains = {
        domain: [op for op in ops if op not in custom_domains(before).get(domain, [])]
        for domain, ops in custom_domains(after).items()
    }
    lost += [f"it brought in {domain}::{op}" for domain, ops in domains.items() for op in ops]
    if lost:
        raise BackendError(
            "wrong result", f"{simplifier} changed the graph's interface: " + "; ".join(lost), _another(simplifier)
        )


def _same_value(old: Any, new: Any) -> bool:
    """Tell whether a value kept its name, type and axes; an extent that became known where it was not is no loss."""
    if old.name != new.name or old.type.tensor_type.elem_type != new.type.tensor_type.elem_type:
        return False
    left, right = dims_of(old), dims_of(new)
    # Axes that the recipe names are plain names; what inference made up (unk__0, expressions) may be found anew.
    named = [dim if isinstance(dim, int) or str(dim).isidentifier() else None for dim in left]
    return len(left) == len(right) and all(
        a is None or a == b or (isinstance(a, str) and isinstance(b, str) and a.startswith("unk__"))
        for a, b in zip(named, right, strict=True)
    )


def _compare(request: StageRequest, source: Path, target: Path, passes: Sequence[str]) -> float:
    """Run both graphs at every case and return the largest absolute difference of any element; `passes` changed something."""
    params: Mapping[str, Any] = request.params
    makers = ", ".join(name for name in (params["simplifier"], *passes) if name != "none") or "no change"
    cases = []
    for index, case in enumerate(params["cases"]):
        inputs = seeded_inputs(params["tensors"], case["shapes"], params["input_seed"], index)
        what = f"case {case['name']} ({', '.join(f'{name} {list(a.shape)}' for name, a in sorted(inputs.items()))})"
        cases.append((case["name"], inputs, what))
    # One graph after the other: two of them at once would be twice the weights.
    runner = GraphRunner(source)
    references = [runner.run(inputs, what) for _name, inputs, what in cases]
    del runner
    runner, worst = GraphRunner(target), 0.0
    for index, ((case_name, inputs, what), expected) in enumerate(zip(cases, references, strict=True)):
        request.report(0.5 + 0.5 * index / len(cases), f"comparing at {case_name}")
        found = runner.run(inputs, f"{what} after {makers}")
        for name, reference in expected.items():
            gap, scale = _distance(reference, found[name])
            if not gap <= TOLERANCE * scale:
                raise BackendError(
                    "wrong result",
                    f"after {makers}, output {name!r} differs by {gap:.3g} (its largest value is {scale:.3g}) at {what}",
                    ("set export.rewrites to [], or " if passes else "") + _another(params["simplifier"]),
                )
            worst = max(worst, gap)
    return worst


def _distance(reference: Array, found: Array) -> tuple[float, float]:
    """Return the largest absolute difference, and the largest magnitude of the reference (at least the smallest normal).

    Equal NaNs and infinities count as equal; where only one side has them, or shapes differ, the difference is infinite.
    """
    if reference.shape != found.shape or reference.dtype != found.dtype:
        return math.inf, 1.0
    if not np.issubdtype(reference.dtype, np.floating):
        return (0.0 if np.array_equal(reference, found) else math.inf), 1.0
    finite = np.isfinite(reference)
    if not np.array_equal(reference[~finite], found[~finite], equal_nan=True):
        return math.inf, 1.0
    x, y = reference[finite].astype(np.float64), found[finite].astype(np.float64)
    scale = max(float(np.abs(x).max(initial=0.0)), float(np.finfo(np.float32).tiny))
    gap = float(np.abs(y - x).max(initial=0.0))
    return (gap if math.isfinite(gap) else math.inf), scale


def _another(simplifier: str) -> str:
    other = "onnxslim" if simplifier == "onnxsim" else "onnxsim"
    return f"set export.simplifier to {other} or none, and report the graph to {simplifier}"
