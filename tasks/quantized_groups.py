"""One group of nodes quantised at a time, out of one graph in which all of them are.

Quantising a graph costs far more than changing which nodes read a Q/DQ pair and which read what went into it. So the graph is typed once,
its weights lie in a file beside it, and each group's graph is the small rest.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Final

import onnx

from tasks.onnx_files import GRAPH, load_graph, save_graph
from tasks.onnx_weights import load_streamed
from tasks.quantize import OPERATORS, residuals

_ALONE: Final = "group.onnx"


class Groups:
    """A quantised graph, of which any group of nodes can be had quantised alone, exactly as `tasks.quantize` would do it."""

    def __init__(self, typed: Path, source: onnx.ModelProto, folder: Path, *, residual_pairs: bool) -> None:
        """Take the graph with all pairs, the one without any (hoisted, its nodes named), and a folder to write to.

        `residual_pairs` says whether sums have pairs of their own, as of `tasks.quantize.quantize`.
        """
        save_graph(load_streamed(typed), folder, external=True)
        self._folder = folder
        self._model = load_graph(folder / GRAPH, weights=False)
        known = {name for node in source.graph.node for name in node.output}
        middles = {
            node.output[0]: node.input[0]
            for node in self._model.graph.node
            if node.op_type == "QuantizeLinear" and node.output[0] not in known
        }
        # What went into each pair, by what came out of it.
        self._pairs = {
            node.output[0]: middles[node.input[0]]
            for node in self._model.graph.node
            if node.op_type == "DequantizeLinear" and node.input[0] in middles
        }
        # A sum takes the pair of its residual for the convolution that it is fused with.
        sums = residuals(source) if residual_pairs else []
        self._sums = {one.add: (one.conv, one.tensor) for one in sums}

    def alone(self, group: Collection[str]) -> Path:
        """Write the graph in which these nodes alone are quantised, and return its path: until the next is asked for."""
        model = onnx.ModelProto()
        model.CopyFrom(self._model)
        on = {name for node in model.graph.node if self._quantised(node) and node.name in group for name in node.input}
        for node in model.graph.node:
            conv, residual = self._sums.get(node.name, ("", ""))
            for index, name in enumerate(node.input):
                if name not in self._pairs:
                    continue
                # Whoever else reads a tensor that has a pair reads the pair; what is a sum's alone, nobody else does.
                reads = node.name in group if self._quantised(node) else name in on
                if not reads and not (conv in group and self._pairs[name] == residual):
                    node.input[index] = self._pairs[name]
        read = {name for node in model.graph.node for name in node.input} | {one.name for one in model.graph.output}
        dropped = {name for name in self._pairs if name not in read}
        kept = [node for node in model.graph.node if not (node.output and node.output[0] in dropped)]
        read = {name for node in kept for name in node.input} | {one.name for one in model.graph.output}
        kept = [node for node in kept if node.op_type != "QuantizeLinear" or node.output[0] in read]
        copied = [onnx.NodeProto.FromString(node.SerializeToString()) for node in kept]
        del model.graph.node[:]
        model.graph.node.extend(copied)
        path = self._folder / _ALONE
        path.write_bytes(model.SerializeToString())
        return path

    def _quantised(self, node: onnx.NodeProto) -> bool:
        return node.op_type in OPERATORS and node.domain in ("", "ai.onnx")
