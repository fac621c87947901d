import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from recipes.errors import Fault, RecipeError
from tasks.errors import BackendError, ModelCodeError, StageCancelledError
from tasks.process import Limits, run_stage

ROOT = Path(__file__).resolve().parents[3]
MIB = 1 << 20
PATIENCE = 30


class Stage:
    """Runs stages of `misbehaving` in one folder, and keeps what they said."""

    def __init__(self, folder):
        self.folder = folder
        self.output_dir = folder / "outputs"
        self.output_dir.mkdir()
        self.progress = []
        self.log = []

    def run(self, name, params=None, inputs=None, *, timeout_s=PATIENCE, memory_bytes=1 << 30, cancel=None, **listen):
        listen = {"on_progress": lambda *said: self.progress.append(said), "on_log": self.log.append} | listen
        return run_stage(
            "test",
            params or {},
            inputs or {},
            self.output_dir,
            limits=Limits(timeout_s=timeout_s, memory_bytes=memory_bytes),
            cancel=cancel,
            entry=f"tests.unit.tasks.misbehaving:{name}",
            **listen,
        )

    def fail(self, name, *arguments, **named):
        with pytest.raises(BackendError) as caught:
            self.run(name, *arguments, **named)
        return caught.value


@pytest.fixture
def stage(tmp_path):
    return Stage(tmp_path)


def wait_until(true):
    deadline = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)


def gone(pid):
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_a_stage_gets_its_inputs_and_gives_its_outputs_facts_and_progress(stage, tmp_path, monkeypatch):
    (tmp_path / "in.txt").write_text("hello")
    monkeypatch.chdir(tmp_path)
    result = stage.run("well", {"suffix": "!"}, {"in.txt": Path("in.txt")})
    assert (dict(result.outputs), dict(result.facts)) == ({"out.txt": "text/plain"}, {"length": 3})
    assert (stage.output_dir / "out.txt").read_text() == "hello!"
    assert stage.progress == [(0.25, "a quarter"), (1.0, "too much"), (None, "who knows")]


def test_the_process_is_offline_deterministic_bounded_and_in_a_folder_of_its_own(stage, monkeypatch):
    monkeypatch.setenv("PREFECT_API_KEY", "secret")
    monkeypatch.setenv("ENGINERY_SIGN_KEY", "key.pem")
    monkeypatch.setenv("ENGINERY_SIGN_PASSWORD", "secret")
    monkeypatch.setenv("PYTHONPATH", "relative")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    facts = stage.run("surroundings").facts
    environment = facts["environment"]
    wanted = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "PYTHONHASHSEED": "0"}
    assert {name: environment.get(name) for name in wanted} == wanted
    assert environment["OMP_NUM_THREADS"] == str(len(os.sched_getaffinity(0)))
    assert not [name for name in environment if name.startswith(("PREFECT_", "ENGINERY_SIGN"))]
    assert environment["PYTHONPATH"].split(os.pathsep)[0] == str(Path("relative").absolute())
    assert facts["folder"] == environment["TMPDIR"]
    assert facts["folder"] not in facts["path"]
    assert (facts["stdin"], facts["group"]) == ("", True)
    assert sorted(path.name for path in stage.folder.iterdir()) == ["outputs", "outputs.log"]


def test_the_number_of_threads_can_be_set(stage, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "64")
    entry = "tests.unit.tasks.misbehaving:surroundings"
    result = run_stage("test", {}, {}, stage.output_dir, limits=Limits(PATIENCE, 1 << 30, threads=3), entry=entry)
    assert result.facts["environment"]["OMP_NUM_THREADS"] == "3"


def test_nothing_heavy_is_imported_before_the_stage(stage):
    heavy = {"numpy", "onnx", "onnxruntime", "torch", "pydantic", "psutil", "prefect", "yaml", "safetensors"}
    assert not heavy & set(stage.run("surroundings").facts["modules"])


def test_an_unknown_stage_is_the_callers_fault(tmp_path):
    with pytest.raises(ValueError, match="unknown stage 'bake'"):
        run_stage("bake", {}, {}, tmp_path, limits=Limits(1, 1))


def test_time_is_bounded(stage):
    error = stage.fail("sleep", timeout_s=2)
    assert error.kind == "time-out"
    assert "after 2 s" in error.message
    assert "about to sleep" in error.message
    assert "build.timeout" in error.advice


def test_memory_is_bounded(stage):
    error = stage.fail("allocate", {"bytes": 600 * MIB}, memory_bytes=300 * MIB)
    assert error.kind == "out of memory"
    assert "0.29 GiB allowed by build.memory" in error.message


def test_memory_of_grandchildren_counts(stage):
    error = stage.fail("allocate_in_child", {"bytes": 600 * MIB}, memory_bytes=300 * MIB)
    assert error.kind == "out of memory"


def test_memory_below_the_bound_is_allowed(stage):
    assert stage.run("allocate", {"bytes": 100 * MIB, "seconds": 0.5}, memory_bytes=300 * MIB).facts["held"]


def test_pages_of_mapped_files_do_not_count(stage):
    assert stage.run("map_file", {"bytes": 200 * MIB}, memory_bytes=100 * MIB).facts["total"] == 0


@pytest.mark.parametrize(
    ("name", "signal_name", "said"),
    [("segfault", "SIGSEGV", "before the fault"), ("abort", "SIGABRT", "misbehaving.py")],
)
def test_a_native_crash_is_an_error_with_the_last_lines(stage, name, signal_name, said):
    error = stage.fail(name)
    assert error.kind == "crash"
    assert f"died of {signal_name}" in error.message
    assert said in error.message


def test_a_kill_by_somebody_else_is_taken_for_the_kernels(stage):
    error = stage.fail("killed")
    assert error.kind == "out of memory"
    assert "SIGKILL" in error.message


def test_an_exit_without_a_result_is_a_crash(stage):
    error = stage.fail("exit_silently")
    assert error.kind == "crash"
    assert "exit status 3 and no result" in error.message


def test_a_crash_after_the_result_does_not_undo_it(stage):
    assert stage.run("crash_after_the_result").facts == {"done": True}


def test_what_a_stage_prints_is_logged_and_never_taken_for_its_report(stage):
    stage.run("print_garbage")
    assert stage.log == ["\N{REPLACEMENT CHARACTER}" * 2 + "{not json}", "red bell", "10%", "20%", "no end"]
    assert b"\xff\xfe{not json}" in (stage.folder / "outputs.log").read_bytes()


def test_a_flood_of_output_passes(stage):
    stage.run("flood", {"lines": 20_000})
    assert stage.log[:20_000] == [f"{index} {'x' * 90}" for index in range(20_000)]
    assert max(map(len, stage.log)) <= 4096


def test_writing_to_the_report_is_an_error(stage):
    error = stage.fail("scribble_on_the_report")
    assert error.kind == "crash"
    assert "'mine'" in error.message


def test_a_forked_copy_of_the_stage_reports_nothing(stage):
    assert stage.run("fork_and_raise").facts == {"original": True}


def test_facts_may_be_larger_than_a_pipe(stage):
    assert len(stage.run("big_facts").facts["text"]) == 3_000_000


def test_a_backend_error_keeps_its_kind_message_and_advice(stage):
    error = stage.fail("raise_backend")
    assert (error.kind, error.message, error.advice) == ("no kernel", "no such thing", "try another")


def test_an_error_of_the_recipes_code_stays_one(stage):
    with pytest.raises(ModelCodeError, match=r"^model\.py line 3: boom$"):
        stage.run("raise_model_code")


def test_faults_of_a_recipe_stay_faults(stage):
    with pytest.raises(RecipeError) as caught:
        stage.run("raise_recipe")
    assert caught.value.faults == (Fault("r.yaml", 3, "source.model", "wrong"), Fault("r.yaml", 0, "", "also wrong"))


@pytest.mark.parametrize(
    ("name", "params", "kind", "words"),
    [
        ("raise_other", {}, "crash", "nobody expects this"),
        ("exit_politely", {}, "crash", "SystemExit: 3"),
        ("interrupted", {}, "crash", "KeyboardInterrupt"),
        ("raise_memory", {}, "out of memory", "MemoryError"),
        ("raise_bad_alloc", {}, "out of memory", "bad_alloc"),
        ("import_missing", {"package": "torch"}, "missing package", "pip install 'enginery[torch]'"),
        ("import_missing", {"package": "PIL"}, "missing package", "pip install 'enginery[images]'"),
        ("import_missing", {"package": "frobnicate"}, "missing package", "install frobnicate"),
        ("import_broken", {}, "missing package", "libcudart.so.13"),
        ("import_own_missing", {}, "crash", "no_such_module"),
        ("file_too_large", {}, "disk full", "File too large"),
        ("not_a_result", {}, "crash", "returned a dict"),
        ("not_finite", {}, "crash", "not JSON compliant"),
        ("not_json", {}, "crash", "bytes is not JSON serializable"),
        ("missing_output", {}, "crash", "model.onnx"),
        ("escaping_output", {}, "crash", "../outside"),
        ("linked_output", {}, "crash", "passwd"),
    ],
)
def test_every_failure_has_a_kind(stage, name, params, kind, words):
    error = stage.fail(name, params)
    assert error.kind == kind
    assert words in str(error)


def test_a_full_disk_says_so(stage):
    # /dev/full is a device that answers every write with ENOSPC.
    assert stage.fail("fill", {"path": "/dev/full"}).kind == "disk full"


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    entry = "tests.unit.tasks.misbehaving:well"
    with pytest.raises(BackendError, match="cannot start the stage's process"):
        run_stage("test", {}, {}, tmp_path / "file" / "outputs", limits=Limits(PATIENCE, 1 << 30), entry=entry)


def test_cancelling_kills_the_stage_and_everything_it_started(stage):
    cancel, pids = threading.Event(), stage.folder / "pids"

    def cancel_soon():
        wait_until(pids.exists)
        cancel.set()

    canceller = threading.Thread(target=cancel_soon)
    canceller.start()
    with pytest.raises(StageCancelledError):
        stage.run("sleep_with_children", {"pids": str(pids)}, cancel=cancel)
    canceller.join()
    for pid in json.loads(pids.read_text()):
        wait_until(lambda pid=pid: gone(pid))


def test_what_a_stage_leaves_running_ends_with_it(stage):
    pids = stage.folder / "pids"
    stage.run("return_with_children", {"pids": str(pids)})
    wait_until(lambda: gone(json.loads(pids.read_text())[0]))


def test_an_error_in_a_listener_ends_the_stage(stage):
    def refuse(_line):
        raise OSError("nobody listens")

    with pytest.raises(OSError, match="nobody listens"):
        stage.run("sleep", on_log=refuse)
    assert not [child for child in psutil.Process().children() if "tasks.child" in child.cmdline()]


def test_the_stage_dies_with_its_parent(stage):
    pids = stage.folder / "pids"
    code = (
        "import sys; from pathlib import Path; from tasks.process import Limits, run_stage\n"
        f"run_stage('test', {{'pids': sys.argv[1]}}, {{}}, Path(sys.argv[2]), limits=Limits({PATIENCE}, 1 << 30),"
        " entry='tests.unit.tasks.misbehaving:sleep_with_children')"
    )
    parent = subprocess.Popen([sys.executable, "-c", code, str(pids), str(stage.output_dir)], cwd=ROOT)
    try:
        wait_until(pids.exists)
        parent.send_signal(signal.SIGKILL)
        parent.wait()
        child, *others = json.loads(pids.read_text())
        wait_until(lambda: gone(child))
    finally:
        parent.kill()
        for pid in others:
            os.kill(pid, signal.SIGKILL)
