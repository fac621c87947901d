"""Why RT-DETR in fp16 is far from its source: which places its TopK chooses, and what is left where they are the source's.

    python bench/rtdetr_choice.py recipes/rtdetr-small.yaml --images 32
    python bench/rtdetr_choice.py recipes/rtdetr.yaml --images 3

Each image runs alone through the simplified fp32 graph and through the typed fp16 one (emulated as in the stage `verify`), as it is and
with the indices of the fp32 graph's TopK put in the place of its own. `kept` is the graph whose nodes from the score head to the TopK
stay fp32. Results go to bench/results/rtdetr_choice.json, one entry for a recipe, with its command.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import shutil
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from artifacts.cache import blob_path
from artifacts.store import open_store
from bench.precisions import built
from tasks.emulate import emulated
from tasks.graphs import matching_nodes
from tasks.metrics import distance
from tasks.onnx_files import GRAPH, load_graph
from tasks.precision import run as typed
from tasks.seeded import seeded_inputs
from tasks.session import open_session
from tasks.stage import StageRequest

RESULTS = Path(__file__).resolve().parent / "results" / "rtdetr_choice.json"
HEAD = ["*enc_score_head*", "*ReduceMax*", "*TopK*"]


class Graph:
    """A graph whose choices are outputs too; or, where they are forced, inputs."""

    def __init__(self, model: onnx.ModelProto, *, forced: bool = False) -> None:
        import onnxruntime

        largest = [
            node
            for node in model.graph.node
            if node.op_type == "TopK" and all(one.i for one in node.attribute if one.name == "largest")
        ]
        self.places = [node.output[1] for node in largest]
        self.scores = largest[0].input[0]
        self.outputs = [value.name for value in model.graph.output]
        for node in largest if forced else ():
            model.graph.input.append(onnx.helper.make_tensor_value_info(node.output[1], onnx.TensorProto.INT64, None))
            node.output[1] = f"{node.output[1]}_own"
        added = [] if forced else [*self.places, self.scores]
        model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in added)
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        with tempfile.TemporaryDirectory() as folder:
            onnx.save(model, Path(folder, GRAPH))
            self.session = onnxruntime.InferenceSession(str(Path(folder, GRAPH)), options)

    def __call__(self, feeds: dict[str, Any]) -> dict[str, Any]:
        names = [value.name for value in self.session.get_outputs()]
        return dict(zip(names, self.session.run(names, feeds), strict=True))


def compared(reference: dict[str, Any], found: dict[str, Any], outputs: list[str]) -> float:
    return max(distance(reference[name], found[name]).relative_l2 for name in outputs)


def measure(recipe: Path, images: int, store: str, graph: Path | None) -> dict[str, Any]:
    session = open_session(recipe, open_store(store))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if graph is not None:
            shutil.copyfile(graph, folder / GRAPH)
        else:
            steps = {step.id: step for step in built(session).steps}
            for step in ("simplify", "outliers"):
                for file, ref in steps[step].record.outputs.items():
                    session.store.get_file(blob_path(ref.digest), ref, folder / file)
        inputs = {path.name: path for path in folder.iterdir()}

        def half(keep: list[str], *, forced: bool = False) -> Graph:
            with tempfile.TemporaryDirectory() as made:
                params = {"precision": "fp16", "keep": keep, "io": "float32"}
                typed(StageRequest("type", params, inputs, Path(made)))
                return Graph(emulated(load_graph(Path(made, GRAPH))), forced=forced)

        source = load_graph(folder / GRAPH)
        kept = len(matching_nodes(source, HEAD))
        full, plain, head, told = Graph(source), half([]), half(HEAD), half([], forced=True)
    tensors = {name: dict(one) for name, one in session.loaded.recipe.inputs.items()}
    rows = []
    for index in range(images):
        feeds = seeded_inputs(tensors, {name: [1, *one["shape"][1:]] for name, one in tensors.items()}, 7, index)
        expected, own, by_head = full(feeds), plain(feeds), head(feeds)
        right = told({**feeds, **{name: expected[name] for name in full.places}})
        chosen = set(expected[full.places[0]].reshape(-1).tolist())
        scores = np.sort(expected[full.scores].reshape(-1).astype(np.float64))[::-1]
        error = np.abs(own[plain.scores].astype(np.float64) - expected[full.scores])
        rows.append(
            {
                "others_chosen": len(chosen - set(own[plain.places[0]].reshape(-1).tolist())),
                "others_chosen_with_fp32_head": len(chosen - set(by_head[head.places[0]].reshape(-1).tolist())),
                "of": len(chosen),
                "last_less_next": float(scores[len(chosen) - 1] - scores[len(chosen)]),
                "score_error": float(error.max()),
                "relative_l2": compared(expected, own, full.outputs),
                "relative_l2_with_fp32_head": compared(expected, by_head, full.outputs),
                "relative_l2_with_the_same_places": compared(expected, right, full.outputs),
            }
        )
        print(rows[-1])
    same = [row["relative_l2"] for row in rows if not row["others_chosen"]]
    other = [row["relative_l2"] for row in rows if row["others_chosen"]]
    return {
        "images": images,
        "date": dt.datetime.now(tz=dt.UTC).date().isoformat(),
        "nodes_kept_in_head": kept,
        "images_with_other_places": len(other),
        "images_with_other_places_with_fp32_head": sum(bool(row["others_chosen_with_fp32_head"]) for row in rows),
        "greatest_relative_l2_of_images_with_the_same_places": max(same, default=None),
        "least_relative_l2_of_images_with_other_places": min(other, default=None),
        "greatest_relative_l2_with_the_same_places_forced": max(
            row["relative_l2_with_the_same_places"] for row in rows
        ),
        "rows": rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--store", help="a store that may have the graphs already (default: an empty one)")
    parser.add_argument(
        "--graph", type=Path, help="the recipe's simplified graph, where it is at hand: nothing is built"
    )
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(asked.recipe, asked.images, asked.store or folder, asked.graph)
    before = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    document = {
        "versions": {
            name: metadata.version(name) for name in ("onnx", "onnxruntime", "torch", "transformers", "numpy")
        },
        "recipes": {
            **before.get("recipes", {}),
            str(asked.recipe): {"command": f"python bench/rtdetr_choice.py {' '.join(sys.argv[1:])}", **found},
        },
    }
    RESULTS.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
