"""The `sensitivity` stage: how much each layer costs when it alone is quantised, and which ones `keep: auto` leaves high.

One group of nodes at a time is quantised, and the graph compared with the fp32 one on real inputs. Then the recipe's own gates
decide: nothing kept, the most sensitive group, two, four, ... until they pass, and fewest between the last two by halving. At
most half of the groups are kept: where that is not enough, the precision does not serve this model, and gives way.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from artifacts.manifest_gates import MetricGate, ParityGate
from artifacts.refs import JSON
from recipes.gates import Verdict, judge_by
from tasks import precision, verify
from tasks.datasets import Array, batches
from tasks.errors import BackendError
from tasks.graphs import hoist_constants, matching_nodes, name_nodes
from tasks.metrics import distance, finite
from tasks.onnx_files import DATA, GRAPH, load_graph
from tasks.onnx_sessions import GraphRunner
from tasks.outliers import nodes_of
from tasks.precision import KEEP
from tasks.quantize import OPERATORS, read_ranges, zero_range
from tasks.quantized_groups import Groups
from tasks.references import HELD_OUT
from tasks.stage import StageRequest, StageResult

SENSITIVITY: Final = "sensitivity.json"
# Each group costs a session and one run of the graph, on so many samples at most: they rank, and the gates decide.
MOST_GROUPS: Final = 64
MOST_SAMPLES: Final = 8


@dataclass(frozen=True)
class Group:
    """Nodes that are quantised together, and how far the graph's outputs are then from the fp32 graph's."""

    nodes: tuple[str, ...]
    relative_l2: float
    cosine: float


def run(request: StageRequest) -> StageResult:
    """Rank the groups of "model.onnx" and choose which to keep, so that params["precision"] passes its gates.

    Inputs are those of the `type` and the `verify` stage; params: precision, keep (globs), io; bounds and gate (as a manifest
    states them); measure (params of `verify`). Writes "keep.json" {node: why} and "sensitivity.json" {"precision", "groups":
    [{"nodes", "relative_l2", "cosine", "kept"}], "tried": [{"kept_groups", "passed", "reasons"}]}, the most sensitive group
    first. Facts: groups, kept_groups (null where not even half of the groups was enough: nothing is kept then), kept, tried.
    """
    globs, nodes = _nodes(request)
    size = -(-len(nodes) // MOST_GROUPS)
    groups = [tuple(nodes[start : start + size]) for start in range(0, len(nodes), size or 1)]
    ranked = sorted(_measured(request, groups, set(globs)), key=lambda group: -group.relative_l2)
    tried: dict[int, Verdict] = {}

    def passes(count: int) -> bool:
        if count not in tried:
            request.report(None, f"gates with {count} of {len(ranked)} groups kept")
            tried[count] = _verdict(request, [node for group in ranked[:count] for node in group.nodes])
        return tried[count].passed

    count = fewest(passes, len(ranked) // 2)
    why = {
        node: f"{request.params['precision']} of {_others(group, node)} moves the outputs by relative_l2 "
        f"{group.relative_l2:.3g}, place {place} of {len(ranked)}"
        for place, group in enumerate(ranked[: count or 0], start=1)
        for node in group.nodes
    }
    document = {
        "precision": request.params["precision"],
        "groups": [
            {
                "nodes": list(group.nodes),
                "relative_l2": finite(group.relative_l2),
                "cosine": finite(group.cosine),
                "kept": place < (count or 0),
            }
            for place, group in enumerate(ranked)
        ],
        "tried": [
            {"kept_groups": kept, "passed": verdict.passed, "reasons": list(verdict.reasons)}
            for kept, verdict in sorted(tried.items())
        ],
    }
    for name, content in ((KEEP, why), (SENSITIVITY, document)):
        (request.output_dir / name).write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", "utf-8")
    facts = {"groups": len(ranked), "kept_groups": count, "kept": sorted(why), "tried": document["tried"]}
    return StageResult({KEEP: JSON, SENSITIVITY: JSON}, facts)


def fewest(passes: Callable[[int], bool], most: int) -> int | None:
    """Return a number of 0 to `most` that passes, found by doubling and halving; None where `most` does not pass either.

    The fewest, where what passes goes on to pass with more.
    """
    low, high = -1, 0
    while not passes(high):
        if high >= most:
            return None
        low, high = high, min(most, max(1, 2 * high))
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if passes(middle) else (middle, high)
    return high


def _others(group: Group, node: str) -> str:
    return "it alone" if len(group.nodes) == 1 else f"{node} and {len(group.nodes) - 1} neighbours alone"


def _nodes(request: StageRequest) -> tuple[set[str], list[str]]:
    """Return what is kept already, and the nodes that would be quantised, in the graph's order."""
    model = load_graph(request.inputs[GRAPH])
    hoist_constants(model)
    name_nodes(model)
    kept = matching_nodes(model, request.params["keep"])
    if "outliers.json" in request.inputs:
        kept |= nodes_of(model, json.loads(request.inputs["outliers.json"].read_text("utf-8")))
    zero = {name for name, span in read_ranges(request.inputs["ranges.json"]).items() if zero_range(*span)}
    nodes = [
        node.name
        for node in model.graph.node
        if node.op_type in OPERATORS and node.name not in kept and not zero.intersection(node.input[:2])
    ]
    return kept, nodes


def _measured(request: StageRequest, groups: Sequence[Sequence[str]], kept: set[str]) -> list[Group]:
    """Quantise one group at a time, the rest of the graph in fp32, and compare with the fp32 graph."""
    feeds = _feeds(request)
    expected = GraphRunner(request.inputs[GRAPH]).run(feeds, "the held-out data")
    # Halves cost the same whatever is quantised: pairs are what is compared.
    pairs = "fp8" if request.params["precision"].startswith("fp8") else "int8"
    found = []
    with tempfile.TemporaryDirectory() as folder:
        request.report(0.0, f"quantising {len(groups)} groups of nodes")
        typed = _typed(request, list(kept), Path(folder), pairs)
        source = load_graph(request.inputs[GRAPH], weights=False)
        hoist_constants(source)
        name_nodes(source)
        (Path(folder) / "alone").mkdir()
        one_of = Groups(typed[GRAPH], source, Path(folder) / "alone", residual_pairs=pairs == "int8")
        for index, group in enumerate(groups):
            request.report(index / len(groups), f"group {index + 1} of {len(groups)}: {group[0]}")
            outputs = GraphRunner(one_of.alone(group)).run(feeds, f"the held-out data with {group[0]} quantised")
            distances = [distance(expected[name], outputs[name]) for name in expected]
            found.append(
                Group(tuple(group), max(one.relative_l2 for one in distances), min(one.cosine for one in distances))
            )
    return found


def _verdict(request: StageRequest, kept: Sequence[str]) -> Verdict:
    """Apply the recipe's gates to the graph with these nodes kept, as the planner does to the one that is built."""
    params = request.params
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as output:
        try:
            typed = _typed(request, kept, Path(folder), params["precision"])
        except BackendError as err:
            if err.kind != "bad data":  # nothing was left to quantise
                raise
            return Verdict(passed=False, reasons=(err.message,))
        inputs = {**{name: path for name, path in request.inputs.items() if name not in (GRAPH, DATA)}, **typed}
        facts = verify.run(StageRequest("verify", params["measure"], inputs, Path(output))).facts
    gate = MetricGate.model_validate(params["gate"]) if params["gate"] is not None else None
    return judge_by(facts, ParityGate.model_validate(params["bounds"]), gate, params["precision"])


def _typed(request: StageRequest, kept: Sequence[str], folder: Path, as_what: str) -> dict[str, Path]:
    """Type the graph as the `type` stage does, with these nodes kept besides; return its files."""
    wanted = folder / "wanted"
    wanted.mkdir()
    (wanted / KEEP).write_text(json.dumps(dict.fromkeys(kept, "")), "utf-8")
    output = folder / "typed"
    output.mkdir()
    params = {name: request.params[name] for name in ("keep", "io")} | {"precision": as_what}
    names = (GRAPH, DATA, "ranges.json", *(("outliers.json",) if as_what.endswith("-fp16") else ()))
    inputs = {name: path for name, path in request.inputs.items() if name in names} | {KEEP: wanted / KEEP}
    made = precision.run(StageRequest("type", params, inputs, output))
    return {name: output / name for name in made.outputs}


def _feeds(request: StageRequest) -> dict[str, Array]:
    """Return real inputs of one run, of MOST_SAMPLES at most where batches are free: held-out samples, else labelled ones."""
    tensors = request.params["measure"]["tensors"]
    free = all(tensor["shape"] and isinstance(tensor["shape"][0], str) for tensor in tensors.values())
    return {name: array[:MOST_SAMPLES] if free else array for name, array in _batch(request).items()}


def _batch(request: StageRequest) -> dict[str, Array]:
    from safetensors.numpy import load_file

    if HELD_OUT in request.inputs:
        arrays, first = load_file(str(request.inputs[HELD_OUT])), "held-out/0/in/"
        return {name.removeprefix(first): array for name, array in arrays.items() if name.startswith(first)}
    measure = request.params["measure"]
    data = load_file(str(request.inputs["dataset.safetensors"]))
    _samples, arrays = next(batches(data, measure["tensors"], measure["batch"]))
    return {name: np.ascontiguousarray(array) for name, array in arrays.items()}
