"""The operator check of a plan: which target refuses which node of the model, known before anything is compiled for it.

Where TensorRT-RTX is installed its parser is asked (`tasks.support.check`). That of TensorRT would need a GPU, and ten seconds for the
builder's start (8.6), for what the compilation says before it has timed a kernel: it is not asked apart. ONNX Runtime runs every standard graph while it is
simplified and measured, so that it is asked only about operators outside the standard, which may run by plugins elsewhere.
Where TensorRT is not here, the opset that its version reads at most decides.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from recipes.gates import judge_by, parity_bounds
from recipes.options import stated_plugins
from recipes.pipeline import Pipeline, graph_files
from recipes.schema import Acceptance, Target
from recipes.steps import Output, Step
from recipes.targets import opset_ceiling

PLACES: Final = "places.json"
_TOLD: Final = 20


def support_step(pipeline: Pipeline, target: Target, *, here: bool, toolchain: Mapping[str, Any]) -> Step | None:
    """Describe the check of one target's runtime, or None where nothing is left to ask.

    `here` says that the runtime is installed and can be asked, `toolchain` what it is.
    """
    exported = pipeline.export.facts or {}
    custom = bool(exported.get("domains"))
    params: dict[str, Any] = {"runtime": target.runtime}
    subject: str = target.runtime
    if target.runtime == "onnxruntime":
        if not custom or not stated_plugins_of_any(pipeline):
            return None
        params["by"] = "session"
    elif here and target.runtime == "tensorrt-rtx":
        params["by"] = "parser"
    else:
        ceiling = opset_ceiling(target.runtime, target.version)
        if ceiling is None or int(exported.get("opset", 0)) <= ceiling:
            return None
        params |= {"by": "opset", "version": target.version, "ceiling": ceiling}
        subject += f":{target.version}"
    places = Output(pipeline.export, PLACES)
    return pipeline.steps.add(
        pipeline.id("check", subject),
        params=params,
        inputs=[*graph_files(pipeline.simplify), *([places] if places.ref is not None else [])],
        toolchain={**pipeline.versions("onnx"), **(toolchain if params["by"] != "opset" else {})},
    )


def stated_plugins_of_any(pipeline: Pipeline) -> bool:
    """Tell whether any target of the recipe has plugins: only then does a graph get here that ONNX Runtime cannot run."""
    return any(plugins for _at, plugins in stated_plugins(pipeline.recipe))


def refused_nodes(facts: Mapping[str, Any] | None) -> str | None:
    """Return what a check found, as lines: each node with its place, the target's words and what to do; None: nothing."""
    if facts is None or facts.get("state") != "no":
        return None
    nodes: Sequence[Mapping[str, Any]] = facts["nodes"]
    lines = [f"{facts['target']} does not read the model: {facts['words']}"]
    for node in nodes[:_TOLD]:
        named = f" {node['name']!r}" if node["name"] else ""
        lines.append(f"  {node['operator']}{named} ({node['location']}): {node['words']}")
        lines.append(f"    next: {node['advice']}")
    if len(nodes) > _TOLD:
        lines.append(f"  and {len(nodes) - _TOLD} more: enginery inspect tells all of a file's")
    if not nodes:
        lines.append(f"    next: {facts['advice']}")
    return "\n".join(lines)


def source_fails(facts: Mapping[str, Any] | None, acceptance: Acceptance) -> str | None:
    """Return what to say of a graph whose source is at fault, where no reason says it: it equals one that fails the metric's gate itself.

    None where the exporter may be: its graph is away from the source, or the source passes.
    """
    if facts is not None and facts.get("told"):
        return ""
    metric = facts.get("metric") if facts is not None else None
    bounds = parity_bounds(acceptance, "fp32")
    if facts is None or metric is None or not judge_by(facts, bounds, None, "fp32").passed:
        return None
    if judge_by({**facts, "metric": {**metric, "value": metric["source"]}}, bounds, acceptance.metric, "fp32").passed:
        return None
    value = "not finite" if metric["source"] is None else f"{metric['source']:.4g}"
    return (
        f"\nthe graph equals its source, whose own {metric['name']} is {value}\n"
        "    next: look at the model's weights, the data and its labels (acceptance.metric), and the bound"
    )


def told_of_sample(facts: Mapping[str, Any] | None, framework: str) -> str:
    """Return what the exporter took from its sample input, as lines to add to what failed; empty where nothing is known."""
    if facts is None:
        return ""
    lines = []
    for one in facts.get("found", ()):
        about = f"axis {one['axis']!r}" if one["axis"] is not None else "values"
        named = f"{one['operator']} {one['node']!r}: " if one["node"] else ""
        lines.append(f"  {about} ({one['at']}): {named}{one['words']}")
    if not lines:
        lines.append(
            f"  {facts.get('exports', 0)} more exports with other samples gave the same graph: the exporter itself is wrong"
        )
        lines.append(
            "    next: Paddle traces open axes as -1, so that a Python `if` on x.shape is decided by that: use paddle.shape(x), or "
            "give the axis a fixed size"
            if framework == "paddle"
            else "    next: try the other export.exporter, or another opset"
        )
    else:
        lines.append(
            "    next: compute it from tensors and their shapes (torch.where, x.size()), or give the axis a fixed size"
        )
    return "\n" + "\n".join(["what the exporter took from its sample input:", *lines])
