"""One GPU for one stage: real processes that hold it, a made-up list of devices."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import uuid

import pytest

from artifacts.cache import ActionCache
from artifacts.folder import FolderStore
from artifacts.host import Gpu, Host
from artifacts.keys import Action
from recipes.steps import Step
from tasks.errors import BackendError, StageCancelledError
from tasks.gpus import LOCKS, gpu_held, held, visible
from tasks.process import Limits, run_stage
from tasks.run import StepRunner

HOLDER = """
import sys, time
from pathlib import Path
from tasks.gpus import held

folder, rounds, hold = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
for _ in range(rounds):
    with held(["GPU-a", "GPU-b"], busy=lambda uuids: (), waits=lambda: None, give_up=lambda: False, folder=folder) as uuid:
        mark = folder / f"{uuid}.held"
        mark.touch(exist_ok=False)  # fails where another holds the same GPU
        print(uuid, flush=True)
        time.sleep(hold)
        mark.unlink()
"""


def start(folder, rounds=1, hold=600.0):
    arguments = [sys.executable, "-c", HOLDER, str(folder), str(rounds), str(hold)]
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True)


def hold(folder, uuids=("GPU-a", "GPU-b"), busy=(), give_up=lambda: False, waits=lambda: None):
    return held(list(uuids), busy=lambda _uuids: busy, waits=waits, give_up=give_up, folder=folder)


def free(folder):
    """Return the GPUs that could be had now."""
    found = []
    for name in ("GPU-a", "GPU-b"):
        with contextlib.suppress(StageCancelledError), hold(folder, [name], give_up=lambda: True):
            found.append(name)
    return found


def test_no_two_processes_hold_one_gpu_and_both_gpus_are_used(tmp_path):
    processes = [start(tmp_path, rounds=6, hold=0.02) for _ in range(5)]
    said = [process.communicate(timeout=60)[0].split() for process in processes]
    assert [process.returncode for process in processes] == [0] * 5
    assert [len(words) for words in said] == [6] * 5
    assert {word for words in said for word in words} == {"GPU-a", "GPU-b"}
    assert free(tmp_path) == ["GPU-a", "GPU-b"]


def test_a_gpu_is_free_again_when_its_holder_is_killed(tmp_path):
    holder = start(tmp_path)
    assert holder.stdout.readline().strip() == "GPU-a"
    assert free(tmp_path) == ["GPU-b"]
    holder.send_signal(signal.SIGKILL)
    holder.communicate()
    assert free(tmp_path) == ["GPU-a", "GPU-b"]


def test_a_gpu_whose_slot_another_has_is_passed_over_and_left_free(tmp_path):
    asked = []

    def slot(uuid):
        asked.append(uuid)
        return contextlib.nullcontext(uuid == "GPU-b")

    def take(uuids, **more):
        return held(uuids, busy=lambda _uuids: (), waits=lambda: None, folder=tmp_path, slot=slot, **more)

    with take(["GPU-a", "GPU-b"], give_up=lambda: False) as uuid:
        assert uuid == "GPU-b"
        assert free(tmp_path) == ["GPU-a"]
    assert asked == ["GPU-a", "GPU-b"]
    with pytest.raises(StageCancelledError), take(["GPU-a"], give_up=lambda: True):
        pytest.fail("its slot was refused")
    assert free(tmp_path) == ["GPU-a", "GPU-b"]


def test_threads_of_one_process_get_different_gpus(tmp_path):
    with hold(tmp_path) as one, hold(tmp_path) as other:
        assert {one, other} == {"GPU-a", "GPU-b"}
    with pytest.raises(ZeroDivisionError), hold(tmp_path):
        raise ZeroDivisionError
    assert free(tmp_path) == ["GPU-a", "GPU-b"]


def test_the_first_that_frees_is_taken(tmp_path):
    waiting = threading.Event()
    got = []

    def wait():
        with hold(tmp_path, waits=waiting.set) as uuid:
            got.append(uuid)

    with hold(tmp_path) as one:
        with hold(tmp_path) as other:
            thread = threading.Thread(target=wait)
            thread.start()
            assert waiting.wait(30)
        thread.join(30)
        assert got == [other] != [one]


@pytest.mark.parametrize(("busy", "expected"), [((), "GPU-a"), (("GPU-a",), "GPU-b"), (("GPU-a", "GPU-b"), "GPU-a")])
def test_what_others_compute_on_is_taken_last(tmp_path, busy, expected):
    with hold(tmp_path, busy=busy) as uuid:
        assert uuid == expected


def test_a_gpu_that_others_compute_on_is_better_than_waiting(tmp_path):
    with hold(tmp_path, busy=("GPU-b",)) as one, hold(tmp_path, busy=("GPU-b",)) as other:
        assert (one, other) == ("GPU-a", "GPU-b")


def gpu(name, **facts):
    return Gpu(
        **{"name": "H200", "uuid": f"{name}-{uuid.uuid4()}", "compute_capability": "sm90", "memory_bytes": 1, **facts}
    )


def test_a_stage_gets_a_gpu_that_is_as_planned():
    other, slow, slices = gpu("GPU", compute_capability="sm89"), gpu("GPU", sm_count=114), gpu("MIG", mig=True)
    params = {"runtime": "tensorrt", "gpu": "sm90"}
    with gpu_held(params, slices.device(), gpus=[other, slow, slices]) as got:
        assert got is slices
        assert visible(got) == {"CUDA_VISIBLE_DEVICES": slices.uuid}
    with gpu_held(params, None, gpus=[other, slow, slices]) as got:
        assert got is slow
    with gpu_held({"runtime": "tensorrt-rtx", "gpu": "sm90"}, gpus=[slow]) as got:
        assert got is None
        assert visible(got) == {}
    for device, gpus, words in (
        (None, [other], "no sm90 GPU is here (found: H200 (sm89))"),
        (None, [], "found: none"),
        (slow.device(), [slices], "no H200 (sm90, as planned) GPU is here"),
    ):
        with pytest.raises(BackendError) as caught, gpu_held(params, device, gpus=gpus):
            pass
        assert caught.value.kind == "no device"
        assert words in caught.value.message
    for left in LOCKS.glob("enginery-*"):
        if left.stem.removeprefix("enginery-") in {one.uuid for one in (other, slow, slices)}:
            left.unlink()


def test_locks_that_cannot_be_written_are_said_and_not_waited_for(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(BackendError, match="GPU-a cannot be locked") as caught, hold(tmp_path / "file"):
        pass
    assert caught.value.kind == "no device"
    assert "writable" in caught.value.advice


def test_cancelling_ends_the_wait_for_a_gpu(tmp_path):
    store, said = FolderStore(tmp_path / "store"), []
    only = gpu("GPU")
    host = Host("here", "linux", "x86_64", gpus=(only,))
    runner = StepRunner(store, ActionCache(store), Limits(60, 4 << 30), {}, listen=said.append, host=host)
    params = {"runtime": "tensorrt", "gpu": "sm90"}
    step = Step("compile:it", "compile", "run", action=Action("compile", 1, params, {}, {"device": only.device()}))
    with gpu_held(params, gpus=[only]):
        runner.cancel.set()
        with pytest.raises(StageCancelledError, match="waiting for a GPU"):
            runner.run(step)
    assert "waiting for a GPU" in [progress.text for progress in said]
    (LOCKS / f"enginery-{only.uuid}.lock").unlink()


def test_a_stages_process_sees_the_gpu_that_is_held_and_no_other(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    result = run_stage(
        "test",
        {},
        {},
        tmp_path / "out",
        limits=Limits(60, 1 << 30),
        entry="tests.unit.tasks.misbehaving:surroundings",
        variables={"CUDA_VISIBLE_DEVICES": "GPU-a"},
    )
    assert result.facts["environment"]["CUDA_VISIBLE_DEVICES"] == "GPU-a"
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "0,1"


def test_a_parser_takes_any_gpu_and_an_opset_none():
    gpus = [Gpu("NVIDIA H200", f"GPU-{uuid.uuid4()}", "sm90", 150 << 30, 132)]
    with gpu_held({"runtime": "tensorrt", "by": "parser"}, gpus=gpus) as gpu:
        assert gpu is gpus[0]
    with gpu_held({"runtime": "tensorrt", "by": "opset", "version": "8.6"}, gpus=[]) as gpu:
        assert gpu is None
    with (
        pytest.raises(BackendError, match=r"no NVIDIA GPU is here \(found: none\)"),
        gpu_held({"runtime": "tensorrt", "by": "parser"}, gpus=[]),
    ):
        pytest.fail("nothing is held")
