"""Four real models on one GPU: PyTorch against engines of the product, in one run.

    python bench/h200_models.py OUT --work /tmp/models --plan explore --seconds 560

Runs with the Python that has TensorRT (and this repository on its path); PyTorch is asked from the Python named by --torch.
Steps, each in processes of their own, bounded, and resumable (what lies in --work is not made again):

1. export and torch.compile of every model, all at once; then PyTorch's times, one model at a time, nothing else running
2. engines: --jobs builds at once (tactics are then chosen on a busy GPU: for exploration), or --jobs 1 for figures to keep
3. every engine, one at a time: parity, times, kernels, layers

Results lie in OUT/models.json (all), rewritten after each step.
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

    def torch(self, models: list[str]) -> None:
        asked = self.asked
        wanted = [
            model for model in models if asked.force or not (read(asked.work / model / "torch.json") or {}).get("times")
        ]
        if asked.dry:
            wanted = [model for model in models if not (asked.work / model / "exported").exists()]
        processes = {}
        for model in wanted:
            batches = asked.batches
            if asked.plan in EXPORTS:
                batches = ",".join(map(str, sorted({1, *(batch for batch, _variant in PLANS[asked.plan][model])})))
            command = [asked.torch, "-m", "bench.models.baselines", model, str(asked.work), "--batches", batches]
            if asked.dry:
                command += ["--device", "cpu", "--small"]
            if asked.dry or asked.plan in EXPORTS:
                command += ["--export-only"]
            env = {
                "OMP_NUM_THREADS": "4",
                "TORCHINDUCTOR_CACHE_DIR": str(asked.work / "inductor"),
                "HF_HUB_OFFLINE": "1",
            }
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
            processes[model] = self.start(command, f"torch-{model}", base=other_python(), env=env, **pipes)
        limit = time.monotonic() + min(asked.torch_seconds, self.left() - 60)
        ready = {model: wait_for(process, "READY", limit) for model, process in processes.items()}
        self.say("PyTorch ready:", ready)
        for model, process in processes.items():
            if ready[model] and not asked.dry and asked.plan not in EXPORTS:
                assert process.stdin is not None
                process.stdin.write("go\n")
                process.stdin.flush()
                done = wait_for(process, "DONE", time.monotonic() + min(90, self.left()))
                self.say(
                    "PyTorch",
                    model,
                    "measured" if done else "not done",
                    summary(read(asked.work / model / "torch.json")),
                )
            self.finish(process, 15 if ready[model] else 0)
            self.keep()

    # ---- engines -----------------------------------------------------------------------------------------------

    def build(self, jobs: list[tuple[str, int, str]], until: float) -> None:
        asked = self.asked

        def one(job: tuple[str, int, str]) -> None:
            model, batch, variant = job
            known = read(asked.work / model / f"b{batch}" / variant / "build.json") or {}
            if "compile" in known and not asked.force:
                return
            seconds = min(asked.build_seconds, until - time.monotonic())
            if seconds < 40 or not (asked.work / model / f"b{batch}" / "model.onnx").exists():
                self.say("not built:", *job, f"{seconds:.0f} s left")
                return
            command = [sys.executable, "-m", "bench.models.variant", model, str(batch), variant, str(asked.work)]
            command += ["--seconds", f"{seconds:.0f}", "--threads", str(max(2, (os.cpu_count() or 4) // asked.jobs))]
            if asked.timing_cache:
                command.append("--timing-cache")
            if asked.dry:
                command.append("--dry")
            began = time.monotonic()
            process = self.start(command, f"build-{model}-b{batch}-{variant}", stdout=subprocess.DEVNULL)
            status = self.finish(process, seconds + 10)
            facts = read(asked.work / model / f"b{batch}" / variant / "build.json") or {}
            words = facts.get("error", "")[:300] if status == 0 else f"ended with {status}"
            self.say("build", *job, f"{time.monotonic() - began:.0f} s", facts.get("seconds"), words)
            self.keep()

        with ThreadPoolExecutor(asked.jobs) as pool:
            list(pool.map(one, jobs))

    def measure(self, jobs: list[tuple[str, int, str]]) -> None:
        for model, batch, variant in jobs:
            folder = self.asked.work / model / f"b{batch}" / variant
            done = (read(folder / "run.json") or {}).get("layers") and not self.asked.force
            if done or not (folder / "compile" / "model.plan").exists() or self.left() < 15:
                continue
            command = [sys.executable, "-m", "bench.models.measure", model, str(batch), variant, str(self.asked.work)]
            process = self.start(command, f"run-{model}-b{batch}-{variant}", stdout=subprocess.PIPE)
            status = self.finish(process, min(60, self.left()))
            assert process.stdout is not None
            self.say(process.stdout.read().strip() or f"{model} {batch} {variant} ended with {status}")
            if status != 0 and "--no-kernels" not in command:  # CUPTI may be what failed
                process = self.start(
                    [*command, "--no-kernels"], f"run2-{model}-b{batch}-{variant}", stdout=subprocess.PIPE
                )
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
    parser.add_argument("--steps", default="torch,build,measure")
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
    models = asked.models
    steps = asked.steps.split(",")
    try:
        if "torch" in steps:
            run.torch(models)
        jobs = planned(asked.plan, models)
        if "build" in steps:
            run.build(jobs, run.end - asked.measure_seconds)
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
