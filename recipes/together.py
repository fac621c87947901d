"""What the parts of a model do together: run one after the other by the recipe's own code, and judged as one.

The source's parts are run once, on the recipe's labelled data. Each combination of precisions is run in the same way: as graphs, and
as engines where this host executes them. See docs/adr/0013-whole-model-gates.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from recipes.engine_stages import PLAN_NAMES, RUNTIME_PACKAGES, EngineStages
from recipes.gates import Verdict, judge_together, telling_parity
from recipes.pipeline import Pipeline, graph_files, interface_of, saved_files
from recipes.plan import EnginePlan
from recipes.schema import EXACTNESS, Precision, Together
from recipes.steps import Output, Step

# Where the source's files lie that parts share; a part has a folder of its name.
SHARED = "shared/source"


@dataclass(frozen=True)
class TogetherStages:
    """Describes running the parts together: as their source has them, and as an engine has."""

    asked: Together
    whole: Pipeline
    parts: Mapping[str, EngineStages]

    def measured(self, engine: EnginePlan) -> dict[str, Step]:
        """Measure the typed graphs of an engine's parts (`graph`), and what was compiled where it can be executed (`engine`).

        Of graphs that are known to fail together no engine is measured: the combination is given up. A saved source is no graph.
        """
        if engine.fallback == "source":
            return {"engine": self._saved(engine)}
        found = {"graph": self.graphs(engine)}
        known = self.verdict(found)
        if (known is None or known.passed) and all(part.engine_verify is not None for part in engine.parts.values()):
            found["engine"] = self._engines(engine)
        return found

    def verdict(self, steps: Mapping[str, Step]) -> Verdict | None:
        """Judge what was measured; None where something of it is not known yet."""
        verdicts = [judge_together(step.facts, self.asked) for step in steps.values() if step.facts is not None]
        failed = next((verdict for verdict in verdicts if not verdict.passed), None)
        return failed or (verdicts[0] if len(verdicts) == len(steps) else None)

    def giving_way(self, engine: EnginePlan) -> str | None:
        """Return the part that gives way: of those that can, the least exact, and of these the farthest from its source."""

        def distance(name: str) -> float:
            part = engine.parts[name]
            step = part.engine_verify or part.verify
            found = telling_parity(step.facts, part.given or "fp32") if step is not None and step.facts else None
            return float((found or {}).get("relative_l2") or 0.0)

        able = [name for name, part in engine.parts.items() if self._next(name, part) is not None]
        return min(
            able, key=lambda name: (EXACTNESS[engine.parts[name].given or "fp32"], -distance(name)), default=None
        )

    def _next(self, name: str, part: EnginePlan) -> Precision | None:
        """Return what comes after the precision that a part was given."""
        if part.given is None or part.asked == "auto":
            return None
        chain = (part.asked, *self.parts[name].pipeline.recipe.precision.fallback.get(part.asked, ()))
        after = chain[chain.index(part.given) + 1 :]
        return after[0] if after else None

    def graphs(self, engine: EnginePlan) -> Step:
        """Run the typed graphs of a combination of precisions: what is compiled of one waits for it."""
        parts: dict[str, dict[str, Any]] = {}
        files: list[Output] = []
        for name, part in engine.parts.items():
            source = part.typed or part.given or "fp32"
            parts[name] = {
                "executor": "onnxruntime",
                "subject": "graph",
                **({"tf32": True} if source == "tf32" else {}),
            }
            files += _in_folder(name, graph_files(self.parts[name].pipeline.typed(source)))
        versions = self.whole.versions("onnx", "onnxruntime", "numpy")
        return self._verify(_named(engine, typed=True), parts, files, versions)

    def _engines(self, engine: EnginePlan) -> Step:
        parts: dict[str, dict[str, Any]] = {}
        files: list[Output] = []
        toolchain = self.whole.versions("numpy")
        for name, part in engine.parts.items():
            stages = self.parts[name]
            parts[name] = {"subject": "fallback" if engine.fallback else "engine", **stages.executor(part)}
            if part.compile is not None:
                files += _in_folder(name, graph_files(part.compile, PLAN_NAMES[engine.runtime]))
            files += _in_folder(name, stages.pipeline.plugins(part.options) if engine.runtime == "tensorrt" else [])
            toolchain[RUNTIME_PACKAGES[engine.runtime]] = engine.runtime_version
            toolchain |= stages.device(part) if engine.runtime != "onnxruntime" else {}
        if engine.runtime == "onnxruntime":
            toolchain |= self.whole.versions("onnx", "onnxruntime")
        return self._verify(f"{engine.runtime}:{engine.gpu}:{_named(engine, typed=False)}", parts, files, toolchain)

    def _saved(self, engine: EnginePlan) -> Step:
        parts: dict[str, dict[str, Any]] = {}
        files: list[Output] = []
        toolchain: dict[str, Any] = {}
        saved: dict[str, Mapping[str, Any] | None] = {}
        for name in engine.parts:
            pipeline = self.parts[name].pipeline
            parts[name] = {"subject": "fallback", "executor": engine.runtime, "tensors": pipeline.interface}
            saved[name] = pipeline.save.facts
            files += _in_folder(name, saved_files(pipeline.save))
            toolchain |= pipeline.serving_toolchain()
        return self._verify(engine.gpu, parts, files, toolchain, saved)

    def _verify(
        self,
        subject: str,
        parts: dict[str, dict[str, Any]],
        files: list[Output],
        toolchain: dict[str, Any],
        saved: Mapping[str, Mapping[str, Any] | None] | None = None,
    ) -> Step:
        params, own = self.whole.measure("together")
        del params["executor"]
        run, entry, packages = self._run()
        params |= {"tensors": interface_of(self.asked.inputs), "batch": self._batch, "run": entry, "parts": parts}
        return self.whole.steps.add(
            f"verify:together:{subject}",
            params=params,
            inputs=[*files, run, *self.reference()],
            toolchain=toolchain | own | packages,
            measured=saved,
        )

    def reference(self) -> list[Output]:
        """Bring the data, what the source's parts make of it together, and the code of the recipe's own metric."""
        whole, labelled = self.whole, self.whole.files.labelled
        if labelled is None:
            raise ValueError("there is no data to run the parts on")
        data = whole.dataset("labelled", self.asked.data, labelled, self.asked.labels)
        run, entry, toolchain = self._run()
        parts: dict[str, Any] = {}
        inputs = [data, run]
        for name, stages in self.parts.items():
            folder = name if stages.pipeline.own else SHARED
            parts[name] = {**stages.pipeline.source_params(), "folder": folder}
            inputs += _in_folder(folder, stages.pipeline.source_files)
            toolchain |= stages.pipeline.reference_toolchain()
        step = whole.steps.add(
            "reference:together",
            params={
                "kind": "together",
                "tensors": interface_of(self.asked.inputs),
                "batch": self._batch,
                "run": entry,
                "parts": parts,
            },
            inputs=list({output.placed: output for output in inputs}.values()),
            toolchain=toolchain,
            gates=whole.data,
        )
        metric = whole.files.metric
        code = [whole.code("fetch:metric", metric)] if metric is not None else []
        return [data, Output(step, "outputs.safetensors"), *code]

    def _run(self) -> tuple[Output, str, dict[str, Any]]:
        """Return the code that runs the parts, what of it is called, and the versions of what it imports."""
        bundle = self.whole.files.run
        if bundle is None:
            raise ValueError("there is no code that runs the parts")
        made = self.whole.code("fetch:together", bundle)
        return replace(made, folder="run"), bundle.entry, self.whole.versions(*bundle.packages)

    @property
    def _batch(self) -> int:
        """How many samples run at once: as many as every part takes."""
        return min(stages.pipeline.evaluation_batch for stages in self.parts.values())


def _in_folder(folder: str, outputs: list[Output]) -> list[Output]:
    return [replace(output, folder=folder) for output in outputs]


def _named(engine: EnginePlan, *, typed: bool) -> str:
    """Name a combination of precisions by what each part has."""
    return ",".join(f"{name}-{part.typed if typed else part.given}" for name, part in engine.parts.items())
