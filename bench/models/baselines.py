"""One model in PyTorch: export it, then time eager fp32, eager fp16 and torch.compile, when told that the GPU is free.

    python -m bench.models.baselines MODEL FOLDER --step export --batches 1
    python -m bench.models.baselines MODEL FOLDER --step time --batches 1,8

The first makes weights.pt and the data, where they are not there, and the graph of every batch size. The second waits for
them, compiles, prints READY, and waits for a line on its standard input; the times follow, written to FOLDER/MODEL/torch.json
after each. The defaults of PyTorch hold (TF32 in convolutions and not in products); torch.compile has mode="reduce-overhead",
which replays CUDA graphs. What is timed gets no mask where every token sees every one (sources.unmasked): with the mask that
transformers makes under torch.compile, its attention is three times slower than eager.
"""

from __future__ import annotations

import argparse
import copy
import fcntl
import json
import sys
import time
import traceback
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.models.clock import end_to_end, windows
from bench.models.sources import SOURCES, build, export, unmasked, write_data


class Subject:
    """A model in one precision and layout, ready to be called on one batch."""

    def __init__(self, model: torch.nn.Module, image: torch.Tensor, kind: torch.dtype, *, channels_last: bool) -> None:
        form = torch.channels_last if channels_last else torch.contiguous_format
        self.host, self.kind, self.form = image, kind, form
        self.device = next(model.parameters()).device
        self.model: Callable[[torch.Tensor], torch.Tensor] = model
        self.image = self.upload()

    def upload(self) -> torch.Tensor:
        return self.host.to(self.device).to(self.kind).contiguous(memory_format=self.form)

    def run(self) -> None:
        self.out = self.model(self.image)

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def whole(self) -> np.ndarray:
        return self.model(self.upload()).float().cpu().numpy()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", choices=list(SOURCES))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--batches", default="1,8")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--step", choices=("export", "time"), required=True)
    asked = parser.parse_args()
    job = Job(asked)
    if asked.step == "export":
        job.export()
    else:
        with unmasked():
            job.prepare()
            print("READY", flush=True)
            sys.stdin.readline()
            with torch.inference_mode():
                job.measure()
    print("DONE", flush=True)


class Job:
    """What one call of this script does, and the JSON that it fills."""

    def __init__(self, asked: argparse.Namespace) -> None:
        self.asked = asked
        self.name = asked.model
        self.batches = [int(batch) for batch in asked.batches.split(",")]
        self.folder = asked.folder / self.name
        self.folder.mkdir(parents=True, exist_ok=True)
        self.result: dict[str, Any] = {
            "torch": torch.__version__,
            "device": torch.cuda.get_device_name() if asked.device == "cuda" else "cpu",
            "notes": [],
            "times": {},
            "seconds": {},
        }
        self.subjects: dict[tuple[str, int], Subject] = {}

    def keep(self) -> None:
        name = "torch" if self.asked.step == "time" else f"export-{self.asked.batches}"
        (self.folder / f"{name}.json").write_text(json.dumps(self.result, indent=1) + "\n")

    def step(self, what: str, do: Callable[[], Any]) -> Any:
        started = time.perf_counter()
        try:
            return do()
        except Exception:  # noqa: BLE001  # the rest can go on without this step, and says what it lacks
            self.result["notes"].append(f"{what}: {traceback.format_exc()[-1500:]}")
            return None
        finally:
            self.result["seconds"][what] = round(time.perf_counter() - started, 1)
            self.keep()

    def model(self) -> torch.nn.Module:
        """Return the model with the weights that are kept, or make them: the first who asks, while the others wait."""
        kept = self.folder / "weights.pt"
        with (self.folder / "weights.lock").open("w") as held:
            fcntl.flock(held, fcntl.LOCK_EX)
            if not kept.exists():
                model = build(self.name, self.asked.device, small=self.asked.small)
                count = 8 if self.asked.small else 64
                self.step(
                    "data",
                    lambda: write_data(
                        model, self.name, self.asked.device, self.folder, count=count, calibration=count // 2
                    ),
                )
                torch.save(model.state_dict(), kept.with_suffix(".tmp"))
                kept.with_suffix(".tmp").rename(kept)
                return model
        model = build(self.name, self.asked.device, small=self.asked.small, fitted=False)
        model.load_state_dict(torch.load(kept, map_location=self.asked.device))
        return model

    def export(self) -> None:
        model = self.step("build", self.model)
        for batch in self.batches:
            target = self.folder / f"b{batch}" / "model.onnx"
            self.step(f"export {batch}", lambda: export(model, SOURCES[self.name].size, batch, target))  # noqa: B023  # runs now

    def prepare(self) -> None:
        model = self.step("build", self.model)
        data = np.load(self.folder / "data.npz")
        self.models = {"fp32": model, "fp16": copy.deepcopy(model).half()}
        with torch.inference_mode():
            for batch in self.batches:
                image = torch.from_numpy(data["image"][:batch])
                self.step(f"subjects {batch}", lambda: self.add_subjects(image, batch))  # noqa: B023  # runs now

    def add_subjects(self, image: torch.Tensor, batch: int) -> None:
        options = {"mode": "reduce-overhead", "dynamic": False}
        layouts = (False, True) if SOURCES[self.name].channels_last else (False,)
        for last in layouts:
            suffix = " channels_last" if last else ""
            full = self.models["fp32"]
            half = self.models["fp16"]
            if last:
                half = copy.deepcopy(half).to(memory_format=torch.channels_last)
            self.subjects[f"fp16 compile{suffix}", batch] = compiled = Subject(
                half, image, torch.float16, channels_last=last
            )
            compiled.model = torch.compile(half, **options)
            for _ in range(4):  # compiles, warms up, captures
                compiled.run()
            compiled.wait()
            self.subjects[f"fp16 eager{suffix}", batch] = Subject(half, image, torch.float16, channels_last=last)
            if not last:
                self.subjects["fp32 eager", batch] = Subject(full, image, torch.float32, channels_last=False)

    def measure(self) -> None:
        data = np.load(self.folder / "data.npz")
        for (kind, batch), subject in sorted(self.subjects.items(), key=lambda item: item[0][1]):

            def timed(kind: str = kind, batch: int = batch, subject: Subject = subject) -> None:
                row: dict[str, Any] = windows(subject.run, subject.wait)
                row["end_to_end_ms"] = end_to_end(subject.whole, 20)
                expected, found = data["out"][:batch], subject.whole()
                row["relative_l2"] = float(np.linalg.norm(found - expected) / np.linalg.norm(expected))
                self.result["times"].setdefault(f"b{batch}", {})[kind] = row

            self.step(f"time {kind} {batch}", timed)
        for (kind, batch), subject in self.subjects.items():
            if "compile" in kind:
                rows = self.step(f"kernels {kind} {batch}", lambda: kernels_of(subject))  # noqa: B023  # runs now
                self.result.setdefault("kernels", {})[f"b{batch} {kind}"] = rows
        self.keep()


def kernels_of(subject: Subject, runs: int = 10) -> dict[str, Any]:
    """Return how many kernels one call runs, their time in all, and the longest ones by name."""
    if subject.device.type != "cuda":
        return {}
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as found:
        for _ in range(runs):
            subject.run()
        subject.wait()
    total: dict[str, list[float]] = defaultdict(list)
    for event in found.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            total[event.name].append(event.device_time)
    rows = sorted(((sum(times), len(times), name) for name, times in total.items()), reverse=True)
    return {
        "count": sum(count for _us, count, _name in rows) / runs,
        "us": round(sum(us for us, _count, _name in rows) / runs, 1),
        "top": [
            {"us": round(us / runs, 2), "count": count / runs, "name": name[:140]} for us, count, name in rows[:25]
        ],
    }


if __name__ == "__main__":
    main()
