"""Four real models on one GPU: PyTorch against engines of the product, in one run.

    python bench/h200_models.py OUT --work /tmp/models --plan explore --seconds 560

Runs with the Python that has TensorRT (and this repository on its path); PyTorch is asked from the Python named by --torch.
Steps, each in processes of their own, bounded, and resumable (what lies in --work is not made again):

1. exports and torch.compile of every model, all at once; engines as their graphs come, --jobs builds at once
2. PyTorch's times, one model at a time, nothing else running
3. every engine, one at a time: parity, times, kernels, layers

Tactics are chosen while other builds use the GPU: where there are several, each model has one to itself. Results lie in OUT/models.json (all), rewritten after each step.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

MODELS = ("resnet50", "swin", "vit", "hunyuan")
# model -> [(batch, variant)], in the order of importance.
PLANS: dict[str, dict[str, list[tuple[int, str]]]] = {
    "explore": {
        "resnet50": [(1, "fp16"), (1, "int8"), (8, "int8"), (8, "fp16"), (1, "weak")],
        "swin": [(1, "fp16"), (1, "fp16-rw"), (1, "weak-rw"), (1, "int8-rw"), (8, "fp16-rw"), (1, "weak-rw-ln")],
        "vit": [
            *((1, variant) for variant in ("fp16", "fp16-rw", "weak-rw", "int8-rw")),
            *((8, "fp16-rw"), (8, "int8-rw"), (1, "weak-rw-ln")),
        ],
        "hunyuan": [(1, "fp16-rw"), (1, "int8-rw"), (8, "fp16-rw")],
    },
    # What removing the mask, padding tokens and widening heads do to attention; engines only.
    "pad": {
        "vit": [(1, "fp16-mha"), (8, "fp16-mha"), (1, "int8-half"), (8, "int8-half"), (1, "fp16-mha-ln")],
        "hunyuan4": [(1, "fp16-mha")],
        "hunyuan4w": [(1, "fp16-mha")],
        "vit640": [(1, "fp16-mha")],
    },
    # One engine or two for each model and batch size: what the table shows.
    "final": {
        "hunyuan": [(1, "fp16-mha"), (8, "fp16-mha")],
        "swin": [(1, "weak-mha-ln"), (8, "weak-mha-ln")],
        "resnet50": [(1, "int8"), (8, "int8"), (1, "fp16"), (8, "fp16")],
        "vit": [(1, "fp16-mha"), (8, "fp16-mha"), (1, "int8-half"), (8, "int8-half")],
    },
    # What makes TensorRT 8.6 run Swin in fp32; several builds share a GPU.
    "halves": {
        "swin": [
            *((1, name) for name in ("weak-bare", "fp16-bare", "weak", "fp16", "fp16-soft", "fp16-rw", "fp16-mha")),
            *((1, name) for name in ("fp16-held", "fp16-mha-held")),
            *((8, name) for name in ("weak-bare", "fp16-bare", "fp16-held", "fp16-mha-held")),
        ],
    },
    "levels": {
        "resnet50": [(1, "int8-o5")],
        "swin": [(1, "weak-rw-o5"), (1, "int8-mlp"), (8, "int8-rw")],
        "vit": [(1, "weak-rw-o5"), (1, "int8-mlp"), (1, "int8-rw-all"), (8, "weak-rw")],
        "hunyuan": [(8, "int8-rw"), (1, "weak-rw")],
    },
}


# Plans that time no PyTorch, and the seconds that they keep for measuring.
EXPORTS = {"pad": 60.0}


class Run:
    """One run of this script: its deadline, the processes that it started, and the result so far."""

    def __init__(self, asked: argparse.Namespace) -> None:
        self.asked = asked
        self.end = time.monotonic() + asked.seconds
        self.started: set[subprocess.Popen[str]] = set()
        self.lock = threading.Lock()
        self.log: list[str] = []
        self.cupti = cupti_of(asked.torch)
        self.gpus = visible_gpus()
        self.exports: list[tuple[str, subprocess.Popen[str]]] = []
        self.compiled: dict[str, subprocess.Popen[str]] = {}
        asked.work.mkdir(parents=True, exist_ok=True)
        asked.out.mkdir(parents=True, exist_ok=True)

    def left(self) -> float:
        return self.end - time.monotonic()

    def say(self, *words: Any) -> None:
        line = " ".join(str(word) for word in (f"[{self.asked.seconds - self.left():5.0f}]", *words))
        print(line, flush=True)
        self.log.append(line)

    def start(self, command: list[str], name: str, **options: Any) -> subprocess.Popen[str]:
        log = (self.asked.work / f"{name}.log").open("w")
        base = options.pop("base", os.environ)
        environment = {**base, "PYTHONPATH": str(Path.cwd()), "PYTHONUNBUFFERED": "1", **options.pop("env", {})}
        if self.cupti:
            environment["CUPTI_LIBRARY"] = self.cupti
        process = subprocess.Popen(command, text=True, stderr=log, start_new_session=True, env=environment, **options)
        with self.lock:
            self.started.add(process)
        return process

    def finish(self, process: subprocess.Popen[str], seconds: float) -> int | None:
        """Wait so long for a process, then end it and what it started."""
        try:
            return process.wait(max(seconds, 0.1))
        except subprocess.TimeoutExpired:
            return None
        finally:
            if process.poll() is None:
                for wanted in (signal.SIGTERM, signal.SIGKILL):
                    os.killpg(process.pid, wanted)  # its own session: this ends only what it started
                    try:
                        process.wait(5)
                        break
                    except subprocess.TimeoutExpired:
                        continue
            with self.lock:
                self.started.discard(process)

    def keep(self) -> None:
        """Write all results found in the work folder."""
        found: dict[str, Any] = {"command": sys.argv, "log": self.log, "models": {}}
        for model in dict.fromkeys((*MODELS, *self.asked.models)):
            base = self.asked.work / model
            row: dict[str, Any] = {"torch": read(base / "torch.json"), "engines": {}}
            for file in sorted(base.glob("b*/*/build.json")):
                name = f"{file.parent.parent.name} {file.parent.name}"
                row["engines"][name] = {"build": read(file), "run": read(file.with_name("run.json"))}
            found["models"][model] = row
        temporary = self.asked.out / "models.tmp"
        temporary.write_text(json.dumps(found, indent=1) + "\n")
        temporary.rename(self.asked.out / "models.json")

    # ---- PyTorch -----------------------------------------------------------------------------------------------

    def command(self, model: str, step: str, batches: str) -> subprocess.Popen[str]:
        asked = self.asked
        command = [asked.torch, "-m", "bench.models.baselines", model, str(asked.work), "--step", step]
        command += ["--batches", batches, *(["--device", "cpu", "--small"] if asked.dry else [])]
        env = {"TORCHINDUCTOR_CACHE_DIR": str(asked.work / "inductor"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "4"}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        name = f"torch-{model}-{step}-{batches}"
        return self.start(command, name, base=other_python(), env={**env, **self.gpu(model)}, **pipes)

    def gpu(self, model: str, batch: int | None = None, variant: str = "") -> dict[str, str]:
        """Return what gives each model a GPU of its own, where there are several, or the one that --place says."""
        if len(self.gpus) < 2:
            return {}
        return {"CUDA_VISIBLE_DEVICES": self.gpus[self.place(model, batch, variant)]}

    def place(self, model: str, batch: int | None = None, variant: str = "") -> int:
        places = dict(entry.split("=") for entry in self.asked.place.split(",") if entry)
        alone = places.get(model, self.asked.models.index(model) % max(len(self.gpus), 1))
        return int(places.get(f"{model}:{batch}:{variant}", places.get(f"{model}:{batch}", alone)))

    def prepare(self, jobs: list[tuple[str, int, str]]) -> None:
        """Start the exports and the compilations of PyTorch, each in a process of its own."""
        asked = self.asked
        for model in asked.models:
            batches = sorted({1, *(batch for other, batch, _variant in jobs if other == model)})
            for batch in batches:
                if not (asked.work / model / f"b{batch}" / "model.onnx").exists():
                    self.exports.append((model, self.command(model, "export", str(batch))))
            if (
                asked.dry
                or "torch" not in asked.steps
                or asked.plan in EXPORTS
                or (read(asked.work / model / "torch.json") or {}).get("times")
            ):
                continue
            self.compiled[model] = self.command(model, "time", asked.batches)

    def torch(self) -> None:
        """Let one model after the other be timed by PyTorch, while nothing else runs."""
        limit = time.monotonic() + min(self.asked.torch_seconds, self.left() - 30)
        ready = {model: wait_for(process, "READY", limit) for model, process in self.compiled.items()}
        self.say("PyTorch ready:", ready)
        for model, process in self.compiled.items():
            if ready[model]:
                assert process.stdin is not None
                process.stdin.write("go\n")
                process.stdin.flush()
                done = wait_for(process, "DONE", time.monotonic() + min(90, self.left() - 10))
                times = summary(read(self.asked.work / model / "torch.json"))
                self.say("PyTorch", model, "measured" if done else "not done", times)
            self.finish(process, 15 if ready[model] else 0)
            self.keep()

    def exported(self, model: str, batch: int, until: float) -> bool:
        """Wait until a graph is there; False where it will not come, or not in time."""
        target = self.asked.work / model / f"b{batch}" / "model.onnx"
        while not target.exists() and time.monotonic() < until:
            if all(process.poll() is not None for other, process in self.exports if other == model):
                break
            time.sleep(0.5)
        return target.exists()

    # ---- engines -----------------------------------------------------------------------------------------------

    def build(self, jobs: list[tuple[str, int, str]], until: float) -> None:
        asked = self.asked

        def one(job: tuple[str, int, str]) -> None:
            model, batch, variant = job
            known = read(asked.work / model / f"b{batch}" / variant / "build.json") or {}
            if "compile" in known and not asked.force:
                return
            there = all(self.exported(model, needed, until - 30) for needed in {1, batch})
            seconds = min(asked.build_seconds, until - time.monotonic())
            if seconds < 30 or not there:
                self.say("not built:", *job, f"{seconds:.0f} s left")
                return
            command = [sys.executable, "-m", "bench.models.variant", model, str(batch), variant, str(asked.work)]
            command += ["--seconds", f"{seconds:.0f}", "--threads", str(max(2, (os.cpu_count() or 4) // asked.jobs))]
            if asked.timing_cache:
                command.append("--timing-cache")
            if asked.dry:
                command.append("--dry")
            began = time.monotonic()
            name = f"build-{model}-b{batch}-{variant}"
            process = self.start(command, name, stdout=subprocess.DEVNULL, env=self.gpu(*job))
            status = self.finish(process, seconds + 10)
            facts = read(asked.work / model / f"b{batch}" / variant / "build.json") or {}
            words = facts.get("error", "")[:300] if status == 0 else f"ended with {status}"
            self.say("build", *job, f"{time.monotonic() - began:.0f} s", facts.get("seconds"), words)
            self.keep()

        lanes: list[list[tuple[str, int, str]]] = [[job] for job in jobs]
        if asked.alone:  # a build at a time on a GPU
            lanes = [[job for job in jobs if self.place(*job) == place] for place in range(len(self.gpus) or 1)]
        with ThreadPoolExecutor(len(lanes) if asked.alone else asked.jobs) as pool:
            list(pool.map(lambda lane: [one(job) for job in lane], lanes))

    def measure(self, jobs: list[tuple[str, int, str]]) -> None:
        for model, batch, variant in jobs:
            folder = self.asked.work / model / f"b{batch}" / variant
            done = (read(folder / "run.json") or {}).get("layers") and not self.asked.force
            if done or not (folder / "compile" / "model.plan").exists() or self.left() < 15:
                continue
            command = [sys.executable, "-m", "bench.models.measure", model, str(batch), variant, str(self.asked.work)]
            name = f"{model}-b{batch}-{variant}"
            process = self.start(command, f"run-{name}", stdout=subprocess.PIPE, env=self.gpu(model))
            status = self.finish(process, min(60, self.left()))
            assert process.stdout is not None
            self.say(process.stdout.read().strip() or f"{model} {batch} {variant} ended with {status}")
            if status != 0 and "--no-kernels" not in command:  # CUPTI may be what failed
                command.append("--no-kernels")
                process = self.start(command, f"run2-{name}", stdout=subprocess.PIPE, env=self.gpu(model))
                self.finish(process, min(60, self.left()))
                self.say(process.stdout.read().strip() if process.stdout else "")
            self.keep()


def wait_for(process: subprocess.Popen[str], word: str, limit: float) -> bool:
    """Read a process's lines until one is the word; False where it ends or the time is up first."""
    seen = threading.Event()

    def reader() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            if line.strip() == word:
                seen.set()
                return

    thread = threading.Thread(target=reader, daemon=True)
    thread.start()
    while time.monotonic() < limit and thread.is_alive():
        thread.join(0.2)
    return seen.is_set()


def visible_gpus() -> list[str]:
    """Return what names each GPU in CUDA_VISIBLE_DEVICES: those that it names, else all; none where there is no driver."""
    limited = os.environ.get("CUDA_VISIBLE_DEVICES")
    if limited is not None:
        return [name for name in limited.split(",") if name]
    try:
        done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [str(index) for index in range(len(done.stdout.splitlines()))] if done.returncode == 0 else []


def other_python() -> dict[str, str]:
    """Return the environment for another Python than this one, whose own home and libraries must not reach it."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONHOME"}
    own = Path(sys.prefix).parent
    if "PYTHONHOME" in os.environ and "LD_LIBRARY_PATH" in kept:
        entries = [
            entry for entry in kept["LD_LIBRARY_PATH"].split(":") if entry and not Path(entry).is_relative_to(own)
        ]
        kept["LD_LIBRARY_PATH"] = ":".join(entries)
    return kept


def cupti_of(python: str) -> str | None:
    """Return the CUPTI library that PyTorch brings, which fits the driver."""
    code = (
        "import glob, sys; print(*(name for path in sys.path for name in"
        " glob.glob(path + '/nvidia/*/lib/libcupti.so*') + glob.glob(path + '/torch/lib/libcupti*.so*')))"
    )
    done = subprocess.run(
        [python, "-c", code], capture_output=True, text=True, check=False, timeout=60, env=other_python()
    )
    said = done.stdout.split()
    return said[0] if said else None


def read(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def summary(torch: Any) -> str:
    times = (torch or {}).get("times", {})
    rows = [
        f"{batch} {kind}: {row['device_ms']}/{row['call_ms']}"
        for batch, kinds in times.items()
        for kind, row in kinds.items()
    ]
    return "; ".join(rows) + (f" NOTES {[note[-200:] for note in torch['notes']]}" if torch and torch["notes"] else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--work", type=Path, default=Path("/tmp/models"))
    parser.add_argument("--plan", default="explore", help=f"{', '.join(PLANS)}, or model:batch:variant,...")
    parser.add_argument("--models", help="those of the plan, else")
    parser.add_argument("--batches", default="1,8")
    parser.add_argument("--steps", default="export,torch,build,measure")
    parser.add_argument(
        "--place",
        default="",
        help="which GPU builds what, where there are several: model=0,model:batch=1,model:batch:variant=2,...",
    )
    parser.add_argument("--alone", action="store_true", help="one build at a time on each GPU")
    parser.add_argument("--jobs", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=560)
    parser.add_argument("--torch-seconds", type=float, default=240)
    parser.add_argument("--build-seconds", type=float, default=280)
    parser.add_argument("--measure-seconds", type=float, help="kept free for measuring, at the end")
    parser.add_argument("--torch", default="python3", help="the Python that has PyTorch")
    parser.add_argument("--timing-cache", action="store_true")
    parser.add_argument("--force", action="store_true", help="make again what is there")
    parser.add_argument("--dry", action="store_true", help="small models on a CPU; nothing is compiled")
    asked = parser.parse_args()
    asked.models = asked.models.split(",") if asked.models else list(PLANS.get(asked.plan, MODELS))
    if asked.measure_seconds is None:
        asked.measure_seconds = EXPORTS.get(asked.plan, 120.0)
    run = Run(asked)
    asked.steps = steps = asked.steps.split(",")
    jobs = planned(asked.plan, asked.models)
    try:
        if {"export", "torch"} & set(steps):
            run.prepare(jobs)
        if "build" in steps:
            run.build(jobs, run.end - asked.measure_seconds)
        for _model, process in run.exports:
            run.finish(process, 1 if asked.dry else 0)
        if "torch" in steps:
            run.torch()
        if "measure" in steps and not asked.dry:
            run.measure(jobs)
    finally:
        for process in list(run.started):
            run.finish(process, 0)
        run.keep()
    run.say("done")


def planned(plan: str, models: list[str]) -> list[tuple[str, int, str]]:
    """Return what to build: the first of every model, then the second of every model, and so on."""
    if ":" in plan:
        rows = [entry.split(":") for entry in plan.split(",")]
        return [(model, int(batch), variant) for model, batch, variant in rows]
    lists = {model: PLANS[plan].get(model, []) for model in models}
    longest = max(len(entries) for entries in lists.values())
    return [
        (model, *entries[index]) for index in range(longest) for model, entries in lists.items() if index < len(entries)
    ]


if __name__ == "__main__":
    main()
